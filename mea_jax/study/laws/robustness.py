"""How much a wrong learning rate costs, and how large a one is stable.

Learning-rate sensitivity (arXiv 2309.14322): the mean, over learning rates drawn log-uniformly from
[a, b], of min(loss, loss at initialisation) less the best loss in [a, b]. Nats; lower is more
robust. A diverged run counts at the loss at initialisation.

Largest stable learning rate: the largest value of the grid at which no seed has an unrecovered
spike, and every seed learns. A spike is that of `mea_jax.train.guards`: losses above the lowest
before them by a margin. It is unrecovered where it lasts until the end. A run has not learned that
ends above the middle between the loss at initialisation and the best loss of any variant at its
size and horizon: too large a learning rate may leave a model early at the frequencies of words, and
there it has no spike.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mea_jax.study.laws.intervals import Estimate, jackknife, step_of, two_digits
from mea_jax.study.laws.results import Result, grouped
from mea_jax.train.guards import SpikeDetector

SPIKE_MARGIN = 1.0  # nats, as of GuardConfig
SPIKE_POINTS = 1  # held-out losses in a row, the last of the run; they lie many steps apart
LEAST = 3  # learning rates in [a, b]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Of one (variant, size, tokens).

    Attributes:
      learning_rates: those that every variant was tried at, at this size and horizon: one set, so
        that variants compare. [a, b] is its range.
      seeds: that have a run at every one of them.
      initial_loss: nats; None where it is not known and not needed.
      value: nats; its interval is over seeds, from 3 of them on.
      reason: why there is no number, and what to add. None where there is.
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
    """Of one (variant, size, tokens).

    Attributes:
      grid: the learning rates that were tried.
      unstable: those at which a seed diverged, ended in a spike, or has not learned.
      learned_below: nats, the most that a run which has learned ends with. None where no curve
        begins at 0 tokens.
      learning_rate: the largest other one.
      limit_found: a larger one is unstable. Otherwise `learning_rate` is only a lower bound.
      note: what to add to the grid, or that stability does not grow monotonically.
      reason: why there is no number, and what to add. None where there is.
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
    """Whether a run diverged, or its held-out loss ends in a spike."""
    detector = SpikeDetector(SPIKE_MARGIN, SPIKE_POINTS)
    for tokens, loss in result.curve:
        detector.feed(tokens, loss)
    if result.loss is not None and (not result.curve or result.curve[-1][0] < result.tokens):
        detector.feed(result.tokens, result.loss)
    return result.diverged or detector.above >= SPIKE_POINTS


def initial_loss_of(runs: Sequence[Result]) -> float | None:
    """The mean of the losses at 0 tokens; None where no curve begins there."""
    starts = [run.curve[0][1] for run in runs if run.curve and run.curve[0][0] == 0]
    return float(np.mean(starts)) if starts else None


def learned_below(runs: Sequence[Result]) -> float | None:
    """The middle between the loss at initialisation and the best one.

    Of runs of all variants at one size and horizon. None where no curve begins at 0 tokens, or no
    run has a loss.
    """
    initial = initial_loss_of(runs)
    ends = [run.loss for run in runs if run.loss is not None and not run.diverged]
    return None if initial is None or not ends else (initial + min(ends)) / 2


def fit_stability(results: Sequence[Result]) -> list[Stability]:
    """One for each (variant, size, tokens) of `results`, which are of all variants compared."""
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
            "the number is used"
        )
    elif not found:
        note = f"at the edge, a lower bound: extend the grid, add {two_digits(largest * step)}"
    return dataclasses.replace(about, learning_rate=largest, limit_found=found, note=note)


def fit_sensitivity(
    results: Sequence[Result], initial_loss: float | None = None
) -> list[Sensitivity]:
    """One for each (variant, size, tokens) of `results`.

    Args:
      results: of all variants that are to be compared.
      initial_loss: nats, where curves do not begin at 0 tokens; about log V.
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
                        reason=f"{len(common)} of the {LEAST} learning rates needed were tried "
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
            "[0, loss], or give initial_loss",
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
    """The definition, of each rate's mean over seeds, by trapezoids in log learning rate."""
    means = [
        float(np.mean([some[rate] for some in losses.values() if rate in some])) for rate in rates
    ]
    logs = np.log(rates)
    return float(np.trapezoid(means, logs)) / float(logs[-1] - logs[0]) - min(means)
