"""The division of bits over slots, and the quantiser's table."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_jax.compress import bits
from mea_jax.ops import slots


@pytest.mark.parametrize("count", range(1, 9))
def test_the_table_is_that_of_the_best_uniform_quantiser(count):
    """Mean square errors of 10^6 Gaussian numbers: at the step of the table and beside it."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1_000_000, 1)), jnp.float32)
    layout = slots.Layout((count,))

    def lost(step):
        step_X = jnp.asarray([step], jnp.float32)
        found = slots.dequantise(layout, slots.quantise(layout, x, step_X), step_X)
        return float(jnp.mean(jnp.square(found - x)))

    step = bits.STEPS[count - 1]
    assert lost(step) == pytest.approx(bits.DISTORTIONS[count], rel=0.02)
    assert lost(step) < min(lost(0.9 * step), lost(1.1 * step))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4), st.integers(0, 12))
def test_no_other_division_loses_less(weights, total):
    weights_X = np.asarray(weights)
    table = np.asarray(bits.DISTORTIONS)
    found = bits.Division(weights_X).bits(total)
    assert found.sum() == total if total <= 8 * len(weights) else 8 * len(weights)
    every = (
        np.asarray(one)
        for one in itertools.product(range(9), repeat=len(weights))
        if sum(one) == found.sum()
    )
    best = min(float(weights_X @ table[one]) for one in every)
    assert float(weights_X @ table[found]) <= best * (1 + 1e-12)


def test_slots_of_no_variance_get_their_bits_last():
    found = bits.Division(np.asarray([0.0, 1.0, 0.0])).bits(9)
    assert found[1] == 8
    assert found.sum() == 9
    assert bits.steps(np.asarray([0.0, 4.0, 1.0]), np.asarray([1, 2, 0])).tolist() == [
        1.0,
        2 * bits.STEPS[1],
        1.0,
    ]


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_wrong_weights(wrong):
    with pytest.raises(ValueError, match="finite and at least 0"):
        bits.Division(np.asarray([1.0, wrong]))
