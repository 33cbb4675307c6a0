"""Write a `ModelConfig` as the config.json of a class of transformers."""

from typing import Any

from mea_jax.config.schema import ModelConfig, Side
from mea_jax.convert.families import FAMILIES, KEPT, Family, Json
from mea_jax.convert.rope_scaling import rope_scaling
from mea_jax.errors import UserError

_KINDS = {True: "sliding_attention", False: "full_attention"}


def stock_family(model: ModelConfig, published: Any = None) -> Family:
    """Return the stock class that computes `model`, that of model type `published` if it does.

    Raise `UserError`, which names the feature, if no stock class does.
    """
    mixes = model.mixes(Side.KEY) or model.mixes(Side.VALUE)
    for lacking, what in (
        (model.variant != "mea", f"variant={model.variant!r}"),
        (
            mixes,
            "component heads (give --form stock to rebuild composite heads, or --form absorbed)",
        ),
        (model.head_norm, "a norm of each head's output (head_norm)"),
        (model.gate != "none", f"gate={model.gate!r}"),
        (model.positions != "rope", f"positions={model.positions!r}"),
    ):
        if lacking:
            raise UserError(f"no class of transformers has {what}: export it with --form mea")
    able = [family for family in FAMILIES if family.lacks(model) is None]
    if not able:
        near = next((f for f in FAMILIES if f.model_type == published), FAMILIES[0])
        raise UserError(
            f"no supported class of transformers computes this model ({near.architecture} cannot "
            f"have {near.lacks(model)}): export it with --form mea"
        )
    family = next((family for family in able if family.model_type == published), able[0])
    if family.sizes and model.d_model % model.n_heads:
        raise UserError(
            f"{family.architecture} cannot have d_model={model.d_model}, which "
            f"n_heads={model.n_heads} does not divide: export it with --form mea"
        )
    return family


def stock_config(model: ModelConfig, dtype: str, kept: Json) -> dict[str, Any]:
    """Return config.json of a stock class, in names that transformers 4 reads as well.

    `kept` contains values for the keys of `KEPT`. Raise `UserError` as `stock_family`.
    """
    family = stock_family(model, kept.get("model_type"))
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope_scaling(model),
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }
    if "bias" in family.free:
        config["attention_bias"] = model.qkv_bias
    if family.experts:
        config |= {
            "intermediate_size": kept.get("intermediate_size", model.d_ff),
            "num_experts": model.n_experts,
            "num_experts_per_tok": model.experts_per_token,
            "moe_intermediate_size": model.d_expert,
            "norm_topk_prob": model.normalise_router,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if family.model_type in ("llama", "smollm3"):
        config["mlp_bias"] = False
    if family.window is not None or any(model.windows()):
        config |= _windows(family.model_type, model)
    if family.model_type == "smollm3":
        config["no_rope_layers"] = [int(theta > 0) for theta in model.thetas()]
        config["rope_theta"] = max(model.thetas())
    if family.model_type == "gemma3_text":
        config |= _gemma3(config, model)
    config |= {key: kept[key] for key in KEPT if key in kept}
    longest = model.longest_context()
    return config if longest is None else config | {"max_position_embeddings": longest}


def _windows(model_type: str, model: ModelConfig) -> dict[str, Any]:
    """Return the keys of windows."""
    window = max(model.windows()) or None
    if model_type == "mistral":
        return {"sliding_window": window}
    kinds = [_KINDS[bool(window)] for window in model.windows()]
    found: dict[str, Any] = {"sliding_window": window, "use_sliding_window": window is not None}
    if window:
        found |= {"layer_types": kinds, "max_window_layers": kinds.index(_KINDS[True])}
    return found


def _gemma3(config: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Return the keys of Gemma 3 that differ from a Llama's, and remove those it has not."""
    for key in ("hidden_act", "use_sliding_window", "max_window_layers"):
        config.pop(key, None)
    thetas = {bool(w): t for w, t in zip(model.windows(), model.thetas(), strict=True)}
    scalar = model.head_dim if model.attention_scale == 0 else model.attention_scale**-2
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-3 else scalar,
        "rope_theta": thetas.get(False, model.rope_theta),
        "rope_local_base_freq": thetas.get(True, model.rope_theta),
        "sliding_window": max(model.windows()),
        "layer_types": [_KINDS[bool(window)] for window in model.windows()],
    }
