"""Tests of rotary positions against complex numbers, and of llama3 scaling against a loop."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mea_jax.config.schema import RopeScaling
from mea_jax.ops.rope import apply_rope, rope_frequencies, rope_table

LLAMA3 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
# Angles of up to 300 radians have float32 errors of 300 * 2^-24 = 2e-5.
TOLERANCE = 1e-4


def rotate(x_BTNH, positions_BT, theta=10_000.0):
    frequencies = rope_frequencies(x_BTNH.shape[-1], theta, RopeScaling())
    table = rope_table(jnp.asarray(positions_BT), frequencies)
    return np.asarray(apply_rope(jnp.asarray(x_BTNH), table))


@pytest.mark.slow
@given(
    half=st.integers(1, 6),
    theta=st.sampled_from([100.0, 10_000.0, 500_000.0]),
    seed=st.integers(0, 9),
)
def test_rope_is_a_complex_rotation(half, theta, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 5, 3, 2 * half)).astype(np.float32)
    positions = rng.integers(0, 300, (2, 5), dtype=np.int32)
    angles = positions[:, :, None, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(x, positions, theta), expected, atol=TOLERANCE)


@given(shift=st.integers(0, 200), seed=st.integers(0, 9))
def test_scores_depend_on_the_distance_alone(shift, seed):
    q, k = np.random.default_rng(seed).standard_normal((2, 1, 1, 1, 8)).astype(np.float32)
    near = np.vdot(rotate(q, np.array([[17]])), rotate(k, np.array([[5]])))
    far = np.vdot(rotate(q, np.array([[17 + shift]])), rotate(k, np.array([[5 + shift]])))
    np.testing.assert_allclose(near, far, atol=10 * TOLERANCE)


def test_position_zero_is_the_identity():
    x = np.random.default_rng(0).standard_normal((1, 2, 2, 6)).astype(np.float32)
    np.testing.assert_array_equal(rotate(x, np.zeros((1, 2), np.int32)), x)


def test_no_scaling_is_the_plain_series():
    expected = [500_000.0 ** (-2 * i / 64) for i in range(32)]
    # float64 throughout
    np.testing.assert_allclose(rope_frequencies(64, 500_000.0, RopeScaling()), expected, rtol=1e-12)


@pytest.mark.parametrize("scaling", [LLAMA3, RopeScaling(8.0, 1.0, 4.0, 8192)])
def test_llama3_scaling(scaling):
    """The frequencies are those of a loop over wavelengths, as in the published description."""
    expected = []
    for frequency in [500_000.0 ** (-2 * i / 64) for i in range(32)]:
        wavelength = 2 * math.pi / frequency
        if wavelength < scaling.original_context / scaling.high_freq_factor:
            expected.append(frequency)
        elif wavelength > scaling.original_context / scaling.low_freq_factor:
            expected.append(frequency / scaling.factor)
        else:
            smooth = scaling.original_context / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            expected.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    scaled = rope_frequencies(64, 500_000.0, scaling)
    np.testing.assert_allclose(scaled, expected, rtol=1e-12)  # float64 throughout
    plain = rope_frequencies(64, 500_000.0, RopeScaling())
    ratio = plain / scaled
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(scaling.factor)
    assert ((ratio > 1.01) & (ratio < 0.99 * scaling.factor)).any(), "none is between"


def test_bfloat16_is_rotated_in_float32():
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 8)).astype(np.float32)
    positions = np.array([[1, 77, 250]], np.int32)
    low = jnp.asarray(x, jnp.bfloat16)
    table = rope_table(jnp.asarray(positions), rope_frequencies(8, 10_000.0, RopeScaling()))
    turned = apply_rope(low, table)
    assert turned.dtype == jnp.bfloat16
    exact = rotate(np.asarray(low, np.float32), positions)
    # A single rounding of values up to 4 to 8 bits of mantissa.
    np.testing.assert_allclose(np.asarray(turned, np.float32), exact, atol=4 * 2**-9)
