"""Fits of the optimal learning rate over sizes and tokens (Step Law, arXiv 2503.04715).

    log lr* = a + b log N + c log D

N is the number of parameters without embeddings, D the number of tokens; logarithms are natural.
The fit follows Step Law's procedure: ordinary least squares over all runs within 0.25% of the
lowest loss of their (N, D), and bootstraps.

Step Law resamples runs. But the runs of one (N, D) share the grid and the best run, so resampling
runs gives intervals that are too narrow. Here the departures of entire cells (N, D) from the law
are resampled, and the interval accounts for the small number of cells in the regression.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mea_jax.study.laws.intervals import Estimate, student_t
from mea_jax.study.laws.optimum import edge
from mea_jax.study.laws.results import Result, finished, grouped

NEAR = 0.0025  # relative distance from the lowest loss, as in Step Law
BOOTSTRAPS = 1000  # as in Step Law
_COLLINEAR = 0.98  # correlation of log N and log D above which their exponents are not separable


@dataclasses.dataclass(frozen=True)
class Cell:
    """The contribution of one (N, D) to the law.

    Attributes:
      learning_rates: the learning rate of each run within 0.25% of the lowest loss.
      reason: why the cell is left out, and what to add. None if it is used.
    """

    size: str
    parameters: int
    tokens: int
    learning_rates: tuple[float, ...]
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class LearningRateLaw:
    """A law of one variant, lr* = factor N^parameters_exponent D^tokens_exponent.

    Attributes:
      cells: every (N, D), including those that were left out.
      tokens: the smallest and the largest horizon of the runs.
      runs: the number of runs that were fitted.
      intercept: a, the log of the factor. It is the value at N = D = 1, far outside any data, so
        its interval is wide.
      parameters_exponent: b. None if all cells share N: the law then holds at that N only.
      tokens_exponent: c. None if all cells share D: the law then holds at that D only.
      run_bootstrap: the standard deviations of (a, b, c) over resampled runs, as in Step Law,
        without the exponents that are None.
      covariance: the covariance of (a, b, c), without the exponents that are None, over resampled
        cells with widened departures; `predict` uses it.
      reason: why there is no law, and what to add. None if there is one.
    """

    variant: str
    cells: tuple[Cell, ...]
    tokens: tuple[int, int]
    runs: int = 0
    intercept: Estimate | None = None
    parameters_exponent: Estimate | None = None
    tokens_exponent: Estimate | None = None
    run_bootstrap: tuple[float, ...] | None = None
    covariance: tuple[tuple[float, ...], ...] | None = None
    reason: str | None = None

    def predict(self, parameters: float, tokens: float) -> Estimate:
        """Return the optimum at N and D with its interval.

        Raise `ValueError` with the reason if there is no law.
        """
        if self.intercept is None or self.covariance is None:
            raise ValueError(self.reason)
        terms, row = [self.intercept], [1.0]
        for term, value in ((self.parameters_exponent, parameters), (self.tokens_exponent, tokens)):
            if term is not None:
                terms.append(term)
                row.append(math.log(value))
        log = sum(term.value * x for term, x in zip(terms, row, strict=True))
        freedom = sum(not cell.reason for cell in self.cells) - len(terms)
        variance = float(np.array(row) @ np.array(self.covariance) @ np.array(row))
        reach = student_t(freedom) * math.sqrt(max(variance, 0.0))
        return Estimate(*(math.exp(log + d) for d in (0.0, -reach, reach)))


def fit_laws(results: Sequence[Result], seed: int = 0) -> list[LearningRateLaw]:
    """Return one law for each variant of `results`; `seed` is that of the bootstraps."""
    groups = grouped(results, lambda result: result.variant)
    return [_fit_variant(runs, np.random.default_rng(seed)) for _, runs in groups]


def _cell(runs: Sequence[Result]) -> Cell:
    kept, first = finished(runs), runs[0]
    grid = sorted({run.learning_rate for run in runs})
    about = Cell(first.size, first.parameters, first.tokens, ())
    if not kept:
        return dataclasses.replace(
            about, reason="runs diverged at every learning rate: add a lower one"
        )
    losses = [(run.loss or math.nan, rate) for rate, some in kept.items() for run in some]
    lowest = min(losses)[0]
    rates = tuple(rate for loss, rate in losses if loss < lowest * (1 + NEAR))
    diverged = [rate for rate in grid if rate not in kept]
    # A learning rate that diverges bounds the set as well as one with a high loss does. Only the
    # ends of the grid cut the set off.
    cut = rates[0] == grid[0] or rates[-1] == grid[-1]
    reason = edge(grid, diverged, rates[0], rates[-1]) if cut else None
    return dataclasses.replace(about, learning_rates=rates, reason=reason)


def _fit_variant(runs: Sequence[Result], random: np.random.Generator) -> LearningRateLaw:
    groups = grouped(runs, lambda r: (r.parameters, r.size, r.tokens))
    cells = tuple(_cell(some) for _, some in groups)
    used = [cell for cell in cells if not cell.reason]
    horizons = [run.tokens for run in runs]
    about = LearningRateLaw(runs[0].variant, cells, (min(horizons), max(horizons)))
    rows = np.array([[1.0, math.log(cell.parameters), math.log(cell.tokens)] for cell in used])
    free = [0] + [i for i in (1, 2) if used and np.ptp(rows[:, i]) > 0]
    needed = len(free) + 2
    if len(free) == 1 or len(used) < needed:
        cut = "; ".join(f"{c.size} at {c.tokens} tokens: {c.reason}" for c in cells if c.reason)
        return dataclasses.replace(
            about,
            reason=f"{len(used)} of the {max(needed, 4)} required cells (size, tokens) have an "
            "optimum inside their grid: add sizes or horizons" + (f"; or fix {cut}" if cut else ""),
        )
    if len(free) == 3 and abs(np.corrcoef(rows[:, 1], rows[:, 2])[0, 1]) > _COLLINEAR:
        return dataclasses.replace(
            about,
            reason="tokens grow with parameters, so their exponents cannot be separated: add "
            "another horizon to a size",
        )
    rows = rows[:, free]
    logs = [np.log(cell.learning_rates) for cell in used]
    counts = np.array([len(some) for some in logs], float)
    sums = np.array([some.sum() for some in logs])
    moments = counts[:, None, None] * rows[:, :, None] * rows[:, None, :]
    right = sums[:, None] * rows
    fitted = np.linalg.solve(moments.sum(0), right.sum(0))
    covariance = _over_cells(rows, counts, sums / counts, random)
    reach = student_t(len(used) - len(free)) * np.sqrt(np.diag(covariance))
    found: dict[int, Estimate] = {
        i: Estimate(float(v), float(v - r), float(v + r))
        for i, v, r in zip(free, fitted, reach, strict=True)
    }
    return dataclasses.replace(
        about,
        runs=int(counts.sum()),
        intercept=found[0],
        parameters_exponent=found.get(1),
        tokens_exponent=found.get(2),
        run_bootstrap=_over_runs(rows, logs, random),
        covariance=tuple(tuple(float(v) for v in row) for row in covariance),
    )


def _solve(rows: np.ndarray, weights: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Solve weighted least squares for each row of `weights` (draws, cells); (draws, columns)."""
    moments = np.einsum("bg,gi,gj->bij", weights, rows, rows)
    right = np.einsum("bg,gi,bg->bi", weights, rows, np.broadcast_to(means, weights.shape))
    return np.linalg.solve(moments, right[:, :, None])[:, :, 0]


def _centred(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return standardised columns, and the matrix that maps their coefficients back to `rows`'."""
    middle, spread = rows.mean(0), rows.std(0)
    middle[0], spread[0] = 0.0, 1.0
    back = np.diag(1 / spread)
    back[0, 1:] = -middle[1:] / spread[1:]
    return (rows - middle) / spread, back


def _over_cells(
    rows: np.ndarray, counts: np.ndarray, means: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Return the covariance of the coefficients over resampled departures of cells.

    Each draw gives every cell a departure from the law with a random sign and the magnitude of a
    random cell's departure. Resampling the cells themselves would often leave too few different
    ones to fit. The fit reduces departures, most of all when cells are few, so they are divided by
    sqrt(1 - leverage), as in HC2.
    """
    columns, back = _centred(rows)
    root = np.sqrt(counts)[:, None]
    hat = (columns * root) @ np.linalg.pinv(columns * root)
    fitted = _solve(columns, counts[None], means)[0]
    left = np.clip(1 - np.diag(hat), 0.05, None)
    departures = (means - columns @ fitted) / np.sqrt(left)
    drawn = random.choice(departures, size=(BOOTSTRAPS, len(rows)))
    drawn = drawn * random.choice([-1.0, 1.0], size=drawn.shape)
    draws = _solve(columns, np.broadcast_to(counts, drawn.shape), drawn)
    return back @ np.cov(draws.T, ddof=0) @ back.T


def _over_runs(
    rows: np.ndarray, logs: Sequence[np.ndarray], random: np.random.Generator
) -> tuple[float, ...]:
    """Return the standard deviations of the coefficients over resampled runs, as in Step Law."""
    columns, back = _centred(rows)
    owner = np.repeat(np.arange(len(logs)), [len(some) for some in logs])
    values = np.concatenate(logs)
    chosen = random.integers(len(values), size=(BOOTSTRAPS, len(values)))
    weights = np.zeros((BOOTSTRAPS, len(logs)))
    sums = np.zeros_like(weights)
    draw = np.arange(BOOTSTRAPS)[:, None]
    np.add.at(weights, (draw, owner[chosen]), 1.0)
    np.add.at(sums, (draw, owner[chosen]), values[chosen])
    moments = np.einsum("bg,gi,gj->bij", weights, columns, columns) / len(values)
    whole = np.linalg.det(moments) > 1e-6  # other draws have too few different cells to fit
    means = sums[whole] / np.maximum(weights[whole], 1.0)
    draws = _solve(columns, weights[whole], means) @ back.T
    return tuple(float(v) for v in draws.std(0))
