"""Attention with the positions of each window split over the mesh's `sequence` axis.

Every device holds some queries and gathers all keys and values (the all-gather form of context
parallelism, as in arXiv 2407.21783, section 3.3.2): keys and values are few under grouped queries,
segment ids need no care, and the local kernel is the one that runs without a split.

A causal window is no rectangle: its late queries see more keys. So it is cut into 2n chunks for n
shards, and shard i holds chunks i and 2n - 1 - i ("zigzag"): all shards compute as many pairs of
blocks. Nothing but attention cares where a position stands, so a step reorders its batch of
integers once (`lay_out`), and no activation, except gathered keys and values, whose chunks are put
back in order on their way to the kernel.

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
    """The chunks of a window in the order of its shards: 0, 2n - 1, 1, 2n - 2, ..."""
    early = np.arange(shards)
    return np.stack([early, 2 * shards - 1 - early], axis=1).reshape(-1)


def zigzag(length: int, shards: int) -> np.ndarray:
    """Natural positions (T,) in the order in which `shards` hold them; one shard: 0 to T - 1.

    Raises `ValueError` unless T divides into two chunks a shard.
    """
    if shards == 1:
        return np.arange(length)
    if length % (2 * shards):
        raise ValueError(f"{length} positions do not divide into 2 x {shards} chunks")
    return np.arange(length).reshape(2 * shards, -1)[chunk_order(shards)].reshape(-1)


def lay_out(batch: Mapping[str, Array], shards: int) -> dict[str, Array]:
    """A batch of arrays (B, T) in zigzag order for `shards`, split over the mesh's axis."""
    if shards > 1:
        order = zigzag(next(iter(batch.values())).shape[1], shards)
        batch = {name: jnp.take(x, order, axis=1) for name, x in batch.items()}
    return {name: constrain(x, "batch", "length") for name, x in batch.items()}


def own_chunks(x: Array, shards: int) -> Array:
    """Inside `shard_map`: this device's shard (B, T/n, ...) of a window in natural order."""
    shard = jax.lax.axis_index(mesh_axes("length"))
    chunks = x.reshape(x.shape[0], 2 * shards, -1, *x.shape[2:])
    own = jnp.take(chunks, jnp.stack([shard, 2 * shards - 1 - shard]), axis=1)
    return own.reshape(x.shape[0], -1, *x.shape[2:])


def gathered(x: Array, shards: int) -> Array:
    """Inside `shard_map`: a shard (B, T/n, ...) of every device as the window (B, T, ...).

    In natural order. The transpose, for gradients, is a reduce-scatter.
    """
    x = jax.lax.all_gather(x, mesh_axes("length"), axis=1, tiled=True)
    chunks = x.reshape(x.shape[0], shards, 2, -1, *x.shape[2:])
    # The early chunks as they come, then the late ones backwards.
    ordered = jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1)
    return ordered.reshape(x.shape)


class Local(NamedTuple):
    """A kernel for one shard's queries and all keys.

    `table` says what each shard computes, `spec` how it is split, so that `run(part of it, q, k, v,
    ids of queries, ids of keys, slopes)` is the attention of the shard that holds that part.
    """

    table: Any
    spec: Any
    run: Callable[..., Array]


def _splash(q_BTNH: Array, v_BTKW: Array, shards: int, interpret: bool) -> Local:
    order_T = zigzag(q_BTNH.shape[1], shards)
    table, table_spec = flash.sharded_splash(
        q_BTNH, v_BTKW, order_T, shards, chunked.SAVED, interpret
    )

    def run(kernel, q, k, v, q_ids, k_ids, slopes):
        assert slopes is None, "backends.resolve keeps ALiBi from it"
        return flash.run_splash(kernel, q, k, v, q_ids, k_ids)

    return Local(table, table_spec, run)


def _chunked(length: int, shards: int, scale: float, block: int) -> Local:
    cut = chunked.blocks(length, block, shards)
    table = jnp.asarray(chunked.pairs(length, cut.size, shards))

    def run(pairs, q, k, v, q_ids, k_ids, slopes):
        ids = (q_ids, k_ids)
        return chunked.attend_in_blocks(q, k, v, ids, slopes, pairs[0], scale, cut)

    return Local(table, spec(("length", None, None)), run)


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
) -> Array:
    """Causal attention within segments of windows in zigzag order: (B, T, N, W), in that order.

    `segment_ids_BT` alone are in natural order: whole on each device, they need no gathering.
    `kernel` is "splash" (TPU; T a multiple of 256 n; `interpret` runs it anywhere) or "chunked", in
    blocks of up to `block`; what they take and return, their modules say. Under a mesh of
    `jax.set_mesh` whose `sequence` axis has n > 1 devices. Raises `ValueError` for another kernel,
    and where T does not divide.
    """
    shards, length = shard_count("length"), q_BTNH.shape[1]
    if shards == 1:
        raise ValueError("no mesh is set whose sequence axis splits the windows")
    zigzag(length, shards)  # or it raises
    if kernel == "splash":
        q_BTNH = flash.scaled(q_BTNH, scale)
        local = _splash(q_BTNH, v_BTKW, shards, interpret)
    elif kernel == "chunked":
        local = _chunked(length, shards, scale, block)
    else:
        raise ValueError(
            f"attention kernel {kernel!r} cannot take windows that are split: {KERNELS} can"
        )

    def shard(table, q_BTNH, k_BTKH, v_BTKW, ids_BS, slopes_N):
        k_BSKH, v_BSKW = gathered(k_BTKH, shards), gathered(v_BTKW, shards)
        q_ids_BT = own_chunks(ids_BS, shards)
        return local.run(table, q_BTNH, k_BSKH, v_BSKW, q_ids_BT, ids_BS, slopes_N)

    # The gradient gathers keys and values again: saved, they would take n times the memory of a
    # device's own.
    policy = jax.checkpoint_policies.save_only_these_names(chunked.SAVED)
    heads, rows = spec(HEADS), spec(("batch", None))
    split = jax.shard_map(
        jax.checkpoint(shard, policy=policy, prevent_cse=False),
        in_specs=(local.spec, heads, heads, heads, rows, spec(("activation_heads",))),
        out_specs=heads,
        check_vma=False,  # a Pallas call does not say over which axes its results vary
    )
    return split(local.table, q_BTNH, k_BTKH, v_BTKW, segment_ids_BT, slopes_N)
