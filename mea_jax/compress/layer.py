"""Convert one attention layer's parameters to those of the compressed model.

A layer is split into composite heads (an existing HLC is folded into them), the methods solve for
components, and gauges go into neighbouring weights: into the queries for keys, into the output
projection for values. The result is an ordinary layer of `mea_jax.model.attention`.
"""

import dataclasses
from typing import Any

import numpy as np

from mea_jax.compress.keys import Keys
from mea_jax.compress.moments import complex_heads, real_heads
from mea_jax.compress.values import Values
from mea_jax.config.schema import ModelConfig, Side
from mea_jax.ops import hlc

Tree = dict[str, Any]
_ONE = 1e-6  # a gauge within this distance of 1 is ignored


@dataclasses.dataclass(frozen=True)
class Heads:
    """A layer as plain attention, in float64. Norm weights are (H,), or None without that norm.

    D counts one more row in layers with biases: a bias is the weight of an input that is always 1,
    so whatever mixes or turns heads carries it along. `key_mean_KH` is a constant that was taken
    from the composite keys (`centred`) and is added when they are read.
    """

    query_DNH: np.ndarray
    key_DKH: np.ndarray
    value_DKH: np.ndarray
    out_NHD: np.ndarray
    query_norm_H: np.ndarray | None
    key_norm_H: np.ndarray | None
    head_norm_H: np.ndarray | None
    key_mean_KH: np.ndarray | None = None


def centred(heads: Heads, mean_X: np.ndarray) -> Heads:
    """Return heads whose keys lack their mean (K H,): minus it is a bias of the keys."""
    mean_KH = mean_X.reshape(heads.key_DKH.shape[1:])
    key_DKH = heads.key_DKH
    if key_DKH.shape[0] == heads.out_NHD.shape[2]:  # no biases so far
        key_DKH = np.concatenate([key_DKH, np.zeros_like(mean_KH)[None]])
    key_DKH = np.concatenate([key_DKH[:-1], key_DKH[-1:] - mean_KH])
    return dataclasses.replace(heads, key_DKH=key_DKH, key_mean_KH=mean_KH)


def split_heads(model: ModelConfig, attention: Tree) -> Heads:
    """Return the composite heads of a layer with parameters `attention`."""

    def scale(name: str) -> np.ndarray | None:
        return np.asarray(attention[name]["scale"], np.float64) if name in attention else None

    def joined(kernel_DKH: Any, bias_KH: Any) -> np.ndarray:
        rows = [kernel_DKH] if bias_KH is None else [kernel_DKH, np.asarray(bias_KH)[None]]
        return np.concatenate([np.asarray(row, np.float64) for row in rows])

    key_DKH, value_DKH = (
        joined(
            hlc.composite_heads(model, side, attention),
            hlc.composite_bias(model, side, attention) if model.qkv_bias else None,
        )
        for side in Side
    )
    return Heads(
        query_DNH=joined(attention["query"], attention.get("query_bias")),
        key_DKH=key_DKH,
        value_DKH=value_DKH,
        out_NHD=np.asarray(attention["out"], np.float64),
        query_norm_H=scale("query_norm"),
        key_norm_H=scale("key_norm"),
        head_norm_H=scale("head_norm"),
    )


def put_heads(tree: Tree, name: str, kernel_DKH: np.ndarray) -> None:
    """Set the projection `name` of a layer's attention, and its bias from the last row, if any."""
    if f"{name}_bias" in tree:
        tree[f"{name}_bias"], kernel_DKH = kernel_DKH[-1], kernel_DKH[:-1]
    tree[name] = kernel_DKH


def input_scale(layer: Tree) -> Any:
    """Return the weight (D,) of the norm of a layer's attention input, None without that norm."""
    return layer["attention_norm"]["scale"] if "attention_norm" in layer else None


def tie_pairs(scale_H: np.ndarray) -> np.ndarray:
    """Return one norm weight per rotary pair, (F,): the root mean square of the pair's weights."""
    pairs = scale_H.reshape(2, -1)
    return np.sqrt(np.mean(np.square(pairs), axis=0))


def repeat_pairs(x_F: np.ndarray) -> np.ndarray:
    """Return (H,) from (F,): the same value for both features of a rotary pair."""
    return np.concatenate([x_F, x_F])


def _per_query(x_KX: np.ndarray, queries: int) -> np.ndarray:
    """Repeat the row of each composite head for every query head that reads it: (N, ...)."""
    return np.repeat(x_KX, queries // x_KX.shape[0], axis=0)


def with_keys(heads: Heads, keys: Keys, tree: Tree) -> Tree:
    """Return `tree` with component keys, their mixing, and the gauge in the queries.

    Under a key norm, a gauge (of modulus 1) commutes with the norm's weight only if the weight is
    equal within rotary pairs. So the weights of both norms are tied within pairs, and the ratio to
    the original weights goes into the projections before the norm. That is an approximation,
    because the norm then sees scaled features. Mixing per frequency does not need this: its
    components carry the weight (`model.attention.Attention.key_inverse_rms`).
    """
    frequency = keys.mix.ndim == 3
    gauged = keys.gauge is not None and bool(np.abs(keys.gauge - 1).max() > _ONE)
    key_DKH, query_DNH, tree = heads.key_DKH, heads.query_DNH, dict(tree)
    if heads.key_norm_H is not None and frequency:
        key_DKH = key_DKH * heads.key_norm_H
    elif heads.key_norm_H is not None and heads.query_norm_H is not None and gauged:
        for name, scale_H in (("key_norm", heads.key_norm_H), ("query_norm", heads.query_norm_H)):
            alike_H = repeat_pairs(tie_pairs(scale_H))
            ratio_H = scale_H / np.where(alike_H == 0, 1, alike_H)
            if name == "key_norm":
                key_DKH = key_DKH * ratio_H
            else:
                query_DNH = query_DNH * ratio_H
            tree[name] = {"scale": alike_H}
    if heads.key_mean_KH is not None:
        carried_H = heads.key_norm_H if heads.key_norm_H is not None and frequency else 1.0
        tree["key_mean"] = heads.key_mean_KH * carried_H
        tree.setdefault("key_bias", None)  # `put_heads` sets it
    put_heads(tree, "key", real_heads(keys.components(complex_heads(key_DKH))))
    mix = keys.mix
    if frequency:
        mix = np.stack([mix.real, mix.imag], axis=-1).transpose(1, 2, 0, 3)  # (C, K, F, 2)
    tree["key_mixing"] = mix
    if gauged:
        assert keys.gauge is not None
        turn_NF = _per_query(keys.gauge.conj(), query_DNH.shape[1])
        query_DNH = real_heads(complex_heads(query_DNH) * turn_NF)
    put_heads(tree, "query", query_DNH)
    return tree


def with_values(heads: Heads, values: Values, tree: Tree) -> Tree:
    """Return `tree` with component values, their mixing, and the gauge in the output projection.

    A rotation commutes with the head norm but not with the norm's weight, so the weight is first
    moved into the output projection.
    """
    tree, out_NHD = dict(tree), heads.out_NHD
    put_heads(tree, "value", values.components(heads.value_DKH))
    tree["value_mixing"] = values.mix
    if values.gauge is not None:
        identity = np.eye(values.gauge.shape[-1])
        if np.abs(values.gauge - identity).max() > _ONE:
            if heads.head_norm_H is not None:
                out_NHD = out_NHD * heads.head_norm_H[None, :, None]
                tree["head_norm"] = {"scale": np.ones_like(heads.head_norm_H)}
            out_NHD = _per_query(values.gauge, out_NHD.shape[0]) @ out_NHD
    tree["out"] = out_NHD
    return tree


def balanced(tree: Tree, like: Tree) -> Tree:
    """Return a layer's attention with slots of equal size, which computes the same function.

    Methods return slots in units in which errors cost the same, so their projections differ by
    orders of magnitude. An optimizer with steps of one size per parameter needs them alike: each
    column of "key" and "value" gets the root mean square of the original's, in `like`, a rotary
    pair of keys one factor for both, and mixing the reciprocal. Steps and biases follow.
    """
    tree = dict(tree)
    for side in Side:
        kernel_DCH = np.asarray(tree[side.value], np.float64)
        square_CH = np.mean(np.square(kernel_DCH), axis=0)
        if side == Side.KEY:
            square_CH = np.mean(square_CH.reshape(len(square_CH), 2, -1), axis=1)
            square_CH = np.concatenate([square_CH, square_CH], axis=1)
        size = np.sqrt(np.mean(np.square(np.asarray(like[side.value], np.float64))))
        factor_CH = np.where(square_CH > 0, size / np.sqrt(np.maximum(square_CH, 1e-300)), 1.0)
        tree[side.value] = kernel_DCH * factor_CH
        for name in (f"{side}_bias", f"{side}_steps"):
            if name in tree:
                tree[name] = np.asarray(tree[name], np.float64) * factor_CH
        mix, half = np.asarray(tree[f"{side}_mixing"], np.float64), kernel_DCH.shape[2] // 2
        if side == Side.KEY:  # (C, K, F, 2)
            mix = mix / factor_CH[:, None, :half, None]
        else:  # (C, H, K, H)
            mix = mix / factor_CH[:, :, None, None]
        tree[f"{side}_mixing"] = mix
    return tree


def as_float32(tree: Tree) -> Tree:
    """Return the tree of parameters in float32, as they are stored."""
    return {
        name: as_float32(leaf) if isinstance(leaf, dict) else np.asarray(leaf, np.float32)
        for name, leaf in tree.items()
    }
