"""Causal attention by blocks, in plain JAX for any platform, with no T x T array.

The online softmax of arXiv 2205.14135 (algorithm 1) under a gradient that recomputes probabilities
from the saved log-sum-exp, as in arXiv 2307.08691 (section 3.1). One `scan` runs over the pairs
(i, j) of a query block and a key block with j <= i: the lower triangle and nothing above it. The
queries may be those of one shard of the sequence (context_parallel.py): two chunks of the window
against all of its keys, a list of pairs that is as long on every shard.

Letters: those of attention.py, and n blocks of t query or s key positions each, W the width of a
value. Blocks are held head-major, (n, B, K, G, t, H): each product then finds its batch dimensions
first and leaves the scores in the order of their masks, and each update of a buffer is one
contiguous piece of it. Batch and heads keep dimensions of their own, so that a partitioner can
shard them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mea_jax.ops.attention import MASKED, full_precision

Array = jax.Array

# What is worth saving for the gradient, the result and its log-sum-exp, by the name that policies
# of `jax.checkpoint` know it by.
SAVED = "attention"


def _product(spec: str, lhs: Array, rhs: Array) -> Array:
    """An einsum with a float32 result; inputs enter in their own format, except on a CPU.

    XLA's CPU backend refuses bfloat16 products of some layouts ("Unsupported element type for
    DotThunk"); widening the operands gives the same values.
    """
    if jax.default_backend() == "cpu":
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    precision = full_precision(lhs.dtype)
    return jnp.einsum(spec, lhs, rhs, precision=precision, preferred_element_type=jnp.float32)


def _split(x: Array, chunks: int, block: int, fill: int) -> Array:
    """(B, T, ...) to (B, n, t, ...): each chunk of T in blocks, its last one filled up."""
    length = x.shape[1] // chunks
    pads = [(0, 0)] * (x.ndim + 1)
    pads[2] = (0, -length % block)
    x = jnp.pad(x.reshape(x.shape[0], chunks, length, *x.shape[2:]), pads, constant_values=fill)
    return x.reshape(x.shape[0], -1, block, *x.shape[3:])


def _to_blocks(x_BTNH: Array, composites: int, chunks: int, block: int) -> Array:
    """(B, T, N, H) to (n, B, K, G, t, H), with zeros after the end of a chunk's last block."""
    batch, _, heads, width = x_BTNH.shape
    x = _split(x_BTNH, chunks, block, 0)
    x_BntKGH = x.reshape(batch, -1, block, composites, heads // composites, width)
    return jnp.transpose(x_BntKGH, (1, 0, 3, 4, 2, 5))


def _from_blocks(x_nBKGtH: Array, chunks: int, length: int) -> Array:
    """The inverse of `_to_blocks`: (B, T, N, H)."""
    _, batch, composites, groups, _, width = x_nBKGtH.shape
    x_BntKGH = jnp.transpose(x_nBKGtH, (1, 0, 4, 2, 3, 5))
    x = x_BntKGH.reshape(batch, chunks, -1, composites * groups, width)[:, :, : length // chunks]
    return x.reshape(batch, length, composites * groups, width)


def _segment_blocks(segment_ids_BT: Array, chunks: int, block: int) -> Array:
    """Segment ids (n, B, t). What is added at the end of a chunk belongs to -1, no real segment:
    it sees, if anything, its like, and is seen by nothing real."""
    return jnp.swapaxes(_split(segment_ids_BT, chunks, block, -1), 0, 1)


class Blocks(NamedTuple):
    """A division of T positions: `chunks` pieces of the queries and of the keys, in equal blocks.

    One piece each, the window itself, or the 2 of a shard's queries and all 2n of the keys.
    """

    size: int
    queries: int = 1
    keys: int = 1


def blocks(length: int, limit: int, shards: int = 1) -> Blocks:
    """Blocks of up to `limit` positions for windows of `length`, of one size whatever the rest."""
    chunks = 1 if shards == 1 else 2 * shards
    piece = length // chunks
    return Blocks(-(-piece // -(-piece // limit)), min(chunks, 2), chunks)


def pairs(length: int, block: int, shards: int = 1) -> np.ndarray:
    """Return the pairs of blocks that each shard computes, int32 (shards, P, 3).

    (i, j, ahead): the query block's number on its shard, the key block's in the window, and how far
    the keys' first position lies ahead of the queries'. j runs from 0 to the query block's own
    place for each i. Of the window's 2 `shards` chunks, shard s holds s and 2 shards - 1 - s, so
    that P is alike for all. `length` is that of the window.
    """
    chunks = 1 if shards == 1 else 2 * shards
    piece = length // chunks
    each = -(-piece // block)  # blocks a chunk

    def first(number: int) -> int:
        return number // each * piece + number % each * block

    tables = []
    for shard in range(shards):
        held = [0] if shards == 1 else [shard, chunks - 1 - shard]
        numbers = [chunk * each + b for chunk in held for b in range(each)]
        tables.append(
            [(i, j, first(j) - first(g)) for i, g in enumerate(numbers) for j in range(g + 1)]
        )
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
) -> Array:
    """Scores (B, K, G, t, s) in float32 of a query block and a key block, MASKED where hidden."""
    scores = scale * _product("bkgth,bksh->bkgts", q_BKGtH, k_BKsH)
    offsets = jnp.arange(q_BKGtH.shape[3], dtype=jnp.int32)
    ahead_ts = ahead + offsets[None, :] - offsets[:, None]  # position s minus t
    if slopes_KG is not None:
        distance = ahead_ts.astype(jnp.float32)[None, None, None]
        scores = scores + slopes_KG[None, :, :, None, None] * distance
    same_Bts = ids_Bt[:, :, None] == ids_Bs[:, None, :]
    return jnp.where((same_Bts & (ahead_ts <= 0)[None])[:, None, None], scores, MASKED)


def _prepare(arrays: tuple, cut: Blocks) -> tuple:
    """Everything in blocks: q_nBKGtH, k_nBKsH, v_nBKsW, ids_nBt, ids_nBs, slopes_KG, pairs."""
    q_BTNH, k_BSKH, v_BSKW, ids, slopes_N, pairs_P3 = arrays
    composites = k_BSKH.shape[2]
    q = _to_blocks(q_BTNH, composites, cut.queries, cut.size)
    k, v = (_to_blocks(x, composites, cut.keys, cut.size)[:, :, :, 0] for x in (k_BSKH, v_BSKW))
    slopes_KG = None
    if slopes_N is not None:
        slopes_KG = slopes_N.astype(jnp.float32).reshape(composites, -1)
    q_ids = _segment_blocks(ids[0], cut.queries, cut.size)
    k_ids = _segment_blocks(ids[1], cut.keys, cut.size)
    # Tied to q: ids and pairs alone are known before anything else is, and the derivative of a scan
    # over layers would save the masks of all pairs, T x T / 2 bytes a head.
    q, q_ids, k_ids, pairs_P3 = jax.lax.optimization_barrier((q, q_ids, k_ids, pairs_P3))
    return q, k, v, q_ids, k_ids, slopes_KG, pairs_P3


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKW: Array,
    ids: tuple[Array, Array],
    slopes_N: Array | None,
    pairs_P3: Array,
    scale: float,
    cut: Blocks,
) -> Array:
    return _attention_fwd(q_BTNH, k_BSKH, v_BSKW, ids, slopes_N, pairs_P3, scale, cut)[0]


def _attention_fwd(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKW: Array,
    ids: tuple[Array, Array],
    slopes_N: Array | None,
    pairs_P3: Array,
    scale: float,
    cut: Blocks,
) -> tuple[Array, tuple]:
    arrays = (q_BTNH, k_BSKH, v_BSKW, ids, slopes_N, pairs_P3)
    q, k, v, q_ids, k_ids, slopes_KG, ordered = _prepare(arrays, cut)
    rows, width = q.shape[1:5], v.shape[-1]  # rows: (B, K, G, t)

    def step(carry: tuple, pair: Array) -> tuple[tuple, None]:
        o_nBKGtW, lse_nBKGt, top, total, acc = carry
        i, j, ahead = pair
        # What is left of block i - 1, and what hidden keys add to a row that has seen no other,
        # needs no clearing: it is finite, and the first key to be seen, at the latest the row's own
        # at ahead == 0, multiplies it by exp(MASKED - score), which is zero.
        top = jnp.where(j == 0, MASKED, top)
        hidden = (_get(q_ids, i), _get(k_ids, j), slopes_KG, ahead, scale)
        scores = _scores(_get(q, i), _get(k, j), *hidden)
        new_top = jnp.maximum(top, jnp.max(scores, -1))
        p = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(p, -1)
        pv = _product("bkgts,bksw->bkgtw", p.astype(v.dtype), _get(v, j))
        acc = acc * shrink[..., None] + pv

        # Written at every j, the last time at ahead == 0: a small write each step is cheaper than
        # a branch, which accelerators wait for.
        o_nBKGtW = _put(o_nBKGtW, acc / total[..., None], i)
        lse_nBKGt = _put(lse_nBKGt, new_top + jnp.log(total), i)
        return (o_nBKGtW, lse_nBKGt, new_top, total, acc), None

    n = q.shape[0]
    start = (
        jnp.zeros((n, *rows, width), v.dtype),
        jnp.zeros((n, *rows), jnp.float32),
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, width), jnp.float32),
    )
    (o_nBKGtW, lse_nBKGt, *_), _ = jax.lax.scan(step, start, ordered)
    o_BTNW = checkpoint_name(_from_blocks(o_nBKGtW, cut.queries, q_BTNH.shape[1]), SAVED)
    lse_nBKGt = checkpoint_name(lse_nBKGt, SAVED)
    return o_BTNW, (arrays, o_BTNW, lse_nBKGt)


def _attention_bwd(
    scale: float, cut: Blocks, saved: tuple, do_BTNW: Array
) -> tuple[Array, Array, Array, None, None, None]:
    arrays, o_BTNW, lse_nBKGt = saved
    q, k, v, q_ids, k_ids, slopes_KG, ordered = _prepare(arrays, cut)
    composites = k.shape[2]
    do = _to_blocks(do_BTNW, composites, cut.queries, cut.size)
    delta_BTN1 = jnp.sum(
        o_BTNW.astype(jnp.float32) * do_BTNW.astype(jnp.float32), -1, keepdims=True
    )
    delta_nBKGt1 = _to_blocks(delta_BTN1, composites, cut.queries, cut.size)

    def step(carry: tuple, pair: Array) -> tuple[tuple, None]:
        dq, dk, dv = carry
        i, j, ahead = pair
        q_i, do_i, k_j, v_j = _get(q, i), _get(do, i), _get(k, j), _get(v, j)
        # A hidden score is MASKED and every row sees itself, so that its lse is a real score's
        # size: the p of what is hidden is exactly zero, and so is its ds.
        hidden = (_get(q_ids, i), _get(k_ids, j), slopes_KG, ahead, scale)
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
        _from_blocks((scale * dq).astype(q.dtype), cut.queries, lengths[0]),
        _from_blocks((scale * dk[:, :, :, None]).astype(k.dtype), cut.keys, lengths[1]),
        _from_blocks(dv[:, :, :, None].astype(v.dtype), cut.keys, lengths[1]),
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
) -> Array:
    """Causal attention within segments, `attention.dot_product_attention` by blocks: (B, T, N, W).

    Position t sees the positions s <= t of its own segment (id 0, padding, is a segment like any
    other); query head n reads key/value head n // (N // K). Products take their inputs in the
    format they come in (probabilities in that of the values); scores, softmax and sums are float32;
    the result has the format of the values. `slopes_N`, float32 (N,), adds slopes_N[n] * (s - t) to
    the scores (ALiBi, arXiv 2108.12409): a constant, whose gradient is zero.

    FLOPs: with n = ceil(T / block) blocks of t positions and P = n (n + 1) / 2 pairs, 2 B N (H + W)
    P t^2 forward and 2 B N (3 H + 2 W) P t^2 backward (scores are computed again): for many blocks
    half of what all T^2 pairs take. Blocks that segments hide as a whole are computed all the same.

    Memory: a few arrays of 4 B N block^2 bytes at a time (scores, and in the backward pass their
    gradient, with the copies that a platform's products ask for). The rest is linear in T: copies
    of the inputs in blocks, and float32 accumulators of their gradients. Saved for the backward
    pass: the inputs, the result, and 4 B N T bytes of log-sum-exp, of which scores of 1e4 lose what
    float32 loses there, 5e-4 of each probability.

    Any T will do: it is cut into blocks of one size, up to `block`, the last of which is filled up.
    Raises ValueError if K does not divide N.
    """
    length = q_BTNH.shape[1]
    cut = blocks(length, block)
    ids = (segment_ids_BT, segment_ids_BT)
    order = jnp.asarray(pairs(length, cut.size)[0])
    return attend_in_blocks(q_BTNH, k_BSKH, v_BSKW, ids, slopes_N, order, scale, cut)


def attend_in_blocks(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKW: Array,
    ids: tuple[Array, Array],
    slopes_N: Array | None,
    pairs_P3: Array,
    scale: float,
    cut: Blocks,
) -> Array:
    """`chunked_attention` of some of a window's queries to all of its keys: (B, T, N, W).

    `ids`: segment ids of the queries (B, T) and of the keys (B, S). `pairs_P3`: a shard's part of
    `pairs`, for queries in the order in which that shard holds them and keys in natural order.
    Raises ValueError if K does not divide N.
    """
    heads, composites = q_BTNH.shape[2], k_BSKH.shape[2]
    if heads % composites:
        raise ValueError(f"{heads} query heads do not divide into {composites} key/value heads")
    return _attention(q_BTNH, k_BSKH, v_BSKW, ids, slopes_N, pairs_P3, float(scale), cut)
