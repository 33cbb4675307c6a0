"""The logits of keys' mean: against rotated means at each position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_jax.config.schema import RopeScaling
from mea_jax.ops.mean_key import mean_logits
from mea_jax.ops.rope import apply_rope, rope_frequencies, rope_table


def reference(q_BKGH, mean_KH, start_B, length, frequencies_F, factor):
    """The mean is rotated to each position and multiplied with each query."""
    places_BS = start_B[:, None] + jnp.arange(length)[None]
    table = rope_table(places_BS, frequencies_F, factor)
    shape = (*places_BS.shape, *mean_KH.shape)
    mean_BSKH = apply_rope(jnp.broadcast_to(mean_KH[None, None], shape), table)
    return jnp.einsum("bkgh,bskh->bkgs", q_BKGH, mean_BSKH, precision="highest")


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 5, 512, 513, 1100]),
    st.lists(st.integers(-40, 900), min_size=2, max_size=2),
    st.sampled_from([1.0, 1.37]),
    st.integers(0, 99),
)
def test_it_equals_the_product_with_rotated_means(k, length, starts, factor, seed):
    keys = jax.random.split(jax.random.key(seed))
    q_BKGH = jax.random.normal(keys[0], (2, k, 3, 16))
    mean_KH = jax.random.normal(keys[1], (k, 16))
    frequencies_F = rope_frequencies(16, 1e4, RopeScaling())
    start_B = jnp.asarray(starts, jnp.int32)
    found = mean_logits(q_BKGH, mean_KH, start_B, length, frequencies_F, factor)
    wanted = reference(q_BKGH, mean_KH, start_B, length, frequencies_F, factor)
    # A rounding of angles up to 2,000 radians in float32 is 1e-4 of a radian.
    np.testing.assert_allclose(found, wanted, atol=3e-3, rtol=1e-4)


def test_without_positions_it_is_the_same_everywhere():
    q_BKGH = jax.random.normal(jax.random.key(0), (1, 2, 2, 8))
    mean_KH = jax.random.normal(jax.random.key(1), (2, 8))
    found = mean_logits(q_BKGH, mean_KH, jnp.asarray([7], jnp.int32), 600, np.zeros(4))
    wanted = jnp.einsum("bkgh,kh->bkg", q_BKGH, mean_KH)[..., None]
    np.testing.assert_allclose(found, np.broadcast_to(wanted, found.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [512, 8192])
def test_the_program_has_no_table_of_all_positions(length):
    """Cosines and sines are constants of at most 512 positions, so nothing grows but the result."""
    shapes = ((1, 1, 1, 64), (1, 64), (1,))
    q, mean, start = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    frequencies_F = rope_frequencies(64, 1e4, RopeScaling())
    run = jax.jit(lambda q, m, s: mean_logits(q, m, s.astype(jnp.int32), length, frequencies_F))
    jaxpr = run.trace(q, mean, start).jaxpr
    constants = sum(np.asarray(value).size for value in jaxpr.consts)
    assert constants <= 512 * 64 + 16 * 64
