"""Convert MEA and compressed models for other programs: to a plain model, or to modeling_mea.py.

Without a head norm an MEA layer is plain attention of its composite heads: `rebuild` folds the
mixing into full projections, which any server runs, with the cache size of an uncompressed model.
`mea_config`, `mea_tensors` and `mea_top_tensors` convert every MEA model to the names of
`modeling_mea.py`, whose cache contains components only.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mea_jax.config.schema import ModelConfig, Side
from mea_jax.convert import tensors as stock
from mea_jax.convert.rope_scaling import rope_scaling
from mea_jax.errors import UserError
from mea_jax.model.layer_spec import fold_layer, fold_model

Tree = dict[str, Any]
_HERE = Path(__file__).parent
# The oldest and the newest versions that MODEL_FILES were run with. config.json records them, and
# the model warns when it is loaded with others.
TESTED_WITH = {"transformers": ["5.4", "5.24"], "torch": ["2.13", "2.13"]}
# The files that `from_pretrained(..., trust_remote_code=True)` reads in addition to the weights.
MODEL_FILES = tuple(_HERE / f"{name}_mea.py" for name in ("configuration", "attention", "modeling"))
_HEAD_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm", "head_norm": "head_norm"}


def check_rebuildable(model: ModelConfig) -> None:
    """Raise `UserError` unless the composite heads of `model` make a model of a stock class."""
    mea_only = "no stock class of transformers has: export it with --form mea"
    check_exportable(model)
    if model.head_norm:
        raise UserError(f"this model norms each head's output (head_norm), which {mea_only}")
    if model.gate != "none":
        raise UserError(
            f"this model gates each head's output (gate={model.gate!r}), which {mea_only}"
        )
    if model.positions != "rope":
        raise UserError(f"this model's positions are {model.positions!r}, which {mea_only}")
    if model.qk_norm and model.mixes(Side.KEY) and model.hlc_order == "after":
        raise UserError(
            f"this model mixes keys after their norm (hlc_order='after'), which {mea_only}"
        )


def check_exportable(model: ModelConfig) -> None:
    """Raise `UserError` if modeling_mea.py cannot compute `model` either."""
    if model.variant != "mea":
        raise UserError(
            f"this model's attention is {model.variant!r}: only MEA, MHA, GQA and MQA are exported"
            "; give a checkpoint of one of them"
        )
    if model.key_bits is not None or model.value_bits is not None or model.key_mean:
        raise UserError(
            "config.model.key_bits, key_mean: the cache is packed by bits per slot, which neither "
            "transformers nor the exported code has; give the checkpoint from before compression"
        )


def rebuild(model: ModelConfig, layer: Tree) -> tuple[ModelConfig, Tree]:
    """Return a layer as plain attention of its composite heads, which computes the same function.

    `layer` contains one layer's parameters, without the axis of layers. The new key and value
    projections are (D, K, H), float32, folded in float32. A key norm acts on composite keys, so
    folding leaves it as it is; frequency mixing contains the norm's weight, which is divided out.

    Raises:
      UserError: if the result is no model of a stock class (`check_rebuildable`), or a weight of
        the key norm that must be divided out is zero.
    """
    check_rebuildable(model)
    if model.hlc == "none":
        return model, layer
    if model.qk_norm and model.mixes(Side.KEY) and model.key_mixing == "frequency":
        scale_H = np.asarray(layer["attention"]["key_norm"]["scale"])
        if not np.all(scale_H):
            raise UserError(
                f"{np.sum(scale_H == 0)} weights of a key norm are 0, so keys mixed per frequency "
                "cannot be rebuilt before their norm: export the model with --form mea"
            )
    return fold_model(model), layer | {"attention": fold_layer(model, layer["attention"])}


def mea_config(model: ModelConfig, context_length: int = 2048) -> dict[str, Any]:
    """Return the content of config.json for `modeling_mea.MEAForCausalLM`.

    `context_length` is the number of positions that the model is meant for; a table of learned
    positions takes precedence. Raise `UserError` for attention that `modeling_mea` does not have.
    """
    check_exportable(model)
    if model.key_slots or model.value_slots:
        raise UserError(
            "config.model.key_slots: modeling_mea.py caches whole component heads, not single "
            "slots: export the model with --form absorbed, or with --form stock if that is refused"
        )
    rope: dict[str, Any] | None = None
    if model.positions == "rope":
        scaling = rope_scaling(model) or {"rope_type": "default"}
        rope = {"rope_theta": model.rope_theta} | scaling
    classes = {
        "AutoConfig": "configuration_mea.MEAConfig",
        "AutoModel": "modeling_mea.MEAModel",
        "AutoModelForCausalLM": "modeling_mea.MEAForCausalLM",
    }
    return {
        "architectures": ["MEAForCausalLM"],
        "auto_map": classes,
        "model_type": "mea",
        "tested_with": TESTED_WITH,
        "dtype": "float32" if model.dtype == "auto" else model.dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "key_components": list(model.components(Side.KEY)),
        "value_components": list(model.components(Side.VALUE)),
        "hlc": model.hlc,
        "key_mixing": model.key_mixing,
        "value_mixing": model.value_mixing,
        "hlc_order": model.hlc_order,
        "head_norm": model.head_norm,
        "qk_norm": model.qk_norm,
        "qk_norm_over": model.qk_norm_over,
        "qkv_bias": model.qkv_bias,
        "out_bias": model.out_bias,
        "attention_multiplier": model.attention_scale or None,
        "output_gate": model.gate,
        "norms": model.norms,
        "hidden_act": {"silu": "silu", "gelu": "gelu_pytorch_tanh"}[model.activation],
        "embedding_multiplier": model.embedding_scale,
        "positions": model.positions,
        "rope_parameters": rope,
        "layer_thetas": model.layer_thetas and list(model.layer_thetas),
        "max_position_embeddings": model.longest_context() or context_length,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "n_experts": model.n_experts,
        "experts_per_token": model.experts_per_token,
        "d_expert": model.d_expert,
        "normalise_router": model.normalise_router,
    } | _windows(model.windows())


def _windows(windows: tuple[int, ...]) -> dict[str, Any]:
    """Return the keys of windows; those of transformers determine what its caches keep."""
    if not any(windows):
        return {}
    return {
        "windows": list(windows),
        "sliding_window": max(windows),
        "layer_types": ["sliding_attention" if size else "full_attention" for size in windows],
    }


def _linear(kernel: Any, inputs: int = 1) -> np.ndarray:
    """Return a view (out, in), as in torch's Linear, of a kernel that contracts `inputs` axes.

    It is written in pieces, so nothing is copied before.
    """
    kernel = np.asarray(kernel)
    return kernel.reshape(int(np.prod(kernel.shape[:inputs])), -1).T


def mea_tensors(model: ModelConfig, index: int, layer: Tree) -> dict[str, np.ndarray]:
    """Return one layer's parameters, without the axis of layers, by their names in `modeling_mea`.

    Many are transposed views. `safetensors.numpy.save_file` would write them wrongly: call
    `np.ascontiguousarray` first. Raise `UserError` as `check_exportable`.
    """
    check_exportable(model)
    attention, mlp, at = layer["attention"], layer["mlp"], f"model.layers.{index}"
    tensors = {
        "self_attn.q_proj.weight": _linear(attention["query"]),
        "self_attn.k_proj.weight": _linear(attention["key"]),
        "self_attn.v_proj.weight": _linear(attention["value"]),
        "self_attn.o_proj.weight": _linear(attention["out"], 2),
    }
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        if f"{ours}_bias" in attention:
            tensors[f"self_attn.{theirs}_proj.bias"] = np.ravel(attention[f"{ours}_bias"])
    for theirs, ours in stock.NORMS[model.norms].items():
        tensors[f"{theirs}.weight"] = np.asarray(layer[ours]["scale"])
    for which in ("key_mixing", "value_mixing"):
        if which in attention:
            tensors[f"self_attn.{which}.weight"] = np.asarray(attention[which])
    for ours, theirs in _HEAD_NORMS.items():
        if ours in attention:
            tensors[f"self_attn.{theirs}.weight"] = np.asarray(attention[ours]["scale"])
    if "output_gate" in attention:
        tensors["self_attn.gate_proj.weight"] = _linear(attention["output_gate"])
    if "router" in mlp:
        tensors["mlp.router.weight"] = _linear(mlp["router"])
        tensors |= {f"mlp.{name}": np.asarray(mlp[name]) for name in ("gate", "up", "down")}
    else:
        for name in ("gate", "up", "down"):
            tensors[f"mlp.{name}_proj.weight"] = _linear(mlp[name])
    return {f"{at}.{name}": tensor for name, tensor in tensors.items()}


def mea_top_tensors(model: ModelConfig, top: Tree) -> dict[str, np.ndarray]:
    """Return the parameters outside the layers by their names in `modeling_mea`."""
    tensors = {
        "model.embed_tokens.weight": np.asarray(top["embedding"]),
        "model.norm.weight": np.asarray(top["final_norm"]["scale"]),
    }
    if not model.tie_embeddings:
        tensors["lm_head.weight"] = _linear(top["head"])
    if model.positions == "learned":
        tensors["model.position_embedding.weight"] = np.asarray(top["position_embedding"])
    return tensors
