"""Multi-head Explicit Attention as pure functions of arrays (arXiv 2601.19611, eq. 10-17).

Letters: B batch, T query positions, S key positions, D model width, N query heads, K composite
key/value heads, C component (cached) key/value heads, G = N/K, H head width, W width of a value
head. How components make composites: mixing.py.
"""

import jax
import jax.numpy as jnp

# Masked logits. Not -inf: a row that is masked as a whole (padding) must stay finite.
MASKED = -1e30


def visible(segment_ids_BT: jax.Array) -> jax.Array:
    """Mask (B, T, T): query t sees key s <= t of the same document."""
    length = segment_ids_BT.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal[None] & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def raw_logits(
    q_BTNH: jax.Array, k_BSKH: jax.Array, scale: float, slopes_N: jax.Array | None
) -> jax.Array:
    """Scaled logits (B, K, G, T, S) in float32; query head n = k G + g reads head k.

    `slopes_N` (ALiBi, arXiv 2108.12409): slope times (s - t) is added. Query t stands at position
    S - T + t.
    """
    batch, length, heads, width = q_BTNH.shape
    composites, keys = k_BSKH.shape[2], k_BSKH.shape[1]
    q_BTKGH = q_BTNH.reshape(batch, length, composites, heads // composites, width)
    logits_BKGTS = scale * jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
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
    """`raw_logits` (B, K, G, T, S) with what `mask_BTS` leaves out hidden."""
    logits_BKGTS = raw_logits(q_BTNH, k_BSKH, scale, slopes_N)
    return jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED)


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKW: jax.Array,
    segment_ids_BT: jax.Array,
    scale: float,
    slopes_N: jax.Array | None = None,
) -> jax.Array:
    """Causal attention within segments by plain einsums, softmax in float32: (B, T, N, W)."""
    mask_BTT = visible(segment_ids_BT)
    logits_BKGTS = attention_logits(q_BTNH, k_BSKH, mask_BTT, scale, slopes_N)
    p_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKW.dtype)
    o_BTKGW = jnp.einsum("bkgts,bskw->btkgw", p_BKGTS, v_BSKW)
    return o_BTKGW.reshape(q_BTNH.shape[:3] + v_BSKW.shape[-1:])


def mix_logits(x: jax.Array, talk_NN: jax.Array) -> jax.Array:
    """Talking heads (arXiv 2003.02436): logits or probabilities (B, K, G, ...) mixed over heads."""
    b, k, g, *rest = x.shape
    return jnp.einsum("bn...,nm->bm...", x.reshape(b, k * g, *rest), talk_NN).reshape(x.shape)


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
    """Attention whose heads exchange logits before the softmax, probabilities after: (B, T, N, H).

    No flash kernel can do this: a softmax needs the logits of all heads. All T x T logits of a
    window exist at one time, so this is for comparisons at short contexts.
    """
    logits_BKGTS = mix_logits(raw_logits(q_BTNH, k_BSKH, scale, slopes_N), before_NN)
    mask_BTS = visible(segment_ids_BT)
    p_BKGTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED), axis=-1)
    p_BKGTS = mix_logits(p_BKGTS, after_NN).astype(v_BSKH.dtype)
    o_BTKGH = jnp.einsum("bkgts,bskh->btkgh", p_BKGTS, v_BSKH)
    return o_BTKGH.reshape(q_BTNH.shape[:3] + v_BSKH.shape[-1:])


def attention_statistics(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    segment_ids_BT: jax.Array,
    scale: float,
    slopes_N: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Per query head (N,), float32: mean `entropy` of attention in nats, largest `logit`.

    Means and maxima run over positions of real segments (id > 0). One head's (B, T, S) logits
    exist at a time.
    """
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    mask_BTS = visible(segment_ids_BT)
    weight_BT = (segment_ids_BT > 0).astype(jnp.float32)

    def head(n):
        q_BT1H = jax.lax.dynamic_slice_in_dim(q_BTNH, n, 1, axis=2)
        k_BS1H = jax.lax.dynamic_slice_in_dim(k_BSKH, n // groups, 1, axis=2)
        slope = None if slopes_N is None else jax.lax.dynamic_slice_in_dim(slopes_N, n, 1)
        logits_BTS = attention_logits(q_BT1H, k_BS1H, mask_BTS, scale, slope)[:, 0, 0]
        log_p_BTS = jax.nn.log_softmax(logits_BTS, axis=-1)
        entropy_BT = -jnp.sum(jnp.exp(log_p_BTS) * log_p_BTS, axis=-1)
        real_BTS = mask_BTS & (segment_ids_BT > 0)[:, :, None]
        return {
            "entropy": jnp.sum(entropy_BT * weight_BT) / jnp.maximum(weight_BT.sum(), 1),
            "logit": jnp.max(jnp.where(real_BTS, logits_BTS, -jnp.inf)),
        }

    return jax.lax.map(head, jnp.arange(q_BTNH.shape[2]))
