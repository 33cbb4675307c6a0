"""Fits of the learning-rate sensitivity and of the largest stable learning rate.

Learning-rate sensitivity (arXiv 2309.14322) is the mean, over learning rates drawn log-uniformly
from [a, b], of min(loss, loss at initialisation), minus the best loss in [a, b], in nats. Lower is
more robust. A diverged run counts with the loss at initialisation.

The largest stable learning rate is the largest value of the grid at which no seed has an
unrecovered spike and every seed learns. Spikes are defined in `mea_jax.train.guards`: losses that
exceed the lowest earlier loss by a margin. A spike is unrecovered if it lasts until the end. A run
has not learned if it ends above the midpoint between the loss at initialisation and the best loss
of any variant at its size and horizon. Too large a learning rate can leave a model early at the
token frequencies, where it has no spike.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mea_jax.study.laws.intervals import Estimate, jackknife, step_of, two_digits
from mea_jax.study.laws.results import Result, grouped
from mea_jax.train.guards import SpikeDetector

SPIKE_MARGIN = 1.0  # nats, as in GuardConfig
SPIKE_POINTS = 1  # consecutive held-out losses at the end of a run; they are many steps apart
LEAST = 3  # fewest learning rates in [a, b]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The learning-rate sensitivity of one (variant, size, tokens).

    Attributes:
      learning_rates: the learning rates at which every variant was tried at this size and horizon.
        All variants share this set, so that they are comparable. [a, b] is its range.
      seeds: the number of seeds that have a run at every one of `learning_rates`.
      initial_loss: the loss at initialisation, nats; None if it is neither known nor needed.
      value: the sensitivity, nats; it has an interval over seeds if there are 3 or more.
      reason: why there is no `value`, and what to add. None if there is one.
    """

    variant: str
    size: str
    tokens: int
    learning_rates: tuple[float, ...]
    seeds: int = 0
    initial_loss: float | None = None
    value: Estimate | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Stability:
    """The largest stable learning rate of one (variant, size, tokens).

    Attributes:
      grid: the learning rates that were tried.
      unstable: those at which a seed diverged, ended in a spike, or has not learned.
      learned_below: the largest final loss, in nats, of a run that has learned. None if no curve
        begins at 0 tokens, or no run has a loss.
      learning_rate: the largest learning rate of `grid` that is not in `unstable`.
      limit_found: whether a larger one is unstable. Otherwise `learning_rate` is a lower bound.
      note: what to add to the grid, or that a smaller learning rate is unstable.
      reason: why there is no `learning_rate`, and what to add. None if there is one.
    """

    variant: str
    size: str
    tokens: int
    grid: tuple[float, ...]
    unstable: tuple[float, ...]
    learned_below: float | None = None
    learning_rate: float | None = None
    limit_found: bool = False
    note: str | None = None
    reason: str | None = None


def unrecovered(result: Result) -> bool:
    """Return whether a run diverged or its held-out loss ends in a spike."""
    detector = SpikeDetector(SPIKE_MARGIN, SPIKE_POINTS)
    for tokens, loss in result.curve:
        detector.feed(tokens, loss)
    if result.loss is not None and (not result.curve or result.curve[-1][0] < result.tokens):
        detector.feed(result.tokens, result.loss)
    return result.diverged or detector.above >= SPIKE_POINTS


def initial_loss_of(runs: Sequence[Result]) -> float | None:
    """Return the mean of the losses at 0 tokens; None if no curve begins there."""
    starts = [run.curve[0][1] for run in runs if run.curve and run.curve[0][0] == 0]
    return float(np.mean(starts)) if starts else None


def learned_below(runs: Sequence[Result]) -> float | None:
    """Return the midpoint between the loss at initialisation and the best final loss, nats.

    `runs` are those of all variants at one size and horizon. Return None if no curve begins at 0
    tokens, or if no run has a loss without having diverged.
    """
    initial = initial_loss_of(runs)
    ends = [run.loss for run in runs if run.loss is not None and not run.diverged]
    return None if initial is None or not ends else (initial + min(ends)) / 2


def fit_stability(results: Sequence[Result]) -> list[Stability]:
    """Return the stability of each (variant, size, tokens) of `results`.

    `results` must contain all variants that are compared, because they share `learned_below`.
    """
    found = []
    for (size, tokens), cell in grouped(results, lambda r: (r.size, r.tokens)):
        limit = learned_below(cell)
        for variant, runs in grouped(cell, lambda r: r.variant):
            grid = tuple(sorted({run.learning_rate for run in runs}))
            bad = {run.learning_rate for run in runs if unrecovered(run) or _unlearned(run, limit)}
            about = Stability(variant, size, tokens, grid, tuple(sorted(bad)), limit)
            found.append(_stability(about))
    return sorted(found, key=lambda s: (s.variant, s.size, s.tokens))


def _unlearned(run: Result, limit: float | None) -> bool:
    return limit is not None and run.loss is not None and run.loss > limit


def _stability(about: Stability) -> Stability:
    stable = [rate for rate in about.grid if rate not in about.unstable]
    step = step_of(about.grid)
    if not stable:
        return dataclasses.replace(
            about,
            reason=f"no learning rate is stable: add {two_digits(about.grid[0] / step)}",
        )
    largest = stable[-1]
    found = any(rate > largest for rate in about.unstable)
    holes = [rate for rate in about.unstable if rate < largest]
    note = None
    if holes:
        note = (
            f"{holes[0]:g} is unstable though {largest:g} is stable: add seeds at both before "
            "using this number"
        )
    elif not found:
        note = f"at the edge, a lower bound: extend the grid, add {two_digits(largest * step)}"
    return dataclasses.replace(about, learning_rate=largest, limit_found=found, note=note)


def fit_sensitivity(
    results: Sequence[Result], initial_loss: float | None = None
) -> list[Sensitivity]:
    """Return the sensitivity of each (variant, size, tokens) of `results`.

    Args:
      results: the runs of all variants that are compared.
      initial_loss: the loss at initialisation in nats, about log V; used if no curve begins at 0
        tokens.
    """
    found = []
    for (size, tokens), runs in grouped(results, lambda r: (r.size, r.tokens)):
        variants = grouped(runs, lambda run: run.variant)
        tried = [{run.learning_rate for run in some} for _, some in variants]
        common = tuple(sorted(set.intersection(*tried)))
        every = set.union(*tried)
        for variant, some in variants:
            about = Sensitivity(variant, size, tokens, common)
            if len(common) < LEAST:
                lacking = sorted(every - {run.learning_rate for run in some})
                add = ", ".join(f"{rate:g}" for rate in lacking) or "more"
                found.append(
                    dataclasses.replace(
                        about,
                        reason=f"{len(common)} of the {LEAST} required learning rates were tried "
                        f"with every variant: add {add}",
                    )
                )
            else:
                found.append(_sensitivity(about, some, initial_loss))
    return sorted(found, key=lambda s: (s.variant, s.size, s.tokens))


def _sensitivity(
    about: Sensitivity, runs: Sequence[Result], initial_loss: float | None
) -> Sensitivity:
    runs = [run for run in runs if run.learning_rate in about.learning_rates]
    measured = initial_loss_of(runs)
    initial = initial_loss if measured is None else measured
    if initial is None and any(run.diverged for run in runs):
        return dataclasses.replace(
            about,
            reason="runs diverged and the loss at initialisation is not known: begin curves with "
            "[0, loss], or pass initial_loss",
        )
    losses: dict[int, dict[float, float]] = {}
    for run in runs:
        loss = initial if run.diverged else run.loss
        assert loss is not None
        loss = loss if initial is None else min(loss, initial)
        losses.setdefault(run.seed, {})[run.learning_rate] = loss
    whole = [seed for seed, some in losses.items() if len(some) == len(about.learning_rates)]
    every = _mean_excess(about.learning_rates, losses)
    without = []
    for seed in whole:
        others = {other: losses[other] for other in whole if other != seed}
        if others:
            without.append(_mean_excess(about.learning_rates, others))
    return dataclasses.replace(
        about, seeds=len(whole), initial_loss=initial, value=jackknife(every, without)
    )


def _mean_excess(rates: Sequence[float], losses: Mapping[int, Mapping[float, float]]) -> float:
    """Compute the sensitivity from each rate's mean over seeds, by trapezoids in log rate."""
    means = [
        float(np.mean([some[rate] for some in losses.values() if rate in some])) for rate in rates
    ]
    logs = np.log(rates)
    return float(np.trapezoid(means, logs)) / float(logs[-1] - logs[0]) - min(means)
