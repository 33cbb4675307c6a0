"""Tests of chunked cross-entropy against the plain one, on meshes, and of its memory."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from mea_jax.config.schema import MeshConfig
from mea_jax.ops import cross_entropy
from mea_jax.ops.backend import CpuBackend, XlaBackend
from mea_jax.parallel import sharding
from mea_jax.train.step import Teacher, batch_loss
from tests.helpers import assert_close, params_of, random_batch

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


# 5 and 7 do not divide 12; 100 exceeds it; 0 means all.
@given(
    chunk=st.sampled_from([1, 4, 5, 7, 12, 100, 0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_are_those_of_log_softmax(chunk, z_loss, seed):
    x, kernel, targets, weights = inputs(seed)

    @jax.jit
    def chunked(x, kernel):
        return cross_entropy.cross_entropy(x, kernel, targets, weights, FLOAT32, chunk, z_loss)

    @jax.jit
    def differentiated(x, kernel):
        # Times 3, so that the cotangent is not one.
        def scaled(x, kernel):
            sums = cross_entropy.cross_entropy(x, kernel, targets, weights, FLOAT32, chunk, z_loss)
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


def distilled_reference(x, kernel, targets, weights, y, teacher, z_loss, share):
    objective, nll = reference(x, kernel, targets, weights, z_loss)
    log_p, log_q = jax.nn.log_softmax(y @ teacher), jax.nn.log_softmax(x @ kernel)
    kl = jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
    return objective + share * (kl - nll), (nll, kl)


# Weights of 0, 0.5 and 1, chunks as above, and a teacher of a different width.
@pytest.mark.slow
@given(
    chunk=st.sampled_from([1, 5, 100, 0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_distillation_is_the_divergence_of_whole_distributions(chunk, z_loss, share, seed):
    x, kernel, targets, weights = inputs(seed)
    rng = np.random.default_rng(seed + 1000)
    y = rng.standard_normal((BATCH, LENGTH, 7)).astype(np.float32)
    teacher = rng.standard_normal((7, VOCAB)).astype(np.float32)
    taught = (targets, weights, y, teacher)

    def scaled(x, kernel):  # times 3, so that the cotangent is not one
        options = cross_entropy.LossOptions(FLOAT32, chunk, z_loss, share)
        objective, *reports = cross_entropy.distilled_cross_entropy(
            x, kernel, targets, weights, (y, teacher), options
        )
        return 3 * objective, tuple(reports)

    plain = jax.jit(scaled)(x, kernel)
    (objective, reports), gradients = jax.jit(jax.value_and_grad(scaled, (0, 1), has_aux=True))(
        x, kernel
    )
    (expected, wanted), expected_gradients = jax.value_and_grad(
        lambda x, k: distilled_reference(x, k, *taught, z_loss, share), (0, 1), has_aux=True
    )(x, kernel)
    # 24 float32 terms of up to ten each.
    for found in (plain, (objective, reports)):
        np.testing.assert_allclose(found[0] / 3, expected, rtol=1e-5)
        np.testing.assert_allclose(found[1], wanted, rtol=1e-5)
    assert_close(gradients, [3 * g for g in expected_gradients], rtol=1e-4, atol=1e-5)


def test_weights_of_zero_take_no_part():
    x, kernel, targets, _ = inputs(0)
    weights = np.ones((BATCH, LENGTH), np.float32)
    weights[1, 3:] = 0
    x2 = np.where(weights[..., None] > 0, x, 1e3).astype(np.float32)  # large, but with weight 0

    def both(x):
        return jax.value_and_grad(
            lambda x: cross_entropy.cross_entropy(x, kernel, targets, weights, FLOAT32, 4, 0.1)[0]
        )(x)

    (value, gradient), (value2, gradient2) = both(x), both(x2)
    np.testing.assert_allclose(value, value2, rtol=1e-6)
    np.testing.assert_array_equal(gradient2[1, 3:], 0)
    np.testing.assert_allclose(gradient[0], gradient2[0], rtol=1e-6)


@pytest.mark.parametrize("backend", [XlaBackend(BFLOAT16), CpuBackend(BFLOAT16)])
def test_products_in_bfloat16_accumulate_in_float32(backend):
    x, kernel, targets, weights = inputs(1)
    low = cross_entropy.cross_entropy(x, kernel, targets, weights, backend, 4, 0.0)[1]
    x, kernel = (jnp.asarray(a, jnp.bfloat16).astype(jnp.float32) for a in (x, kernel))
    exact = reference(x, kernel, targets, weights, 0.0)[1]
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, exact, rtol=1e-5)  # the inputs are rounded, the sums are not


def test_uniform_logits_cost_log_of_the_vocabulary():
    x, kernel, targets, _ = inputs(0)
    weights = np.ones((BATCH, LENGTH), np.float32)
    _, nll = cross_entropy.cross_entropy(0 * x, kernel, targets, weights, FLOAT32, 4, 0.0)
    assert float(nll) == pytest.approx(BATCH * LENGTH * math.log(VOCAB), rel=1e-6)


def largest_array(text: str) -> int:
    """Return the number of elements of the largest array in a program's HLO."""
    shapes = re.findall(r"\b(?:f32|bf16|f16|s32|u32|pred|s8)\[([\d,]*)\]", text)
    return max(math.prod(int(d) for d in shape.split(",") if d) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize(("mebibytes", "whole"), [(1, False), (0, True)])
def test_logits_of_the_whole_batch_never_exist(tiny, mebibytes, whole):
    """The compiled gradient of the loss never contains them, with or without a teacher.

    Without chunks it does, so the test can detect them.
    """
    options = {"model.n_layers": 1, "model.vocab_size": 4096, "optimizer.z_loss": 0.1}
    config = tiny(**{"model.loss_chunk": mebibytes}, **options)
    batch = random_batch(0, batch=8, length=32, vocab=4096)
    params = params_of(config.model)
    for teacher in (None, Teacher(config.model, params)):
        grad = jax.value_and_grad(
            lambda p, t=teacher: batch_loss(config, p, batch, t), has_aux=True
        )
        text = jax.jit(grad).lower(params).compile().as_text()
        assert text is not None
        logits = 8 * 32 * 4096
        # All other arrays are smaller: the table has 4096 x 32 elements.
        assert (largest_array(text) >= logits) == whole


def test_chunks_fit_into_their_bytes():
    assert cross_entropy.positions_within(0, 264) == 0, "0 means all positions"
    assert cross_entropy.positions_within(256, 128_256) == 512, "523, down to multiples of 128"
    assert cross_entropy.positions_within(512, 32_000) == 4_096  # 4,194
    assert cross_entropy.positions_within(8, 128_256) == 16, "counts below 128 are not rounded"
    assert cross_entropy.positions_within(1, 10**6) == 1, "at least one position"


def test_memory_does_not_grow_with_the_vocabulary():
    """Temporary memory for 8,192 positions is the same for 32,000 and 128,256 tokens.

    The gradient of the kernel is not counted.
    """
    positions, width, mebibytes = 8192, 16, 32

    def extra(vocab):
        def loss(x, kernel, targets, weights):
            chunk = cross_entropy.positions_within(mebibytes, vocab)
            sums = cross_entropy.cross_entropy(x, kernel, targets, weights, FLOAT32, chunk, 0.0)
            return sums[0]

        shapes = (1, positions, width), (width, vocab), (1, positions), (1, positions)
        types = jnp.float32, jnp.float32, jnp.int32, jnp.float32
        arrays = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, types, strict=True)]
        memory: Any = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile().memory_analysis()
        return memory.temp_size_in_bytes - 4 * width * vocab

    few, many = extra(32_000), extra(128_256)
    assert mebibytes * 2**20 * 0.5 < few < positions * 32_000 * 4 / 4
    assert many < 1.1 * few


# -- on a mesh ------------------------------------------------------------------------------

MESHES = {
    "data": MeshConfig(8, 1, 1),
    "fsdp": MeshConfig(1, 8, 1),
    "tensor": MeshConfig(1, 1, 8),
    "sequence": MeshConfig(1, 1, 1, sequence=8),
    "data, fsdp and tensor": MeshConfig(2, 2, 2),
    "fsdp, sequence and tensor": MeshConfig(1, 2, 2, sequence=2),
}


def sharded_inputs(seed):
    """Return arrays like those of `inputs`, in sizes that 8 devices divide."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8, 16, 16)).astype(np.float32)
    kernel = rng.standard_normal((16, 40)).astype(np.float32)
    targets = rng.integers(0, 40, (8, 16), dtype=np.int32)
    weights = rng.choice([0.0, 1.0, 0.5], (8, 16)).astype(np.float32)
    weights[3], weights[5, 3:] = 0, 0  # a row of padding, and one that is mostly padding
    return x, kernel, targets, weights


def sharded_gradient(mesh, x, kernel, targets, weights):
    """Return (compiled function, its arguments placed on `mesh`, their shardings).

    The function returns ((objective, nll), gradients), with the objective times 3.
    """

    def scaled(x, kernel, targets, weights):
        sums = cross_entropy.cross_entropy(x, kernel, targets, weights, FLOAT32, 5, 0.1)
        return 3 * sums[0], sums[1]

    rows = ("batch", "length")
    names = (*rows, "activation_embed"), ("embed", "vocab"), rows, rows
    where = [NamedSharding(mesh, sharding.spec(n)) for n in names]
    placed = [
        jax.device_put(a, w) for a, w in zip((x, kernel, targets, weights), where, strict=True)
    ]
    return jax.jit(jax.value_and_grad(scaled, (0, 1), has_aux=True)), placed, where


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_gives_the_loss_and_gradients_of_log_softmax(name):
    arrays = sharded_inputs(0)
    mesh = sharding.make_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        gradient, placed, where = sharded_gradient(mesh, *arrays)
        (objective, nll), gradients = gradient(*placed)
        evaluated = jax.jit(
            lambda *a: cross_entropy.cross_entropy(*a, FLOAT32, 5, 0.1),
        )(*placed)
    x, kernel, targets, weights = arrays
    expected = reference(x, kernel, targets, weights, 0.1)
    expected_gradients = jax.grad(lambda x, k: reference(x, k, targets, weights, 0.1)[0], (0, 1))(
        x, kernel
    )
    # A few hundred float32 terms of up to ten each, in a different order.
    np.testing.assert_allclose((objective / 3, nll), expected, rtol=1e-5)
    np.testing.assert_allclose(evaluated, expected, rtol=1e-5)
    assert_close(gradients, [3 * g for g in expected_gradients], rtol=1e-4, atol=2e-5)
    for found, sharded in zip(gradients, where, strict=False):
        assert found.sharding.is_equivalent_to(sharded, found.ndim)


COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@pytest.mark.parametrize("name", ["fsdp", "data, fsdp and tensor", "fsdp, sequence and tensor"])
def test_no_chunk_waits_for_the_kernel_or_its_gradient(name):
    """In the loop only numbers of its 5 positions cross the mesh; the kernel is gathered once."""
    mesh = sharding.make_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        gradient, placed, _ = sharded_gradient(mesh, *sharded_inputs(0))
        text = gradient.lower(*placed).compile().as_text()
    assert text is not None
    lines = [line for line in text.splitlines() if COLLECTIVE.search(line)]
    inside = [line for line in lines if "while/body" in line]
    gathers = [line for line in lines if "all-gather" in line]
    assert len(gathers) == 1, "only the kernel is gathered"
    assert gathers[0] not in inside
    assert any("reduce-scatter" in line for line in lines)
    assert bool(inside) == ("tensor" in name), "only a tensor axis communicates inside the loop"
    for line in inside:
        sizes = re.findall(r"f32\[([\d,]*)\]", line.split("all-reduce(")[0])
        assert set(sizes) <= {"5", "2,5"}, line
