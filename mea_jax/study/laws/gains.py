"""Fits of a variant's gain over a baseline, each at its own best learning rate.

A comparison at a single learning rate shows only which variant that rate suits. Here each variant
uses the learning rate of the grid with its lowest mean loss. Runs of one seed share their data and
the initial values of the parameters they have in common, so differences are taken seed by seed.
Their interval is Student's t interval over seeds.

The minimum of noisy values is biased low, for the baseline and for the other variants. With equal
grids the bias cancels to the extent that the noise of both is the same.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mea_jax.errors import UserError
from mea_jax.study.laws.intervals import Estimate, student_t
from mea_jax.study.laws.results import Result, finished, grouped

LEAST = 3  # fewest seeds for an interval: with two it would be 13 standard errors wide


@dataclasses.dataclass(frozen=True)
class Gain:
    """The gain of one (variant, size, tokens) over the baseline.

    Attributes:
      learning_rate: the value of the grid with the lowest mean loss. None if all diverged.
      at_edge: whether no larger or no smaller value finished: none was tried, or all diverged.
      seeds: the number of seeds with a run at `learning_rate`.
      loss: the mean loss of these runs, nats.
      spread: the standard deviation of their losses over seeds, nats. None for one seed.
      gain: the baseline's loss at its own best learning rate minus this variant's loss, nats, over
        the seeds that both have; positive if the variant is better. None for the baseline.
      reason: why there is no gain. None if there is one, and for the baseline.
    """

    variant: str
    size: str
    tokens: int
    baseline: str
    learning_rate: float | None = None
    at_edge: bool = False
    seeds: int = 0
    loss: float | None = None
    spread: float | None = None
    gain: Estimate | None = None
    reason: str | None = None


def choose_baseline(results: Sequence[Result], baseline: str | None) -> str:
    """Return `baseline`; for None "mha" if it has runs, else the first variant.

    Raise `UserError` if `baseline` has no runs.
    """
    names = sorted({run.variant for run in results})
    if baseline is None:
        return "mha" if "mha" in names else names[0]
    if baseline not in names:
        raise UserError(f"no runs of the baseline {baseline!r}: choose one of {', '.join(names)}")
    return baseline


def fit_gains(results: Sequence[Result], baseline: str | None = None) -> list[Gain]:
    """Return the gain of each (variant, size, tokens) of `results`, sorted by these three.

    Raise `UserError` if `baseline` has no runs; None chooses it as `choose_baseline` does.
    """
    name = choose_baseline(results, baseline)
    found = []
    for (size, tokens), runs in grouped(results, lambda r: (r.size, r.tokens)):
        of = dict(grouped(runs, lambda run: run.variant))
        theirs = _at_best(of.get(name, []))
        found += [_gain(Gain(v, size, tokens, name), some, theirs) for v, some in of.items()]
    return sorted(found, key=lambda g: (g.variant, g.size, g.tokens))


def _at_best(runs: Sequence[Result]) -> list[Result]:
    """Return the runs at the learning rate with the lowest mean loss; empty if all diverged."""
    kept = finished(runs)
    return min(kept.values(), key=lambda some: np.mean([r.loss for r in some]), default=[])


def _gain(about: Gain, runs: Sequence[Result], theirs: Sequence[Result]) -> Gain:
    mine = _at_best(runs)
    if not mine:
        return dataclasses.replace(
            about, reason="runs diverged at every learning rate: add a lower one"
        )
    losses = {run.seed: float(run.loss or 0.0) for run in mine}
    rate, kept = mine[0].learning_rate, list(finished(runs))
    about = dataclasses.replace(
        about,
        learning_rate=rate,
        at_edge=rate in (kept[0], kept[-1]),
        seeds=len(losses),
        loss=float(np.mean(list(losses.values()))),
        spread=float(np.std(list(losses.values()), ddof=1)) if len(losses) > 1 else None,
    )
    if about.variant == about.baseline:
        return about
    better = [float(run.loss or 0.0) - losses[run.seed] for run in theirs if run.seed in losses]
    if not better:
        why = f"no seed has runs at the best rates of both this and {about.baseline}: add one"
        return dataclasses.replace(about, reason=why)
    return dataclasses.replace(about, gain=_mean(better))


def _mean(values: Sequence[float]) -> Estimate:
    mean, count = float(np.mean(values)), len(values)
    if count < LEAST:
        return Estimate(mean)
    reach = student_t(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - reach, mean + reach)
