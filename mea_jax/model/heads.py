"""The parameters of key or value heads, and the heads that they make of the residual."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.config.schema import ModelConfig, Side
from mea_jax.ops import hlc, slots
from mea_jax.ops.backend import Backend

Array = jax.Array
SINKS = 4  # first positions of a text that are not packed: many heads attend to them at all times


class HeadLayout(NamedTuple):
    """The layout of one layer's cached keys or values."""

    form: str
    heads: int
    width: int
    bits: tuple[int, ...] | None = None  # of each slot, C H, if it is packed (ops/slots.py)
    kept: tuple[int, ...] | None = None  # the features of C H that are cached; None: all


def digits(row: str) -> tuple[int, ...]:
    """Return a row of `ModelConfig.key_bits` as integers."""
    return tuple(int(digit) for digit in row)


def add_bias(x: Array, bias: Array | None) -> Array:
    """Return `x` with a float32 bias of its last axes added in float32, in the dtype of `x`."""
    if bias is None:
        return x
    bias = bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)
    return (x.astype(bias.dtype) + bias).astype(x.dtype)


class Heads(NamedTuple):
    """A projection (D, C, H) to component heads and, where they exist, its mixing and bias (C, H).

    The bias is mixed like the heads: components are affine in the input, and so are composites.
    `steps_CH` are the quantiser's steps of slots that are cached in few bits. `mean_KH` is the
    constant part of composite keys, which components do not contain.
    """

    kernel_DCH: Array
    kind: str
    mixing: Array | None
    bias_CH: Array | None = None
    steps_CH: Array | None = None
    mean_KH: Array | None = None

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
            return add_bias(self.mix(self.components(backend, x_BTD)), self.mean_KH)
        folded_DKH, bias_KH = backend.fold(self.kind, self.kernel_DCH, self.mixing), self.bias_CH
        if bias_KH is not None:
            bias_KH = hlc.fold(self.kind, bias_KH[None], self.mixing)[0]
            bias_KH = bias_KH if self.mean_KH is None else bias_KH + self.mean_KH
        return add_bias(backend.project(x_BTD, folded_DKH), bias_KH)

    def rounded(self, rows: tuple[str, ...], x_BTCH: Array, positions_BT: Array, index) -> Array:
        """Return components as packed slots store them; the first positions of a text are exact.

        `rows` are the bits of all layers and `index` is the layer's number, or `rows` are its own.
        A cache keeps the latest positions exactly as well, for a while; this does not.
        """
        assert self.steps_CH is not None
        table_LX = 2.0 ** np.asarray([digits(row) for row in rows], np.float32)
        levels_X = jnp.asarray(table_LX)[index if len(rows) > 1 else 0]
        step, levels = (x.reshape(1, 1, *x_BTCH.shape[2:]) for x in (self.steps_CH, levels_X))
        exact_BT11 = (positions_BT < SINKS)[..., None, None]
        return jnp.where(exact_BT11, x_BTCH, slots.rounded(x_BTCH, step, levels))
