"""Cross-entropy that never holds the logits of a whole batch.

The loss of a 128,256-word vocabulary is the largest activation of a small model. Here the logits
of `chunk` positions of each window exist at one time; when the loss is differentiated, the
gradients of hidden states and kernel are formed in the same pass, while those logits are there,
so nothing is recomputed and nothing of size T x V is saved.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from mea_jax.sharding import constrain


class Products(Protocol):
    """How a backend multiplies: inputs of `dtype`, float32 results. Hashable."""

    @property
    def dtype(self) -> jnp.dtype: ...

    def matmul(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """(..., D) x (D, F) -> (..., F)."""
        ...

    def matmul_transposed(self, g: jax.Array, w: jax.Array) -> jax.Array:
        """(..., F) x (D, F) -> (..., D)."""
        ...

    def weight_gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """(..., D) x (..., F) -> (D, F), summed over the leading axes."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    x_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    products: Products,
    chunk: int,
    z_loss: float,
) -> tuple[jax.Array, jax.Array]:
    """Sums over tokens, float32: (objective, negative log-likelihood in nats).

    objective = sum of weight * (nll + z_loss * logsumexp(logits)^2). Logits of `chunk` positions
    of each window exist at one time (0: of all). Only the objective is differentiated: the second
    output is a report, its cotangent is ignored. Gradients flow to `x_BTD` and `kernel_DV`.
    """
    sums, _ = _scan(x_BTD, kernel_DV, targets_BT, weights_BT, products, chunk, z_loss, False)
    return sums


def _scan(x_BTD, kernel_DV, targets_BT, weights_BT, products, chunk, z_loss, differentiate):
    batch, length, _ = x_BTD.shape
    chunk = min(chunk or length, length)
    dtype = products.dtype
    kernel_DV = kernel_DV.astype(dtype)

    def chunks(y_BT):  # (B, T, ...) to (T / chunk, B, chunk, ...): the batch axis stays sharded
        short = ((0, 0), (0, -length % chunk)) + ((0, 0),) * (y_BT.ndim - 2)
        split = jnp.pad(y_BT, short).reshape(batch, -1, chunk, *y_BT.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    def body(carry, xs):
        (objective, nll), d_kernel_DV = carry
        x_BCD, targets_BC, weights_BC = xs
        x_BCD = x_BCD.astype(dtype)
        logits_BCV = products.matmul(x_BCD, kernel_DV)
        logits_BCV = constrain(logits_BCV, "batch", "length", "activation_vocab")
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        # A comparison, not a gather: it stays local where the vocabulary is sharded.
        words = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2)
        hit_BCV = words == targets_BC[..., None]
        nll_BC = lse_BC - jnp.sum(jnp.where(hit_BCV, logits_BCV, 0.0), axis=-1)
        objective += jnp.sum(weights_BC * (nll_BC + z_loss * lse_BC**2))
        nll += jnp.sum(weights_BC * nll_BC)
        if not differentiate:
            return ((objective, nll), d_kernel_DV), None
        # d nll / d logits = softmax - hit; d lse^2 / d logits = 2 lse softmax.
        p_BCV = jnp.exp(logits_BCV - lse_BC[..., None])
        slope_BC = weights_BC * (1.0 + 2.0 * z_loss * lse_BC)
        d_BCV = slope_BC[..., None] * p_BCV - jnp.where(hit_BCV, weights_BC[..., None], 0.0)
        d_BCV = d_BCV.astype(dtype)
        d_x_BCD = products.matmul_transposed(d_BCV, kernel_DV)
        d_kernel_DV += products.weight_gradient(x_BCD, d_BCV)
        return ((objective, nll), d_kernel_DV), d_x_BCD.astype(x_BTD.dtype)

    zero = jnp.zeros((), jnp.float32)
    start = jnp.zeros(kernel_DV.shape if differentiate else (), jnp.float32)
    xs = (chunks(x_BTD), chunks(targets_BT), chunks(weights_BT.astype(jnp.float32)))
    (sums, d_kernel_DV), d_x = jax.lax.scan(body, ((zero, zero), start), xs)
    if not differentiate:
        return sums, None
    d_x_BTD = jnp.moveaxis(d_x, 0, 1).reshape(batch, -1, x_BTD.shape[2])[:, :length]
    return sums, (d_x_BTD, d_kernel_DV)


def _forward(x_BTD, kernel_DV, targets_BT, weights_BT, products, chunk, z_loss):
    return _scan(x_BTD, kernel_DV, targets_BT, weights_BT, products, chunk, z_loss, True)


def _backward(products, chunk, z_loss, gradients, cotangents):
    d_x_BTD, d_kernel_DV = gradients
    scale = cotangents[0]
    return d_x_BTD * scale.astype(d_x_BTD.dtype), d_kernel_DV * scale, None, None


cross_entropy.defvjp(_forward, _backward)
