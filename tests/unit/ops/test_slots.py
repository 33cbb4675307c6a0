"""Packed slots: codes, bytes, and products with them, against sums over the values themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_jax.ops import slots
from mea_jax.ops.slots import Layout

LAYOUTS = st.lists(st.integers(0, 8), min_size=1, max_size=40).map(tuple).map(Layout)
EVERY = Layout(tuple(range(9)) * 3)


def codes_of(layout, rows, seed=0):
    most = 2 ** np.asarray(layout.bits)
    return np.random.default_rng(seed).integers(0, most, (rows, len(most))).astype(np.uint8)


def steps_of(layout, seed=1):
    size = len(layout.bits)
    return jnp.asarray(np.exp(np.random.default_rng(seed).normal(0, 2, size)), jnp.float32)


def values_of(layout, codes, step_X):
    """Return (n - (2^b - 1)/2) step for each code n."""
    bits = np.asarray(layout.bits, np.float64)
    return (codes - (2**bits - 1) / 2) * np.asarray(step_X, np.float64)


@settings(max_examples=30, deadline=None)
@given(LAYOUTS)
def test_products_with_packed_slots_are_those_with_their_values(layout):
    codes, step_X = codes_of(layout, 7), steps_of(layout)
    data = slots.pack(layout, jnp.asarray(codes))
    assert data.dtype == jnp.uint8
    assert data.shape == (7, layout.bytes)
    values = values_of(layout, codes, step_X)
    pieces = np.asarray(slots.unpack(layout, data, jnp.float32), np.float64)
    rng = np.random.default_rng(2)
    q = rng.normal(size=(3, len(layout.bits))).astype(np.float32)
    expanded = np.asarray(slots.expand_query(layout, jnp.asarray(q), step_X), np.float64)
    size = np.abs(q.astype(np.float64)) @ np.abs(values).T + 1
    np.testing.assert_array_less(np.abs(expanded @ pieces.T - q @ values.T) / size, 1e-5)
    p = rng.random((3, 7))
    found = slots.collapse_values(layout, jnp.asarray(p @ pieces, jnp.float32), step_X)
    size = p @ np.abs(values) + 1
    np.testing.assert_array_less(np.abs(found - p @ values) / size, 1e-5)


def test_pieces_are_exact_in_bfloat16():
    codes = jnp.asarray(codes_of(EVERY, 200))
    data = slots.pack(EVERY, codes)
    wide, narrow = (slots.unpack(EVERY, data, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    np.testing.assert_array_equal(wide, narrow.astype(jnp.float32))
    assert np.abs(wide).max() == 255
    assert (np.asarray(wide) % 2 == 1).all()


@settings(max_examples=30, deadline=None)
@given(LAYOUTS)
def test_bytes_are_those_of_the_bits(layout):
    """Pieces fill bytes: what is lost is less than one byte for each width below 8."""
    bits = sum(layout.bits)
    assert 0 <= layout.bytes - bits / 8 < 3


@settings(max_examples=30, deadline=None)
@given(LAYOUTS, st.integers(0, 1000))
def test_quantising_rounds_to_the_nearest_level(layout, seed):
    step_X = steps_of(layout)
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(50, len(layout.bits))) * np.asarray(step_X) * 3).astype(np.float32)
    codes = slots.quantise(layout, jnp.asarray(x), step_X)
    found = np.asarray(slots.dequantise(layout, codes, step_X), np.float64)
    np.testing.assert_allclose(found, values_of(layout, np.asarray(codes), step_X), rtol=1e-5)
    levels = 2.0 ** np.asarray(layout.bits)
    reach = (levels - 1) / 2 * np.asarray(step_X)  # the outermost level
    lost = np.abs(np.clip(x, -reach, reach) - found)
    assert (lost <= np.asarray(step_X) / 2 * (1 + 1e-5)).all()
    assert (found[:, np.asarray(layout.bits) == 0] == 0).all()


def test_nothing_is_stored_for_slots_without_bits():
    layout, x = Layout((0, 0)), jnp.ones((3, 2))
    codes = slots.quantise(layout, x, jnp.ones(2))
    data = slots.pack(layout, codes)
    assert data.shape == (3, 0)
    assert slots.unpack(layout, data, jnp.float32).shape == (3, 0)


def test_unpacking_reads_bytes_and_writes_no_codes():
    """The compiled product reads the packed bytes; the largest array besides is the pieces."""
    layout = Layout((4,) * 64 + (2,) * 64 + (1,) * 64)

    def logits(data, q):
        return jnp.einsum("nx,sx->ns", q, slots.unpack(layout, data, jnp.float32))

    data = jax.ShapeDtypeStruct((1024, layout.bytes), jnp.uint8)
    q = jax.ShapeDtypeStruct((4, len(layout.places)), jnp.float32)
    memory = jax.jit(logits).lower(data, q).compile().memory_analysis()
    assert memory is not None
    assert memory.argument_size_in_bytes == 1024 * layout.bytes + 4 * 192 * 4
    assert memory.temp_size_in_bytes <= 2 * 1024 * 192 * 4


def test_wrong_bits():
    with pytest.raises(ValueError, match=r"bits must be 0 to 8, not \(9,\)"):
        Layout((9,))
