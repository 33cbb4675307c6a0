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


@settings(max_examples=8, deadline=None)  # each example compiles
@given(LAYOUTS, st.integers(1, 11))
def test_products_with_packed_slots_are_those_with_their_values(layout, length):
    """1e-6 of the largest terms, each of which is exact to 2^-24, with 3 digits; 2e-4 with 2."""
    codes, step_X = codes_of(layout, 2 * length).reshape(2, length, -1), steps_of(layout)
    data = slots.pack(layout, jnp.asarray(codes))
    assert data.dtype == jnp.uint8
    assert data.shape == (2, layout.bytes, length)
    values = values_of(layout, codes, step_X)
    rng = np.random.default_rng(2)
    q = rng.normal(size=(2, 3, len(layout.bits))).astype(np.float32)
    p = rng.random((2, 3, length)).astype(np.float32)
    reach = 2.0 ** np.asarray(layout.bits) / 2 * np.asarray(step_X)
    largest_term = np.abs(q * reach).max(axis=2, keepdims=True) * len(reach)
    for digits, tolerance in ((3, 1e-6), (2, 2e-4)):
        found = slots.logits(layout, jnp.asarray(q), data, step_X, digits)
        wanted = np.einsum("bnx,bsx->bns", q, values)
        assert (np.abs(found - wanted) <= tolerance * largest_term).all()
        found = slots.weighted_sums(layout, jnp.asarray(p), data, step_X, digits)
        wanted = np.einsum("bns,bsx->bnx", p, values)
        assert (np.abs(found - wanted) <= tolerance * length * reach).all()


def test_unpacked_codes_are_at_the_top_of_a_byte():
    codes = codes_of(EVERY, 200)
    data = slots.pack(EVERY, jnp.asarray(codes)[None])
    bits = np.asarray(EVERY.bits)
    signed = np.where(bits > 0, codes.astype(np.int64) - 2 ** np.maximum(bits - 1, 0), 0)
    unpacked = slots.unpack(EVERY, data)
    assert unpacked.dtype == jnp.int8
    np.testing.assert_array_equal(unpacked[0], (signed * 2 ** (8 - bits)).T)
    assert np.asarray(unpacked).min() == -128


@settings(max_examples=30, deadline=None)
@given(LAYOUTS)
def test_bytes_are_those_of_the_bits(layout):
    assert 0 <= layout.bytes - sum(layout.bits) / 8 < 1
    assert slots.packed_bytes(np.asarray(layout.bits)) == layout.bytes


def test_sums_over_many_positions_do_not_overflow():
    """140,000 equal weights of the outermost level: 2^31 is reached after 133,153 in one sum."""
    layout, step_X, length = Layout((8, 1)), jnp.ones(2), 140_000
    data = slots.pack(layout, jnp.zeros((1, length, 2), jnp.uint8))
    found = slots.weighted_sums(layout, jnp.ones((1, 1, length)), data, step_X, 3)
    np.testing.assert_allclose(found, [[[-127.5 * length, -0.5 * length]]], rtol=1e-6)


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
    layout, x = Layout((0, 0)), jnp.ones((1, 3, 2))
    codes = slots.quantise(layout, x, jnp.ones(2))
    data = slots.pack(layout, codes)
    assert data.shape == (1, 0, 3)
    assert not slots.unpack(layout, data).any()
    for found, shape in (
        (slots.logits(layout, x, data, jnp.ones(2), 3), (1, 3, 3)),
        (slots.weighted_sums(layout, jnp.ones((1, 1, 3)), data, jnp.ones(2), 3), (1, 1, 2)),
    ):
        np.testing.assert_array_equal(found, np.zeros(shape))


def test_unpacking_writes_one_byte_per_slot_and_position():
    """The compiled product reads the packed bytes; the largest array besides is the codes."""
    layout, length = Layout((4,) * 64 + (2,) * 64 + (1,) * 64), 8192
    data = jax.ShapeDtypeStruct((1, layout.bytes, length), jnp.uint8)
    q, step = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 1, 192), (192,)))
    logits = jax.jit(lambda q, data, step: slots.logits(layout, q, data, step, 3))
    memory = logits.lower(q, data, step).compile().memory_analysis()
    assert memory is not None
    assert memory.argument_size_in_bytes == length * layout.bytes + 2 * 192 * 4
    rows = 4 * 3 * length  # sums of digits
    assert memory.temp_size_in_bytes <= 1.05 * (length * 192 + rows)


def test_layers_are_unpacked_one_after_the_other():
    """Each layer's query depends on the layer before, and codes are unpacked after the query.

    If all were unpacked first, 16 arrays of codes (2 for each layer) would exist at a time. The
    bound is 12, since XLA reuses the memory of every second array only (9.2).
    """
    layout, length, layers = Layout((4,) * 64), 4096, 8

    def run(q_BNX, caches):
        for data_BYS in caches:
            logits_BNS = slots.logits(layout, q_BNX, data_BYS, jnp.ones(64), 3)
            q_BNX = slots.weighted_sums(layout, logits_BNS, data_BYS, jnp.ones(64), 3)
        return q_BNX

    data = jax.ShapeDtypeStruct((1, layout.bytes, length), jnp.uint8)
    q = jax.ShapeDtypeStruct((1, 1, 64), jnp.float32)
    memory = jax.jit(run).lower(q, [data] * layers).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 12 * length * 64


def test_wrong_bits():
    with pytest.raises(ValueError, match=r"bits must be 0 to 8, not \(9,\)"):
        Layout((9,))
