"""The KV cache: preallocated, updated in place, read once in the form in which it is stored.

A layer stores keys and values each in one of three forms:

- "direct": the K heads that attention reads, (B, K, S, H). Plain attention, or mixing folded away.
- "absorbed": C component heads, (B, S, C H), read as they are: the mixing is applied to the query
  and to the weighted sum. C/K of the bytes, and nothing of size S x K x H is ever made.
- "explicit": the same bytes, but composite heads are rebuilt at every step: for comparison.

The layouts put the features that one product contracts next to one another in memory, whole:
H of one head if direct, all C H of a position if absorbed.

int8 storage keeps one float32 step for each vector that a product reads whole, so the step factors
out of the product, and the stored integers are all that is read. Letters as in attention.py, S the
cache's length, X = C H.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mea_jax import mixing
from mea_jax.attention import MASKED
from mea_jax.backends import Backend

Array = jax.Array


@struct.dataclass
class HeadCache:
    """Keys or values of one layer. `data` (B, K, S, H) or (B, S, C H); `step` only for int8."""

    data: Any
    step: Any  # float32 (B, K, S) or (B, S): what one unit of the integers is worth
    form: str = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)  # features of a head


@struct.dataclass
class LayerCache:
    """One layer. `inverse_rms_BKS` is there where a key norm meets mixed keys, float32."""

    key: HeadCache
    value: HeadCache
    inverse_rms_BKS: Any


@struct.dataclass
class Cache:
    """All layers, and whose the slots are: `segment_ids_BS` int32 holds 0 in an empty slot."""

    layers: tuple[LayerCache, ...]
    segment_ids_BS: Any
    lengths_B: Any  # int32, slots in use: each row's tokens lie in its first slots
    positions_B: Any  # int32, of the next token within its segment


def empty_heads(
    form: str, batch: int, length: int, heads: int, width: int, dtype: Any
) -> HeadCache:
    """Room for `length` positions of `heads` heads."""
    shape = (batch, heads, length) if form == "direct" else (batch, length)
    features = width if form == "direct" else heads * width
    step = jnp.zeros(shape, jnp.float32) if dtype == jnp.int8 else None
    return HeadCache(jnp.zeros((*shape, features), dtype), step, form, width)


def count_bytes(layers: Iterable[LayerCache]) -> int:
    """Bytes of the arrays that grow with the context, counted from the arrays themselves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tuple(layers)))


def _write_array(stored: Array, new: Array, slots_B: Array | None, axis: int) -> Array:
    """`new`, of stored's rank, at the start (`slots_B` None), or one position at a slot a row.

    Positions are on `axis`; batch, and heads if they come before it, are rows of one scatter. With
    rows apart the TPU's compiler would copy the whole cache into another layout and back.
    """
    new = new.astype(stored.dtype)
    if slots_B is None:
        return jax.lax.dynamic_update_slice(stored, new, (0,) * stored.ndim)
    rows, rest = math.prod(stored.shape[:axis]), stored.shape[axis:]
    slots_R = jnp.repeat(slots_B, rows // slots_B.shape[0])
    written = (
        stored.reshape(rows, *rest)
        .at[jnp.arange(rows), slots_R]
        .set(
            new.reshape(rows, *rest[1:]),
            unique_indices=True,
            indices_are_sorted=True,
            mode="drop",
        )
    )
    return written.reshape(stored.shape)


def write_heads(cache: HeadCache, new_BTCH: Array, slots_B: Array | None) -> HeadCache:
    """Stores heads of T positions: from slot 0 on, or (T = 1) at one slot of each row."""
    direct = cache.form == "direct"
    b, t = new_BTCH.shape[:2]
    new = jnp.swapaxes(new_BTCH, 1, 2) if direct else new_BTCH.reshape(b, t, -1)
    axis, step = (2 if direct else 1), cache.step
    if step is not None:
        new = new.astype(jnp.float32)
        unit = jnp.max(jnp.abs(new), axis=-1) / 127
        new = jnp.round(new / jnp.maximum(unit, 1e-30)[..., None])
        step = _write_array(step, unit, slots_B, axis)
    data = _write_array(cache.data, new, slots_B, axis)
    return HeadCache(data, step, cache.form, cache.width)


def write_scalars(stored_BKS: Array, new_BTK: Array, slots_B: Array | None) -> Array:
    """`write_heads` for one number a head and position."""
    return _write_array(stored_BKS, jnp.swapaxes(new_BTK, 1, 2), slots_B, 2)


def read_logits(
    backend: Backend, q_BKGH: Array, layer: LayerCache, kind: str, mix: Array | None
) -> Array:
    """q . k for every slot: float32 (B, K, G, S), neither masked nor biased.

    `q_BKGH` carries the scale. `kind` and `mix` say how cached components make composite keys;
    `mix` is None for "direct" keys, and for queries that are absorbed already, (B, K, G, C H).
    """
    cache, dtype = layer.key, backend.dtype
    b, k, g, _ = q_BKGH.shape
    data = cache.data.astype(dtype)
    if cache.form == "absorbed":
        if mix is not None:
            q_BKGH = mixing.absorb(kind, q_BKGH[:, None], mix)[:, 0]
        q_BNX = q_BKGH.reshape(b, k * g, -1).astype(dtype)
        logits_BKGS = backend.dot(q_BNX, data, ((2,), (2,)), 1).reshape(b, k, g, -1)
        step = None if cache.step is None else cache.step[:, None, None]
    else:
        step = None if cache.step is None else cache.step[..., None, :]
        if cache.form == "explicit":
            data, step = _rebuilt(backend, cache, kind, mix), None
        logits_BKGS = backend.dot(q_BKGH.astype(dtype), data, ((3,), (3,)), 2)
    if step is not None:
        logits_BKGS = logits_BKGS * step
    if layer.inverse_rms_BKS is not None:
        logits_BKGS = logits_BKGS * layer.inverse_rms_BKS[:, :, None]
    return logits_BKGS


def read_values(
    backend: Backend, p_BKGS: Array, cache: HeadCache, kind: str, mix: Array | None
) -> Array:
    """Sums of values weighted by `p_BKGS`, mixed to composite heads: float32 (B, K, G, H)."""
    dtype = backend.dtype
    b, k, g, s = p_BKGS.shape
    if cache.form == "absorbed":
        if cache.step is not None:
            p_BKGS = p_BKGS * cache.step[:, None, None]
        p_BNS = p_BKGS.reshape(b, k * g, s).astype(dtype)
        o_BNX = backend.dot(p_BNS, cache.data.astype(dtype), ((2,), (1,)), 1)
        o_BKGCH = o_BNX.reshape(b, k, g, -1, cache.width)
        assert mix is not None
        return mixing.mix_groups(kind, o_BKGCH[:, None], mix)[:, 0]
    if cache.form == "explicit":
        data = _rebuilt(backend, cache, kind, mix)
    else:
        data = cache.data.astype(dtype)
        if cache.step is not None:
            p_BKGS = p_BKGS * cache.step[:, :, None]
    return backend.dot(p_BKGS.astype(dtype), data, ((3,), (2,)), 2)


def _rebuilt(backend: Backend, cache: HeadCache, kind: str, mix: Array | None) -> Array:
    """Composite heads (B, K, S, H) of every slot from the cached components."""
    assert mix is not None
    data = cache.data.astype(backend.activation)
    if cache.step is not None:
        data = data * cache.step[..., None].astype(data.dtype)
    components_BSCH = data.reshape(*data.shape[:2], -1, cache.width)
    composites_BSKH = mixing.mix(kind, components_BSCH, mix).astype(backend.dtype)
    return jnp.swapaxes(composites_BSKH, 1, 2)


def add_slopes(logits_BKGS: Array, slots_B: Array, slopes_N: Array | None) -> Array:
    """ALiBi: each head's slope times the distance from the row's own slot."""
    if slopes_N is None:
        return logits_BKGS
    _, k, g, s = logits_BKGS.shape
    distance_BS = (jnp.arange(s)[None] - slots_B[:, None]).astype(jnp.float32)
    return logits_BKGS + slopes_N.reshape(1, k, g, 1) * distance_BS[:, None, None]


def mask_logits(
    logits_BKGS: Array, seen_BS: Array, slots_B: Array, slopes_N: Array | None
) -> Array:
    """Hides the slots of other segments and empty ones; adds ALiBi."""
    biased_BKGS = add_slopes(logits_BKGS, slots_B, slopes_N)
    return jnp.where(seen_BS[:, None, None], biased_BKGS, MASKED)
