"""Tests of gains over a baseline, against synthetic runs with a known gain."""

# mypy: disable-error-code="union-attr,operator"
# An estimate that is None fails its test.

import math

import numpy as np
import pytest

from mea_jax.errors import UserError
from mea_jax.study.laws import Result, fit_gains

BEST = {"mha": 2e-3, "mea": 4e-3}
GRID = tuple(5e-4 * 2**i for i in range(6))


def runs(random, gain=0.02, seeds=3, noise=0.002, shared=0.1, diverged=()):
    """Return runs with losses quadratic in log lr around `BEST`.

    A seed changes the losses of all variants by the same amount.
    """
    of_seed = shared * random.normal(size=seeds)
    found = []
    for variant, best in BEST.items():
        for rate in GRID:
            for seed in range(seeds):
                loss = 3 + 0.05 * math.log(rate / best) ** 2 - gain * (variant == "mea")
                loss += of_seed[seed] + noise * random.normal()
                lost = (variant, rate, seed) in diverged
                found.append(
                    Result(variant, rate, "s", 10**6, 10**7, seed, None if lost else loss, lost)
                )
    return found


def of_mea(found):
    return next(g for g in found if g.variant == "mea")


def test_intervals_hold_the_gain_though_seeds_differ_by_more():
    held, reach = [], []
    for trial in range(200):
        gain = of_mea(fit_gains(runs(np.random.default_rng(trial)))).gain
        held.append(gain.low <= 0.02 <= gain.high)
        reach.append(gain.high - gain.low)
    assert np.mean(held) >= 0.9
    assert np.median(reach) < 0.03, "common shifts of a seed are not noise"


def test_each_has_the_learning_rate_that_suits_it():
    mea, mha = sorted(fit_gains(runs(np.random.default_rng(0))), key=lambda g: g.variant)
    assert (mea.learning_rate, mha.learning_rate) == (4e-3, 2e-3)
    assert (mea.seeds, mea.at_edge, mha.gain, mea.baseline) == (3, False, None, "mha")
    assert mea.loss < mha.loss
    assert 0.03 < mea.spread < 0.3


def test_a_learning_rate_at_which_a_seed_diverges_is_none_to_choose():
    found = runs(np.random.default_rng(0), diverged={("mea", 4e-3, 1)})
    assert of_mea(fit_gains(found)).learning_rate in (2e-3, 8e-3)
    every = {("mea", rate, 1) for rate in GRID}
    lost = of_mea(fit_gains(runs(np.random.default_rng(0), diverged=every)))
    assert lost.learning_rate is None
    assert lost.reason == "runs diverged at every learning rate: add a lower one"


def test_a_value_at_the_end_of_the_grid_is_said_to_be():
    found = [run for run in runs(np.random.default_rng(0)) if run.learning_rate <= 4e-3]
    assert of_mea(fit_gains(found)).at_edge


def test_one_seed_has_a_gain_and_no_interval():
    gain = of_mea(fit_gains(runs(np.random.default_rng(0), seeds=1, noise=0.0)))
    assert gain.spread is None
    assert gain.gain.low is None
    assert gain.gain.value == pytest.approx(0.02)


def test_a_baseline_by_name_and_one_that_is_not_there():
    found = fit_gains(runs(np.random.default_rng(0), noise=0.0), "mea")
    assert {g.variant: g.gain is None for g in found} == {"mea": True, "mha": False}
    assert next(g for g in found if g.variant == "mha").gain.value == pytest.approx(-0.02)
    with pytest.raises(UserError, match="no runs of the baseline 'gqa': choose one of mea, mha"):
        fit_gains(runs(np.random.default_rng(0)), "gqa")


def test_without_common_seeds_there_is_no_difference():
    found = [
        run for run in runs(np.random.default_rng(0)) if (run.variant == "mea") == (run.seed == 2)
    ]
    mea = of_mea(fit_gains(found))
    assert mea.gain is None
    assert mea.reason == "no seed has runs at the best rates of both this and mha: add one"
