"""Tests of the measures of mixing matrices and heads, on examples with known answers."""

import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.ops import hlc
from mea_jax.study import head_measures as measures
from mea_jax.study.clusters import clusters, silhouette

KINDS = ("heads", "frequency", "dense")


def off_diagonal(size):
    return ~np.eye(size, dtype=bool)


def blocks(rng, size, noise):
    """Return a matrix with two groups of equal rows and of equal columns, plus noise."""
    signs = np.kron([[1.0, 1.0], [1.0, -1.0]], np.ones((size // 2, size // 2)))
    return signs + noise * rng.standard_normal((size, size))


# -- clusters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_blocks_are_clusters(side):
    """The groups are found with p < 0.01, for any diagonal."""
    x = blocks(np.random.default_rng(0), 8, 0.3) + 5 * np.eye(8)
    found = clusters(x if side == "rows" else x.T, off_diagonal(8), True, 999, 0)
    assert found is not None
    assert found.p < 0.01
    assert found.groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found.silhouette > found.chance


@pytest.mark.parametrize("scales", [0.0, 1.0])
@pytest.mark.parametrize("signed", [True, False])
def test_chance_is_no_cluster(scales, signed):
    """The p of random mixings is uniform, also with heads of very different scales.

    Of 120 uniform p, the share at or below x has a standard deviation below sqrt(x / 120). The
    bounds are four standard deviations.
    """
    rng, found = np.random.default_rng(1), []
    for seed in range(120):
        loud_C1, loud_1K = np.exp(scales * rng.standard_normal((2, 8)))[:, :, None]
        x = rng.standard_normal((8, 8)) * loud_C1 * loud_1K.T
        result = clusters(x if signed else np.abs(x), off_diagonal(8), signed, 59, seed)
        assert result is not None
        found.append(result.p)
    for level in (0.05, 0.2, 0.5, 0.8):
        share = np.mean(np.array(found) <= level)
        assert abs(share - level) < 4 * np.sqrt(level * (1 - level) / 120), level
    assert min(found) >= 1 / 60


def test_sign_and_scale_of_a_head_are_no_matter():
    """Flipping and scaling rows and columns keeps the groups, and p stays below 0.02."""
    rng = np.random.default_rng(2)
    x = blocks(rng, 8, 0.3)
    signs = rng.choice([-1.0, 1.0], (2, 8)) * np.exp(rng.standard_normal((2, 8)))
    other = x * signs[0][:, None] * signs[1]
    one, two = (clusters(y, off_diagonal(8), True, 199, 0) for y in (x, other))
    assert one is not None
    assert two is not None
    assert (one.groups, two.groups) == ([[0, 1, 2, 3], [4, 5, 6, 7]],) * 2
    assert max(one.p, two.p) < 0.02  # shuffles of a row keep its signs, so chance differs
    # Balancing stops after a few sweeps, so the last digits differ.
    assert two.silhouette == pytest.approx(one.silhouette, abs=0.02)


def test_silhouette_is_rousseeuws():
    """Points 0, 1 and 10 on a line, the first two in a group, have 9/10, 8/9 and 0 (alone)."""
    points = np.array([0.0, 1.0, 10.0])
    distance = np.abs(points[:, None] - points[None])
    found = silhouette(distance[None], np.array([[0, 0, 2]]))
    np.testing.assert_allclose(found, [(9 / 10 + 8 / 9 + 0) / 3], rtol=1e-12)


def test_too_little_is_not_tested():
    few = np.random.default_rng(3).standard_normal((2, 8))
    assert clusters(few, np.ones((2, 8), bool), True, 19, 0) is None
    three = np.random.default_rng(3).standard_normal((3, 3))  # rows share one column
    assert clusters(three, off_diagonal(3), True, 19, 0) is None
    assert clusters(np.eye(8), off_diagonal(8), True, 19, 0) is None


# -- the mixing --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("components", [4, 2])
def test_the_start_is_at_no_distance(kind, components):
    parameter = np.asarray(hlc.initial(kind, components, 4, 8))
    mix = measures.as_mixing(kind, parameter)
    start = measures.block_identity_redundancy(kind, components, 4, 8)
    assert measures.distance(mix, start) == 0
    assert measures.distance(1.5 * mix, start) == pytest.approx(0.5)
    assert measures.from_others(kind, mix) == 0
    assert measures.own_weight(kind, mix) == pytest.approx(1)
    assert measures.head_level(kind, mix) == pytest.approx(1)
    np.testing.assert_allclose(
        measures.by_pair(kind, mix), hlc.block_identity(components, 4), atol=1e-12
    )
    values = measures.singular_values(kind, mix)
    np.testing.assert_allclose(values, np.sqrt(4 / components), rtol=1e-6)
    assert measures.rank_in_heads(kind, values, 8) == pytest.approx(components)


def test_weights_from_others_and_beyond_whole_heads():
    even = np.ones((4, 4))
    assert measures.from_others("heads", even) == pytest.approx(3 / 4)
    turned = (
        measures.block_identity_redundancy("frequency", 4, 4, 8) * 1j
    )  # rotated by a right angle: no real part
    assert measures.head_level("frequency", turned) == pytest.approx(0)
    assert measures.from_others("frequency", turned) == pytest.approx(0)
    quarter = np.zeros((8, 8))
    quarter[np.arange(0, 8, 2), np.arange(1, 8, 2)] = 1
    swapped = np.einsum("ck,hj->chkj", np.eye(4), quarter + quarter.T)  # features in pairs
    assert measures.head_level("dense", swapped) == pytest.approx(0)
    assert measures.distance(
        swapped, measures.block_identity_redundancy("dense", 4, 4, 8)
    ) == pytest.approx(2**0.5)


def test_effective_rank():
    """The rank is exp(entropy): n for n equal values, 2 sqrt 2 for shares 1/2, 1/4, 1/4."""
    assert measures.effective_rank(np.array([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
    assert measures.effective_rank(np.array([2.0, 1.0, 1.0])) == pytest.approx(2 * 2**0.5)
    assert measures.effective_rank(np.array([5.0])) == pytest.approx(1)
    np.testing.assert_allclose(
        measures.effective_rank(np.array([[1.0, 1.0], [1.0, 0.0]])), [2, 1], rtol=1e-12
    )


def rotation(rng, width):
    return np.linalg.qr(rng.standard_normal((width, width)))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_composites_are_blind_to_the_components_basis(kind):
    """A change of the components' basis changes the spectrum of M, not that of composite heads.

    R^-1 on components and R M as mixing give the same function. The scale of a composite head has
    no effect either.
    """
    rng = np.random.default_rng(4)
    kernel_DCH = rng.standard_normal((16, 3, 4))
    shapes = {"heads": (3, 4), "frequency": (3, 4, 2, 2), "dense": (3, 4, 4, 4)}
    parameter = rng.standard_normal(shapes[kind])
    change = rng.standard_normal((3, 3)) + 2 * np.eye(3)
    other_kernel = np.einsum("dch,ce->deh", kernel_DCH, np.linalg.inv(change))
    other_parameter = np.tensordot(change, parameter, axes=1)

    def both(kernel, parameter):
        folded = hlc.fold(kind, jnp.asarray(kernel), jnp.asarray(parameter))
        covariance = measures.covariance_of(np.asarray(folded), np.eye(16))
        composite = measures.composite_values(kind, covariance, 4)
        mix = measures.as_mixing(kind, parameter)
        return composite, measures.singular_values(kind, mix)

    (composite, values), (composite2, values2) = (
        both(kernel_DCH, parameter), both(other_kernel, other_parameter),
    )  # fmt: skip
    # Folding is in float32; a singular value of 0 is the root of an eigenvalue of 1e-7.
    np.testing.assert_allclose(composite, composite2, atol=2e-3)
    assert np.abs(values - values2).max() > 0.1
    composites = {"heads": (1, 4), "frequency": (1, 4, 1, 1), "dense": (1, 1, 4, 1)}[kind]
    louder = parameter * np.array([1, 5, 1, 2]).reshape(composites)
    np.testing.assert_allclose(both(kernel_DCH, louder)[0], composite, atol=2e-3)
    rank = measures.rank_in_heads(kind, composite, 4)
    assert 1 < rank <= 3 + 0.01  # three components do not make four heads


# -- redundancy --------------------------------------------------------------------------------


def covariance(x_BKH):
    flat = (x_BKH - x_BKH.mean(axis=0)).reshape(len(x_BKH), -1)
    return flat.T @ flat / len(flat)


def test_copies_are_alike_and_independent_heads_are_not():
    rng = np.random.default_rng(5)
    head = rng.standard_normal((20_000, 1, 4)) * np.array([3, 2, 1, 0.5])
    same = measures.redundancy(covariance(np.repeat(head, 3, axis=1)), 3)
    assert same["cka"] == pytest.approx(1)
    assert same["canonical"] == pytest.approx(1, abs=1e-4)  # reduced by the ridge
    assert same["effective_heads"] == pytest.approx(1, abs=1e-6)
    apart = measures.redundancy(covariance(rng.standard_normal((20_000, 3, 4))), 3)
    # By chance, both are about H / n for n tokens.
    assert 0 <= apart["cka"] < 0.001
    assert 0 <= apart["canonical"] < 0.001
    assert apart["effective_heads"] == pytest.approx(3, abs=0.001)


def test_a_heads_basis_changes_nothing():
    """Rotating and scaling single heads changes neither measure.

    Invertible maps of heads change CKA but not the canonical correlations.
    """
    rng = np.random.default_rng(6)
    shared = rng.standard_normal((500, 6))
    x_BKH = np.stack([shared @ rng.standard_normal((6, 4)) for _ in range(3)], axis=1)
    turned = np.stack([(k + 1) * x_BKH[:, k] @ rotation(rng, 4) for k in range(3)], axis=1)
    before, after = (measures.redundancy(covariance(x), 3) for x in (x_BKH, turned))
    assert after == pytest.approx(before, rel=1e-6)
    assert 0.2 < before["cka"] < 0.98
    skewed = np.stack([x_BKH[:, k] @ rng.standard_normal((4, 4)) for k in range(3)], axis=1)
    skew = measures.redundancy(covariance(skewed), 3)
    # The ridge is a millionth, and the condition numbers of the maps are hundreds.
    assert skew["canonical"] == pytest.approx(before["canonical"], abs=0.01)
    assert skew["cka"] != pytest.approx(before["cka"], abs=0.01)


def test_random_heads_of_one_residual_are_alike_by_chance():
    """Two random H-dimensional subspaces of D features have mean squared cosines of H / D."""
    found = measures.chance(np.eye(64), 6, 8, 0)
    assert found["canonical"] == pytest.approx(8 / 64, rel=0.1)
    narrow = np.diag(np.where(np.arange(64) < 8, 1.0, 1e-3))
    assert measures.chance(narrow, 6, 8, 0)["cka"] > found["cka"] + 0.2
