"""The feed-forward half of a block: a gated linear unit."""

import flax.linen as nn
import jax

from mea_jax.config.schema import ModelConfig
from mea_jax.model.init import kernel, residual_gain
from mea_jax.ops.backend import make_backend
from mea_jax.parallel.sharding import constrain


class MLP(nn.Module):
    """A gated linear unit (arXiv 2002.05202): SwiGLU, or GEGLU with `activation` "gelu"."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, backend = self.config, make_backend(self.config)
        wide = (c.d_model, c.d_ff)
        gate_DF = kernel(self, "gate", wide, ("embed", "mlp"), c.d_model)
        up_DF = kernel(self, "up", wide, ("embed", "mlp"), c.d_model)
        down_FD = kernel(
            self,
            "down",
            (c.d_ff, c.d_model),
            ("mlp", "embed"),
            c.d_ff,
            gain=residual_gain(c),
        )
        hidden = ("batch", "length", "activation_mlp")
        gate_BTF = constrain(backend.project(x_BTD, gate_DF), *hidden)
        up_BTF = constrain(backend.project(x_BTD, up_DF), *hidden)
        return backend.project(backend.gated(c.activation, gate_BTF, up_BTF), down_FD)
