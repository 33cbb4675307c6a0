"""Tests of the functions of head-level linear composition: forms, extensions and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_jax.config.schema import RopeScaling
from mea_jax.ops import attention, hlc, rope
from mea_jax.ops.resolve import resolve
from tests import references
from tests.helpers import assert_close, tiny_model

# Sums of up to 32 float32 products, in a different order.
TOLERANCE = 1e-5
HEAD_DIM = 8
KINDS = ("heads", "frequency", "dense")
few = settings(max_examples=4)  # each example compiles again


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def mixing_of(kind, seed, components, composites):
    """Return a random mixing of `kind`."""
    c, k, h = components, composites, HEAD_DIM
    return normal(
        seed, *{"heads": (c, k), "frequency": (c, k, h // 2, 2), "dense": (c, h, k, h)}[kind]
    )


@pytest.mark.parametrize("kind", KINDS)
@few
@given(composites=st.integers(1, 4), missing=st.integers(0, 3), seed=st.integers(0, 9))
def test_folded_and_explicit_mixing_are_the_reference(kind, composites, missing, seed):
    components = max(composites - missing, 1)  # C need not divide K in a compressed model
    x, kernel = normal(seed, 2, 3, 5), normal(seed + 1, 5, components, HEAD_DIM)
    mix = mixing_of(kind, seed + 2, components, composites)
    weight = normal(seed + 3, 2, 3, composites, HEAD_DIM)

    def reference(x, kernel, mix):
        return references.composites(kind, jnp.einsum("btd,dch->btch", x, kernel), mix)

    def folded(x, kernel, mix):
        return jnp.tensordot(x, hlc.fold(kind, kernel, mix), axes=1)

    def explicit(x, kernel, mix):
        return hlc.mix(kind, jnp.tensordot(x, kernel, axes=1), mix)

    @jax.jit
    def results(*arguments):
        forms = (reference, folded, explicit)
        pulled = [jax.vjp(form, *arguments) for form in forms]
        return [(out, pull(weight)) for out, pull in pulled]

    expected, *others = results(x, kernel, mix)
    for found in others:
        assert_close(found, expected, rtol=1e-4, atol=4 * TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_folding_is_in_float32(kind):
    kernel, mix = normal(0, 8, 4, HEAD_DIM), mixing_of(kind, 1, 4, 4)
    low = kernel.astype(jnp.bfloat16)
    folded = hlc.fold(kind, low, mix)
    assert folded.dtype == jnp.float32
    exact = references.composites(kind, low[None].astype(jnp.float32), mix)[0]
    np.testing.assert_allclose(folded, exact, rtol=1e-5, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_mixing_keeps_the_dtype_of_activations(kind):
    """A float32 parameter does not widen bfloat16 activations."""
    x, mix = normal(0, 2, 3, 2, HEAD_DIM).astype(jnp.bfloat16), mixing_of(kind, 1, 2, 4)
    assert hlc.mix(kind, x, mix).dtype == jnp.bfloat16
    if kind != "dense":
        q = normal(2, 2, 3, 4, 1, HEAD_DIM).astype(jnp.bfloat16)
        assert hlc.absorb(kind, q, mix).dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heads", "frequency"])
@few
@given(components=st.integers(1, 4), composites=st.integers(1, 4), seed=st.integers(0, 9))
def test_absorbing_is_the_adjoint_of_mixing(kind, components, composites, seed):
    """For each query and position, q . mix(k) = absorb(q) . k."""
    q, k = normal(seed, 2, 3, composites, 2, HEAD_DIM), normal(seed + 1, 2, 5, components, HEAD_DIM)
    mix = mixing_of(kind, seed + 2, components, composites)
    expected = jnp.einsum("btkgh,bskh->bkgts", q, hlc.mix(kind, k, mix))
    absorbed = hlc.absorb(kind, q, mix)
    assert absorbed.shape == (2, 3, composites, 2, components, HEAD_DIM)
    found = jnp.einsum("btkgch,bsch->bkgts", absorbed, k)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=4 * TOLERANCE)


@pytest.mark.parametrize("kind", ["heads", "dense"])
@few
@given(components=st.integers(1, 4), composites=st.integers(1, 4), seed=st.integers(0, 9))
def test_values_may_be_mixed_after_the_weighted_sum(kind, components, composites, seed):
    """Mixing commutes with the weighted sum: sum_s p_s mix(v_s) = mix(sum_s p_s v_s).

    Each query head keeps its composite head.
    """
    p, v = normal(seed, 2, composites, 2, 3, 5), normal(seed + 1, 2, 5, components, HEAD_DIM)
    mix = mixing_of(kind, seed + 2, components, composites)
    expected = jnp.einsum("bkgts,bskh->btkgh", p, hlc.mix(kind, v, mix))
    found = hlc.mix_groups(kind, jnp.einsum("bkgts,bsch->btkgch", p, v), mix)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=4 * TOLERANCE)


@pytest.mark.parametrize("kind", ["heads", "frequency"])
@few
@given(seed=st.integers(0, 9))
def test_rope_commutes_with_mixing_of_keys(kind, seed):
    x, mix = normal(seed, 2, 6, 3, HEAD_DIM), mixing_of(kind, seed + 1, 3, 5)
    frequencies = rope.rope_frequencies(HEAD_DIM, 100.0, RopeScaling())
    table = rope.rope_table(jnp.arange(12).reshape(2, 6), frequencies)
    before = hlc.mix(kind, rope.apply_rope(x, table), mix)
    after = rope.apply_rope(hlc.mix(kind, x, mix), table)
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=TOLERANCE)


def test_rope_does_not_commute_with_dense_mixing():
    """Dense mixing of keys does not commute with rotation, so "dense" is for values only."""
    x, mix = normal(0, 1, 6, 3, HEAD_DIM), mixing_of("dense", 1, 3, 5)
    frequencies = rope.rope_frequencies(HEAD_DIM, 100.0, RopeScaling())
    table = rope.rope_table(jnp.arange(6)[None], frequencies)
    before = hlc.mix("dense", rope.apply_rope(x, table), mix)
    after = rope.apply_rope(hlc.mix("dense", x, mix), table)
    assert np.abs(before - after).max() > 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("components", "composites"), [(4, 4), (2, 8), (1, 3), (3, 6), (3, 4)])
def test_initial_mixing_repeats_each_component(kind, components, composites):
    """Consecutive composite heads share a component, as grouped queries share a key head."""
    x = normal(0, 2, 3, components, HEAD_DIM)
    mix = hlc.initial(kind, components, composites, HEAD_DIM)
    assert mix.shape == mixing_of(kind, 0, components, composites).shape
    assert mix.dtype == jnp.float32
    serving = [composite * components // composites for composite in range(composites)]
    if composites % components == 0:
        assert serving == [
            composite // (composites // components) for composite in range(composites)
        ]
    assert set(serving) == set(range(components)), "every component must be used"
    np.testing.assert_array_equal(hlc.mix(kind, x, mix), x[:, :, jnp.asarray(serving)])


@pytest.mark.parametrize("kind", KINDS)
def test_normal_mixing_keeps_the_size_of_heads(kind):
    """Mean squares over 64 x 32 draws stay the same within 10%; the standard error is about 1%."""
    x = normal(0, 64, 32, 6, HEAD_DIM)
    keys = jax.random.split(jax.random.key(0), 16)
    mixes = [hlc.draw("normal", key, kind, 6, 8, HEAD_DIM) for key in keys]
    squares = [jnp.mean(hlc.mix(kind, x, mix) ** 2) / jnp.mean(x**2) for mix in mixes]
    assert np.mean(squares) == pytest.approx(1.0, abs=0.1)
    assert np.abs(mixes[0] - mixes[1]).max() > 0.1


# -- W_lc among its extensions and relatives -------------------------------------------------


@pytest.mark.slow
@few
@given(components=st.integers(1, 4), composites=st.integers(1, 4), seed=st.integers(0, 9))
def test_wlc_is_a_case_of_both_extensions(components, composites, seed):
    """W_lc is "frequency" with equal real numbers at all frequencies, and "dense" with M kron I."""
    x, mix_CK = normal(seed, 2, 3, components, HEAD_DIM), normal(seed + 1, components, composites)
    expected = hlc.mix("heads", x, mix_CK)
    real_CKF = jnp.repeat(mix_CK[:, :, None], HEAD_DIM // 2, axis=2)
    frequency = jnp.stack([real_CKF, jnp.zeros_like(real_CKF)], axis=-1)
    kron = jnp.kron(mix_CK, jnp.eye(HEAD_DIM))  # (C H, K H)
    dense = kron.reshape(components, HEAD_DIM, composites, HEAD_DIM)
    for kind, mix in (("frequency", frequency), ("dense", dense)):
        np.testing.assert_allclose(hlc.mix(kind, x, mix), expected, rtol=1e-5, atol=TOLERANCE)


def test_mixing_keys_is_talking_heads_before_the_softmax_where_heads_share_a_query():
    """Talking heads mixes logits: q . sum_c M[c, n] k_c = sum_c M[c, n] (q . k_c)."""
    n = 4
    q_BTNH = jnp.repeat(normal(0, 2, 5, 1, HEAD_DIM), n, axis=2)
    k, v, mix = normal(1, 2, 5, n, HEAD_DIM), normal(2, 2, 5, n, HEAD_DIM), normal(3, n, n)
    segments = jnp.asarray([[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]])
    mixed = attention.dot_product_attention(q_BTNH, hlc.mix("heads", k, mix), v, segments, 0.3)
    talking = attention.talking_heads_attention(q_BTNH, k, v, segments, 0.3, mix, jnp.eye(n))
    np.testing.assert_allclose(mixed, talking, rtol=1e-4, atol=TOLERANCE)


def test_mixing_values_is_no_talking_of_probabilities():
    """The sum over c of M[c, n] (p_n v_c) keeps p_n; talking heads mixes the p of other heads."""
    n = 4
    q, k, v = (normal(i, 2, 5, n, HEAD_DIM) for i in range(3))
    mix, segments = normal(3, n, n), jnp.ones((2, 5), jnp.int32)
    mixed = attention.dot_product_attention(q, k, hlc.mix("heads", v, mix), segments, 0.3)
    for after in (mix, mix.T):
        talking = attention.talking_heads_attention(q, k, v, segments, 0.3, jnp.eye(n), after)
        assert np.abs(mixed - talking).max() > 0.5


# -- the faster form in training -------------------------------------------------------------

shapes = st.sampled_from([64, 256, 1024, 4096, 16384])
heads = st.integers(1, 64)


@given(
    kind=st.sampled_from(KINDS), d_model=shapes, heads=heads, head_dim=st.sampled_from([32, 128])
)
def test_without_compression_folding_always_wins(kind, d_model, heads, head_dim):
    assert hlc.choose_form(kind, d_model, heads, heads, head_dim) == "folded"


@given(kind=st.sampled_from(KINDS), heads=heads, missing=st.integers(1, 63))
def test_explicit_stays_the_choice_as_models_widen(kind, heads, missing):
    """The saving of explicit mixing grows with D; its cost does not."""
    components = max(heads - missing, 1)
    forms = [hlc.choose_form(kind, d, components, heads, 64) for d in (64, 512, 4096, 32768)]
    assert forms == sorted(forms, reverse=True), "folded first, explicit above some width"


@pytest.mark.parametrize(
    ("d_model", "components", "form"),
    [(256, 8, "folded"), (2048, 8, "explicit"), (2048, 16, "folded")],
)
def test_halved_heads_are_mixed_explicitly_in_wide_models_only(d_model, components, form):
    """With 16 composite heads of width 128, 8 components are explicit at D = 2048, not at 256."""
    assert hlc.choose_form("heads", d_model, components, 16, 128) == form


WIDE = {"d_model": 2048, "n_heads": 16, "n_kv_heads": 16, "head_dim": 128, "hlc_form": "auto"}


@pytest.mark.parametrize(
    ("changes", "tensor", "form"),
    [
        ({}, 1, "folded"),
        ({"key_components": 8, "value_components": 8}, 1, "explicit"),
        ({"key_components": 8, "value_components": 8}, 2, "folded"),
        ({"key_components": 8, "value_components": 8, "hlc_form": "explicit"}, 2, "explicit"),
        ({"key_components": 8}, 1, "folded"),  # a tie: one projection is faster in each form
        ({"key_components": 8, "hlc": "k"}, 1, "explicit"),
        ({"hlc_order": "after"}, 1, "folded"),  # for values; keys are explicit in either form
        ({"hlc": "none", "head_norm": False}, 1, "auto"),
    ],
)
def test_resolved_form(changes, tensor, form):
    """The form follows from shapes on one device; with split heads it is folded unless forced."""
    model = tiny_model(**WIDE | changes)
    assert resolve(model, jax.devices(), 64, tensor).hlc_form == form
