"""Fits of the best learning rate at one (variant, size, tokens).

The loss is close to quadratic in the logarithm of the learning rate near its minimum
(arXiv 2601.05049), so the vertex of a parabola is the optimum. Its interval is Fieller's (1954) for
a ratio of coefficients. That interval is unbounded if the curvature is within the noise.

The optimum decreases with the horizon (arXiv 2409.19913), so an optimum at one D does not hold at
another D.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mea_jax.study.laws.intervals import Estimate, step_of, student_t, two_digits
from mea_jax.study.laws.results import Result, finished, grouped

# Learning rates within this factor of the best one are fitted, and the next one on either side if
# none is that close. Farther away the loss is not a parabola.
WINDOW = 4.0


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The fit of one (variant, size, tokens).

    Attributes:
      tokens: D, the horizon for which the optimum holds.
      grid: all learning rates that were tried, including those that diverged.
      diverged: the learning rates at which a seed diverged; none of their runs is fitted.
      runs: the number of runs that were fitted.
      best: the value of the grid with the lowest mean loss.
      learning_rate: the vertex of the parabola.
      loss: the value of the parabola at its vertex, nats.
      curvature: half the second derivative in log learning rate, nats. The loss grows by
        0.48 times this at twice the best learning rate.
      error: the root mean square of the residuals, nats.
      reason: why there is no `learning_rate`, and what to add. None if there is one.
    """

    variant: str
    size: str
    parameters: int
    tokens: int
    grid: tuple[float, ...]
    diverged: tuple[float, ...]
    runs: int = 0
    best: float | None = None
    learning_rate: Estimate | None = None
    loss: float | None = None
    curvature: float | None = None
    error: float | None = None
    reason: str | None = None


def fit_optima(results: Sequence[Result]) -> list[Optimum]:
    """Return one fit for each (variant, size, tokens) of `results`."""
    groups = grouped(results, lambda r: (r.variant, r.parameters, r.size, r.tokens))
    return [_fit_group(runs) for _, runs in groups]


def edge(grid: Sequence[float], diverged: Sequence[float], low: float, high: float) -> str | None:
    """Return why `low` to `high` reach the edge of the grid, and what to add; None if they do not.

    Args:
      grid: all learning rates tried, ascending, including those that diverged.
      diverged: the learning rates that diverged.
      low: the smallest value that must be inside the grid, one of its values.
      high: the largest such value, one of its values.
    """
    kept = [rate for rate in grid if rate not in diverged]
    step = step_of(grid)
    for here, last, ratio, side in (
        (low, kept[0], 1 / step, "smallest"),
        (high, kept[-1], step, "largest"),
    ):
        if here != last:
            continue
        beyond = [r for r in diverged if (r > here) == (ratio > 1)]
        if not beyond:
            return (
                f"at the edge: {here:g} is the {side} learning rate tried: extend the grid, "
                f"add {two_digits(here * ratio)}"
            )
        near = min(beyond) if ratio > 1 else max(beyond)
        return (
            f"at the edge: between {here:g} and {near:g}, where runs diverge: refine the grid, "
            f"add {two_digits(math.sqrt(here * near))}"
        )
    return None


def _fit_group(runs: Sequence[Result]) -> Optimum:
    kept, first = finished(runs), runs[0]
    grid = tuple(sorted({run.learning_rate for run in runs}))
    about = Optimum(
        variant=first.variant,
        size=first.size,
        parameters=first.parameters,
        tokens=first.tokens,
        grid=grid,
        diverged=tuple(rate for rate in grid if rate not in kept),
    )
    if not kept:
        less = two_digits(grid[0] / step_of(grid))
        return _without(about, f"runs diverged at every learning rate: add {less}")
    means = {rate: float(np.mean([r.loss for r in some])) for rate, some in kept.items()}
    best = min(means, key=lambda rate: means[rate])
    about = dataclasses.replace(about, best=best)
    why = edge(grid, about.diverged, best, best)
    if why:
        return _without(about, why)
    window = [rate for rate in kept if 1 / WINDOW <= rate / best * (1 + 1e-9) <= WINDOW * 1.01]
    window.append(max(rate for rate in kept if rate < best))
    window.append(min(rate for rate in kept if rate > best))
    fitted = [run for rate in sorted(set(window)) for run in kept[rate]]
    about = dataclasses.replace(about, runs=len(fitted))
    if len(fitted) < 4:
        return _without(
            about,
            f"{len(fitted)} runs near the best learning rate, but a parabola and its error need 4 "
            f"or more: add seeds, or the learning rate {two_digits(best * math.sqrt(2))}",
        )
    return _fit_parabola(about, fitted)


def _shift(x: np.ndarray, losses: np.ndarray, vertex: float) -> float:
    """Return how far a cubic term moves the minimum from `vertex`, in log learning rate.

    Return 0 for fewer than 4 learning rates, and inf if the cubic has no minimum.
    """
    if len(np.unique(x)) < 4:
        return 0.0
    design = np.stack([np.ones_like(x), x, x**2, x**3], axis=1)
    _, b, c, d = np.linalg.lstsq(design, losses, rcond=None)[0]
    inner = c * c - 3 * b * d  # discriminant of the slope; the root with a plus is the minimum
    if inner <= 0 or c + math.sqrt(inner) <= 0:
        return math.inf
    return abs(float(-b / (c + math.sqrt(inner))) - vertex)


def _fit_parabola(about: Optimum, fitted: Sequence[Result]) -> Optimum:
    logs = np.log([run.learning_rate for run in fitted])
    losses = np.array([run.loss for run in fitted])
    centre = float(logs.mean())
    x = logs - centre
    design = np.stack([np.ones_like(x), x, x * x], axis=1)
    coefficients, *_ = np.linalg.lstsq(design, losses, rcond=None)
    a, b, c = (float(value) for value in coefficients)
    residuals = losses - design @ coefficients
    freedom = len(fitted) - 3
    # Runs of one seed at several learning rates have correlated losses. That correlation is counted
    # as noise here, which makes intervals wider than necessary, never narrower.
    variance = float(residuals @ residuals) / freedom
    covariance = variance * np.linalg.inv(design.T @ design)
    t2 = student_t(freedom) ** 2
    about = dataclasses.replace(about, curvature=c, error=math.sqrt(float(np.mean(residuals**2))))
    if c <= 0 or c * c <= t2 * covariance[2, 2]:
        return _without(
            about,
            "the curvature is within the noise: add seeds, or learning rates farther from the best "
            f"({two_digits(about.grid[0])} to {two_digits(about.grid[-1])} were tried)",
        )
    vertex = -b / (2 * c)
    if not x.min() < vertex < x.max():
        at = math.exp(vertex + centre)
        side = min(x, key=lambda value: abs(value - vertex))
        return _without(
            about,
            f"at the edge: the parabola's vertex {two_digits(at)} is outside the fitted values: "
            f"extend the grid beyond {two_digits(math.exp(side + centre))}",
        )
    # Fieller's interval: all v at which b + 2 c v differs from 0 by at most t standard errors.
    square = 4 * (c * c - t2 * covariance[2, 2])
    half = 2 * (b * c - t2 * covariance[1, 2])
    last = b * b - t2 * covariance[1, 1]
    reach = math.sqrt(max(half * half - square * last, 0.0))
    shift = _shift(x, losses, vertex)
    if shift > x.max() - x.min():
        return _without(
            about,
            "the loss is not a parabola near its minimum: add seeds, or learning rates closer to "
            f"{about.best:g}",
        )
    low, high = (-half - reach) / square - shift, (-half + reach) / square + shift
    return dataclasses.replace(
        about,
        learning_rate=Estimate(*(_rate(v + centre) for v in (vertex, low, high))),
        loss=a + b * vertex + c * vertex**2,
    )


def _rate(log: float) -> float:
    return math.exp(min(max(log, -700.0), 700.0))


def _without(about: Optimum, reason: str) -> Optimum:
    return dataclasses.replace(about, reason=reason)
