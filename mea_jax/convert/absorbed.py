"""Convert a model with component heads to a stock class whose cache contains only components.

Attention that reads unmixed components (model/kv_cache.py) is attention with one key/value head as
wide as all C of them. Mixing commutes with rotation, so it goes into weights:

- the query projection makes absorbed queries, (D, N, C H), of which each part is rotated like its
  component;
- key and value projections make the components side by side, (D, 1, C H);
- the output projection contains the mixing of values, (N, C H, D).

What differs from a stock model is the order of rotary frequencies, F per component. The rope type
"longrope" has a factor for each frequency, so it can express any, and with equal factors for short
and long texts and an original context of the whole context it has no other effect. The factor of
logits goes into the query projection. So transformers, vLLM and others need no code of ours, and
cache C H numbers per token for keys, and as many for values, in place of K H. If only some
features of components are cached (`ModelConfig.key_slots`), the head has R of them.

All layers of a stock class have heads of one width, for keys and values alike: narrower ones are
padded with zeros. Query and output projections are C H / H times as large.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.config.schema import ModelConfig, RopeScaling, Side
from mea_jax.convert.composite import check_exportable
from mea_jax.errors import UserError
from mea_jax.model.layer_spec import layer_specs
from mea_jax.ops import hlc, rope

Tree = dict[str, Any]
# Widths of heads that vLLM 0.32 serves: on a CPU, and by FlashAttention on a GPU (at most, and in
# multiples of 8). Its other backends for GPUs take more.
CPU_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
FLASH_WIDTH = 256


def check(model: ModelConfig) -> None:
    """Raise `UserError`, which names the feature, if no stock class has a cache of components."""
    check_exportable(model)
    own, plugin = other_form(model), "vllm, a plug-in"
    for lacking, what, form in (
        (model.head_norm, "a norm of each head's output (head_norm)", plugin),
        (model.qk_norm, "a norm of each composite key, a factor beside the cache (qk_norm)", own),
        (model.gate != "none", f"a gate of each head's output (gate={model.gate!r})", plugin),
        (model.positions != "rope", f"positions={model.positions!r}", own),
        (model.layer_thetas is not None, "other frequencies in some layers (layer_thetas)", plugin),
        (model.rope_scaling.kind == "dynamic", "rope_type 'dynamic' with a width of its own", own),
    ):
        if lacking:
            raise UserError(
                f"no stock class reads component heads and has {what}: export it with --form {form}"
            )
    if not (model.mixes(Side.KEY) and model.mixes(Side.VALUE)):
        raise UserError(
            f"config.model.hlc={model.hlc!r} does not mix keys and values both, so one head of all "
            "that is cached would save nothing: export it with --form auto"
        )
    if width(model) >= model.n_kv_heads * model.head_dim:
        raise UserError(
            f"the widest layer caches {max(widths(model))} numbers per token for its keys or its "
            f"values, as many as without mixing ({model.n_kv_heads} heads of {model.head_dim}). "
            "All layers of a stock class are alike: compress with --budget uniform and a smaller "
            "--keep, or give --form stock"
        )


def other_form(model: ModelConfig) -> str:
    """Return the form for a model that no engine can cache as components."""
    return "stock" if model.key_slots or model.value_slots else "mea"


def _kept(model: ModelConfig, side: Side, components: int) -> np.ndarray:
    """Return the cached features of C component heads, as indices into (C H), in a head's order.

    That is the order of `model`, except that real parts of keys precede imaginary parts.
    """
    kept_R = np.asarray(model.slots(side) or range(components * model.head_dim))
    if side == Side.VALUE:
        return kept_R
    is_real_R = kept_R % model.head_dim < model.head_dim // 2
    return np.concatenate([kept_R[is_real_R], kept_R[~is_real_R]])


def widths(model: ModelConfig) -> list[int]:
    """Return the numbers that each layer caches per token for keys, and those for values."""
    return [
        len(_kept(model, side, count))
        for spec in layer_specs(model)
        for side, count in zip(Side, spec.components, strict=True)
    ]


def width(model: ModelConfig) -> int:
    """Return the width of the only key/value head, R: that of the layer and side that has most.

    It is even, as features of keys are rotated in pairs.
    """
    most = max(widths(model))
    return most + most % 2


def absorbed_model(model: ModelConfig) -> ModelConfig:
    """Return the config of the exported model; `rope_config` are its rotary positions.

    Raise `UserError` as `check`.
    """
    check(model)
    return as_one_head(model, width(model))


def as_one_head(model: ModelConfig, size: int) -> ModelConfig:
    """Return the config of `model` with one key/value head of `size` features in all layers."""
    biased = model.qkv_bias or model.out_bias
    return dataclasses.replace(
        model,
        hlc="none",
        hlc_order="before",
        key_components=None,
        value_components=None,
        key_mixing="heads",
        value_mixing="heads",
        key_slots="",
        value_slots="",
        n_kv_heads=1,
        head_dim=size,
        attention_scale=0.0,
        qkv_bias=biased,
        out_bias=biased,
        rope_scaling=RopeScaling(),
    )


def wavelengths(model: ModelConfig, size: int) -> list[float]:
    """Return the reciprocal frequencies of the rotary pairs of a head of `size` features."""
    frequencies_F = rope.rope_frequencies(model.head_dim, model.rope_theta, model.rope_scaling)
    waves_F = 1 / np.asarray(frequencies_F, np.float64)
    features_R = _kept(model, Side.KEY, max(model.components(Side.KEY)))
    waves_R = waves_F[features_R[: len(features_R) // 2] % model.head_dim]
    return np.resize(waves_R, size // 2).tolist()  # padding may have any


def rope_config(model: ModelConfig, context: int) -> dict[str, Any]:
    """Return the keys of config.json for the rotary positions of the exported model.

    `context` is the number of positions that the model is meant for. The base is 1, so that factors
    are wavelengths and are rounded once.
    """
    waves = wavelengths(model, width(model))
    scaling = {
        "rope_type": "longrope",
        "short_factor": waves,
        "long_factor": waves,
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
    }
    return {"rope_theta": 1.0, "rope_scaling": scaling, "max_position_embeddings": context}


def _padded(x: np.ndarray, size: int, pairs: bool = False) -> np.ndarray:
    """Return `x` with zeros up to `size` of the last axis; with `pairs`, in each half of it."""
    halves = np.split(x, 2, axis=-1) if pairs else [x]
    missing, odd = divmod(size - x.shape[-1], len(halves))
    assert not odd
    zeros = np.zeros((*x.shape[:-1], missing), x.dtype)
    return np.concatenate([part for half in halves for part in (half, zeros)], axis=-1)


def value_maps(model: ModelConfig, attention: Tree, size: int) -> np.ndarray:
    """Return the maps (K, R, H) from a head of `size` cached features to each composite value."""
    k, h = model.n_kv_heads, model.head_dim
    components = attention["value"].shape[1]
    kind, mix = "heads", np.eye(components, dtype=np.float32)
    if model.mixes(Side.VALUE):
        kind, mix = model.value_mixing, np.asarray(attention["value_mixing"], np.float32)
    if kind == "heads":
        mix = mix[:, None, :, None] * np.eye(h, dtype=np.float32)[None, :, None, :]
    maps_RKH = mix.reshape(components * h, k, h)[_kept(model, Side.VALUE, components)]
    return np.moveaxis(_padded(np.moveaxis(maps_RKH, 0, -1), size), -1, 1)


def absorb_projections(model: ModelConfig, attention: Tree, size: int) -> Tree:
    """Return "query" (D, N, R), "key" and "value" (D, 1, R), R = `size`, and their biases.

    `attention` are the parameters of a layer of `model`, without the axis of layers. Logits of the
    result have the factor of a head of R features, 1/sqrt(R).
    """
    n, k, h = model.n_heads, model.n_kv_heads, model.head_dim
    factor = rope.attention_factor(model.rope_scaling) ** 2 if model.rope_theta else 1.0
    scale = (model.attention_scale or h**-0.5) * size**0.5 * factor

    def heads(name: str) -> np.ndarray:
        """Return a projection with its bias as the last row, if there is one."""
        rows = [np.asarray(attention[name], np.float32)]
        if f"{name}_bias" in attention:
            rows.append(np.asarray(attention[f"{name}_bias"], np.float32)[None])
        return np.concatenate(rows)

    key, value, query = heads("key"), heads("value"), heads("query")
    q_DKGH = jnp.asarray(query).reshape(len(query), 1, k, n // k, h)
    kind, mix = "heads", jnp.eye(key.shape[1])
    if model.mixes(Side.KEY):
        kind, mix = model.key_mixing, jnp.asarray(attention["key_mixing"], jnp.float32)
    with jax.default_matmul_precision("highest"):
        q_DKGCH = hlc.absorb(kind, q_DKGH, mix)[:, 0]
    keys_R, values_R = (
        _kept(model, side, x.shape[1]) for side, x in ((Side.KEY, key), (Side.VALUE, value))
    )
    q_DNR = np.asarray(q_DKGCH).reshape(len(query), n, -1)[..., keys_R] * np.float32(scale)
    found = {
        "query": _padded(q_DNR, size, pairs=True),
        "key": _padded(key.reshape(len(key), 1, -1)[..., keys_R], size, pairs=True),
        "value": _padded(value.reshape(len(value), 1, -1)[..., values_R], size),
    }
    if model.qkv_bias:
        found |= {f"{name}_bias": x[-1] for name, x in found.items()}
        found |= {name: found[name][:-1] for name in ("query", "key", "value")}
    return found


def absorb_layer(model: ModelConfig, attention: Tree, size: int) -> Tree:
    """Return a layer's attention parameters as those of the exported model, float32.

    `attention` are the parameters of a layer of `model`, without the axis of layers, and `size` is
    `width(model)`.
    """
    n, k, h = model.n_heads, model.n_kv_heads, model.head_dim
    found = absorb_projections(model, attention, size)
    out_KGHD = np.asarray(attention["out"], np.float32).reshape(k, n // k, h, -1)
    maps_KRH = value_maps(model, attention, size)
    out_KGRD = np.einsum("krh,kghd->kgrd", maps_KRH, out_KGHD, optimize=True)
    return with_biases(model, attention, found | {"out": out_KGRD.reshape(n, size, -1)})


def with_biases(model: ModelConfig, attention: Tree, found: Tree) -> Tree:
    """Return `found` with zeros for missing biases: a stock class has all biases or none."""
    found = dict(found)
    if model.qkv_bias or model.out_bias:
        for name in ("query", "key", "value"):
            found.setdefault(f"{name}_bias", np.zeros_like(found[name][0]))
        zeros_D = np.zeros(model.d_model, np.float32)
        found["out_bias"] = np.asarray(attention.get("out_bias", zeros_D), np.float32)
    return found
