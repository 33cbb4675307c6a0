"""The KV cache: preallocated, read once a step in the form in which it is stored.

A decode step writes its positions to a small buffer, `Cache.recent`, at one slot that is the same
for all rows. Once in `RECENT` steps, `flush` moves them to the main arrays, behind each row's last
position. So a step writes a few slots and only reads the rest. If a step wrote to the large arrays,
the CPU's compiler would copy them, and a TPU would need a scatter.

A layer stores keys and values each in one of three forms:

- "direct": the K heads that attention reads, (B, K, S, H). For plain attention or folded mixing.
- "absorbed": C component heads, (B, S, C H), read as they are stored. The mixing is applied to the
  query and to the weighted sum. This takes C/K of the bytes, and no array of size S x K x H is ever
  built.
- "explicit": the same bytes, but composite heads are rebuilt at every step. For comparison.

The layouts keep the features that one product contracts contiguous in memory: H of one head in the
direct form, all C H of a position in the absorbed form.

int8 storage keeps one float32 step for each vector of H or C H features. So the step factors out of
the product, which reads only the stored integers. Letters as in ops/attention.py; S is the cache's
length and X = C H.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mea_jax.model.heads import SINKS
from mea_jax.ops import hlc, slots
from mea_jax.ops.attention import MASKED
from mea_jax.ops.backend import Backend

Array = jax.Array


@struct.dataclass
class HeadCache:
    """The keys or values of one layer: (B, K, S, H) or (B, S, C H), or packed slots (B, Y, S).

    Of the C H features of component heads only those in `kept` are stored; None means all.

    `step` exists for int8 and packed slots: float32 (B, K, S) or (B, S), the value of one unit of
    the integers; or (X,), the steps of slots. `first_BSX` exists for packed slots: the first SINKS
    positions of each row, exactly; the same positions of `data` are not read.
    """

    data: Any
    step: Any
    form: str = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)  # features of a head
    first_BSX: Any = None
    layout: slots.Layout | None = struct.field(pytree_node=False, default=None)
    kept: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)

    @property
    def axis(self) -> int:
        """The axis of positions in `data`."""
        return 2 if self.form == "direct" or self.layout is not None else 1


@struct.dataclass
class LayerCache:
    """The cache of one layer.

    `inverse_rms_BKS` (float32) exists if keys are normed after mixing; otherwise it is None.
    """

    key: HeadCache
    value: HeadCache
    inverse_rms_BKS: Any


class CachedLayer(NamedTuple):
    """One layer's cache: the main part, and the recent positions not yet flushed into it."""

    main: LayerCache
    recent: LayerCache


@struct.dataclass
class Cache:
    """The caches of all layers; `segment_ids_BS` (int32) is 0 in empty slots."""

    layers: tuple[LayerCache, ...]
    recent: tuple[LayerCache, ...]  # RECENT positions, in each row's last segment
    segment_ids_BS: Any
    lengths_B: Any  # int32, slots of `layers` in use: each row's tokens are in its first slots
    recent_count: Any  # () int32, slots of `recent` in use, the same for all rows
    positions_B: Any  # int32, position of the next token within its segment


RECENT = 128  # positions between two flushes: one tile of a TPU's registers


def empty_heads(
    form: str,
    batch: int,
    length: int,
    heads: int,
    width: int,
    dtype: Any,
    bits: tuple[int, ...] | None = None,
    kept: tuple[int, ...] | None = None,
) -> HeadCache:
    """Return an empty cache for `length` positions of `heads` heads.

    It is packed if there are `bits`, and has only the features `kept` if they are given.
    """
    shape = (batch, heads, length) if form == "direct" else (batch, length)
    features = width if form == "direct" else heads * width
    if kept is not None:
        features = len(kept)
    if bits is None:
        step = jnp.zeros(shape, jnp.float32) if dtype == jnp.int8 else None
        data = jnp.zeros((*shape, features), dtype)
        return HeadCache(data, step, form, width, kept=kept)
    layout = slots.Layout(bits)
    first_BSX = jnp.zeros((batch, SINKS, features), dtype)
    data_BYS = jnp.zeros((batch, layout.bytes, length), jnp.uint8)
    step_X = jnp.ones(features, jnp.float32)
    return HeadCache(data_BYS, step_X, form, width, first_BSX, layout)


def count_bytes(layers: Iterable[LayerCache]) -> int:
    """Return the bytes of the layers' arrays, which grow with the context."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tuple(layers)))


def cache_axes(cache: Cache) -> Cache:
    """Return the logical axes of each array of a cache, in its structure."""

    def heads(stored: HeadCache) -> HeadCache:
        direct = stored.form == "direct"
        step = ("batch", "activation_heads", None) if direct else ("batch", None)
        data: Any = (
            ("batch", "activation_heads", None, None) if direct else ("batch", None, "components")
        )
        if stored.layout is not None:  # bytes hold slots of several components
            whole: Any = ("batch", None, None)
            return dataclasses.replace(stored, data=whole, step=(None,), first_BSX=whole)
        if stored.kept is not None:
            data = ("batch", None, None)
        return dataclasses.replace(stored, data=data, step=None if stored.step is None else step)

    def layer(stored: LayerCache) -> LayerCache:
        scalars = None if stored.inverse_rms_BKS is None else ("batch", "activation_heads", None)
        return LayerCache(heads(stored.key), heads(stored.value), scalars)

    rows = ("batch",)
    return Cache(
        tuple(map(layer, cache.layers)),
        tuple(map(layer, cache.recent)),
        (*rows, None),
        rows,
        (),
        rows,
    )


def write_heads(
    cache: HeadCache, new_BTCH: Array, slot: Array | int, steps_CH: Array | None = None
) -> HeadCache:
    """Return `cache` with heads of T positions from `slot` on, the same slot for all rows.

    Packed slots take their steps from `steps_CH`, and are written from slot 0 on.
    """
    b, t = new_BTCH.shape[:2]
    if cache.layout is not None:
        assert steps_CH is not None
        step_X, new_BTX = steps_CH.reshape(-1), new_BTCH.reshape(b, t, -1)
        codes = slots.quantise(cache.layout, new_BTX, step_X)
        packed = slots.pack(cache.layout, codes)
        first_BSX = _write(cache.first_BSX, new_BTX[:, :SINKS], 0, 1)
        data = _write(cache.data, packed, slot, 2)
        return dataclasses.replace(cache, data=data, step=step_X, first_BSX=first_BSX)
    axis, step = cache.axis, cache.step
    new = jnp.swapaxes(new_BTCH, 1, 2) if axis == 2 else new_BTCH.reshape(b, t, -1)
    if cache.kept is not None:
        new = new[..., np.asarray(cache.kept)]
    if step is not None:
        new = new.astype(jnp.float32)
        unit = jnp.max(jnp.abs(new), axis=-1) / 127
        new = jnp.round(new / jnp.maximum(unit, 1e-30)[..., None])
        step = _write(step, unit, slot, axis)
    return dataclasses.replace(cache, data=_write(cache.data, new, slot, axis), step=step)


def write_scalars(stored_BKS: Array, new_BTK: Array, slot: Array | int) -> Array:
    """Return `stored_BKS` with one number per head and position, as `write_heads` does."""
    return _write(stored_BKS, jnp.swapaxes(new_BTK, 1, 2), slot, 2)


def _write(stored: Array, new: Array, slot: Array | int, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(stored, new.astype(stored.dtype), slot, axis)


def flush(cache: Cache) -> Cache:
    """Return the cache with the recent positions moved behind each row's last, `recent` free.

    Positions for which a full row has no slot are dropped, so callers must count them.
    """
    slots_BR = cache.lengths_B[:, None] + jnp.arange(RECENT)[None]
    length = cache.segment_ids_BS.shape[1]
    slots_BR = jnp.where(jnp.arange(RECENT)[None] < cache.recent_count, slots_BR, length)
    rows_B = jnp.arange(cache.lengths_B.shape[0])
    last_B = jnp.maximum(cache.lengths_B - 1, 0)
    segments_B = cache.segment_ids_BS[rows_B, last_B]
    ids_BS = cache.segment_ids_BS.at[rows_B[:, None], slots_BR].set(
        jnp.broadcast_to(segments_B[:, None], slots_BR.shape), mode="drop"
    )

    def move(stored: Array, recent: Array, axis: int) -> Array:
        length = stored.shape[axis]  # positions beyond it are dropped
        # Merge the axes of batch and heads into rows of the scatter. If they were separate, a
        # TPU's compiler would copy the entire array into another layout and back.
        rows, rest = math.prod(stored.shape[:axis]), stored.shape[axis + 1 :]
        slots = jnp.repeat(slots_BR, rows // slots_BR.shape[0], axis=0)
        new = recent.reshape(rows, RECENT, *rest)
        flat = stored.reshape(rows, length, *rest)
        return flat.at[jnp.arange(rows)[:, None], slots].set(new, mode="drop").reshape(stored.shape)

    def move_heads(stored: HeadCache, recent: HeadCache) -> HeadCache:
        axis = stored.axis
        if stored.layout is not None:
            codes = slots.quantise(stored.layout, recent.data, stored.step)
            data = move(stored.data, slots.pack(stored.layout, codes), 2)
            first_BSX = move(stored.first_BSX, recent.data, 1)
            return dataclasses.replace(stored, data=data, first_BSX=first_BSX)
        data = move(stored.data, recent.data, axis)
        step = None if stored.step is None else move(stored.step, recent.step, axis)
        return dataclasses.replace(stored, data=data, step=step)

    layers = []
    for stored, recent in zip(cache.layers, cache.recent, strict=True):
        key, value = move_heads(stored.key, recent.key), move_heads(stored.value, recent.value)
        scalars = stored.inverse_rms_BKS
        if scalars is not None:
            scalars = move(scalars, recent.inverse_rms_BKS, 2)
        layers.append(LayerCache(key, value, scalars))
    lengths_B = jnp.minimum(cache.lengths_B + cache.recent_count, length)
    count = jnp.zeros_like(cache.recent_count)
    return Cache(tuple(layers), cache.recent, ids_BS, lengths_B, count, cache.positions_B)


def read_logits(
    backend: Backend,
    q_BKGH: Array,
    layer: LayerCache,
    kind: str,
    mix: Array | None,
    mean_BKGS: Array | None = None,
) -> Array:
    """Return q . k for all slots: float32 (B, K, G, S), neither masked nor biased.

    `mean_BKGS` is the part of keys that is not cached (ops/mean_key.py), if there is one.

    `q_BKGH` includes the scale. `kind` and `mix` are the mixing of the cached components. `mix` is
    None for "direct" keys, and for queries that are already absorbed, (B, K, G, C H).
    """
    cache, dtype = layer.key, backend.dtype
    b, k, g, _ = q_BKGH.shape
    if cache.form == "absorbed":
        if mix is not None:
            q_BKGH = hlc.absorb(kind, q_BKGH[:, None], mix)[:, 0]
        q_BNX = q_BKGH.reshape(b, k * g, -1).astype(dtype)
        if cache.layout is not None:
            logits_BKGS = _packed_logits(backend, q_BNX, cache).reshape(b, k, g, -1)
            step = None
        else:
            data = cache.data.astype(dtype)
            if cache.kept is not None:
                q_BNX = q_BNX[..., np.asarray(cache.kept)]
            logits_BKGS = backend.dot(q_BNX, data, ((2,), (2,)), 1).reshape(b, k, g, -1)
            step = None if cache.step is None else cache.step[:, None, None]
    else:
        data = cache.data.astype(dtype)
        step = None if cache.step is None else cache.step[..., None, :]
        if cache.form == "explicit":
            data, step = _rebuilt(backend, cache, kind, mix), None
        logits_BKGS = backend.dot(q_BKGH.astype(dtype), data, ((3,), (3,)), 2)
    if step is not None:
        logits_BKGS = logits_BKGS * step
    if mean_BKGS is not None:
        logits_BKGS = logits_BKGS + mean_BKGS
    if layer.inverse_rms_BKS is not None:
        logits_BKGS = logits_BKGS * layer.inverse_rms_BKS[:, :, None]
    return logits_BKGS


def read_values(
    backend: Backend, p_BKGS: Array, cache: HeadCache, kind: str, mix: Array | None
) -> Array:
    """Return sums of values by weights `p_BKGS`, of composite heads: float32 (B, K, G, H)."""
    dtype = backend.dtype
    b, k, g, s = p_BKGS.shape
    if cache.form == "absorbed":
        if cache.layout is not None:
            o_BNX = _packed_values(backend, p_BKGS.reshape(b, k * g, s), cache)
        else:
            if cache.step is not None:
                p_BKGS = p_BKGS * cache.step[:, None, None]
            p_BNS = p_BKGS.reshape(b, k * g, s).astype(dtype)
            o_BNR = backend.dot(p_BNS, cache.data.astype(dtype), ((2,), (1,)), 1)
            o_BNX = _spread(cache, o_BNR, mix)
        o_BKGCH = o_BNX.reshape(b, k, g, -1, cache.width)
        assert mix is not None
        return hlc.mix_groups(kind, o_BKGCH[:, None], mix)[:, 0]
    if cache.form == "explicit":
        data = _rebuilt(backend, cache, kind, mix)
    else:
        data = cache.data.astype(dtype)
        if cache.step is not None:
            p_BKGS = p_BKGS * cache.step[:, :, None]
    return backend.dot(p_BKGS.astype(dtype), data, ((3,), (2,)), 2)


def _packed_logits(backend: Backend, q_BNX: Array, cache: HeadCache) -> Array:
    """Return q . k for all slots of a packed cache: float32 (B, N, S)."""
    assert cache.layout is not None
    digits = slots.count_digits(backend.dtype)
    logits_BNS = slots.logits(cache.layout, q_BNX, cache.data, cache.step, digits)
    first_BcX = cache.first_BSX[:, : logits_BNS.shape[2]].astype(backend.dtype)
    first_BNc = backend.dot(q_BNX, first_BcX, ((2,), (2,)), 1)
    return jax.lax.dynamic_update_slice(logits_BNS, first_BNc, (0, 0, 0))


def _packed_values(backend: Backend, p_BNS: Array, cache: HeadCache) -> Array:
    """Return sums of the values of a packed cache by weights: float32 (B, N, X)."""
    assert cache.layout is not None
    dtype, length = backend.dtype, p_BNS.shape[2]
    count, digits = min(SINKS, length), slots.count_digits(backend.dtype)
    rest_BNS = jnp.where((jnp.arange(length) >= count)[None, None], p_BNS, 0.0)
    o_BNX = slots.weighted_sums(cache.layout, rest_BNS, cache.data, cache.step, digits)
    first_BcX = cache.first_BSX[:, :count].astype(dtype)
    return o_BNX + backend.dot(p_BNS[:, :, :count].astype(dtype), first_BcX, ((2,), (1,)), 1)


def _spread(cache: HeadCache, x: Array, mix: Array | None) -> Array:
    """Return cached features (..., R) as those of component heads (..., C H), 0 where not kept."""
    if cache.kept is None:
        return x
    assert mix is not None
    zeros = jnp.zeros((*x.shape[:-1], mix.shape[0] * cache.width), x.dtype)
    return zeros.at[..., np.asarray(cache.kept)].set(x)


def _rebuilt(backend: Backend, cache: HeadCache, kind: str, mix: Array | None) -> Array:
    """Rebuild composite heads (B, K, S, H) of all slots from the cached components."""
    assert mix is not None
    data = cache.data.astype(backend.activation)
    if cache.step is not None:
        data = data * cache.step[..., None].astype(data.dtype)
    components_BSCH = _spread(cache, data, mix).reshape(*data.shape[:2], -1, cache.width)
    composites_BSKH = hlc.mix(kind, components_BSCH, mix).astype(backend.dtype)
    return jnp.swapaxes(composites_BSKH, 1, 2)


def add_slopes(logits_BKGS: Array, distance_BS: Array, slopes_N: Array | None) -> Array:
    """Add ALiBi's bias, each head's slope times `distance_BS` (0 or less); None adds nothing."""
    if slopes_N is None:
        return logits_BKGS
    _, k, g, _ = logits_BKGS.shape
    distance_B11S = distance_BS[:, None, None].astype(jnp.float32)
    return logits_BKGS + slopes_N.reshape(1, k, g, 1) * distance_B11S


def mask_logits(logits_BKGS: Array, seen_BS: Array) -> Array:
    """Mask the logits of slots that a row may not see."""
    return jnp.where(seen_BS[:, None, None], logits_BKGS, MASKED)
