"""Tests of invalid rows, of fits that abstain and report what to add, and of diverged runs."""

# mypy: disable-error-code="union-attr,operator"
# An estimate that is None fails its test.

import dataclasses
import json
import math
import random

import numpy as np
import pytest

from mea_jax.errors import UserError
from mea_jax.study.laws import (
    Result,
    fit_all,
    fit_laws,
    fit_optima,
    fit_sensitivity,
    fit_stability,
    fit_tokens,
    parse,
)

ROW = {
    "variant": "mea",
    "learning_rate": 1e-3,
    "size": "6m",
    "parameters": 5_900_000,
    "tokens": 1000,
    "seed": 0,
    "loss": 2.5,
    "diverged": False,
    "curve": [[0, 7.6], [500, 3.0], [1000, 2.5]],
    "commit": "of whoever ran it",
}
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def runs(losses, grid=GRID, seeds=2, variant="mea", size="s", parameters=10**7, tokens=10**9):
    """Return runs with `losses` at the rates `grid`, with a little noise; None means diverged."""
    noise = np.random.default_rng(0).normal(size=(seeds, len(grid))) * 1e-3
    return [
        Result(
            variant,
            rate,
            size,
            parameters,
            tokens,
            seed,
            None if loss is None else loss + float(noise[seed, i]),
            loss is None,
        )
        for seed in range(seeds)
        for i, (rate, loss) in enumerate(zip(grid, losses, strict=True))
    ]


def bowl(best, grid=GRID):
    return [3 + 0.1 * math.log(rate / best) ** 2 for rate in grid]


def test_a_row_is_read():
    (found,) = parse([ROW])
    assert found.curve == ((0, 7.6), (500, 3.0), (1000, 2.5))
    assert (found.variant, found.parameters, found.loss) == ("mea", 5_900_000, 2.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": math.nan}, "without diverged=true"),
        ({"loss": math.inf}, "without diverged=true"),
        ({"loss": None}, "without diverged=true"),
        ({"loss": -1.0}, "above 0"),
        ({"loss": "2.5"}, "above 0"),
        ({"loss": True}, "above 0"),
        ({"loss": 10**400}, "above 0"),
        ({"learning_rate": 0}, "above 0"),
        ({"learning_rate": math.nan}, "above 0"),
        ({"learning_rate": "1e-3"}, "above 0"),
        ({"tokens": 1e9}, "an integer"),
        ({"tokens": 0}, "an integer"),
        ({"parameters": True}, "an integer"),
        ({"parameters": 10**30}, "too large"),
        ({"seed": -1}, "an integer"),
        ({"variant": ""}, "a non-empty string"),
        ({"size": 6}, "a non-empty string"),
        ({"diverged": 0}, "true or false"),
        ({"curve": 3}, "a list"),
        ({"curve": [[1, 2, 3]]}, "point 1"),
        ({"curve": [[0, 7.6], [5, math.nan]]}, "point 2"),
        ({"curve": [[5, 7.6], [5, 7.5]]}, "above the point before"),
        ({"curve": [[2000, 7.6]]}, "at most the run's 1000"),
    ],
)
def test_a_malformed_row_is_refused_by_its_number(change, words):
    with pytest.raises(UserError, match=r"^row 2: ") as refused:
        parse([ROW | {"seed": 7}, ROW | change])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", sorted(set(ROW) - {"curve", "commit"}))
def test_a_missing_key_is_named(key):
    with pytest.raises(UserError, match=f"row 1: no {key}"):
        parse([{k: v for k, v in ROW.items() if k != key}])


@pytest.mark.parametrize("row", [3, None, [ROW], "mea"])
def test_what_is_no_object_is_refused(row):
    with pytest.raises(UserError, match=r"row 1: .* not a JSON object"):
        parse([row])


def test_a_run_twice_and_a_size_of_two_kinds_are_refused():
    with pytest.raises(UserError, match="row 2: the same run as row 1"):
        parse([ROW, ROW | {"loss": 2.6}])
    with pytest.raises(UserError, match="row 2: parameters=7, but size 6m of mea has 5900000"):
        parse([ROW, ROW | {"seed": 1, "parameters": 7}])


def test_a_diverged_run_may_have_no_finite_loss():
    change = {"loss": math.nan, "diverged": True, "curve": [[0, 7.6], [500, None]]}
    (found,) = parse([ROW | change])
    assert found.loss is None
    assert found.curve == ((0, 7.6),)


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (5e-5, "0.0001 is the smallest learning rate tried: extend the grid, add 3.2e-05"),
        (5e-2, "0.01 is the largest learning rate tried: extend the grid, add 0.032"),
    ],
)
def test_an_optimum_at_the_edge_is_no_number(best, words):
    (fit,) = fit_optima(runs(bowl(best)))
    assert fit.learning_rate is None
    assert fit.reason == f"at the edge: {words}"


def test_a_vertex_beyond_the_grid_is_no_number():
    """The lowest loss is inside the grid only by chance, at the value before the last."""
    grid = (1e-3, 2e-3, 4e-3, 8e-3, 9e-3)
    losses = bowl(1e-2, grid)
    (fit,) = fit_optima(runs([*losses[:4], losses[3] + 0.002], grid=grid, seeds=2))
    assert fit.best == 8e-3
    assert fit.learning_rate is None
    assert "is outside the fitted values: extend the grid beyond 0.009" in fit.reason


def test_between_the_best_and_divergence_the_grid_is_refined():
    """A parabola does not extend over a diverged value; the reason suggests sqrt(3e-3 1e-2)."""
    losses = [*bowl(5e-3)[:4], None]
    (fit,) = fit_optima(runs(losses))
    assert fit.diverged == (1e-2,)
    assert fit.learning_rate is None
    assert "between 0.003 and 0.01, where runs diverge: refine the grid, add 0.0055" in fit.reason


def test_a_rate_at_which_one_seed_diverged_is_not_fitted():
    found = runs(bowl(1e-3, GRID))
    lucky = [
        dataclasses.replace(run, loss=None, diverged=True)
        if run.learning_rate == 1e-2 and run.seed == 0
        else dataclasses.replace(run, loss=1.0)
        if run.learning_rate == 1e-2
        else run
        for run in found
    ]
    (fit,) = fit_optima(lucky)
    assert fit.diverged == (1e-2,)
    assert fit.best == 1e-3
    assert fit.learning_rate.value == pytest.approx(1e-3, rel=0.02)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (runs(bowl(1e-3), seeds=1)[1:4], "3 runs near the best learning rate"),
        (runs([None] * 5), "diverged at every learning rate: add 3.2e-05"),
        (runs([3.0, 3.0, 2.998, 3.0, 3.0], seeds=2), "curvature is within the noise: add seeds"),
    ],
    ids=["few", "all diverged", "flat"],
)
def test_an_optimum_that_data_do_not_give_is_none(found, words):
    (fit,) = fit_optima(found)
    assert fit.learning_rate is None
    assert words in fit.reason


def curve(points, horizon=10**9, law=lambda d: (4e8 / d) ** 0.3 + 2, **changes):
    tokens = [int(horizon * (i + 1) / points) for i in range(points)]
    line = tuple((t, law(t)) for t in tokens)
    return Result("mea", 1e-3, "s", 10**7, horizon, 0, line[-1][1], False, line, **changes)


def test_losses_in_tokens_that_do_not_follow_the_law():
    (fit,) = fit_tokens([curve(7)])
    assert fit.alpha is None
    assert "7 token counts" in fit.reason
    assert "give 8 or more" in fit.reason
    (fit,) = fit_tokens([curve(40, law=lambda d: (4e8 / d) ** 0.3 + 2 + 0.5 * (d > 8e8))])
    assert fit.alpha is None
    assert fit.held_out_error > 0.1
    assert fit.reason.startswith("does not fit")
    (fit,) = fit_tokens([curve(20, law=lambda d: 3 + 1e-3 * math.sin(d))])
    assert fit.alpha is None
    assert "alpha from L_0" in fit.reason


def test_diverged_runs_are_no_part_of_the_loss_in_tokens():
    sound = curve(20)
    wild = curve(20, law=lambda d: 9.0)
    wild = dataclasses.replace(wild, seed=1, diverged=True, loss=None)
    (fit,) = fit_tokens([sound, wild])
    assert fit.alpha.value == pytest.approx(0.3, rel=1e-3)
    assert (fit.seeds, fit.diverged) == (1, 1)
    (fit,) = fit_tokens([wild])
    assert (
        fit.reason == "every run diverged (1): there is no loss to fit; add a lower learning rate"
    )


def cells(pairs, best=1e-3):
    return [
        run
        for n, d in pairs
        for run in runs(bowl(best), size=str(n), parameters=n, tokens=d, seeds=1)
    ]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(10**7, 10**9)], "1 of the 4 required cells"),
        ([(10**7, 10**9), (10**8, 10**9), (10**8, 10**10)], "3 of the 5 required cells"),
        ([(10**7 * k, 10**9 * k) for k in (1, 2, 4, 8, 16)], "cannot be separated"),
    ],
)
def test_a_law_needs_sizes_and_horizons(pairs, words):
    (law,) = fit_laws(cells(pairs))
    assert law.parameters_exponent is None
    assert words in law.reason
    assert "add" in law.reason
    with pytest.raises(ValueError, match=words):
        law.predict(1e9, 1e11)


def test_a_cell_whose_optimum_is_at_the_edge_is_left_out_of_the_law():
    pairs = [(10**7 * k, d) for k in (1, 2, 4) for d in (10**9, 10**10)]
    cut = runs(bowl(5e-2), size="cut", parameters=10**8, tokens=10**9)
    (law,) = fit_laws(cells(pairs) + cut)
    (left_out,) = [cell for cell in law.cells if cell.reason]
    assert left_out.size == "cut"
    assert "extend the grid, add 0.032" in left_out.reason
    assert law.parameters_exponent.value == pytest.approx(0, abs=1e-9)


def test_one_horizon_gives_the_exponent_of_sizes_only():
    (law,) = fit_laws(cells([(10**7 * k, 10**9) for k in (1, 2, 4, 8)]))
    assert law.parameters_exponent is not None
    assert law.tokens_exponent is None
    assert law.tokens == (10**9, 10**9)


def test_sensitivity_counts_divergence_at_the_loss_at_initialisation():
    """With losses 2, 1, 3 on an even grid and a best loss of 1, the trapezoids give 1.75 - 1.

    The 3 is the loss at initialisation.
    """
    grid = (1e-4, 1e-3, 1e-2)
    found = [
        dataclasses.replace(run, loss=None if run.diverged else round(run.loss))
        for run in runs([2.0, 1.0, None], grid=grid, seeds=1)
    ]
    (fit,) = fit_sensitivity(found, initial_loss=3.0)
    assert fit.value.value == pytest.approx(0.75)
    assert (fit.value.low, fit.seeds) == (None, 1)
    (fit,) = fit_sensitivity(found)
    assert fit.value is None
    assert "the loss at initialisation is not known" in fit.reason
    found[0] = dataclasses.replace(found[0], curve=((0, 3.0), (10**9, 2.0)))
    (fit,) = fit_sensitivity(found)
    assert fit.value.value == pytest.approx(0.75)
    found[0] = dataclasses.replace(found[0], loss=50.0)  # finished, but worse than at the start
    (fit,) = fit_sensitivity(found)
    assert fit.value.value == pytest.approx(1.0)


def test_variants_are_compared_on_one_set_of_learning_rates():
    wide = runs(bowl(1e-3), variant="a")
    narrow = runs(bowl(1e-3)[1:4], grid=GRID[1:4], variant="b")
    first, second = fit_sensitivity(wide + narrow)
    assert first.learning_rates == second.learning_rates == GRID[1:4]
    assert first.value.value == pytest.approx(second.value.value, abs=3e-3)
    few = runs([3.0, 2.9], grid=GRID[:2], variant="b")
    first, second = fit_sensitivity(wide + few)
    assert second.value is None
    assert second.reason.endswith("add 0.001, 0.003, 0.01")


def test_the_largest_stable_learning_rate():
    (fit,) = fit_stability(runs([3.0, 2.9, 2.8, None, None]))
    assert (fit.learning_rate, fit.limit_found, fit.note) == (1e-3, True, None)
    (fit,) = fit_stability(runs([3.0, 2.9, 2.8, 2.9, 3.0]))
    assert (fit.learning_rate, fit.limit_found) == (1e-2, False)
    assert fit.note == "at the edge, a lower bound: extend the grid, add 0.032"
    (fit,) = fit_stability(runs([3.0, 2.9, None, 2.9, None]))
    assert (fit.learning_rate, fit.limit_found) == (3e-3, True)
    assert "0.001 is unstable though 0.003 is stable" in fit.note
    (fit,) = fit_stability(runs([None] * 5))
    assert fit.learning_rate is None
    assert fit.reason == "no learning rate is stable: add 3.2e-05"


@pytest.mark.parametrize(
    ("tail", "stable"),
    [((3.0, 2.9), True), ((4.5, 2.9), True), ((2.9, 4.5), False), ((2.9, 3.8), True)],
    ids=["smooth", "recovered", "unrecovered", "below the margin"],
)
def test_a_spike_at_the_end_is_unstable(tail, stable):
    """A run is unstable if it stays a nat above its lowest held-out loss until the end."""
    line = ((0, 7.6), (10, 3.2), (20, tail[0]), (30, tail[1]))
    run = Result("mea", 1e-3, "s", 10**7, 30, 0, tail[1], False, line)
    (fit,) = fit_stability([run])
    assert (fit.learning_rate == 1e-3) is stable


def test_a_run_that_stays_at_the_frequencies_of_words_is_unstable():
    """A run without a spike is unstable if its loss stays above the mean of start and best loss.

    The mean of 7.6 and 2.8, the best loss of all variants, is 5.2.
    """
    found = []
    for variant, losses in (("mea", (3.0, 2.8, 5.1)), ("mha", (3.0, 3.1, 5.3))):
        for rate, loss in zip(GRID, losses, strict=False):
            line = ((0, 7.6), (10, 5.5), (30, loss))
            found.append(Result(variant, rate, "s", 10**7, 30, 0, loss, False, line))
    mea, mha = fit_stability(found)
    assert mea.learned_below == mha.learned_below == pytest.approx(5.2)
    assert (mea.learning_rate, mea.limit_found) == (1e-3, False)
    assert (mha.learning_rate, mha.limit_found, mha.unstable) == (3e-4, True, (1e-3,))
    (alone,) = fit_stability([run for run in found if run.variant == "mha"])
    assert alone.learned_below == pytest.approx(5.3), "a run at the limit is stable"


def test_everything_as_json_whatever_the_order():
    found = cells([(10**7 * k, d) for k in (1, 2, 4) for d in (10**9, 10**10)])
    found += [dataclasses.replace(run, variant="mha") for run in found[:-1]]
    found += [curve(20)] + runs([None] * 5, size="wild", tokens=7)
    found += runs(bowl(1.1e-3), seeds=9, size="nine")
    tree = fit_all(found, initial_loss=9.0)
    json.dumps(tree, allow_nan=False)
    assert tree == json.loads(json.dumps(tree))
    assert set(tree) == {
        "settings", "runs", "loss_in_tokens", "optimum", "law", "sensitivity", "stability",
        "gain",
    }  # fmt: skip
    assert tree["runs"] == {"finished": len(found) - 10, "diverged": 10}
    assert [law["variant"] for law in tree["law"]] == ["mea", "mha"]
    random.Random(0).shuffle(found)
    assert fit_all(found, initial_loss=9.0) == tree
    assert fit_all(found, initial_loss=9.0, seed=1) != tree


def test_nothing_to_fit_and_settings_out_of_range():
    with pytest.raises(UserError, match="no runs to fit"):
        fit_all([])
    with pytest.raises(UserError, match="skip=1"):
        fit_all([curve(9)], skip=1)
    with pytest.raises(UserError, match="initial_loss=nan"):
        fit_all([curve(9)], initial_loss=math.nan)
