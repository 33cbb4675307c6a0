"""RMSNorm (arXiv 1910.07467), computed in float32 for any input dtype."""

import flax.linen as nn
import jax

from mea_jax.ops.rms_norm import rms_norm
from mea_jax.parallel.sharding import parameter


class Scale(nn.Module):
    """One learned weight per feature, float32 (features,), of a norm computed elsewhere."""

    features: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return parameter(self, "scale", nn.initializers.ones, ("norm",), (self.features,))


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, of width `features`, with one learned weight per feature."""

    features: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, ("norm",), (self.features,))
        return rms_norm(x, scale, self.eps)
