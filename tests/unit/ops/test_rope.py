"""Tests of rotary positions against complex numbers, and of scaled frequencies against numpy."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mea_jax.config.schema import RopeScaling
from mea_jax.ops.rope import apply_rope, attention_factor, rope_frequencies, rope_table

LLAMA3 = RopeScaling("llama3", 32.0, 1.0, 4.0, original_context=8192)
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


@pytest.mark.parametrize("scaling", [LLAMA3, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)])
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


@pytest.mark.parametrize("kind", ["none", "linear", "dynamic"])
def test_linear_scaling_divides_all_frequencies_and_dynamic_none(kind):
    plain = 500_000.0 ** (-np.arange(32) / 32)
    wanted = plain / 4.0 if kind == "linear" else plain
    found = rope_frequencies(64, 500_000.0, RopeScaling(kind, 4.0))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)  # float64 throughout


@given(
    half=st.integers(8, 64),
    theta=st.sampled_from([10_000.0, 1_000_000.0]),
    factor=st.floats(1.0, 40.0),
    original=st.integers(256, 32768),
    betas=st.sampled_from([(32.0, 1.0), (8.0, 2.0)]),
    truncate=st.booleans(),
)
def test_yarn_interpolates_between_two_pairs(half, theta, factor, original, betas, truncate):
    """The pair that turns beta times solves original * theta^(-pair / half) = 2 pi beta."""
    ends = [half * math.log(original / (2 * math.pi * b)) / math.log(theta) for b in betas]
    if truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    ends = [max(ends[0], 0), min(ends[1], 2 * half - 1)]
    divided = np.interp(np.arange(half), ends, [0.0, 1.0])
    plain = theta ** (-np.arange(half) / half)
    scaling = RopeScaling(
        "yarn",
        factor,
        original_context=original,
        beta_fast=betas[0],
        beta_slow=betas[1],
        truncate=truncate,
    )
    found = rope_frequencies(2 * half, theta, scaling)
    wanted = (1 - divided) * plain + divided * plain / factor
    np.testing.assert_allclose(found, wanted, rtol=1e-9)  # float64, of a quotient of small numbers


def test_yarn_between_equal_ends_is_a_step():
    """Both ends are pair 0 if the original context is shorter than a turn of all pairs."""
    found = rope_frequencies(8, 10_000.0, RopeScaling("yarn", 4.0, original_context=6))
    plain = 10_000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(found, [plain[0], *plain[1:] / 4], rtol=1e-12)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        (RopeScaling("yarn", 16.0), 0.1 * math.log(16) + 1),
        (RopeScaling("yarn", 16.0, mscale=0.5), 0.1 * math.log(16) + 1),
        (
            RopeScaling("yarn", 16.0, mscale=1.0, mscale_all_dim=0.5),
            (0.1 * math.log(16) + 1) / (0.05 * math.log(16) + 1),
        ),
        (RopeScaling("yarn", 16.0, attention_factor=0.7, mscale=1.0, mscale_all_dim=0.5), 0.7),
        (RopeScaling("llama3", 16.0, attention_factor=0.7), 1.0),
    ],
)
def test_the_attention_factor_lengthens_rotated_heads(scaling, factor):
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 8)).astype(np.float32)
    frequencies = rope_frequencies(8, 10_000.0, scaling)
    table = rope_table(jnp.asarray([[0, 7, 99]]), frequencies, attention_factor(scaling))
    turned = np.linalg.norm(apply_rope(jnp.asarray(x), table), axis=-1)
    np.testing.assert_allclose(turned, factor * np.linalg.norm(x, axis=-1), rtol=1e-5)  # float32


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
