"""RMSNorm (arXiv 1910.07467), in float32 whatever the input."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mea_jax.sharding import parameter


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis; returns the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, of width `features`, with one learned weight a feature."""

    features: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, ("norm",), (self.features,))
        return rms_norm(x, scale, self.eps)
