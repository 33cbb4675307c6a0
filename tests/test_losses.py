"""Chunked cross-entropy is the plain one, and never holds the logits of a whole batch."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, params_of, random_batch
from hypothesis import given
from hypothesis import strategies as st

from mea_jax import losses
from mea_jax.backends import CpuBackend, XlaBackend
from mea_jax.train_step import batch_loss

BFLOAT16 = jnp.dtype(jnp.bfloat16)
FLOAT32 = XlaBackend(jnp.dtype(jnp.float32))

BATCH, LENGTH, WIDTH, VOCAB = 2, 12, 5, 17


def reference(x_BTD, kernel_DV, targets_BT, weights_BT, z_loss):
    logits = jnp.einsum("btd,dv->btv", x_BTD, kernel_DV)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets_BT[..., None], -1)[..., 0]
    z = jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(weights_BT * (nll + z_loss * z)), jnp.sum(weights_BT * nll)


def inputs(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)
    kernel = rng.standard_normal((WIDTH, VOCAB)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH), dtype=np.int32)
    weights = rng.choice([0.0, 1.0, 0.5], (BATCH, LENGTH)).astype(np.float32)
    return x, kernel, targets, weights


# 5 and 7 do not divide 12; 100 is more than there is; 0 means all.
@given(
    chunk=st.sampled_from([1, 4, 5, 7, 12, 100, 0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_are_those_of_log_softmax(chunk, z_loss, seed):
    x, kernel, targets, weights = inputs(seed)

    @jax.jit
    def chunked(x, kernel):
        return losses.cross_entropy(x, kernel, targets, weights, FLOAT32, chunk, z_loss)

    @jax.jit
    def differentiated(x, kernel):
        # Times 3, so that the cotangent is not one.
        def scaled(x, kernel):
            sums = losses.cross_entropy(x, kernel, targets, weights, FLOAT32, chunk, z_loss)
            return 3 * sums[0], sums[1]

        return jax.value_and_grad(scaled, (0, 1), has_aux=True)(x, kernel)

    expected, nll = reference(x, kernel, targets, weights, z_loss)
    expected_gradients = jax.grad(
        lambda x, k: reference(x, k, targets, weights, z_loss)[0], (0, 1)
    )(x, kernel)
    (objective, reported), gradients = differentiated(x, kernel)
    # 24 float32 terms of up to ten each.
    np.testing.assert_allclose(chunked(x, kernel), (expected, nll), rtol=1e-5)
    np.testing.assert_allclose((objective / 3, reported), (expected, nll), rtol=1e-5)
    assert_close(gradients, [3 * g for g in expected_gradients], rtol=1e-4, atol=1e-5)


def test_weights_of_zero_take_no_part():
    x, kernel, targets, _ = inputs(0)
    weights = np.ones((BATCH, LENGTH), np.float32)
    weights[1, 3:] = 0
    x2 = np.where(weights[..., None] > 0, x, 1e3).astype(np.float32)  # loud, but weightless

    def both(x):
        return jax.value_and_grad(
            lambda x: losses.cross_entropy(x, kernel, targets, weights, FLOAT32, 4, 0.1)[0]
        )(x)

    (value, gradient), (value2, gradient2) = both(x), both(x2)
    np.testing.assert_allclose(value, value2, rtol=1e-6)
    np.testing.assert_array_equal(gradient2[1, 3:], 0)
    np.testing.assert_allclose(gradient[0], gradient2[0], rtol=1e-6)


@pytest.mark.parametrize("backend", [XlaBackend(BFLOAT16), CpuBackend(BFLOAT16)])
def test_products_in_bfloat16_accumulate_in_float32(backend):
    x, kernel, targets, weights = inputs(1)
    low = losses.cross_entropy(x, kernel, targets, weights, backend, 4, 0.0)[1]
    x, kernel = (jnp.asarray(a, jnp.bfloat16).astype(jnp.float32) for a in (x, kernel))
    exact = reference(x, kernel, targets, weights, 0.0)[1]
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, exact, rtol=1e-5)  # the inputs are rounded, the sums are not


def test_uniform_logits_cost_log_of_the_vocabulary():
    x, kernel, targets, _ = inputs(0)
    weights = np.ones((BATCH, LENGTH), np.float32)
    _, nll = losses.cross_entropy(0 * x, kernel, targets, weights, FLOAT32, 4, 0.0)
    assert float(nll) == pytest.approx(BATCH * LENGTH * math.log(VOCAB), rel=1e-6)


def largest_array(text: str) -> int:
    """Elements of the largest array that a program's HLO mentions."""
    shapes = re.findall(r"\b(?:f32|bf16|f16|s32|u32|pred|s8)\[([\d,]*)\]", text)
    return max(math.prod(int(d) for d in shape.split(",") if d) for shape in shapes)


@pytest.mark.parametrize(("chunk", "whole"), [(8, False), (0, True)])
def test_logits_of_the_whole_batch_never_exist(tiny, chunk, whole):
    """In the compiled gradient of the model's loss; without chunks they do, so the test can see."""
    config = tiny(**{"model.loss_chunk": chunk, "model.n_layers": 1, "optimizer.z_loss": 0.1})
    batch = random_batch(0, batch=8, length=32, vocab=264)
    params = params_of(config.model)
    grad = jax.value_and_grad(lambda p: batch_loss(config, p, batch), has_aux=True)
    text = jax.jit(grad).lower(params).compile().as_text()
    assert text is not None
    logits = 8 * 32 * 264
    # All else is smaller: attention logits have 8 x 4 x 32 x 32 elements, half of that.
    assert (largest_array(text) >= logits) == whole
