"""Tests of chunked attention against a short float32 reference, and of its memory and sharding.

Tolerances are relative to the largest entry of each reference array, or to 1 if that is smaller
(with one key, the gradient of q is zero up to rounding). They are 2e-5 in float32, for sums in a
different order, and 2e-2 in bfloat16: inputs are the same, but probabilities, their gradients and
the result are rounded to 8 bits (2^-9 each), the gradients several times in a row.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mea_jax.ops import attention
from mea_jax.ops.chunked import chunked_attention, pairs
from tests import references

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def inputs(seed, batch, length, heads, composites, width, value_width):
    """Return q, k, v and weights like the output, for a scalar of it."""
    shapes = ((heads, width), (composites, width), (composites, value_width), (heads, value_width))
    return [normal(seed + i, batch, length, *shape) for i, shape in enumerate(shapes)]


def packed_ids(seed, batch, length):
    """Return segment ids of random lengths, with recurring ids and padding (0) at the end."""
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random((batch, length)) < 0.2, axis=1) % 3 + 1
    ids[:, length - length // 5 :] = 0
    return jnp.asarray(ids, jnp.int32)


def reference(q, k, v, ids, scale, slopes=None, window=0):
    k, v = (jnp.repeat(x.astype(jnp.float32), q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k)
    if slopes is not None:
        t = jnp.arange(q.shape[1])
        scores += slopes[None, :, None, None] * (t[None, :] - t[:, None])[None, None]
    p = jax.nn.softmax(jnp.where(references.visible(ids, window)[:, None], scores, -jnp.inf))
    return jnp.einsum("bnts,bsnh->btnh", p, v)


def value_and_grads(f, weight, *args):
    """Return the output of `f` and the gradients of its product with `weight`."""

    @jax.jit
    def both(weight, *args):
        out, pull = jax.vjp(f, *args)
        return out, *pull(weight.astype(out.dtype))

    return both(weight, *args)


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1))


@given(
    seed=st.integers(0, 99),
    length=st.sampled_from([37, 21, 32, 5, 1]),
    block=st.sampled_from([8, 4, 16, 64]),
    heads=st.sampled_from([(6, 2), (4, 1), (2, 2)]),
    widths=st.sampled_from([(4, 6), (8, 3), (5, 5)]),
    alibi=st.booleans(),
)
def test_values_and_gradients_are_the_reference(seed, length, block, heads, widths, alibi):
    q, k, v, weight = inputs(seed, 2, length, *heads, *widths)
    ids = packed_ids(seed, 2, length)
    slopes = 2.0 ** -jnp.arange(1.0, heads[0] + 1) if alibi else None

    def chunked(q, k, v):
        return chunked_attention(q, k, v, ids, scale=0.7, slopes_N=slopes, block=block)

    def expected(q, k, v):
        return reference(q, k, v, ids, 0.7, slopes)

    found = value_and_grads(chunked, weight, q, k, v)
    assert_close(found, value_and_grads(expected, weight, q, k, v), TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("length", "block", "window", "alibi"),
    [
        (37, 64, 5, False),  # one block
        (37, 8, 1, False),  # windows of one, below, equal to and above a block, and above T
        (37, 8, 3, True),
        (37, 8, 8, False),
        (32, 8, 9, True),
        (37, 8, 20, False),
        (37, 8, 100, True),
    ],
)
def test_windows(length, block, window, alibi):
    q, k, v, weight = inputs(length, 2, length, 4, 2, 4, 6)
    ids = packed_ids(length, 2, length)
    slopes = 2.0 ** -jnp.arange(1.0, 5.0) if alibi else None

    def chunked(q, k, v):
        options = {"scale": 0.7, "slopes_N": slopes, "block": block, "window": window}
        return chunked_attention(q, k, v, ids, **options)

    def expected(q, k, v):
        return reference(q, k, v, ids, 0.7, slopes, window)

    found = value_and_grads(chunked, weight, q, k, v)
    assert_close(found, value_and_grads(expected, weight, q, k, v), TOLERANCE["float32"])


@settings(max_examples=200)
@given(length=st.integers(1, 40), block=st.integers(1, 9), window=st.integers(0, 45))
def test_the_pairs_of_blocks_are_those_with_a_visible_key(length, block, window):
    behind = np.subtract.outer(np.arange(length), np.arange(length))
    seen = (behind >= 0) & (behind < (window or length))
    starts = range(0, length, block)
    expected = [
        (i, j, s - t)
        for i, t in enumerate(starts)
        for j, s in enumerate(starts)
        if seen[t : t + block, s : s + block].any()
    ]
    (found,) = pairs(length, block, window=window).tolist()
    assert [tuple(pair) for pair in found] == expected


def test_pairs_outside_of_a_window_are_not_computed():
    """The program's loop has one step per pair: 3 pairs for a query block instead of up to 64."""
    q, k, v, _ = inputs(0, 1, 512, 2, 1, 4, 4)
    ids = jnp.ones((1, 512), jnp.int32)
    for window, steps in ((0, 64 * 65 // 2), (16, 3 * 64 - 3), (10, 3 * 64 - 3), (9, 2 * 64 - 1)):

        def attend(q, window=window):
            return chunked_attention(q, k, v, ids, scale=0.5, block=8, window=window)

        (found,) = re.findall(r"\blength=(\d+)", str(jax.make_jaxpr(attend)(q)))
        assert int(found) == steps


def test_it_is_the_plain_attention_of_the_model():
    q, k, v, weight = inputs(0, 2, 24, 4, 2, 8, 8)
    ids = packed_ids(1, 2, 24)
    plain = value_and_grads(
        lambda q, k, v: attention.dot_product_attention(q, k, v, ids, 0.3), weight, q, k, v
    )
    found = value_and_grads(
        lambda q, k, v: chunked_attention(q, k, v, ids, scale=0.3, block=8), weight, q, k, v
    )
    assert_close(found, plain, TOLERANCE["float32"])


def test_bfloat16():
    *args, weight = (x.astype(jnp.bfloat16) for x in inputs(3, 2, 50, 4, 2, 16, 8))
    ids, slopes = packed_ids(3, 2, 50), jnp.asarray([0.5, 0.25, 0.125, 0.0625])
    found = value_and_grads(
        lambda q, k, v: chunked_attention(q, k, v, ids, scale=0.25, slopes_N=slopes, block=16),
        weight,
        *args,
    )
    assert all(x.dtype == jnp.bfloat16 for x in found)
    expected = value_and_grads(lambda q, k, v: reference(q, k, v, ids, 0.25, slopes), weight, *args)
    assert_close(found, expected, TOLERANCE["bfloat16"])


def test_rematerialised_and_scanned_over_layers():
    q, k, v, weight = inputs(5, 1, 19, 2, 1, 4, 4)
    ids = packed_ids(5, 1, 19)

    def layers(attend):
        def layer(x, _):
            return x + attend(x, k, v), None

        return lambda x: jax.lax.scan(layer, x, length=2)[0]

    chunked = jax.checkpoint(lambda q, k, v: chunked_attention(q, k, v, ids, scale=0.5, block=8))
    found = value_and_grads(layers(chunked), weight, q)
    expected = value_and_grads(layers(lambda q, k, v: reference(q, k, v, ids, 0.5)), weight, q)
    assert_close(found, expected, TOLERANCE["float32"])


def test_slopes_are_constants():
    q, k, v, weight = inputs(0, 1, 9, 2, 2, 4, 4)
    ids = jnp.ones((1, 9), jnp.int32)

    def f(slopes, ids):
        o = chunked_attention(q, k, v, ids, scale=0.5, slopes_N=slopes, block=4)
        return jnp.vdot(o, weight)

    slopes = jnp.asarray([0.5, 0.25])
    gradient = jax.jit(jax.grad(f))(slopes, ids)
    np.testing.assert_array_equal(gradient, np.zeros(2, np.float32))
    assert f(slopes, ids) != f(0 * slopes, ids)


def test_what_is_hidden_changes_nothing():
    # Not even by rounding: p of a hidden key is exactly zero. The hidden document has large, not
    # infinite, numbers, because zero times infinity is NaN.
    q, k, v, weight = inputs(7, 1, 40, 2, 1, 4, 4)
    first_T = jnp.arange(40) < 20
    ids = jnp.where(first_T, 1, 2)[None].astype(jnp.int32)

    def run(q, k, v):
        def f(q, k, v):
            return chunked_attention(q, k, v, ids, scale=0.5, block=8)

        return value_and_grads(f, weight, q, k, v)

    before = run(q, k, v)
    after = run(*(jnp.where(first_T[None, :, None, None], 1e3, x) for x in (q, k, v)))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[:, 20:], b[:, 20:])


def test_scores_of_1e4_are_finite_and_right():
    # 3e-3, because scores of 1e4 and their log-sum-exps are rounded to 5e-4.
    q, k, v, weight = inputs(11, 2, 45, 4, 2, 8, 6)
    ids = packed_ids(11, 2, 45)
    scale = 1e4 / float(jnp.max(jnp.abs(jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, 2)))))
    expected = value_and_grads(lambda q, k, v: reference(q, k, v, ids, scale), weight, q, k, v)
    found = value_and_grads(
        lambda q, k, v: chunked_attention(q, k, v, ids, scale=scale, block=8), weight, q, k, v
    )
    assert all(np.isfinite(x).all() for x in found)
    assert_close(found, expected, 3e-3)


def squares(text, length):
    """Return the shapes of a program's arrays with two dimensions of at least `length`."""
    types = re.findall(r"(?:f|bf|s|u|i|bool|pred)\d*\[([\d,]+)\]", text)
    return [dims for dims in types if sum(int(d) >= length for d in dims.split(",") if d) > 1]


def test_memory_is_linear_in_the_length():
    length, block, heads, width = 4096, 256, 2, 16
    shapes = [jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)] * 3
    ids = jnp.ones((1, length), jnp.int32)

    def gradient(f):
        return jax.jit(jax.grad(lambda q, k, v: jnp.sum(f(q, k, v) ** 2), (0, 1, 2)))

    chunked = gradient(lambda q, k, v: chunked_attention(q, k, v, ids, scale=0.25, block=block))
    compiled = chunked.lower(*shapes).compile()
    assert not squares(str(compiled.as_text()), length)
    assert not squares(str(chunked.trace(*shapes).jaxpr), length)
    plain = gradient(lambda q, k, v: attention.dot_product_attention(q, k, v, ids, 0.25))
    assert squares(str(plain.trace(*shapes).jaxpr), length)  # the search finds one here

    # Six arrays of a block's scores and twelve of the inputs' size, far below T x T of one head.
    scores, array = 4 * heads * block**2, 4 * heads * length * width
    assert 6 * scores + 12 * array < 4 * length**2 / 6
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * scores + 12 * array


def test_a_scan_over_layers_saves_no_masks():
    """A scan's derivative saves no masks, as it would if they were computed before the scan."""
    length, shape = 8192, (1, 8192, 2, 16)

    def loss(scales, x, ids):
        def layer(x, scale):
            return x + chunked_attention(scale * x, x, x, ids, scale=0.25, block=256), None

        return jnp.sum(jax.lax.scan(layer, x, scales)[0] ** 2)

    scales, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 1, 1, 1, 1), shape))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(scales, x, ids).compile()
    # 16 arrays of the size of x. With masks, half of T x T bytes per head, it was 81 MB.
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < length**2 / 2


def test_batch_and_heads_are_sharded_without_communication():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
    args = inputs(13, 4, 37, 8, 4, 8, 6)
    ids, slopes = packed_ids(13, 4, 37), 2.0 ** -jnp.arange(1.0, 9.0)

    @jax.jit
    def step(q, k, v, weight, ids):
        def attend(q, k, v):
            return chunked_attention(q, k, v, ids, scale=0.3, slopes_N=slopes, block=16)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(weight)

    placed = [jax.device_put(x, sharding) for x in args]
    placed.append(jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data", None))))
    compiled = step.lower(*placed).compile()
    collectives = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert not re.findall(collectives, str(compiled.as_text()))
    found = compiled(*placed)
    assert all(x.sharding.is_equivalent_to(sharding, 4) for x in found)
    assert_close(found, step(*args, ids), TOLERANCE["float32"])


def test_unequal_groups_are_refused():
    q, k, v, _ = inputs(0, 1, 4, 3, 2, 8, 8)
    with pytest.raises(ValueError, match="3 query heads do not divide into 2"):
        chunked_attention(q, k, v, jnp.ones((1, 4), jnp.int32), scale=1.0)
