"""The hot products of a training step, shaped for XLA's CPU backend.

XLA sends a bfloat16 product to the matrix units (AMX) only under three conditions: each operand is
stored in the order in which it is read, the contracted dimension is last on the left and first or
last on the right, and the result is float32. XLA widens all other products to float32 (a
contraction over the first dimension on the left, which the gradient of a weight needs, or a
bfloat16 result), and they run 3 to 6 times slower. So the functions below define where each
transposition happens. They keep all arithmetic except products in float32, because conversions back
and forth cost a CPU more than they save.

All are plain functions of arrays, equal to the einsum they replace, and work with `jit`, `grad`,
`jax.checkpoint` and `scan`. `dtype` is the dtype of a product's inputs; sums are float32. Letters:
B batch, T query positions, S key positions, D model width, N query heads, K key/value heads,
G = N / K, H head width, F any output width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.ops.attention import TreeMask

Array = jax.Array
DType = Any
_MASKED = -1e30  # score of a hidden position: finite, so that the difference of two is finite
_SCORE_BYTES = 2 << 20  # scores computed at a time: about the L2 cache of one core
_MOST_PARTS = 4  # of a batch: each part is compiled separately
_MOST_BLOCKS = 16  # of queries, for the same reason


def _several_devices() -> bool:
    """Return whether the traced program may be partitioned.

    While it is traced, a function can only find out whether there are several devices.
    """
    return jax.device_count() > 1


def _row_major(x: Array) -> Array:
    """Make XLA store `x` in row-major order, so that no product has to transpose it.

    With several devices in the process this returns `x` as it is: the partitioner has no rule for
    the constraint and would gather the entire array on each device.
    """
    if _several_devices():
        return x
    from jax.experimental.layout import Layout, with_layout_constraint  # experimental, so local

    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def product(lhs: Array, rhs: Array, contract: tuple, batch: int = 0) -> Array:
    """Multiply lhs by rhs over `batch` leading dimensions that both share: float32 result.

    `contract` is the pair of contracted dimensions of each side. bfloat16 operands and the result
    are pinned to row-major order. Otherwise XLA may fold a transposition into a bfloat16 product
    after it has chosen the code for it, and the compiled program fails with "UNIMPLEMENTED:
    Unsupported element type for DotThunk". With several devices the pin is not available
    (`_row_major`), so bfloat16 operands are widened: the same values, without the matrix units.
    """
    dims = (contract, (tuple(range(batch)),) * 2)
    if lhs.dtype != jnp.float32:
        if _several_devices():
            lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
        else:
            lhs, rhs = _row_major(lhs), _row_major(rhs)
    return _row_major(jax.lax.dot_general(lhs, rhs, dims, preferred_element_type=jnp.float32))


def thin_product(lhs: Array, rhs: Array, contract: tuple, batch: int) -> Array:
    """Compute `product` for an `lhs` of few rows, (batch ..., rows, D), and a large `rhs`."""
    if lhs.dtype == jnp.float32 and contract[1][0] == rhs.ndim - 1:
        return product(lhs, rhs, contract, batch)
    return _pad_single_row(lambda lhs: product(lhs, rhs, contract, batch), lhs, batch)


def fold_heads(kernel_DCH: Array, mix_CK: Array) -> Array:
    """Fold W_lc into a projection (hlc.fold), as one product of matrices: float32 (D, K, H).

    With C as the first axis this is 1.5 times as fast here as D small products (on a TPU it moves
    more bytes).
    """
    d, c, h = kernel_DCH.shape
    kernel_CX = jnp.swapaxes(kernel_DCH.astype(jnp.float32), 0, 1).reshape(c, d * h)
    folded_KX = jnp.einsum("ck,cx->kx", mix_CK, kernel_CX)
    return jnp.swapaxes(folded_KX.reshape(-1, d, h), 0, 1)


def _transposed(x: Array, axes: tuple[int, ...]) -> Array:
    return _row_major(jnp.transpose(x, axes))


def matmul(x: Array, w: Array) -> Array:
    """Multiply x (..., D) by w (D, F) of the same dtype: float32 (..., F)."""
    if x.dtype == jnp.float32:  # a wide result: a single row is 1.1 to 1.7 times slower if padded
        return product(x, w, ((x.ndim - 1,), (0,)))
    return _pad_single_row(lambda x: product(x, w, ((x.ndim - 1,), (0,))), x, 0)


def matmul_transposed(g: Array, w: Array) -> Array:
    """Multiply g (..., F) by the transpose of w (D, F) of the same dtype: float32 (..., D)."""
    if g.dtype == jnp.float32:
        return product(g, w, ((g.ndim - 1,), (1,)))
    # With more than two axes XLA would contract the first axis of `w`, and copy it transposed. A
    # decode step has at most one axis that is not 1, so that flattening is free on a mesh, too.
    lead = g.shape[:-1]
    if max(lead, default=1) == math.prod(lead):
        g = g.reshape(-1, g.shape[-1])
    y = _pad_single_row(lambda g: product(g, w, ((g.ndim - 1,), (1,))), g, 0)
    return y.reshape(*lead, w.shape[0])


def _pad_single_row(multiply: Callable[[Array], Array], x: Array, axis: int) -> Array:
    """Return `multiply(x)`; a single row of `x` is padded with a row of zeros along `axis`.

    XLA would compute a single row as a product of a vector. For that it widens the entire large
    operand to float32 if it is bfloat16 (2.5 to 5 times as slow), and reads it in a bad order if it
    is contracted over its first axis and its other axis is narrow, such as a head's (2 times). Do
    not use this for a float32 operand contracted over its last axis: without padding that takes 0.4
    times as long.
    """
    if math.prod(x.shape[axis:-1]) != 1:
        return multiply(x)
    pads = [(0, 1 if i == axis else 0) for i in range(x.ndim)]
    return jax.lax.slice_in_dim(multiply(jnp.pad(x, pads)), 0, 1, axis=axis)


def weight_gradient(x: Array, g: Array) -> Array:
    """Multiply the transpose of x (..., D) by g (..., F) over all leading axes: float32 (D, F).

    The tokens are the first dimension on both sides. In bfloat16 the narrower side is transposed
    first, which is 2.4 times as fast as the direct product (2048 tokens, 256 x 704, with the
    casts). In float32 the direct product is 1.1 times as fast as that.
    """
    n = x.ndim - 1
    tokens, last_first, one_to_n = tuple(range(n)), (n, *range(n)), tuple(range(1, n + 1))
    if x.dtype == jnp.float32:
        return product(x, g, (tokens, tokens))
    if x.shape[-1] <= g.shape[-1]:
        return product(_transposed(x, last_first), g, (one_to_n, tokens))
    return _transposed(product(_transposed(g, last_first), x, (one_to_n, tokens)), (1, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: Array, w: Array, dtype: DType) -> Array:
    """Multiply x (..., D) by w (D, F), inputs rounded to `dtype`: float32 (..., F).

    The gradient of `w` is float32, that of `x` has the dtype of `x`.
    """
    return _dense_fwd(x, w, dtype)[0]


def _dense_fwd(x: Array, w: Array, dtype: DType) -> tuple[Array, tuple]:
    x_, w_ = x.astype(dtype), w.astype(dtype)
    return matmul(x_, w_), (x_, w_, jnp.zeros((), x.dtype))


def _dense_bwd(dtype: DType, saved: tuple, g: Array) -> tuple[Array, Array]:
    x, w, like = saved
    g = g.astype(dtype)
    return matmul_transposed(g, w).astype(like.dtype), weight_gradient(x, g)


dense.defvjp(_dense_fwd, _dense_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def swiglu(gate: Array, up: Array, dtype: DType) -> Array:
    """Return silu(gate) * up of two float32 arrays, rounded once to `dtype` for the next product.

    It saves only its two inputs. The derivative is written out so that it stays one pass over
    contiguous arrays: autodiff would merge it with a strided transposition, 13 ms per layer for
    2048 x 704.
    """
    return (gate * jax.nn.sigmoid(gate) * up).astype(dtype)


def _swiglu_fwd(gate: Array, up: Array, dtype: DType) -> tuple[Array, tuple]:
    return swiglu(gate, up, dtype), (gate, up)


def _swiglu_bwd(dtype: DType, saved: tuple, g: Array) -> tuple[Array, Array]:
    gate, up = saved
    s, g = jax.nn.sigmoid(gate), g.astype(jnp.float32)
    return g * up * s * (1.0 + gate * (1.0 - s)), g * gate * s


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


# Attention. Queries, values and outputs are stored feature-major (H before positions) and scores as
# s_ST, key position first. Then every product, forward and backward, reads its operands in memory
# order and transposes nothing of size T x S. The sum over keys is a row of the product with the
# values, and the G query heads of a group are G T columns of one matrix.


def _columns(x_BTNH: Array, groups: int, start: int, stop: int, dtype: DType) -> Array:
    """Return the heads at positions start:stop, feature-major: (B, K, H, G * (stop - start))."""
    x = x_BTNH[:, start:stop].astype(dtype)
    b, t, n, h = x.shape
    x = x.reshape(b, t, n // groups, groups, h)
    return _transposed(x, (0, 2, 4, 3, 1)).reshape(b, n // groups, h, groups * t)


def _from_columns(x_BKHt: Array, groups: int) -> Array:
    """Invert `_columns`: (B, K, H, G * t) to (B, t, N, H)."""
    b, k, h, gt = x_BKHt.shape
    x = x_BKHt.reshape(b, k, h, groups, gt // groups)
    return jnp.transpose(x, (0, 4, 1, 3, 2)).reshape(b, gt // groups, k * groups, h)


class _Span(NamedTuple):
    """A block of queries start:stop, and the first key that they see (the last is stop - 1)."""

    start: int
    stop: int
    first: int


def _spans(t: int, block: int, window: int) -> list[_Span]:
    """Return the blocks of T queries, whose positions see the last `window` positions; 0: all."""
    return [
        _Span(start, min(start + block, t), max(start - window + 1, 0) if window else 0)
        for start in range(0, t, block)
    ]


def _hidden(s: Array, seg_BT: Array, span: _Span, tree: bool, window: int) -> Array:
    """Mask the scores (B, K, S, G * t) of the keys and queries of a span."""
    start, stop, first = span
    keys_S1, queries_1t = np.arange(first, stop)[:, None], np.arange(start, stop)[None]
    causal = keys_S1 <= queries_1t
    if window:
        causal &= keys_S1 > queries_1t - window
    if tree:
        seen = (seg_BT[:, first:stop, None] > queries_1t[None]) & causal[None]
    else:
        seen = (seg_BT[:, first:stop, None] == seg_BT[:, None, start:stop]) & causal[None]
    groups = s.shape[3] // (stop - start)
    seen = jnp.broadcast_to(seen[:, None, :, None], (*s.shape[:3], groups, stop - start))
    return jnp.where(seen.reshape(s.shape), s, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9, 10))
def _attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKW: Array,
    segment_ids_BT: Array,
    norm_W: Array | None,
    eps: float,
    scale: float,
    dtype: DType,
    block: int,
    tree: bool,
    window: int,
) -> Array:
    arrays = (q_BTNH, k_BTKH, v_BTKW, segment_ids_BT, norm_W)
    return _attention_fwd(*arrays, eps, scale, dtype, block, tree, window)[0]


def _attention_fwd(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKW: Array,
    segment_ids_BT: Array,
    norm_W: Array | None,
    eps: float,
    scale: float,
    dtype: DType,
    block: int,
    tree: bool,
    window: int,
) -> tuple[Array, tuple]:
    t, w = q_BTNH.shape[1], v_BTKW.shape[3]
    groups = q_BTNH.shape[2] // k_BTKH.shape[2]
    k_BKHS, v_BKWS = _columns(k_BTKH, 1, 0, t, dtype), _columns(v_BTKW, 1, 0, t, dtype)
    k_BKSH = _transposed(k_BKHS, (0, 1, 3, 2))
    v1 = jnp.concatenate([v_BKWS, jnp.ones((*v_BKWS.shape[:2], 1, t), dtype)], 2)
    out, per_block = [], []
    for span in _spans(t, block, window):
        q = _columns(q_BTNH * scale, groups, span.start, span.stop, dtype)
        keys = slice(span.first, span.stop)
        s = product(k_BKSH[:, :, keys], q, ((3,), (2,)), 2)
        s = _hidden(s, segment_ids_BT, span, tree, window)
        top = jnp.max(s, 2, keepdims=True)
        p = jnp.exp(s - top).astype(dtype)
        o = product(v1[..., keys], p, ((3,), (2,)), 2)
        o, total = o[:, :, :w] / o[:, :, w:], o[:, :, w:]
        per_block.append((q, o, total, top))
        if norm_W is not None:
            o = o * _inverse_rms(o, eps) * norm_W[None, None, :, None]
        out.append(_from_columns(o, groups))
    saved = (k_BKHS, k_BKSH, v_BKWS, segment_ids_BT, norm_W, per_block)
    return jnp.concatenate(out, 1), saved


def _inverse_rms(o_BKWt: Array, eps: float) -> Array:
    return jax.lax.rsqrt(jnp.mean(o_BKWt * o_BKWt, 2, keepdims=True) + eps)


def _attention_bwd(
    eps: float,
    scale: float,
    dtype: DType,
    block: int,
    tree: bool,
    window: int,
    saved: tuple,
    g_BTNW: Array,
) -> tuple[Array, Array, Array, None, Array | None]:
    k_BKHS, k_BKSH, v_BKWS, seg_BT, norm_W, per_block = saved
    t, groups = g_BTNW.shape[1], g_BTNW.shape[2] // k_BKHS.shape[1]
    v_BKSW = _transposed(v_BKWS, (0, 1, 3, 2))
    dq, dk, dv = [], jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    d_norm = jnp.zeros((), jnp.float32)
    for span, (q, o, total, top) in zip(_spans(t, block, window), per_block, strict=True):
        keys = slice(span.first, span.stop)
        s = product(k_BKSH[:, :, keys], q, ((3,), (2,)), 2)
        p = jnp.exp(_hidden(s, seg_BT, span, tree, window) - top).astype(dtype)
        g = _columns(g_BTNW, groups, span.start, span.stop, jnp.float32)
        if norm_W is not None:
            inverse = _inverse_rms(o, eps)
            d_norm = d_norm + jnp.sum(g * o * inverse, (0, 1, 3))
            g = g * norm_W[None, None, :, None] * inverse
            g = g - o * inverse * inverse * jnp.mean(g * o, 2, keepdims=True)
        # p lacks its denominator. The smaller array g gets it: p / total * g = p * (g / total).
        g = g / total
        delta = jnp.sum(g * o, 2, keepdims=True)
        g = g.astype(dtype)
        dp = product(v_BKSW[:, :, keys], g, ((3,), (2,)), 2)
        ds = (p.astype(jnp.float32) * (dp - delta)).astype(dtype)
        grow = ((0, 0), (0, 0), (0, 0), (span.first, t - span.stop))
        dv = dv + jnp.pad(product(g, p, ((3,), (3,)), 2), grow)
        dk = dk + jnp.pad(product(q, ds, ((3,), (3,)), 2), grow)
        dq_ = product(k_BKHS[..., keys], ds, ((3,), (2,)), 2) * scale
        dq.append(_from_columns(dq_, groups))
    d_qkv = jnp.concatenate(dq, 1), _from_columns(dk, 1), _from_columns(dv, 1)
    return *d_qkv, None, None if norm_W is None else d_norm


_attention.defvjp(_attention_fwd, _attention_bwd)


def causal_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKW: Array,
    segment_ids_BT: Array | TreeMask,
    *,
    scale: float,
    dtype: DType,
    norm_W: Array | None = None,
    eps: float = 0.0,
    block: int = 0,
    window: int = 0,
) -> Array:
    """Compute causal grouped-query attention within segments: float32 (B, T, N, W).

    Query head n reads key/value head n // (N // K). Position t sees the positions s <= t of its own
    segment; a `TreeMask` in place of segment ids defines instead which keys each position sees. A
    `window` above 0 hides s <= t - window; a tree must have none. Scores, softmax and sums are
    float32; `dtype` is the dtype of the products' inputs. With `norm_W` each head's output is
    normed: o / sqrt(mean(o^2) + eps) * norm_W. Here, with features first, the mean runs over full
    vectors; outside this function it is 3 times as slow.

    Queries are processed `block` positions at a time (0: chosen by T), each block against the keys
    from the first that it sees up to its end. So the only hidden scores that are computed are those
    within a block's width of a visible one, and only one block's scores exist at a time. The
    backward pass recomputes the scores from the saved row maxima: as fast as saving the
    probabilities, which are T x T. In float32 a batch is processed in up to four parts, so that
    scores stay in cache between passes (1.1 to 1.15 times as fast). Raises `ValueError` if K does
    not divide N.
    """
    b, t, n, _ = q_BTNH.shape
    if n % k_BTKH.shape[2]:
        raise ValueError(
            f"{n} query heads do not divide into {k_BTKH.shape[2]} key/value heads: the first must "
            "be a multiple of the second"
        )
    q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BTKH, v_BTKW))
    block = min(block or max(128, -(-t // _MOST_BLOCKS)), t)
    parts = 1
    if dtype == jnp.float32 and not _several_devices():
        while parts < _MOST_PARTS and b % (2 * parts) == 0:
            if b // (2 * parts) * n * block * t * 4 < _SCORE_BYTES:
                break
            parts *= 2
    tree = isinstance(segment_ids_BT, TreeMask)
    marks_BT = segment_ids_BT.reach_BT if isinstance(segment_ids_BT, TreeMask) else segment_ids_BT
    assert not (tree and window)
    static = (float(eps), float(scale), jnp.dtype(dtype), block, tree, window)
    split = [jnp.split(x, parts) for x in (q, k, v, marks_BT)]
    rows = [_attention(*part, norm_W, *static) for part in zip(*split, strict=True)]
    return jnp.concatenate(rows)
