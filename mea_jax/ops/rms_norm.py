"""RMSNorm (arXiv 1910.07467) as functions, in float32 for inputs of any dtype."""

import jax
import jax.numpy as jnp


def inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    """Return 1 / sqrt(mean(x^2) + eps) over the last axis, kept with size 1: float32."""
    x32 = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)


def along_last(scale: jax.Array, ndim: int) -> jax.Array:
    """Reshape a vector to `ndim` axes, all of size 1 except the last."""
    return scale.reshape((1,) * (ndim - 1) + (-1,))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Return x / sqrt(mean(x^2) + eps) * scale over the last axis, in the dtype of `x`."""
    normed = x.astype(jnp.float32) * inverse_rms(x, eps) * along_last(scale, x.ndim)
    return normed.astype(x.dtype)


def norm_heads(x_BTNH: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Apply RMSNorm to heads: each for itself with a scale (H,), or all together with (N H,)."""
    if scale.shape[0] == x_BTNH.shape[-1]:
        return rms_norm(x_BTNH, scale, eps)
    flat = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
    return rms_norm(flat, scale, eps).reshape(x_BTNH.shape)
