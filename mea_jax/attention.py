"""Multi-head Explicit Attention as pure functions of arrays (arXiv 2601.19611, eq. 10-17).

Letters: B batch, T query positions, S key positions, D model width, N query heads, K composite
key/value heads, C component (cached) key/value heads, G = N/K, H head width. A mixing matrix is
`mix_CK`, the paper's W_lc: composite head k is the sum over c of mix[c, k] times component c.
"""

import jax
import jax.numpy as jnp

# Masked logits. Not -inf: a row that is masked as a whole (padding) must stay finite.
MASKED = -1e30


def initial_mixing(components: int, composites: int) -> jax.Array:
    """Block identity (C, K), float32: component c serves K/C consecutive composite heads.

    The identity for C = K, so a fresh MEA is MHA (or GQA with C groups) without a head norm. A
    truncated identity would leave composite heads at zero, which the head norm would divide by.
    Where C does not divide K (only in compressed models, whose mixing comes from a checkpoint)
    some components serve one head more than others.
    """
    serving_K = jnp.arange(composites) * components // composites
    return (jnp.arange(components)[:, None] == serving_K[None]).astype(jnp.float32)


def fold(kernel_DCH: jax.Array, mix_CK: jax.Array) -> jax.Array:
    """The projection (D, K, H) straight to composite heads, computed in float32.

    x (W M) = (x W) M, so mixing weights once a step equals mixing heads at every token: D C K H
    multiply-adds a step in place of C K H a token.
    """
    # Without a stated precision an accelerator would round float32 inputs to bfloat16 or TF32.
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("dch,ck->dkh", kernel_DCH.astype(jnp.float32), mix_CK, precision=highest)


def mix_heads(x_BSCH: jax.Array, mix_CK: jax.Array) -> jax.Array:
    """Explicit head-level linear composition (eq. 10): (B, S, C, H) to (B, S, K, H)."""
    return jnp.einsum("bsch,ck->bskh", x_BSCH, mix_CK.astype(x_BSCH.dtype))


def visible(segment_ids_BT: jax.Array) -> jax.Array:
    """Mask (B, T, T): query t sees key s <= t of the same document."""
    length = segment_ids_BT.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal[None] & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def attention_logits(
    q_BTNH: jax.Array, k_BSKH: jax.Array, mask_BTS: jax.Array, scale: float
) -> jax.Array:
    """Scaled, masked logits (B, K, G, T, S) in float32; query head n = k G + g reads head k."""
    batch, length, heads, width = q_BTNH.shape
    composites = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, composites, heads // composites, width)
    logits_BKGTS = scale * jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    return jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED)


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BT: jax.Array,
    scale: float,
) -> jax.Array:
    """Causal attention within segments by plain einsums, softmax in float32: (B, T, N, H)."""
    logits_BKGTS = attention_logits(q_BTNH, k_BSKH, visible(segment_ids_BT), scale)
    p_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
    o_BTKGH = jnp.einsum("bkgts,bskh->btkgh", p_BKGTS, v_BSKH)
    return o_BTKGH.reshape(q_BTNH.shape[:3] + v_BSKH.shape[-1:])


def attention_statistics(
    q_BTNH: jax.Array, k_BSKH: jax.Array, segment_ids_BT: jax.Array, scale: float
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
        logits_BTS = attention_logits(q_BT1H, k_BS1H, mask_BTS, scale)[:, 0, 0]
        log_p_BTS = jax.nn.log_softmax(logits_BTS, axis=-1)
        entropy_BT = -jnp.sum(jnp.exp(log_p_BTS) * log_p_BTS, axis=-1)
        real_BTS = mask_BTS & (segment_ids_BT > 0)[:, :, None]
        return {
            "entropy": jnp.sum(entropy_BT * weight_BT) / jnp.maximum(weight_BT.sum(), 1),
            "logit": jnp.max(jnp.where(real_BTS, logits_BTS, -jnp.inf)),
        }

    return jax.lax.map(head, jnp.arange(q_BTNH.shape[2]))
