"""Tests of sampling the next token from logits, against sorting in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mea_jax.errors import UserError
from mea_jax.ops.sampling import Sampling, choose, restrict

VOCAB = 12
many = settings(max_examples=50)  # a single shape: only another k compiles again
# Two different numbers differ enough that their probabilities differ.
numbers = st.integers(-128, 128).map(lambda i: i / 16)
logits_of = functools.partial(st.lists, numbers, min_size=VOCAB, max_size=VOCAB)


def kept(logits, **options):
    """Return a mask of the tokens that may be drawn."""
    row = jnp.asarray(logits, jnp.float32)[None]
    return np.asarray(jax.nn.softmax(restrict(row, Sampling(1.0, **options))))[0] > 0


def smallest_set(p, top_p):
    """Return a mask of the fewest tokens whose probabilities reach `top_p`, by sorting."""
    order = np.argsort(-p, kind="stable")
    count = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    chosen = np.zeros(len(p), bool)
    chosen[order[:count]] = True
    return chosen


def decided(p, top_p):
    """Return whether no sum of probabilities is within 1e-5 of `top_p`.

    Otherwise float32 rounding decides which set of tokens is kept, and two sets are right.
    """
    return np.abs(np.cumsum(-np.sort(-p)) - top_p).min() > 1e-5


def softmax(logits):
    p = np.exp(np.float64(logits) - np.max(logits))
    return p / p.sum()


@many
@given(logits=logits_of(unique=True), top_p=st.floats(0.05, 0.999))
def test_top_p_keeps_the_fewest_tokens_that_reach_it(logits, top_p):
    p = softmax(logits)
    assume(decided(p, top_p))
    np.testing.assert_array_equal(kept(logits, top_p=top_p), smallest_set(p, top_p))


@many
@given(logits=logits_of(unique=True), top_k=st.integers(1, VOCAB + 3))
def test_top_k_keeps_the_k_largest(logits, top_k):
    expected = np.zeros(VOCAB, bool)
    expected[np.argsort(-np.float32(logits), kind="stable")[:top_k]] = True
    np.testing.assert_array_equal(kept(logits, top_k=top_k), expected)


@pytest.mark.slow
@many
@given(logits=logits_of(unique=True), top_k=st.integers(1, VOCAB), top_p=st.floats(0.05, 0.999))
def test_top_p_counts_what_top_k_has_left(logits, top_k, top_p):
    first = kept(logits, top_k=top_k)
    p = np.where(first, softmax(logits), 0)
    p /= p.sum()
    assume(decided(p, top_p))
    expected = smallest_set(p, top_p) & first
    np.testing.assert_array_equal(kept(logits, top_k=top_k, top_p=top_p), expected)


def test_tokens_as_likely_as_the_last_one_stay():
    assert kept([3.0, 2.0, 2.0, 1.0], top_k=2).tolist() == [True, True, True, False]
    assert kept([2.0, 2.0, 2.0, 2.0], top_p=0.3).all()


def test_the_likeliest_token_always_stays():
    assert kept([9.0, 0.0, 0.0], top_p=1e-6).tolist() == [True, False, False]


def test_nothing_is_hidden_by_default():
    logits = jnp.asarray([[1.0, -50.0, 3.0]])
    np.testing.assert_array_equal(restrict(logits, Sampling(0.7)), logits)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.0, top_k=3, top_p=0.5), Sampling(5.0, top_k=1)]
)
def test_greedy(sampling):
    """The most likely token is chosen at temperature 0, and with top_k=1 at any temperature."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((200, VOCAB)), jnp.float32)
    chosen = choose(logits, keys(200), sampling)
    assert chosen.dtype == jnp.int32
    np.testing.assert_array_equal(chosen, np.argmax(logits, axis=1))


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0), VOCAB),
        (Sampling(0.5), VOCAB),
        (Sampling(2.0, top_k=5), 5),
        (Sampling(3.0, top_p=0.7), None),  # 8 tokens; at temperature 1 it would be 7
    ],
)
def test_frequencies_are_the_probabilities(sampling, allowed):
    """Pearson's statistic of 20,000 draws is below 40.

    With 11 degrees of freedom, chance exceeds 40 once in 30,000 times.
    """
    draws = 20_000
    logits = np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32)
    p = softmax(logits / sampling.temperature)
    if allowed is None:
        p = np.where(smallest_set(p, sampling.top_p), p, 0)
    else:
        p[np.argsort(-p)[allowed:]] = 0
    p /= p.sum()
    rows = jnp.broadcast_to(jnp.asarray(logits)[None], (draws, VOCAB))
    chosen = jax.jit(choose, static_argnums=2)(rows, keys(draws), sampling)
    counts = np.bincount(np.asarray(chosen), minlength=VOCAB)
    assert counts[p == 0].sum() == 0
    expected = draws * p[p > 0]
    assert len(expected) > 3
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 40


def test_a_rows_token_depends_on_its_own_key_and_logits():
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((64, VOCAB)), jnp.float32)
    first = choose(logits, keys(64), Sampling(1.0))
    np.testing.assert_array_equal(choose(logits, keys(64), Sampling(1.0)), first)
    assert (choose(logits, keys(64, seed=1), Sampling(1.0)) != first).any()
    alone = choose(logits[7:8], keys(64)[7:8], Sampling(1.0))
    assert alone[0] == first[7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"^temperature=-0\.1 must be 0 \(greedy\) or more$"),
        ({"temperature": float("nan")}, r"^temperature=nan must be 0"),
        ({"top_k": -1}, r"^top_k=-1 must be 0 \(all tokens\) or more$"),
        ({"top_p": 0.0}, r"^top_p=0\.0 must be above 0"),
        ({"top_p": 1.5}, r"^top_p=1\.5 must be above 0"),
    ],
)
def test_sampling_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)
