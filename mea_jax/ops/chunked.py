"""Causal attention in blocks, in plain JAX for any platform, without a T x T array.

It is the online softmax of arXiv 2205.14135 (algorithm 1), with a gradient that recomputes
probabilities from the saved log-sum-exp, as in arXiv 2307.08691 (section 3.1). One `scan` runs over
the pairs (i, j) of a query block and a key block with j <= i: the lower triangle only. The queries
may be those of one shard of the sequence (context_parallel.py): two chunks of the window, against
all of its keys. The list of pairs is equally long on every shard.

Letters: those of attention.py. n is the number of blocks, t and s are the query and key positions
of one block, and W is the width of a value. Blocks are stored head-major, (n, B, K, G, t, H): each
product then finds its batch dimensions first and leaves the scores in the order of their masks, and
each update of a buffer writes one contiguous piece of it. Batch and heads are separate dimensions,
so that a partitioner can shard them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mea_jax.ops.attention import MASKED, full_precision

Array = jax.Array

# The name of the result and its log-sum-exp in `jax.checkpoint` policies: both are worth saving for
# the gradient.
SAVED = "attention"


def _product(spec: str, lhs: Array, rhs: Array) -> Array:
    """Compute an einsum with a float32 result; inputs keep their dtype, except on a CPU.

    XLA's CPU backend rejects bfloat16 products of some layouts ("Unsupported element type for
    DotThunk"); widening the operands gives the same values.
    """
    if jax.default_backend() == "cpu":
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    precision = full_precision(lhs.dtype)
    return jnp.einsum(spec, lhs, rhs, precision=precision, preferred_element_type=jnp.float32)


def _split(x: Array, chunks: int, block: int, fill: int) -> Array:
    """Reshape (B, T, ...) to (B, n, t, ...): each chunk of T in blocks, its last one padded."""
    length = x.shape[1] // chunks
    pads = [(0, 0)] * (x.ndim + 1)
    pads[2] = (0, -length % block)
    x = jnp.pad(x.reshape(x.shape[0], chunks, length, *x.shape[2:]), pads, constant_values=fill)
    return x.reshape(x.shape[0], -1, block, *x.shape[3:])


def _to_blocks(x_BTNH: Array, composites: int, chunks: int, block: int) -> Array:
    """Reshape (B, T, N, H) to (n, B, K, G, t, H); zeros pad the last block of each chunk."""
    batch, _, heads, width = x_BTNH.shape
    x = _split(x_BTNH, chunks, block, 0)
    x_BntKGH = x.reshape(batch, -1, block, composites, heads // composites, width)
    return jnp.transpose(x_BntKGH, (1, 0, 3, 4, 2, 5))


def _from_blocks(x_nBKGtH: Array, chunks: int, length: int) -> Array:
    """Invert `_to_blocks`: return (B, T, N, H)."""
    _, batch, composites, groups, _, width = x_nBKGtH.shape
    x_BntKGH = jnp.transpose(x_nBKGtH, (1, 0, 4, 2, 3, 5))
    x = x_BntKGH.reshape(batch, chunks, -1, composites * groups, width)[:, :, : length // chunks]
    return x.reshape(batch, length, composites * groups, width)


def _segment_blocks(segment_ids_BT: Array, chunks: int, block: int) -> Array:
    """Return segment ids (n, B, t), with id -1 at the positions that pad a chunk.

    No real segment has this id, so padding sees at most padding and no real position sees it.
    """
    return jnp.swapaxes(_split(segment_ids_BT, chunks, block, -1), 0, 1)


class Blocks(NamedTuple):
    """A division of positions into chunks of queries and of keys, in equal blocks of `size`.

    `queries` and `keys` count the chunks: one each for an unsplit window; for one of n shards, its
    2 chunks of queries and all 2n of the keys.
    """

    size: int
    queries: int = 1
    keys: int = 1


def blocks(length: int, limit: int, shards: int = 1) -> Blocks:
    """Divide a window of `length` positions into equal blocks of at most `limit` positions."""
    chunks = 1 if shards == 1 else 2 * shards
    piece = length // chunks
    return Blocks(-(-piece // -(-piece // limit)), min(chunks, 2), chunks)


def pairs(length: int, block: int, shards: int = 1, window: int = 0) -> np.ndarray:
    """Return the pairs of blocks that each shard computes, int32 (shards, P, 3).

    A pair is (i, j, ahead): the query block's number on its shard, the key block's number in the
    window, and the first key's position minus the first query's. For each i, j runs from 0 to the
    query block's own number in the window. Shard s has the chunks s and 2 shards - 1 - s of the
    window's 2 `shards` chunks, so that P is the same for all shards. `length` is that of the
    window. Pairs that a sliding `window` of positions hides are left out if there is one shard;
    with several, P must be the same for all.
    """
    chunks = 1 if shards == 1 else 2 * shards
    piece = length // chunks
    each = -(-piece // block)  # blocks per chunk

    def first(number: int) -> int:
        return number // each * piece + number % each * block

    tables = []
    for shard in range(shards):
        held = [0] if shards == 1 else [shard, chunks - 1 - shard]
        numbers = [chunk * each + b for chunk in held for b in range(each)]
        table = [(i, j, first(j) - first(g)) for i, g in enumerate(numbers) for j in range(g + 1)]
        if window and shards == 1:
            table = [pair for pair in table if pair[2] + block > 1 - window]
        tables.append(table)
    return np.asarray(tables, np.int32)


def _get(x: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(buffer: Array, x: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(buffer, x.astype(buffer.dtype), i, 0)


def _scores(
    q_BKGtH: Array,
    k_BKsH: Array,
    ids_Bt: Array,
    ids_Bs: Array,
    slopes_KG: Array | None,
    ahead: Array,
    scale: float,
    window: int,
) -> Array:
    """Compute scores (B, K, G, t, s) in float32 of two blocks, `MASKED` where hidden."""
    scores = scale * _product("bkgth,bksh->bkgts", q_BKGtH, k_BKsH)
    offsets = jnp.arange(q_BKGtH.shape[3], dtype=jnp.int32)
    ahead_ts = ahead + offsets[None, :] - offsets[:, None]  # position s minus t
    if slopes_KG is not None:
        distance = ahead_ts.astype(jnp.float32)[None, None, None]
        scores = scores + slopes_KG[None, :, :, None, None] * distance
    seen_ts = (ahead_ts <= 0) & (ahead_ts > -window) if window else ahead_ts <= 0
    same_Bts = ids_Bt[:, :, None] == ids_Bs[:, None, :]
    return jnp.where((same_Bts & seen_ts[None])[:, None, None], scores, MASKED)


def _prepare(arrays: tuple, division: Blocks) -> tuple:
    """Cut all arrays into blocks.

    Return q_nBKGtH, k_nBKsH, v_nBKsW, ids_nBt, ids_nBs, slopes_KG and pairs.
    """
    q_BTNH, k_BSKH, v_BSKW, ids, slopes_N, pairs_P3 = arrays
    composites = k_BSKH.shape[2]
    q = _to_blocks(q_BTNH, composites, division.queries, division.size)
    k, v = (
        _to_blocks(x, composites, division.keys, division.size)[:, :, :, 0]
        for x in (k_BSKH, v_BSKW)
    )
    slopes_KG = None
    if slopes_N is not None:
        slopes_KG = slopes_N.astype(jnp.float32).reshape(composites, -1)
    q_ids = _segment_blocks(ids[0], division.queries, division.size)
    k_ids = _segment_blocks(ids[1], division.keys, division.size)
    # The barrier ties ids and pairs to q. Without it masks would not depend on the layer, and the
    # derivative of a scan over layers would save those of all pairs, T x T / 2 bytes per head.
    q, q_ids, k_ids, pairs_P3 = jax.lax.optimization_barrier((q, q_ids, k_ids, pairs_P3))
    return q, k, v, q_ids, k_ids, slopes_KG, pairs_P3


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKW: Array,
    ids: tuple[Array, Array],
    slopes_N: Array | None,
    pairs_P3: Array,
    scale: float,
    division: Blocks,
    window: int,
) -> Array:
    arrays = (q_BTNH, k_BSKH, v_BSKW, ids, slopes_N, pairs_P3)
    return _attention_fwd(*arrays, scale, division, window)[0]


def _attention_fwd(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKW: Array,
    ids: tuple[Array, Array],
    slopes_N: Array | None,
    pairs_P3: Array,
    scale: float,
    division: Blocks,
    window: int,
) -> tuple[Array, tuple]:
    arrays = (q_BTNH, k_BSKH, v_BSKW, ids, slopes_N, pairs_P3)
    q, k, v, q_ids, k_ids, slopes_KG, ordered = _prepare(arrays, division)
    rows, width = q.shape[1:5], v.shape[-1]  # rows: (B, K, G, t)

    def step(carry: tuple, pair: Array) -> tuple[tuple, None]:
        o_nBKGtW, lse_nBKGt, last, top, total, acc = carry
        i, j, ahead = pair
        # Sums of block i - 1, and of hidden keys in rows that have seen no other key, need not be
        # cleared. They are finite, and the first visible key of a row (at the latest its own, at
        # ahead == 0) multiplies them by exp(MASKED - score), which is zero.
        top = jnp.where(i != last, MASKED, top)
        hidden = (_get(q_ids, i), _get(k_ids, j), slopes_KG, ahead, scale, window)
        scores = _scores(_get(q, i), _get(k, j), *hidden)
        new_top = jnp.maximum(top, jnp.max(scores, -1))
        p = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(p, -1)
        pv = _product("bkgts,bksw->bkgtw", p.astype(v.dtype), _get(v, j))
        acc = acc * shrink[..., None] + pv

        # Written at every j, the last time at ahead == 0: a small write per step is cheaper than a
        # branch, which stalls accelerators.
        o_nBKGtW = _put(o_nBKGtW, acc / total[..., None], i)
        lse_nBKGt = _put(lse_nBKGt, new_top + jnp.log(total), i)
        return (o_nBKGtW, lse_nBKGt, i, new_top, total, acc), None

    n = q.shape[0]
    start = (
        jnp.zeros((n, *rows, width), v.dtype),
        jnp.zeros((n, *rows), jnp.float32),
        jnp.int32(-1),
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, width), jnp.float32),
    )
    (o_nBKGtW, lse_nBKGt, *_), _ = jax.lax.scan(step, start, ordered)
    o_BTNW = checkpoint_name(_from_blocks(o_nBKGtW, division.queries, q_BTNH.shape[1]), SAVED)
    lse_nBKGt = checkpoint_name(lse_nBKGt, SAVED)
    return o_BTNW, (arrays, o_BTNW, lse_nBKGt)


def _attention_bwd(
    scale: float, division: Blocks, window: int, saved: tuple, do_BTNW: Array
) -> tuple[Array, Array, Array, None, None, None]:
    arrays, o_BTNW, lse_nBKGt = saved
    q, k, v, q_ids, k_ids, slopes_KG, ordered = _prepare(arrays, division)
    composites = k.shape[2]
    do = _to_blocks(do_BTNW, composites, division.queries, division.size)
    delta_BTN1 = jnp.sum(
        o_BTNW.astype(jnp.float32) * do_BTNW.astype(jnp.float32), -1, keepdims=True
    )
    delta_nBKGt1 = _to_blocks(delta_BTN1, composites, division.queries, division.size)

    def step(carry: tuple, pair: Array) -> tuple[tuple, None]:
        dq, dk, dv = carry
        i, j, ahead = pair
        q_i, do_i, k_j, v_j = _get(q, i), _get(do, i), _get(k, j), _get(v, j)
        # Every row sees itself, so its lse has the size of a real score. A hidden score is MASKED,
        # so its p is exactly zero, and so is its ds.
        hidden = (_get(q_ids, i), _get(k_ids, j), slopes_KG, ahead, scale, window)
        scores = _scores(q_i, k_j, *hidden)
        p = jnp.exp(scores - _get(lse_nBKGt, i)[..., None])
        dp = _product("bkgtw,bksw->bkgts", do_i, v_j)
        ds = p * (dp - _get(delta_nBKGt1, i))
        p, ds = p.astype(do.dtype), ds.astype(q.dtype)
        dq = _put(dq, _get(dq, i) + _product("bkgts,bksh->bkgth", ds, k_j), i)
        dk = _put(dk, _get(dk, j) + _product("bkgts,bkgth->bksh", ds, q_i), j)
        dv = _put(dv, _get(dv, j) + _product("bkgts,bkgtw->bksw", p, do_i), j)
        return (dq, dk, dv), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    (dq, dk, dv), _ = jax.lax.scan(step, start, ordered)
    lengths = (arrays[0].shape[1], arrays[1].shape[1])
    return (
        _from_blocks((scale * dq).astype(q.dtype), division.queries, lengths[0]),
        _from_blocks((scale * dk[:, :, :, None]).astype(k.dtype), division.keys, lengths[1]),
        _from_blocks(dv[:, :, :, None].astype(v.dtype), division.keys, lengths[1]),
        None,
        None,
        None,
    )


_attention.defvjp(_attention_fwd, _attention_bwd)


def chunked_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKW: Array,
    segment_ids_BT: Array,
    *,
    scale: float,
    slopes_N: Array | None = None,
    block: int = 512,
    window: int = 0,
) -> Array:
    """Compute `attention.dot_product_attention` in blocks: (B, T, N, W), dtype of v.

    Position t sees the positions s <= t of its own segment (id 0, padding, is a segment like any
    other); query head n reads key/value head n // (N // K). Products take their inputs in the dtype
    that they have (probabilities in that of the values); scores, softmax and sums are float32.
    `slopes_N`, float32 (N,), adds slopes_N[n] * (s - t) to the scores (ALiBi, arXiv 2108.12409); it
    is a constant, so its gradient is zero. With a `window`, position t sees only s > t - window,
    and pairs of blocks without such positions are not computed.

    FLOPs: with n = ceil(T / block) blocks of t positions and P = n (n + 1) / 2 pairs, 2 B N (H + W)
    P t^2 forward and 2 B N (3 H + 2 W) P t^2 backward, where scores are recomputed. With many
    blocks this is half of what all T^2 pairs take. Blocks that segments hide entirely are still
    computed.

    Memory: a few arrays of 4 B N block^2 bytes at a time (scores, and in the backward pass their
    gradient, with the copies that a platform's products need). The rest is linear in T: copies of
    the inputs in blocks, and float32 accumulators of their gradients. The forward pass saves the
    inputs, the result, and 4 B N T bytes of log-sum-exp for the backward pass. At scores of 1e4,
    float32 rounding of the log-sum-exp changes each probability by 5e-4 of its value.

    Any T is valid: it is cut into blocks of one size, up to `block`, and the last one is padded.
    Raises ValueError if K does not divide N.
    """
    length = q_BTNH.shape[1]
    division = blocks(length, block)
    ids = (segment_ids_BT, segment_ids_BT)
    order = jnp.asarray(pairs(length, division.size, window=window)[0])
    arrays = (q_BTNH, k_BSKH, v_BSKW, ids, slopes_N, order)
    return attend_in_blocks(*arrays, scale, division, window)


def attend_in_blocks(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKW: Array,
    ids: tuple[Array, Array],
    slopes_N: Array | None,
    pairs_P3: Array,
    scale: float,
    division: Blocks,
    window: int = 0,
) -> Array:
    """Compute `chunked_attention` of some of a window's queries to all keys: (B, T, N, W).

    `ids` are the segment ids of the queries (B, T) and of the keys (B, S). `pairs_P3` is one
    shard's part of `pairs`: queries are in the order in which that shard stores them, keys in
    natural order. Raises ValueError if K does not divide N.
    """
    heads, composites = q_BTNH.shape[2], k_BSKH.shape[2]
    if heads % composites:
        raise ValueError(
            f"{heads} query heads do not divide into {composites} key/value heads: the first "
            "must be a multiple of the second"
        )
    arrays = (q_BTNH, k_BSKH, v_BSKW, ids, slopes_N, pairs_P3)
    return _attention(*arrays, float(scale), division, window)
