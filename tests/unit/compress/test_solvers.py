"""Tests of keys and values rebuilt from fewer heads, by each method, on random heads."""

import itertools

import numpy as np
import pytest

from mea_jax.compress import keys, values
from mea_jax.compress.grouping import partition
from mea_jax.compress.moments import complex_blocks, complex_heads, real_heads, root, unseen

D, K, H, TOKENS = 24, 4, 8, 400
F = H // 2


@pytest.fixture(scope="module")
def text():
    """Return inputs of unequal power per direction, and random (D, K, H) and (K, H, D) kernels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, D)) * np.exp(-np.arange(D) / 6)
    return x, rng.normal(size=(D, K, H)), rng.normal(size=(K, H, D))


def heads_of(x, w):
    return np.einsum("nd,dkh->nkh", x, w)


def moment(x, w):
    flat = heads_of(x, w).reshape(TOKENS, -1)
    return flat.T @ flat / TOKENS


WEIGHTS = np.random.default_rng(1).uniform(0.5, 2, (K, F))
KEYS = {
    "heads": lambda gram, c: keys.head_mixing(gram, c, WEIGHTS.mean(1)),
    "mean": keys.mean_groups,
    "frequency": lambda gram, c: keys.per_frequency(gram, c, WEIGHTS),
    "aligned": lambda gram, c: keys.aligned(gram, c, WEIGHTS, unit=False),
    "aligned, unit": lambda gram, c: keys.aligned(gram, c, WEIGHTS, unit=True),
    "groups": lambda gram, c: keys.aligned_groups(gram, c, WEIGHTS, unit=False),
}
VALUES = {
    "heads": lambda m, c, q: values.head_mixing(m, c, np.trace(q, axis1=1, axis2=2)),
    "mean": lambda m, c, q: values.mean_groups(m, c, K),
    "dense": values.dense,
    "aligned": lambda m, c, q: values.aligned(m, c, q, orthogonal=False),
    "aligned, orthogonal": lambda m, c, q: values.aligned(m, c, q, orthogonal=True),
    "groups": lambda m, c, q: values.aligned_groups(m, c, q, orthogonal=False),
}


def test_moments_of_complex_keys_are_those_of_the_activations(text):
    k = complex_heads(heads_of(*text[:2]))
    wanted = np.einsum("ngf,nhf->fgh", k.conj(), k) / TOKENS
    np.testing.assert_allclose(complex_blocks(moment(*text[:2]), K), wanted, atol=1e-12)


@pytest.mark.parametrize("name", KEYS)
def test_all_heads_rebuild_the_keys(text, name):
    found = KEYS[name](complex_blocks(moment(*text[:2]), K), K)
    rebuilt = real_heads(found.rebuilt(complex_heads(text[1])))
    np.testing.assert_allclose(rebuilt, text[1], atol=1e-8)


@pytest.mark.parametrize("components", [1, 2, 3])
@pytest.mark.parametrize("name", KEYS)
def test_residual_of_keys_is_that_of_the_activations(text, name, components):
    """The residual is weighted by head and frequency, relative to the keys' weighted power."""
    x, w = text[:2]
    found = KEYS[name](complex_blocks(moment(x, w), K), components)
    weights = {"heads": np.repeat(WEIGHTS.mean(1)[:, None], F, 1), "mean": np.ones((K, F))}
    k = complex_heads(heads_of(x, w))
    lost = k - complex_heads(heads_of(x, real_heads(found.rebuilt(complex_heads(w)))))
    wanted, whole = (np.sum(weights.get(name, WEIGHTS) * np.abs(e) ** 2) for e in (lost, k))
    assert found.residual == pytest.approx(wanted / whole, rel=1e-6)


@pytest.mark.parametrize("components", [1, 2, 3])
def test_more_freedom_loses_less(text, components):
    gram = complex_blocks(moment(*text[:2]), K)
    lost = {name: solve(gram, components).residual for name, solve in KEYS.items()}
    equal = keys.head_mixing(gram, components, np.ones(K)).residual
    assert lost["frequency"] <= lost["aligned"] + 1e-12
    assert lost["aligned"] <= lost["groups"] + 1e-12
    assert lost["aligned"] <= lost["aligned, unit"] + 1e-3
    # The same objective, with equal weights:
    ones = np.ones((K, F))
    assert keys.aligned(gram, components, ones, unit=False).residual <= equal + 1e-12
    assert equal <= keys.mean_groups(gram, components).residual + 1e-12


def test_mixing_of_any_kind_commutes_with_rotation(text):
    """Rotating components and then mixing them equals mixing them and then rotating."""
    turn_F = np.exp(1j * 7.0 * 10.0 ** -np.arange(F))
    gram = complex_blocks(moment(*text[:2]), K)
    for name in ("heads", "aligned", "frequency"):
        found = KEYS[name](gram, 2)
        components = found.components(complex_heads(text[1]))
        after = np.einsum("dcf,fcg->dgf", components * turn_F, found.full_mix())
        np.testing.assert_allclose(
            after, found.rebuilt(complex_heads(text[1])) * turn_F, atol=1e-10
        )


def test_a_gauge_under_a_norm_has_modulus_one(text):
    found = keys.aligned(complex_blocks(moment(*text[:2]), K), 2, WEIGHTS, unit=True)
    assert found.gauge is not None
    np.testing.assert_allclose(np.abs(found.gauge), 1.0, atol=1e-9)


def test_heads_that_differ_by_a_gauge_need_one_component(text):
    """If heads differ only by rotated and scaled rotary pairs, one component has no residual."""
    rng = np.random.default_rng(2)
    gauge = rng.normal(size=(K, F)) + 1j * rng.normal(size=(K, F))
    w = real_heads(complex_heads(text[1])[:, :1] * gauge)
    gram = complex_blocks(moment(text[0], w), K)
    assert keys.aligned(gram, 1, np.ones((K, F)), unit=False).residual < 1e-12
    assert keys.head_mixing(gram, 1, np.ones(K)).residual > 0.3


def output_error(text, rebuilt, q):
    x, w = text[:2]
    v, lost = heads_of(x, w), heads_of(x, w - rebuilt)
    return np.einsum("nki,kij,nkj->", lost, q, lost) / np.einsum("nki,kij,nkj->", v, q, v)


@pytest.mark.parametrize("name", VALUES)
def test_all_heads_rebuild_the_values(text, name):
    q = values.output_weights(text[2], None, np.ones(K), K)
    found = VALUES[name](moment(*text[:2]), K, q)
    np.testing.assert_allclose(found.rebuilt(text[1]), text[1], atol=1e-6)


@pytest.mark.parametrize("components", [1, 2, 3])
@pytest.mark.parametrize("name", ["dense", "aligned", "groups"])
def test_residual_of_values_is_that_after_the_output_projection(text, name, components):
    q = values.output_weights(text[2], None, np.ones(K), K)
    found = VALUES[name](moment(*text[:2]), components, q)
    wanted = output_error(text, found.rebuilt(text[1]), q)
    assert found.residual == pytest.approx(wanted, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("components", [1, 2, 3])
def test_the_dense_map_is_the_best_of_its_rank(text, components):
    """The residual is the share of the singular values after the first C H (Eckart-Young)."""
    q = values.output_weights(text[2], None, np.ones(K), K)
    weighed = np.einsum("nki,kij->nkj", heads_of(*text[:2]), root(q)[0]).reshape(TOKENS, -1)
    energy = np.linalg.svd(weighed, compute_uv=False) ** 2
    found = values.dense(moment(*text[:2]), components, q)
    wanted = energy[components * H :].sum() / energy.sum()
    assert found.residual == pytest.approx(wanted, abs=1e-10)
    aligned = values.aligned(moment(*text[:2]), components, q, orthogonal=False)
    groups = values.aligned_groups(moment(*text[:2]), components, q, orthogonal=False)
    assert found.residual <= aligned.residual + 1e-12
    assert aligned.residual <= groups.residual + 1e-9


def test_an_orthogonal_gauge_is_orthogonal(text):
    q = values.output_weights(text[2], None, np.ones(K), K)
    gauge = values.aligned(moment(*text[:2]), 2, q, orthogonal=True).gauge
    assert gauge is not None
    products = gauge @ np.swapaxes(gauge, 1, 2)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(H), products.shape), atol=1e-8)


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_the_best_groups_are_the_best_of_all(groups):
    rng = np.random.default_rng(groups)
    costs = {
        frozenset(s): rng.uniform() * len(s)
        for n in range(1, 6)
        for s in itertools.combinations(range(5), n)
    }
    found = partition(5, groups, lambda group: costs[frozenset(group)])
    assert sorted(h for group in found for h in group) == list(range(5))
    labels = itertools.product(range(groups), repeat=5)
    wanted = min(
        sum(costs[frozenset(h for h in range(5) if label[h] == g)] for g in range(groups))
        for label in labels
        if len(set(label)) == groups
    )
    assert sum(costs[frozenset(group)] for group in found) == pytest.approx(wanted)


def test_many_heads_are_joined_greedily():
    """Twelve heads in three distinct clusters are partitioned into these clusters."""
    places = np.repeat([0.0, 10.0, 20.0], 4)[np.random.default_rng(0).permutation(12)]
    found = partition(12, 3, lambda group: float(np.var(places[list(group)]) * len(group)))
    assert sorted(len({*places[list(group)]}) for group in found) == [1, 1, 1]


def test_what_the_text_lacks_is_counted():
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    assert unseen((vectors * np.array([1, 1, 1, 1, 0, 0])) @ vectors.T) == 2
    assert unseen(np.eye(6)) == 0
