"""RMSNorm (arXiv 1910.07467), in float32 whatever the input."""

import flax.linen as nn
import jax

from mea_jax.ops.rms_norm import rms_norm
from mea_jax.parallel.sharding import parameter


class Scale(nn.Module):
    """One learned weight a feature, (features,), float32, where the norm itself is elsewhere."""

    features: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return parameter(self, "scale", nn.initializers.ones, ("norm",), (self.features,))


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, of width `features`, with one learned weight a feature."""

    features: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, ("norm",), (self.features,))
        return rms_norm(x, scale, self.eps)
