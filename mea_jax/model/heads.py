"""The parameters of key or value heads, and the heads that they make of the residual."""

from typing import NamedTuple

import jax

from mea_jax.config.schema import ModelConfig, Side
from mea_jax.ops import hlc
from mea_jax.ops.backend import Backend

Array = jax.Array


class HeadLayout(NamedTuple):
    """The layout of one layer's cached keys or values."""

    form: str
    heads: int
    width: int


def add_bias(x: Array, bias: Array | None) -> Array:
    """Return `x` with a float32 bias of its last axes added in float32, in the dtype of `x`."""
    if bias is None:
        return x
    bias = bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)
    return (x.astype(bias.dtype) + bias).astype(x.dtype)


class Heads(NamedTuple):
    """A projection (D, C, H) to component heads and, where they exist, its mixing and bias (C, H).

    The bias is mixed like the heads: components are affine in the input, and so are composites.
    """

    kernel_DCH: Array
    kind: str
    mixing: Array | None
    bias_CH: Array | None = None

    def mix(self, x_BTCH: Array) -> Array:
        """Return composite heads (B, T, K, H); the input itself if there is no mixing."""
        return x_BTCH if self.mixing is None else hlc.mix(self.kind, x_BTCH, self.mixing)

    def components(self, backend: Backend, x_BTD: Array) -> Array:
        """Compute component heads (B, T, C, H)."""
        return add_bias(backend.project(x_BTD, self.kernel_DCH), self.bias_CH)

    def composites(self, backend: Backend, model: ModelConfig, side: Side, x_BTD: Array) -> Array:
        """Compute composite heads (B, T, K, H), in the folded or the explicit form."""
        count = self.kernel_DCH.shape[1]
        if self.mixing is None or hlc.training_form(model, side, count) == "explicit":
            return self.mix(self.components(backend, x_BTD))
        folded_DKH, bias_KH = backend.fold(self.kind, self.kernel_DCH, self.mixing), self.bias_CH
        if bias_KH is not None:
            bias_KH = hlc.fold(self.kind, bias_KH[None], self.mixing)[0]
        return add_bias(backend.project(x_BTD, folded_DKH), bias_KH)
