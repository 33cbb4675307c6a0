"""Tests of the CPU kernels against short float32 references: values, gradients, odd shapes.

Tolerances are relative to the largest entry of the reference: 2e-5 in float32 for sums in a
different order; 3e-2 in bfloat16 for inputs rounded to 8 bits (2^-9 each) and, in gradients, two
roundings in a row.
"""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_jax.ops import attention, cpu
from mea_jax.ops.backend import CpuBackend
from mea_jax.ops.cross_entropy import cross_entropy
from mea_jax.ops.rms_norm import rms_norm
from tests import references

DTYPES = {"float32": 2e-5, "bfloat16": 3e-2}
few = settings(max_examples=5, deadline=None, derandomize=True)
sizes = st.sampled_from([1, 2, 3, 7, 16, 33, 64, 100])


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """Select the code for one device; for the suite's eight, transpositions are not pinned."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cpu, "_several_devices", lambda: False)
    yield
    patch.undo()


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_close(got, want, dtype):
    """Compare relative to the largest entry of all arrays, because some gradients are zero."""
    scale = max(np.abs(np.asarray(b)).max(initial=0.0) for b in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert np.abs(np.asarray(a) - np.asarray(b)).max(initial=0.0) <= DTYPES[dtype] * scale


def value_and_grads(f, *args):
    """Return the output of `f` and the gradients of a fixed linear functional of it."""

    @jax.jit
    def both(*args):
        out, pull = jax.vjp(f, *args)
        return out, pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    return both(*args)


def attention_reference(q, k, v, segments, scale, window=0):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    seen = references.visible(segments, window)[:, None]
    scores = jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", q, k) * scale, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)


def loss_reference(x, w, targets, weights, z_loss):
    logits = x @ w
    lse = jax.nn.logsumexp(logits, -1)
    nll = lse - jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
    return jnp.sum(weights * (nll + z_loss * lse**2)), jnp.sum(weights * nll)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(lead=st.sampled_from([(1,), (7,), (2, 5), (3, 1), (8, 32)]), d=sizes, f=sizes)
def test_dense(dtype, lead, d, f):
    x, w = normal(0, *lead, d), normal(1, d, f)
    got = value_and_grads(lambda x, w: cpu.dense(x, w, jnp.dtype(dtype)), x, w)
    assert_close(got, value_and_grads(lambda x, w: jnp.dot(x, w), x, w), dtype)


@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (8, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_a_step_copy_no_table(dtype, lead):
    """The product with a transposed table is right, and has no copy of the table in a loop."""
    x, w = normal(0, *lead, 24).astype(dtype), normal(1, 4096, 24).astype(dtype)

    def steps(x, w):
        return jax.lax.fori_loop(
            0, 2, lambda _, y: y + cpu.matmul_transposed(x + y[..., :24].astype(dtype), w), start
        )

    start = jnp.zeros((*lead, 4096))
    once = jax.jit(cpu.matmul_transposed)(x, w)
    np.testing.assert_allclose(once, jnp.dot(x, w.T, preferred_element_type=jnp.float32), atol=1e-4)
    compiled: Any = jax.jit(steps).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * start.nbytes + w.nbytes // 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_operands_reach_no_product(dtype):
    # XLA would fold these transpositions into the products, for which bfloat16 has no code.
    x, w = normal(0, 16, 24), normal(1, 48, 16)

    def f(x, w):
        return cpu.dense(x.T, w.T, jnp.dtype(dtype)).T

    assert_close(value_and_grads(f, x, w), value_and_grads(lambda x, w: w @ x, x, w), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    gate, up = 3 * normal(0, 5, 33), normal(1, 5, 33)

    def f(g, u):
        return cpu.swiglu(g, u, jnp.dtype(dtype)).astype(jnp.float32)

    want = value_and_grads(lambda g, u: jax.nn.silu(g) * u, gate, up)
    assert_close(value_and_grads(f, gate, up), want, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(
    b=st.sampled_from([1, 2, 4]),
    t=st.sampled_from([1, 2, 7, 16, 37, 64]),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (6, 3)]),
    h=st.sampled_from([1, 2, 24, 32, 64, 128]),
    block=st.sampled_from([0, 1, 5, 16, 64]),
    segments=st.integers(1, 4),
)
def test_attention(dtype, b, t, heads, h, block, segments):
    n, k = heads
    block = block if block != 1 or t <= 7 else 9  # each block is compiled separately
    q, key, v = normal(0, b, t, n, h), normal(1, b, t, k, h), normal(2, b, t, k, h)
    ids = jnp.sort(jnp.asarray(np.random.default_rng(3).integers(0, segments, (b, t))), 1)
    options = {"scale": h**-0.5, "dtype": jnp.dtype(dtype), "block": block}

    def f(q, k, v):
        return cpu.causal_attention(q, k, v, ids, **options)

    want = value_and_grads(lambda q, k, v: attention_reference(q, k, v, ids, h**-0.5), q, key, v)
    assert_close(value_and_grads(f, q, key, v), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("t", "block", "window"),
    [
        (37, 0, 1),  # one block
        (37, 0, 5),
        (37, 9, 5),  # windows below, equal to and above a block, and above T
        (37, 9, 9),
        (37, 9, 20),
        (37, 9, 100),
        (8, 1, 3),
    ],
)
def test_attention_with_a_window(dtype, t, block, window):
    q, k, v = normal(0, 2, t, 4, 8), normal(1, 2, t, 2, 8), normal(2, 2, t, 2, 6)
    ids = jnp.sort(jnp.asarray(np.random.default_rng(3).integers(0, 3, (2, t))), 1)
    options = {"scale": 0.3, "dtype": jnp.dtype(dtype), "block": block, "window": window}

    def f(q, k, v):
        return cpu.causal_attention(q, k, v, ids, **options)

    want = value_and_grads(lambda q, k, v: attention_reference(q, k, v, ids, 0.3, window), q, k, v)
    assert_close(value_and_grads(f, q, k, v), want, dtype)


@settings(max_examples=100)
@given(t=st.integers(1, 40), block=st.integers(1, 9), window=st.integers(0, 45))
def test_a_block_of_queries_starts_at_the_first_key_that_it_sees(t, block, window):
    behind = np.subtract.outer(np.arange(t), np.arange(t))
    seen = (behind >= 0) & (behind < (window or t))
    spans = cpu._spans(t, block, window)
    assert [place for span in spans for place in range(span.start, span.stop)] == list(range(t))
    for start, stop, first in spans:
        assert stop - start <= block
        assert np.flatnonzero(seen[start:stop].any(axis=0)).tolist() == list(range(first, stop))


def test_attention_in_parts_of_the_batch_and_blocks_of_its_own_choice():
    q, k, v = (normal(i, 4, 300, 4, 8) for i in range(3))
    ids = jnp.ones((4, 300), jnp.int32)

    def f(q, k, v):
        return cpu.causal_attention(q, k, v, ids, scale=0.3, dtype=jnp.float32)

    want = value_and_grads(lambda q, k, v: attention_reference(q, k, v, ids, 0.3), q, k, v)
    assert_close(value_and_grads(jax.checkpoint(f), q, k, v), want, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(
    b=st.sampled_from([1, 2, 4]),
    t=st.sampled_from([1, 7, 37]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    block=st.sampled_from([0, 5, 16]),
    eps=st.sampled_from([1e-5, 0.3]),
)
def test_head_norm_is_the_norm_of_plain_attention(dtype, b, t, heads, block, eps):
    n, k = heads
    q, key, v = normal(0, b, t, n, 8), normal(1, b, t, k, 8), normal(2, b, t, k, 6)
    ids = jnp.sort(jnp.asarray(np.random.default_rng(3).integers(0, 3, (b, t))), 1)
    options = {"scale": 0.3, "dtype": jnp.dtype(dtype), "block": block, "eps": eps}

    def f(q, k, v, norm_W):
        return cpu.causal_attention(q, k, v, ids, norm_W=norm_W, **options)

    def g(q, k, v, norm_W):
        return rms_norm(attention.dot_product_attention(q, k, v, ids, 0.3), norm_W, eps)

    args = (q, key, v, 1 + 0.3 * normal(4, 6))
    assert_close(value_and_grads(f, *args), value_and_grads(g, *args), dtype)


def test_attention_of_huge_scores_is_finite_and_exact():
    # The maximum is over visible keys: hidden keys, with scores up to 7e4, must not count.
    q, v = jnp.ones((1, 8, 1, 4)), normal(2, 1, 8, 1, 4)
    k = jnp.arange(8.0)[None, :, None, None] * jnp.full((1, 8, 1, 4), 2500.0)
    ids = jnp.ones((1, 8), jnp.int32)

    def f(q, k, v):
        return cpu.causal_attention(q, k, v, ids, scale=1.0, dtype=jnp.float32)

    got, grads = value_and_grads(f, q, k, v)
    np.testing.assert_allclose(got, v, rtol=1e-6)  # each position sees only itself
    assert all(np.isfinite(g).all() for g in grads)


def test_attention_refuses_unequal_groups():
    q, k = normal(0, 1, 4, 3, 8), normal(0, 1, 4, 2, 8)
    with pytest.raises(ValueError, match="3 query heads do not divide into 2"):
        cpu.causal_attention(q, k, k, jnp.ones((1, 4)), scale=1.0, dtype=jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(tokens=sizes, d=sizes, vocab=sizes, chunk=st.sampled_from([1, 16, 33, 1000]))
def test_cross_entropy(dtype, tokens, d, vocab, chunk):
    x, w = normal(0, tokens, d), normal(1, d, vocab) * d**-0.5
    rng = np.random.default_rng(2)
    targets = jnp.asarray(rng.integers(0, vocab, tokens))
    weights = jnp.asarray(rng.integers(0, 3, tokens), jnp.float32)
    products = CpuBackend(jnp.dtype(dtype))

    def f(x, w):
        return cross_entropy(x[None], w, targets[None], weights[None], products, chunk, 1e-2)

    def g(x, w):
        return loss_reference(x, w, targets, weights, 1e-2)

    assert_close(jax.jit(f)(x, w), g(x, w), dtype)  # evaluated only
    got = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, w)
    assert_close(got, jax.value_and_grad(g, (0, 1), has_aux=True)(x, w), dtype)


def test_evaluated_loss_does_no_gradient_work():
    x, w = normal(0, 32, 16), normal(1, 16, 64)
    targets, weights = jnp.zeros(32, jnp.int32), jnp.ones(32)

    def f(x, w):
        products = CpuBackend(jnp.dtype("float32"))
        return cross_entropy(x[None], w, targets[None], weights[None], products, 16, 0.0)[0]

    def products(f):
        return str(jax.make_jaxpr(f)(x, w)).count("dot_general")

    assert products(f) == 1
    assert products(jax.grad(f, (0, 1))) == 3


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mea_jax.ops import cpu as ck
from mea_jax.ops.backend import CpuBackend
from mea_jax.ops.cross_entropy import cross_entropy
mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
arrays = [rng.normal(size=s).astype(np.float32) for s in
          ((8, 12, 16), (16, 32), (16, 32), (16, 32), (32, 16), (16, 64))]
specs = [P("data"), *[P(None, "tensor")] * 3, P("tensor"), P(None, "tensor")]
placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs)]
def loss(x, wq, wk, wv, wo, head, dtype):
    q, k, v = (ck.dense(x, w, dtype).reshape(8, 12, 4, 8) for w in (wq, wk, wv))
    ids = jnp.ones((8, 12), jnp.int32)
    o = ck.causal_attention(q, k, v, ids, scale=0.3, dtype=dtype, block=5)
    y = ck.dense(o.reshape(8, 12, 32), wo, dtype)
    targets, weights = (jnp.arange(96) % 64).reshape(8, 12), jnp.ones((8, 12))
    return cross_entropy(y, head, targets, weights, CpuBackend(jnp.dtype(dtype)), 4, 0.0)[0]
for dtype, limit in ((jnp.float32, 2e-5), (jnp.bfloat16, 1e-1)):
    step = jax.jit(jax.grad(loss, tuple(range(6))), static_argnums=6)
    for got, want in zip(step(*placed, dtype), step(*arrays, jnp.float32)):
        assert np.abs(got - want).max() < limit * np.abs(want).max(), (dtype, got.shape)
print("equal")
"""


@pytest.mark.process
@pytest.mark.slow
def test_sharded_arrays_give_the_same_gradients():
    # bfloat16: 1e-1, for four products in a row in each pass.
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, check=False
    )
    assert run.stdout == "equal\n", run.stderr[-2000:]
