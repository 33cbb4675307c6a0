"""The best learning rate at one (variant, size, tokens).

The loss is close to quadratic in the logarithm of the learning rate near its minimum
(arXiv 2601.05049): the vertex of the parabola is the optimum. Its interval is Fieller's (1954), of
a ratio of coefficients; it has no end where the curvature is within the noise.

The optimum falls with the horizon (arXiv 2409.19913), so one at D says nothing of another D.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mea_jax.study.laws.intervals import Estimate, step_of, student_t, two_digits
from mea_jax.study.laws.results import Result, finished, grouped

WINDOW = 4.0  # learning rates within this factor of the best one are fitted (and the next one on
# either side, where none is as near): further off, the loss is no parabola


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The fit of one (variant, size, tokens).

    Attributes:
      tokens: D, the horizon for which the optimum holds.
      grid: the learning rates that were tried, diverged ones among them.
      diverged: those of them at which a seed diverged; none of their runs is fitted.
      runs: how many were fitted.
      best: the value of the grid with the lowest mean loss.
      learning_rate: the vertex.
      loss: the parabola there, nats.
      curvature: half the second derivative in log learning rate, nats: the loss grows by
        0.48 times this at twice the best learning rate.
      error: root mean square of the residuals, nats.
      reason: why there is no number, and what to add. None where there is.
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
    """One fit for each (variant, size, tokens) of `results`."""
    groups = grouped(results, lambda r: (r.variant, r.parameters, r.size, r.tokens))
    return [_fit_group(runs) for _, runs in groups]


def edge(grid: Sequence[float], diverged: Sequence[float], low: float, high: float) -> str | None:
    """Why the values from `low` to `high` are not well inside what was tried; None where they are.

    Args:
      grid: the learning rates tried, in order, the diverged ones among them.
      diverged: these.
      low, high: of the values that are to lie inside, as values of the grid.
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
            f"{len(fitted)} runs near the best learning rate: a parabola and its error need 4 or "
            f"more: add seeds, or {two_digits(best * math.sqrt(2))}",
        )
    return _fit_parabola(about, fitted)


def _shift(x: np.ndarray, losses: np.ndarray, vertex: float) -> float:
    """How far a cubic term moves the minimum; 0 below 4 learning rates, inf where none is left."""
    if len(np.unique(x)) < 4:
        return 0.0
    design = np.stack([np.ones_like(x), x, x**2, x**3], axis=1)
    _, b, c, d = np.linalg.lstsq(design, losses, rcond=None)[0]
    inner = c * c - 3 * b * d  # of the slope's roots; the minimum is the one with a plus
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
    # Seeds that are shared by learning rates move their losses together; that is counted as noise
    # here, which makes intervals wider than they need to be, never narrower.
    variance = float(residuals @ residuals) / freedom
    covariance = variance * np.linalg.inv(design.T @ design)
    t2 = student_t(freedom) ** 2
    about = dataclasses.replace(about, curvature=c, error=math.sqrt(float(np.mean(residuals**2))))
    if c <= 0 or c * c <= t2 * covariance[2, 2]:
        return _without(
            about,
            "the curvature is within the noise: add seeds, or learning rates further off "
            f"({two_digits(about.grid[0])} to {two_digits(about.grid[-1])} were tried)",
        )
    vertex = -b / (2 * c)
    if not x.min() < vertex < x.max():
        at = math.exp(vertex + centre)
        side = min(x, key=lambda value: abs(value - vertex))
        return _without(
            about,
            f"at the edge: the parabola's vertex {two_digits(at)} lies outside the fitted values: "
            f"extend the grid beyond {two_digits(math.exp(side + centre))}",
        )
    # Fieller: all v at which b + 2 c v differs from 0 by at most t standard errors
    square = 4 * (c * c - t2 * covariance[2, 2])
    half = 2 * (b * c - t2 * covariance[1, 2])
    last = b * b - t2 * covariance[1, 1]
    reach = math.sqrt(max(half * half - square * last, 0.0))
    shift = _shift(x, losses, vertex)
    if shift > x.max() - x.min():
        return _without(
            about,
            "the loss is no parabola around its minimum: add seeds, or learning rates nearer to "
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
