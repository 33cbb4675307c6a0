"""Tests of budgets: the division over layers is optimal, and its bytes are those of the arrays."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.compress.budgets import allot, cache_bytes, choose_layers, heads_kept, uniform
from mea_jax.compress.methods import target_model
from mea_jax.errors import UserError
from mea_jax.generate.decode import empty_cache, serve
from tests.helpers import PLAIN, params_of, tiny_model


@pytest.mark.parametrize("seed", range(5))
def test_the_division_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    costs = [list(map(int, 16 * rng.integers(1, 6, 4))) for _ in range(4)]
    losses = [list(map(float, rng.normal(0.3, 0.5, 4))) for _ in range(4)]
    total = int(sum(map(np.mean, costs)))

    def value(options):
        if sum(c[o] for c, o in zip(costs, options, strict=True)) > total:
            return np.inf
        return sum(max(w[o], 0) for w, o in zip(losses, options, strict=True))

    found = allot(costs, losses, total)
    wanted = min(value(options) for options in itertools.product(range(4), repeat=4))
    assert value(found) == pytest.approx(wanted)


def test_a_total_below_the_cheapest_is_an_error():
    with pytest.raises(ValueError, match="cheapest"):
        allot([[4, 8], [4, 8]], [[1.0, 0.0]] * 2, 7)


@pytest.mark.parametrize("method", ["aligned", "frequency"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_bytes_are_those_of_the_arrays_that_a_generator_holds(method, qk_norm):
    """Cache bytes include the scalars of a key norm, but only in layers with compressed keys."""
    model = tiny_model(qk_norm=qk_norm, **PLAIN)
    target = target_model(model, method, [2, 4], [1, 4])
    served, _ = serve(target, params_of(target))
    cache = jax.eval_shape(functools.partial(empty_cache, served, 1, 128, jnp.bfloat16))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers)) / 128
    assert sum(map(sum, cache_bytes(target))) == size
    scalars = 4 * 4 if qk_norm else 0
    assert cache_bytes(target) == [(2 * 8 * 2 + scalars, 8 * 2), (4 * 8 * 2, 4 * 8 * 2)]


def test_layers_by_name_are_the_papers():
    assert choose_layers("half", 48) == list(range(12, 36))
    assert choose_layers("deep", 48) == list(range(3, 48))
    assert choose_layers("full", 6) == list(range(6))
    assert choose_layers("1,3-5", 6) == [1, 3, 4, 5]


@pytest.mark.parametrize("words", ["some", "7", "2-9", "", "-3", "4-2"])
def test_other_layers_are_refused(words):
    with pytest.raises(UserError, match="--layers="):
        choose_layers(words, 6)


def test_a_layer_keeps_a_head():
    assert uniform(0.5, 8) == 4
    assert uniform(0.3, 10) == 3
    with pytest.raises(UserError, match=r"--keep=0\.1 leaves less than one of 4 heads: keep 0\.25"):
        uniform(0.1, 4)
    for keep in (0.0, -1.0, 1.5):
        with pytest.raises(UserError, match="must be in"):
            uniform(keep, 4)


def test_a_share_between_whole_heads_is_refused_with_the_shares_beside_it():
    with pytest.raises(UserError, match=r"1 are 0\.333 of the cache and 2 are 0\.667.*measured"):
        uniform(0.5, 3)
    assert uniform(0.333, 3) == 1
    assert uniform(0.667, 3) == 2
    assert heads_kept(0.5, 3) == 1.5
