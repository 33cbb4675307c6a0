"""Causal attention by blocks, in plain JAX for any platform, with no T x T array.

The online softmax of arXiv 2205.14135 (algorithm 1) under a gradient that recomputes probabilities
from the saved log-sum-exp, as in arXiv 2307.08691 (section 3.1). One `scan` runs over the pairs
(i, j) of a query block and a key block with j <= i: the lower triangle and nothing above it.

Letters: those of attention.py, and n blocks of t query or s key positions each, W the width of a
value. Blocks are held head-major, (n, B, K, G, t, H): each product then finds its batch dimensions
first and leaves the scores in the order of their masks, and each update of a buffer is one
contiguous piece of it. Batch and heads keep dimensions of their own, so that a partitioner can
shard them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.attention import MASKED, full_precision

Array = jax.Array


def _product(spec: str, lhs: Array, rhs: Array) -> Array:
    """An einsum with a float32 result; inputs enter in their own format, except on a CPU.

    XLA's CPU backend refuses bfloat16 products of some layouts ("Unsupported element type for
    DotThunk"); widening the operands gives the same values.
    """
    if jax.default_backend() == "cpu":
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    precision = full_precision(lhs.dtype)
    return jnp.einsum(spec, lhs, rhs, precision=precision, preferred_element_type=jnp.float32)


def _to_blocks(x_BTNH: Array, composites: int, block: int) -> Array:
    """(B, T, N, H) to (n, B, K, G, t, H), with zeros after the end of the last block."""
    batch, length, heads, width = x_BTNH.shape
    n = -(-length // block)
    x = jnp.pad(x_BTNH, ((0, 0), (0, n * block - length), (0, 0), (0, 0)))
    x_BntKGH = x.reshape(batch, n, block, composites, heads // composites, width)
    return jnp.transpose(x_BntKGH, (1, 0, 3, 4, 2, 5))


def _from_blocks(x_nBKGtH: Array, length: int) -> Array:
    """The inverse of `_to_blocks`: (B, T, N, H)."""
    n, batch, composites, groups, block, width = x_nBKGtH.shape
    x_BntKGH = jnp.transpose(x_nBKGtH, (1, 0, 4, 2, 3, 5))
    return x_BntKGH.reshape(batch, n * block, composites * groups, width)[:, :length]


def _segment_blocks(segment_ids_BT: Array, block: int) -> Array:
    """Segment ids (n, B, t). What is added at the end belongs to -1 and sees, if anything, itself:
    real positions come before it and so are causally shielded from it."""
    batch, length = segment_ids_BT.shape
    n = -(-length // block)
    ids = jnp.pad(segment_ids_BT, ((0, 0), (0, n * block - length)), constant_values=-1)
    return jnp.transpose(ids.reshape(batch, n, block), (1, 0, 2))


def _pairs(n: int) -> tuple[Array, Array]:
    """Every (i, j) with j <= i < n: j runs from 0 to i for each i."""
    rows, columns = np.tril_indices(n)
    return jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32)


def _get(x: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(buffer: Array, x: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(buffer, x.astype(buffer.dtype), i, 0)


def _scores(
    q_BKGtH: Array,
    k_BKsH: Array,
    ids_nBt: Array,
    slopes_KG: Array | None,
    pair: tuple[Array, Array],
    scale: float,
) -> Array:
    """Scores (B, K, G, t, s) in float32 of query block i and key block j, MASKED where hidden."""
    i, j = pair
    scores = scale * _product("bkgth,bksh->bkgts", q_BKGtH, k_BKsH)
    offsets = jnp.arange(q_BKGtH.shape[3], dtype=jnp.int32)
    ahead_ts = (j - i) * offsets.size + offsets[None, :] - offsets[:, None]  # position s minus t
    if slopes_KG is not None:
        ahead = ahead_ts.astype(jnp.float32)[None, None, None]
        scores = scores + slopes_KG[None, :, :, None, None] * ahead
    same_Bts = _get(ids_nBt, i)[:, :, None] == _get(ids_nBt, j)[:, None, :]
    return jnp.where((same_Bts & (ahead_ts <= 0)[None])[:, None, None], scores, MASKED)


def _prepare(
    q_BTNH: Array, k_BSKH: Array, v_BSKW: Array, ids_BT: Array, slopes_N: Array | None, block: int
) -> tuple:
    """Everything in blocks: q_nBKGtH, k_nBKsH, v_nBKsW, ids_nBt, slopes_KG, pairs of blocks."""
    composites = k_BSKH.shape[2]
    q = _to_blocks(q_BTNH, composites, block)
    k, v = (_to_blocks(x, composites, block)[:, :, :, 0] for x in (k_BSKH, v_BSKW))
    slopes_KG = None
    if slopes_N is not None:
        slopes_KG = slopes_N.astype(jnp.float32).reshape(composites, -1)
    ids, pairs = _segment_blocks(ids_BT, block), _pairs(q.shape[0])
    # Tied to q: ids and pairs alone are known before anything else is, and the derivative of a scan
    # over layers would save the masks of all pairs, T x T / 2 bytes a head.
    q, ids, pairs = jax.lax.optimization_barrier((q, ids, pairs))
    return q, k, v, ids, slopes_KG, pairs


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKW: Array,
    ids_BT: Array,
    slopes_N: Array | None,
    scale: float,
    block: int,
) -> Array:
    return _attention_fwd(q_BTNH, k_BSKH, v_BSKW, ids_BT, slopes_N, scale, block)[0]


def _attention_fwd(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKW: Array,
    ids_BT: Array,
    slopes_N: Array | None,
    scale: float,
    block: int,
) -> tuple[Array, tuple]:
    q, k, v, ids, slopes_KG, pairs = _prepare(q_BTNH, k_BSKH, v_BSKW, ids_BT, slopes_N, block)
    rows, width = q.shape[1:5], v.shape[-1]  # rows: (B, K, G, t)

    def step(carry: tuple, pair: tuple[Array, Array]) -> tuple[tuple, None]:
        o_nBKGtW, lse_nBKGt, top, total, acc = carry
        i, j = pair
        # What is left of block i - 1, and what hidden keys add to a row that has seen no other,
        # needs no clearing: it is finite, and the first key to be seen, at the latest the row's own
        # at j == i, multiplies it by exp(MASKED - score), which is zero.
        top = jnp.where(j == 0, MASKED, top)
        scores = _scores(_get(q, i), _get(k, j), ids, slopes_KG, pair, scale)
        new_top = jnp.maximum(top, jnp.max(scores, -1))
        p = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(p, -1)
        pv = _product("bkgts,bksw->bkgtw", p.astype(v.dtype), _get(v, j))
        acc = acc * shrink[..., None] + pv

        # Written at every j, the last time at j == i: a small write each step is cheaper than a
        # branch, which accelerators wait for.
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
    (o_nBKGtW, lse_nBKGt, *_), _ = jax.lax.scan(step, start, pairs)
    o_BTNW = _from_blocks(o_nBKGtW, q_BTNH.shape[1])
    return o_BTNW, (q_BTNH, k_BSKH, v_BSKW, ids_BT, slopes_N, o_BTNW, lse_nBKGt)


def _attention_bwd(
    scale: float, block: int, saved: tuple, do_BTNW: Array
) -> tuple[Array, Array, Array, None, None]:
    q_BTNH, k_BSKH, v_BSKW, ids_BT, slopes_N, o_BTNW, lse_nBKGt = saved
    q, k, v, ids, slopes_KG, pairs = _prepare(q_BTNH, k_BSKH, v_BSKW, ids_BT, slopes_N, block)
    composites, length = k.shape[2], do_BTNW.shape[1]
    do = _to_blocks(do_BTNW, composites, block)
    delta_BTN1 = jnp.sum(
        o_BTNW.astype(jnp.float32) * do_BTNW.astype(jnp.float32), -1, keepdims=True
    )
    delta_nBKGt1 = _to_blocks(delta_BTN1, composites, block)

    def step(carry: tuple, pair: tuple[Array, Array]) -> tuple[tuple, None]:
        dq, dk, dv = carry
        i, j = pair
        q_i, do_i, k_j, v_j = _get(q, i), _get(do, i), _get(k, j), _get(v, j)
        # A hidden score is MASKED and every row sees itself, so that its lse is a real score's
        # size: the p of what is hidden is exactly zero, and so is its ds.
        scores = _scores(q_i, k_j, ids, slopes_KG, pair, scale)
        p = jnp.exp(scores - _get(lse_nBKGt, i)[..., None])
        dp = _product("bkgtw,bksw->bkgts", do_i, v_j)
        ds = p * (dp - _get(delta_nBKGt1, i))
        p, ds = p.astype(do.dtype), ds.astype(q.dtype)
        dq = _put(dq, _get(dq, i) + _product("bkgts,bksh->bkgth", ds, k_j), i)
        dk = _put(dk, _get(dk, j) + _product("bkgts,bkgth->bksh", ds, q_i), j)
        dv = _put(dv, _get(dv, j) + _product("bkgts,bkgtw->bksw", p, do_i), j)
        return (dq, dk, dv), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    (dq, dk, dv), _ = jax.lax.scan(step, start, pairs)
    grads = (scale * dq, scale * dk[:, :, :, None], dv[:, :, :, None])
    dq_, dk_, dv_ = (
        _from_blocks(g.astype(x.dtype), length) for g, x in zip(grads, (q, k, v), strict=True)
    )
    return dq_, dk_, dv_, None, None


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

    FLOPs: with n = ceil(T / block) blocks and P = n (n + 1) / 2 pairs, 2 B N (H + W) P block^2
    forward and 2 B N (3 H + 2 W) P block^2 backward (scores are computed again): for many blocks
    half of what all T^2 pairs take. Blocks that segments hide as a whole are computed all the same.

    Memory: a few arrays of 4 B N block^2 bytes at a time (scores, and in the backward pass their
    gradient, with the copies that a platform's products ask for). The rest is linear in T: copies
    of the inputs in blocks, and float32 accumulators of their gradients. Saved for the backward
    pass: the inputs, the result, and 4 B N T bytes of log-sum-exp, of which scores of 1e4 lose what
    float32 loses there, 5e-4 of each probability.

    Any T will do: the last block is filled up, and a T below `block` is one block. Raises
    ValueError if K does not divide N.
    """
    length, heads, composites = q_BTNH.shape[1], q_BTNH.shape[2], k_BSKH.shape[2]
    if heads % composites:
        raise ValueError(f"{heads} query heads do not divide into {composites} key/value heads")
    static = (float(scale), min(block, length))
    return _attention(q_BTNH, k_BSKH, v_BSKW, segment_ids_BT, slopes_N, *static)
