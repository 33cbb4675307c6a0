"""Multi-head Explicit Attention as pure functions of arrays (arXiv 2601.19611, eq. 10-17).

Letters: B batch, T query positions, S key positions, D model width, N query heads, K composite
key/value heads, C component (cached) key/value heads, G = N/K, H head width, W width of a value
head. hlc.py composes composite heads from component heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The value of masked logits. Not -inf: a fully masked row (padding) must stay finite.
MASKED = -1e30


# The number of queries whose logits `attention_statistics` computes at a time.
_WATCHED = 512


def full_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Return the precision that keeps float32 products in float32; None for other dtypes.

    By default a TPU rounds float32 inputs to bfloat16, and a GPU may round them to TF32.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def visible(segment_ids_BT: jax.Array, window: int = 0) -> jax.Array:
    """Return the mask (B, T, T): query t sees the keys t - window < s <= t of its own segment.

    With a `window` of 0 it sees all s <= t.
    """
    length = segment_ids_BT.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    if window:
        causal &= ~jnp.tril(causal, -window)
    return causal[None] & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def raw_logits(
    q_BTNH: jax.Array, k_BSKH: jax.Array, scale: float, slopes_N: jax.Array | None
) -> jax.Array:
    """Compute scaled logits (B, K, G, T, S) in float32; query head n = k G + g reads head k.

    `slopes_N` (ALiBi, arXiv 2108.12409) adds slope times (key position - query position). Query t
    is at position S - T + t.
    """
    batch, length, heads, width = q_BTNH.shape
    composites, keys = k_BSKH.shape[2], k_BSKH.shape[1]
    q_BTKGH = q_BTNH.reshape(batch, length, composites, heads // composites, width)
    logits_BKGTS = scale * jnp.einsum(
        "btkgh,bskh->bkgts",
        q_BTKGH,
        k_BSKH,
        precision=full_precision(q_BTNH.dtype),
        preferred_element_type=jnp.float32,
    )
    if slopes_N is None:
        return logits_BKGTS
    distance_TS = jnp.arange(keys)[None] - jnp.arange(keys - length, keys)[:, None]
    slopes_KG11 = slopes_N.reshape(composites, -1, 1, 1)
    return logits_BKGTS + (slopes_KG11 * distance_TS[None, None].astype(jnp.float32))[None]


def attention_logits(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    mask_BTS: jax.Array,
    scale: float,
    slopes_N: jax.Array | None = None,
) -> jax.Array:
    """Compute `raw_logits` (B, K, G, T, S), set to `MASKED` where `mask_BTS` is False."""
    logits_BKGTS = raw_logits(q_BTNH, k_BSKH, scale, slopes_N)
    return jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED)


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKW: jax.Array,
    segment_ids_BT: jax.Array,
    scale: float,
    slopes_N: jax.Array | None = None,
    window: int = 0,
) -> jax.Array:
    """Compute causal attention within segments by plain einsums: (B, T, N, W), dtype of v.

    The softmax is in float32.
    """
    mask_BTT = visible(segment_ids_BT, window)
    logits_BKGTS = attention_logits(q_BTNH, k_BSKH, mask_BTT, scale, slopes_N)
    p_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKW.dtype)
    precision = full_precision(v_BSKW.dtype)
    o_BTKGW = jnp.einsum("bkgts,bskw->btkgw", p_BKGTS, v_BSKW, precision=precision)
    return o_BTKGW.reshape(q_BTNH.shape[:3] + v_BSKW.shape[-1:])


class TreeMask(NamedTuple):
    """A mask of windows that contain trees of tokens, for `Backend.attend` in place of segment ids.

    Tokens are in depth-first order. `reach_BT` is one past the last position of the subtree below
    each token, and 0 for padding. Position t sees s <= t < reach[s]: the path from its root and
    nothing of other branches, so that the common prefix of several texts is computed once. A
    document is a tree without branches. `depth_BT` is a token's position on its path, by which a
    window counts.
    """

    reach_BT: jax.Array
    depth_BT: jax.Array


def tree_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKW: jax.Array,
    mask: TreeMask,
    scale: float,
    window: int = 0,
    block: int = 256,
) -> jax.Array:
    """Compute attention of windows that contain trees of tokens: (B, T, N, W), dtype of v.

    Queries are processed `block` at a time (T / 16 if that is more), each block against the keys up
    to its end.
    """
    length, out = q_BTNH.shape[1], []
    block = max(block, -(-length // 16))  # each block is compiled separately
    for start in range(0, length, block):
        stop = min(start + block, length)
        places_t, places_S = jnp.arange(start, stop), jnp.arange(stop)
        causal_tS = places_S[None] <= places_t[:, None]
        seen_BtS = causal_tS[None] & (places_t[None, :, None] < mask.reach_BT[:, None, :stop])
        if window:
            depth_BT = mask.depth_BT
            seen_BtS &= depth_BT[:, start:stop, None] - depth_BT[:, None, :stop] < window
        arrays = (q_BTNH[:, start:stop], k_BSKH[:, :stop], seen_BtS)
        p_BKGtS = jax.nn.softmax(attention_logits(*arrays, scale), axis=-1).astype(v_BSKW.dtype)
        precision = full_precision(v_BSKW.dtype)
        o_BtKGW = jnp.einsum("bkgts,bskw->btkgw", p_BKGtS, v_BSKW[:, :stop], precision=precision)
        out.append(o_BtKGW.reshape(*o_BtKGW.shape[:2], -1, o_BtKGW.shape[-1]))
    return jnp.concatenate(out, axis=1)


def mix_logits(x: jax.Array, talk_NN: jax.Array) -> jax.Array:
    """Mix logits or probabilities (B, K, G, ...) over heads (talking heads, arXiv 2003.02436)."""
    b, k, g, *rest = x.shape
    highest = jax.lax.Precision.HIGHEST  # a softmax's inputs and outputs stay float32
    mixed = jnp.einsum("bn...,nm->bm...", x.reshape(b, k * g, *rest), talk_NN, precision=highest)
    return mixed.reshape(x.shape)


def talking_heads_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BT: jax.Array,
    scale: float,
    before_NN: jax.Array,
    after_NN: jax.Array,
    slopes_N: jax.Array | None = None,
) -> jax.Array:
    """Compute attention that mixes logits and probabilities over heads: (B, T, N, H).

    `before_NN` mixes the logits before the softmax, `after_NN` the probabilities after it. No flash
    kernel can do this, because a softmax needs the logits of all heads. All T x T logits of a
    window exist at the same time, so this is for comparisons at short contexts.
    """
    logits_BKGTS = mix_logits(raw_logits(q_BTNH, k_BSKH, scale, slopes_N), before_NN)
    mask_BTS = visible(segment_ids_BT)
    p_BKGTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED), axis=-1)
    p_BKGTS = mix_logits(p_BKGTS, after_NN).astype(v_BSKH.dtype)
    precision = full_precision(v_BSKH.dtype)
    o_BTKGH = jnp.einsum("bkgts,bskh->btkgh", p_BKGTS, v_BSKH, precision=precision)
    return o_BTKGH.reshape(q_BTNH.shape[:3] + v_BSKH.shape[-1:])


def attention_statistics(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    segment_ids_BT: jax.Array,
    scale: float,
    slopes_N: jax.Array | None = None,
    window: int = 0,
) -> dict[str, jax.Array]:
    """Return each query head's mean `entropy` in nats and largest `logit`: float32 (N,).

    Means and maxima run over positions of real segments (id > 0). The logits of one head and 512
    queries exist at a time.
    """
    length, groups = q_BTNH.shape[1], q_BTNH.shape[2] // k_BSKH.shape[2]
    size = min(_WATCHED, length)
    fill = ((0, 0), (0, -length % size))
    q_BTNH = jnp.pad(q_BTNH, (*fill, (0, 0), (0, 0)))
    ids_BT = jnp.pad(segment_ids_BT, fill)
    places_S = jnp.arange(length)

    def block(n, start):
        """Return the sum of entropies and the largest logit of `size` queries of head n."""
        q_BtH = jax.lax.dynamic_slice_in_dim(q_BTNH[:, :, n], start, size, axis=1)
        own_Bt = jax.lax.dynamic_slice_in_dim(ids_BT, start, size, axis=1)
        k_BSH = k_BSKH[:, :, n // groups]
        logits_BtS = scale * jnp.einsum(
            "bth,bsh->bts", q_BtH, k_BSH, preferred_element_type=jnp.float32
        )
        ahead_tS = places_S[None] - (start + jnp.arange(size))[:, None]
        if slopes_N is not None:
            logits_BtS = logits_BtS + (slopes_N[n] * ahead_tS.astype(jnp.float32))[None]
        seen_BtS = (own_Bt[:, :, None] == segment_ids_BT[:, None]) & (ahead_tS <= 0)[None]
        seen_BtS = seen_BtS & (own_Bt > 0)[:, :, None]
        if window:
            seen_BtS = seen_BtS & (ahead_tS > -window)[None]
        log_p_BtS = jax.nn.log_softmax(jnp.where(seen_BtS, logits_BtS, MASKED), axis=-1)
        entropy_Bt = -jnp.sum(jnp.exp(log_p_BtS) * log_p_BtS, axis=-1)
        return {
            "entropy": jnp.sum(jnp.where(own_Bt > 0, entropy_Bt, 0.0)),
            "logit": jnp.max(jnp.where(seen_BtS, logits_BtS, -jnp.inf)),
        }

    def head(n):
        starts = jnp.arange(0, length, size)
        blocks = jax.lax.map(lambda start: block(n, start), starts)
        real = jnp.maximum(jnp.sum(segment_ids_BT > 0), 1)
        return {"entropy": blocks["entropy"].sum() / real, "logit": blocks["logit"].max()}

    return jax.lax.map(head, jnp.arange(q_BTNH.shape[2]))
