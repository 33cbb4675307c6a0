"""Attention with the positions of each window split over the mesh's `sequence` axis.

Every device has some of the queries and gathers all keys and values (the all-gather form of context
parallelism, as in arXiv 2407.21783, section 3.3.2). Grouped queries have few keys and values,
segment ids need no special care, and the local kernel is the one that runs without a split.

In a causal window late queries see more keys than early ones. So a window is cut into 2n chunks for
n shards, and shard i has chunks i and 2n - 1 - i ("zigzag"): all shards compute the same number of
block pairs. Only attention depends on the order of positions, so a step reorders its batch of
integers once (`lay_out`) and no activations. The exception is the gathered keys and values, whose
chunks are put back in order on their way to the kernel.

Letters: those of attention.py.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.ops import chunked, flash
from mea_jax.parallel.sharding import constrain, mesh_axes, shard_count, spec

Array = jax.Array
HEADS = ("batch", "length", "activation_heads", None)
KERNELS = ("splash", "chunked")


def chunk_order(shards: int) -> np.ndarray:
    """Return the chunks of a window in the order of its shards: 0, 2n - 1, 1, 2n - 2, ..."""
    early = np.arange(shards)
    return np.stack([early, 2 * shards - 1 - early], axis=1).reshape(-1)


def zigzag(length: int, shards: int) -> np.ndarray:
    """Return natural positions (T,) in the order of the shards; for one shard 0 to T - 1.

    Raises `ValueError` unless T divides into two chunks per shard.
    """
    if shards == 1:
        return np.arange(length)
    if length % (2 * shards):
        raise ValueError(
            f"{length} positions do not divide into 2 x {shards} chunks: choose a length that does"
        )
    return np.arange(length).reshape(2 * shards, -1)[chunk_order(shards)].reshape(-1)


def lay_out(batch: Mapping[str, Array], shards: int) -> dict[str, Array]:
    """Put arrays (B, T) in zigzag order and split them over the mesh's `sequence` axis.

    Raises `ValueError` unless T divides into two chunks per shard.
    """
    if shards > 1:
        order = zigzag(next(iter(batch.values())).shape[1], shards)
        batch = {name: jnp.take(x, order, axis=1) for name, x in batch.items()}
    return {name: constrain(x, "batch", "length") for name, x in batch.items()}


def own_chunks(x: Array, shards: int) -> Array:
    """Select this device's shard (B, T/n, ...) of a window in natural order.

    Call it inside `shard_map`.
    """
    shard = jax.lax.axis_index(mesh_axes("length"))
    chunks = x.reshape(x.shape[0], 2 * shards, -1, *x.shape[2:])
    own = jnp.take(chunks, jnp.stack([shard, 2 * shards - 1 - shard]), axis=1)
    return own.reshape(x.shape[0], -1, *x.shape[2:])


def gathered(x: Array, shards: int) -> Array:
    """Gather the shards (B, T/n, ...) of all devices to a window (B, T, ...) in natural order.

    Call it inside `shard_map`. The transpose, for gradients, is a reduce-scatter.
    """
    x = jax.lax.all_gather(x, mesh_axes("length"), axis=1, tiled=True)
    chunks = x.reshape(x.shape[0], shards, 2, -1, *x.shape[2:])
    # First the early chunks in order, then the late ones in reverse order.
    ordered = jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1)
    return ordered.reshape(x.shape)


class ShardedKernel(NamedTuple):
    """A kernel for one shard's queries and all keys.

    `table` describes what each shard computes, and `spec` how it is split. `run(part of the table,
    q, k, v, ids of queries, ids of keys, slopes)` computes the attention of the shard with that
    part.
    """

    table: Any
    spec: Any
    run: Callable[..., Array]


def _splash(
    q_BTNH: Array, v_BTKW: Array, shards: int, interpret: bool, window: int
) -> ShardedKernel:
    order_T = zigzag(q_BTNH.shape[1], shards)
    table, table_spec = flash.sharded_splash(
        q_BTNH, v_BTKW, order_T, shards, chunked.SAVED, interpret, window
    )

    def run(kernel, q, k, v, q_ids, k_ids, slopes):
        assert slopes is None, "splash takes no slopes: ops.resolve must choose another kernel"
        return flash.run_splash(kernel, q, k, v, q_ids, k_ids)

    return ShardedKernel(table, table_spec, run)


def _chunked(length: int, shards: int, scale: float, block: int, window: int) -> ShardedKernel:
    cut = chunked.blocks(length, block, shards)
    table = jnp.asarray(chunked.pairs(length, cut.size, shards))

    def run(pairs, q, k, v, q_ids, k_ids, slopes):
        ids = (q_ids, k_ids)
        return chunked.attend_in_blocks(q, k, v, ids, slopes, pairs[0], scale, cut, window)

    return ShardedKernel(table, spec(("length", None, None)), run)


def attention(
    kernel: str,
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKW: Array,
    segment_ids_BT: Array,
    *,
    scale: float,
    slopes_N: Array | None = None,
    block: int = 512,
    interpret: bool = False,
    window: int = 0,
) -> Array:
    """Compute causal attention within segments of windows in zigzag order: (B, T, N, W).

    The result is in zigzag order too. Only `segment_ids_BT` is in natural order: it is complete on
    each device and needs no gathering. `kernel` is "splash" (TPU; T a multiple of 256 n;
    `interpret` runs it anywhere) or "chunked", in blocks of up to `block` positions; flash.py and
    chunked.py define their dtypes. A position sees the last `window` positions; 0 means all. Call
    it under a mesh of `jax.set_mesh` whose `sequence` axis has n > 1 devices. Raises `ValueError`
    for another kernel, without such a mesh, and if T does not divide.
    """
    shards, length = shard_count("length"), q_BTNH.shape[1]
    if shards == 1:
        raise ValueError(
            "no mesh is set whose sequence axis splits the windows: call this under jax.set_mesh"
        )
    zigzag(length, shards)  # raises if T does not divide
    if kernel == "splash":
        q_BTNH = flash.scaled(q_BTNH, scale)
        local = _splash(q_BTNH, v_BTKW, shards, interpret, window)
    elif kernel == "chunked":
        local = _chunked(length, shards, scale, block, window)
    else:
        raise ValueError(
            f"attention kernel {kernel!r} cannot take windows that are split: use one of {KERNELS}"
        )

    def shard(table, q_BTNH, k_BTKH, v_BTKW, ids_BS, slopes_N):
        k_BSKH, v_BSKW = gathered(k_BTKH, shards), gathered(v_BTKW, shards)
        q_ids_BT = own_chunks(ids_BS, shards)
        return local.run(table, q_BTNH, k_BSKH, v_BSKW, q_ids_BT, ids_BS, slopes_N)

    # The gradient gathers keys and values again. Saved, they would take n times the memory of the
    # device's own keys and values.
    policy = jax.checkpoint_policies.save_only_these_names(chunked.SAVED)
    heads, rows = spec(HEADS), spec(("batch", None))
    split = jax.shard_map(
        jax.checkpoint(shard, policy=policy, prevent_cse=False),
        in_specs=(local.spec, heads, heads, heads, rows, spec(("activation_heads",))),
        out_specs=heads,
        check_vma=False,  # a Pallas call does not declare over which axes its results vary
    )
    return split(local.table, q_BTNH, k_BTKH, v_BTKW, segment_ids_BT, slopes_N)
