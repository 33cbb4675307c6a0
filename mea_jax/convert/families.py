"""Convert between `ModelConfig` and the config.json of published models.

Four architectures of transformers are supported: LlamaForCausalLM, MistralForCausalLM (without its
window), Qwen3ForCausalLM (with normed queries and keys) and Qwen3MoeForCausalLM (with experts in
addition). If a config.json needs what our model does not compute, an error names the key.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea_jax.config.schema import ModelConfig, Side
from mea_jax.convert.rope_scaling import rope_fields, rope_scaling
from mea_jax.errors import UserError, shown

Json = Mapping[str, Any]

_WINDOW = 4096  # the default of transformers' Qwen3 and Mistral classes
# Keys that do not change what the model computes: an export keeps those of the imported config.
KEPT = (
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "attention_dropout",
    "router_aux_loss_coef",
    "output_router_logits",
)


@dataclass(frozen=True)
class Family:
    """One architecture, and its differences from the others."""

    architecture: str
    model_type: str
    qk_norm: bool
    experts: bool
    window: int | None = None  # the default of its `sliding_window`
    window_switch: str | None = None  # the key that turns the window on; None: it is always on


FAMILIES = (
    Family("LlamaForCausalLM", "llama", qk_norm=False, experts=False),
    Family("Qwen3ForCausalLM", "qwen3", True, False, _WINDOW, "use_sliding_window"),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", True, True, _WINDOW, "use_sliding_window"),
    Family("MistralForCausalLM", "mistral", qk_norm=False, experts=False, window=_WINDOW),
)


# -- their config -> ours ----------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model's folder. Raise `UserError` if it is missing or malformed."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} contains no config.json: give the folder of a model as transformers saves it"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}; fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no config of a model but {shown(found)}: fetch it again")
    return found


def family_of(config: Json, where: str) -> Family:
    """Return the family that a config.json names. Raise `UserError` for an unknown architecture."""
    names = config.get("architectures") or []
    kind = config.get("model_type")
    for family in FAMILIES:
        if names == [family.architecture] or (not names and kind == family.model_type):
            return family
    given = names[0] if isinstance(names, list) and len(names) == 1 else names or kind
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(f"{where}: the architecture {shown(given)} is not supported; known: {known}")


class _Reader:
    """The values of a config.json, with checks of their types that raise `UserError`."""

    def __init__(self, config: Json, where: str):
        self.config, self.where = config, where

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise UserError(f"{self.where}: {key}={shown(value)} must be a positive whole number")
        return value

    def agreed(self, values: Json) -> Any:
        """Return the value of a fact that has several spellings; None if no key gives it.

        `values` holds what each key gives. transformers 4 and 5 spell some facts differently, and
        which of two values wins depends on the version. So this raises `UserError`, which names the
        keys, if the values differ.
        """
        given = [(key, value) for key, value in values.items() if value is not None]
        for key, value in given[1:]:
            if value != given[0][1]:
                raise UserError(
                    f"{self.where}: {given[0][0]}={shown(given[0][1])} and {key}={shown(value)} "
                    "disagree: remove the wrong one"
                )
        return given[0][1] if given else None

    def number(self, key: str, default: float | None = None, of: Json | None = None) -> float:
        value = (self.config if of is None else of).get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.where}: {key}={shown(value)} must be a number")
        return float(value)

    def refuse(self, key: str, value: Any, why: str) -> None:
        raise UserError(f"{self.where}: {key}={shown(value)} is not supported: {why}")

    def only(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        value = self.config.get(key)
        if value not in allowed:
            self.refuse(key, value, why)


def model_config(config: Json, where: str) -> ModelConfig:
    """Return the model that a config.json describes.

    Raise `UserError`, which begins with `where` and names the key, for what we do not compute.
    """
    family, read = family_of(config, where), _Reader(config, where)
    no_bias = "projections must have no biases"
    read.only("attention_bias", (None, False), no_bias)
    read.only("mlp_bias", (None, False), no_bias)
    read.only("hidden_act", (None, "silu", "swish"), "feed-forward layers must be SwiGLU")
    read.only("quantization_config", (None,), "give the model in float32, float16 or bfloat16")
    _check_window(family, read)
    kinds = config.get("layer_types") or ()
    for kind in kinds:
        if kind != "full_attention":
            read.refuse("layer_types", kind, "attention must see all positions")
    named = {"the length of layer_types": len(kinds) or None}
    read.agreed({"num_hidden_layers": read.whole("num_hidden_layers"), **named})
    heads, width = read.whole("num_attention_heads"), read.whole("hidden_size")
    llama = family.model_type == "llama"
    fields: dict[str, Any] = {
        "vocab_size": read.whole("vocab_size"),
        "d_model": width,
        "n_layers": read.whole("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": read.whole("num_key_value_heads", heads if llama else None),
        "head_dim": read.whole("head_dim", width // heads if llama else None),
        "d_ff": read.whole("intermediate_size"),
        "hlc": "none",
        "head_norm": False,
        "qk_norm": family.qk_norm,
        "norm_eps": read.number("rms_norm_eps"),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "dtype": _compute_dtype(read),
        **rope_fields(read),
    }
    if family.experts:
        del fields["d_ff"]  # for layers without experts; there are none
        fields |= _experts(read)
    return ModelConfig(**fields)


def _check_window(family: Family, read: _Reader) -> None:
    """Raise `UserError` if attention sees only a window that is shorter than the context."""
    why = "attention must see all positions"
    window = read.config.get("sliding_window", family.window)
    if family.model_type == "llama" or window is None:  # Llama ignores the key
        return
    if family.window_switch is None:
        if window < context_of(read.config, read.where):
            read.refuse("sliding_window", window, why)
    elif read.config.get(family.window_switch):
        read.refuse(family.window_switch, True, why)


def _experts(read: _Reader) -> dict[str, Any]:
    config = read.config
    dense = "every layer must have experts"
    read.only("decoder_sparse_step", (None, 1), dense)
    read.only("mlp_only_layers", (None, []), dense)
    # transformers 5 writes the second name.
    counts = {key: config.get(key) for key in ("num_experts", "num_local_experts")}
    read.agreed(counts)
    return {
        "n_experts": read.whole(
            next((k for k, n in counts.items() if n is not None), "num_experts")
        ),
        "experts_per_token": read.whole("num_experts_per_tok"),
        "d_expert": read.whole("moe_intermediate_size"),
        "normalise_router": bool(config.get("norm_topk_prob", False)),
    }


def _compute_dtype(read: _Reader) -> str:
    """Return the dtype of the model's products: models in float16 run in bfloat16."""
    keys = ("dtype", "torch_dtype")
    names = {k: str(v).removeprefix("torch.") for k in keys if (v := read.config.get(k))}
    return "bfloat16" if read.agreed(names) in ("bfloat16", "float16") else "float32"


def context_of(config: Json, where: str) -> int:
    """Return the number of positions that the model was made for, 2048 if none is given."""
    return _Reader(config, where).whole("max_position_embeddings", 2048)


# -- our config -> theirs ----------------------------------------------------------------------


def stock_family(model: ModelConfig, published: Any = None) -> Family:
    """Return the stock class that computes `model`, that of model type `published` if it does.

    Raise `UserError`, which names the feature, if no stock class does.
    """
    mixes = model.mixes(Side.KEY) or model.mixes(Side.VALUE)
    for lacking, what in (
        (model.variant != "mea", f"variant={model.variant!r}"),
        (mixes, "component heads (give --form stock to rebuild composite heads, or --form mea)"),
        (model.head_norm, "a norm of each head's output (head_norm)"),
        (model.gate != "none", f"gate={model.gate!r}"),
        (model.positions != "rope", f"positions={model.positions!r}"),
    ):
        if lacking:
            raise UserError(f"no class of transformers has {what}: export it with --form mea")
    features = (model.qk_norm, bool(model.n_experts))
    able = [family for family in FAMILIES if (family.qk_norm, family.experts) == features]
    if not able:
        raise UserError(
            "no supported class of transformers has experts without qk_norm: "
            "export it with --form mea"
        )
    family = next((family for family in able if family.model_type == published), able[0])
    if not family.qk_norm and model.d_model % model.n_heads:
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
        "intermediate_size": kept.get("intermediate_size", model.d_ff)
        if family.experts
        else model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope_scaling(model),
        "attention_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }
    if family.experts:
        config |= {
            "num_experts": model.n_experts,
            "num_experts_per_tok": model.experts_per_token,
            "moe_intermediate_size": model.d_expert,
            "norm_topk_prob": model.normalise_router,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    elif family.model_type == "llama":
        config["mlp_bias"] = False
    if family.window is not None and family.window_switch is None:
        config["sliding_window"] = None
    config |= {key: kept[key] for key in KEPT if key in kept}
    longest = model.longest_context()
    return config if longest is None else config | {"max_position_embeddings": longest}
