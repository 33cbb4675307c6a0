"""Fits of the loss as a function of tokens at one learning rate (arXiv 2601.19611, eq. 35).

    L(D) = (D_c / D)^alpha + L_0

D is in tokens, L and L_0 are in nats per token. The fit is robust (Huber's function of
log-residuals, as in arXiv 2203.15556), is checked on held-out late points, and is dropped if that
check fails.

For a given alpha the law is linear in A = D_c^alpha and L_0. So alpha is searched on a fine grid
and the other two are solved for (variable projection), which needs no optimiser and no starting
point. Intervals are profiles: the range of each number among all (alpha, A, L_0) whose sum of
squares exceeds the minimum by at most t^2 s^2. L_0 and alpha trade off along a curved valley, which
intervals from a covariance matrix do not follow.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mea_jax.study.laws.intervals import Estimate, jackknife, student_t
from mea_jax.study.laws.results import Result, grouped

ALPHAS = (0.01, 3.0)  # range of the search; published exponents are between 0.05 and 0.6
SKIP = 0.1  # share of the horizon skipped: warmup and the first descent do not follow a power law
HELD_OUT = 0.25  # share of the token counts that are held out, the last ones
POINTS = 8  # fewest token counts: 6 for three numbers and their errors, 2 held out
# A root mean square of the log-residuals, fitted or held out, above which the fit is dropped:
# 0.03 nats at a loss of 3, which is more than the difference between learning rates.
TOLERANCE = 0.01
_HUBER = 1.345  # standard deviations: 95% efficient for normal errors (Huber 1981)
_COARSE, _ZOOMS = 40, 5  # the search for alpha, to a relative precision of 2e-5
_ROUNDS = 4  # rounds of reweighting, which start from the weights of the previous search
_FINE = 200  # alphas in a profile: an interval's ends are accurate to 1/200 of its length
_ROUNDING = 1e-5  # smallest standard deviation of log-residuals that is assumed


@dataclasses.dataclass(frozen=True)
class LossInTokens:
    """The fit of one (variant, size, learning rate).

    Attributes:
      tokens: the largest horizon of the runs.
      source: "curve" (held-out losses along runs) or "horizons" (final losses of runs of several
        lengths). A curve with a decaying learning rate does not follow the law: use runs of several
        lengths or a constant rate, as the paper does.
      points: the number of points that were fitted.
      seeds: the number of seeds that were fitted.
      diverged: the number of runs that were left out because they diverged.
      alpha: the exponent.
      scale: D_c in tokens.
      floor: L_0 in nats.
      over: "seeds" if the intervals are those of the mean over seeds (3 or more). "points" if they
        describe how well the law fits the points of these runs: another seed may be outside.
      error: the root mean square of the log-residuals; 0.001 is 0.1% of the loss.
      held_out_error: the same on the last quarter of the token counts, by a fit of the earlier
        ones.
      reason: why there are no numbers, and what to add. None if there are.
    """

    variant: str
    size: str
    parameters: int
    learning_rate: float
    tokens: int
    source: str
    points: int
    seeds: int
    diverged: int
    alpha: Estimate | None = None
    scale: Estimate | None = None
    floor: Estimate | None = None
    over: str | None = None
    error: float | None = None
    held_out_error: float | None = None
    reason: str | None = None


def fit_tokens(results: Sequence[Result], skip: float = SKIP) -> list[LossInTokens]:
    """Return one fit for each (variant, size, learning rate) of `results`.

    Args:
      results: the runs of any number of variants.
      skip: the share of the horizon, from its start, whose points are left out.
    """
    found = []
    for _, runs in grouped(results, lambda r: (r.variant, r.size, r.learning_rate)):
        found.append(_fit_group(runs, skip))
    return found


def _fit_group(runs: Sequence[Result], skip: float) -> LossInTokens:
    whole = [run for run in runs if not run.diverged]
    source = "curve" if any(len(run.curve) > 1 for run in whole) else "horizons"
    data = _points(whole, source, skip)
    first = runs[0]
    about = LossInTokens(
        variant=first.variant,
        size=first.size,
        parameters=first.parameters,
        learning_rate=first.learning_rate,
        tokens=max(run.tokens for run in runs),
        source=source,
        points=len(data),
        seeds=len({run.seed for run in whole}),
        diverged=len(runs) - len(whole),
    )
    if not whole:
        return _without(
            about,
            f"every run diverged ({len(runs)}): there is no loss to fit; add a lower learning rate",
        )
    at = np.unique(data[:, 0])
    if len(at) < POINTS:
        return _without(
            about,
            f"{len(at)} token counts beyond the first {skip:.0%} of the horizon: give {POINTS} or "
            "more, by more frequent evaluations or runs of other lengths",
        )
    late = at[-max(2, int(len(at) * HELD_OUT))]
    held_out, early = data[data[:, 0] >= late], data[data[:, 0] < late]
    fit = _Fit(early)
    held_out_error = _rms(np.log(fit.loss(held_out[:, 0]) / held_out[:, 1]))
    fit = _Fit(data)
    error = _rms(np.log(fit.loss(data[:, 0]) / data[:, 1]))
    about = dataclasses.replace(about, error=error, held_out_error=held_out_error)
    if max(error, held_out_error) > TOLERANCE:
        return _without(
            about,
            f"does not fit: log-residuals of {error:.2%}, and {held_out_error:.2%} on held-out "
            f"late points, but at most {TOLERANCE:.0%} is allowed: inspect the curve for spikes "
            "and a decaying learning rate, or skip more of its start",
        )
    over = "seeds" if about.seeds >= 3 else "points"
    estimates = _over_seeds(fit, data) if over == "seeds" else fit.profile()
    if estimates is None:
        return _without(
            about,
            "the points do not separate alpha from L_0: add longer runs, or more evaluations",
        )
    alpha, scale, floor = estimates
    return dataclasses.replace(about, alpha=alpha, scale=scale, floor=floor, over=over)


def _without(about: LossInTokens, reason: str) -> LossInTokens:
    return dataclasses.replace(about, reason=reason)


def _rms(residuals: np.ndarray) -> float:
    return math.sqrt(float(np.mean(residuals**2)))


def _points(runs: Sequence[Result], source: str, skip: float) -> np.ndarray:
    """Return rows of (tokens, loss, series), sorted by series and tokens, past the skipped start.

    Points of one series may be correlated. The series is the seed: of a run's curve, or of the
    final losses of runs of several lengths.
    """
    rows: list[tuple[float, float, float]] = []
    for run in runs:
        points = run.curve
        if source == "horizons" or not points:
            points = ((run.tokens, run.loss or math.nan),)
        rows += [(float(at), loss, float(run.seed)) for at, loss in points]
    most = max((row[0] for row in rows), default=0.0)
    kept = sorted((r for r in rows if r[0] > skip * most), key=lambda r: (r[2], r[0]))
    return np.array(kept).reshape(-1, 3)


def _over_seeds(fit: "_Fit", data: np.ndarray) -> tuple[Estimate, Estimate, Estimate] | None:
    """Return alpha, D_c and L_0 with jackknife intervals from fits that leave out one seed each.

    Alpha and D_c, which are positive, are jackknifed in logarithms. Return None if the interval of
    alpha exceeds the range of the search.
    """
    seeds = np.unique(data[:, 2])
    others = [_Fit(data[data[:, 2] != seed]) for seed in seeds]
    alpha = _exp(jackknife(math.log(fit.alpha), [math.log(other.alpha) for other in others]))
    assert alpha.low is not None
    assert alpha.high is not None
    if alpha.low <= ALPHAS[0] or alpha.high >= ALPHAS[1]:
        return None
    scale = jackknife(fit.log_scale, [other.log_scale for other in others])
    floor = jackknife(fit.floor, [other.floor for other in others])
    floor = Estimate(floor.value, max(0.0, floor.low or 0.0), floor.high)
    return alpha, _exp(scale), floor


def _exp(estimate: Estimate) -> Estimate:
    low, high = estimate.low, estimate.high
    return Estimate(
        _bounded_exp(estimate.value),
        None if low is None else _bounded_exp(low),
        None if high is None else _bounded_exp(high),
    )


def _bounded_exp(value: float) -> float:
    """Compute exp within the range of a float: D_c is far from any data if alpha is small."""
    return math.exp(min(max(value, -700.0), 700.0))


class _Fit:
    """The law that fits the points best.

    Attributes:
      alpha: the exponent.
      floor: L_0.
      log_scale: log D_c.
    """

    def __init__(self, points: np.ndarray):
        """Fit the law to `points`, rows of (tokens, loss, series)."""
        self.tokens, self.losses, self.series = points.T
        # D relative to its geometric mean, so that A is of the order of the loss for every alpha.
        self.unit = math.exp(float(np.mean(np.log(self.tokens))))
        self.scale = math.inf  # of the residuals; if infinite, Huber's function is the square
        self.weights = np.ones_like(self.tokens)
        for _ in range(3):  # the residuals' scale and the fit depend on each other
            self._search()
            residuals = np.log(self.loss(self.tokens) / self.losses)
            # The fit makes 3 residuals vanish; the scale is from the median of the others.
            spread = np.sort(np.abs(residuals))[min(3, len(residuals) - 1) :]
            self.scale = max(1.4826 * float(np.median(spread)), 1e-9)

    def _search(self) -> None:
        """Search alpha over `ALPHAS`, then repeatedly between the neighbours of the best one."""
        alphas = np.geomspace(*ALPHAS, _COARSE)
        for _ in range(_ZOOMS):
            amplitudes, floors, costs, weights = self._solve(alphas)
            best = int(np.argmin(costs))
            low, high = alphas[max(best - 1, 0)], alphas[min(best + 1, len(alphas) - 1)]
            self.alpha, self.amplitude = float(alphas[best]), float(amplitudes[best])
            self.floor = float(floors[best])
            self.weights = weights[best]
            alphas = np.geomspace(low, high, 21)

    @property
    def log_scale(self) -> float:
        return math.log(self.unit) + math.log(self.amplitude) / self.alpha

    def loss(self, tokens: np.ndarray) -> np.ndarray:
        return self.amplitude * (tokens / self.unit) ** -self.alpha + self.floor

    def _solve(self, alphas: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the best A and L_0 >= 0 for each alpha, their Huber costs and the point weights.

        Solves least squares, reweighted in each round so that the fixed point is the minimum of
        Huber's function of log(predicted / observed). Shapes are (alphas,), and (alphas, points)
        for the weights.
        """
        powers = (self.tokens / self.unit) ** -alphas[:, None]
        weights = np.broadcast_to(self.weights, powers.shape)
        for _ in range(1 if self.scale == math.inf else _ROUNDS):
            amplitudes, floors = _linear(powers, self.losses, weights)
            predicted = amplitudes[:, None] * powers + floors[:, None]
            ratios = predicted / self.losses
            logs = np.log(ratios)
            near = np.abs(ratios - 1) < 1e-9  # where log(r) / (r - 1) is 0 / 0
            slope = np.where(near, 1.0, logs / np.where(near, 1.0, ratios - 1))
            bound = _HUBER * self.scale
            with np.errstate(divide="ignore"):
                weights = np.minimum(1.0, bound / np.abs(logs)) * slope / ratios
        absolute = np.abs(logs)
        inside = absolute <= bound
        costs = np.where(inside, logs**2 / 2, np.minimum(bound, 1e9) * (absolute - bound / 2))
        if self.scale == math.inf:
            costs = logs**2 / 2
        return amplitudes, floors, costs.sum(axis=1), weights

    def profile(self) -> tuple[Estimate, Estimate, Estimate] | None:
        """Return alpha, D_c and L_0 with profile intervals; None if alpha's reaches `ALPHAS`' ends.

        Uses pseudo-observations (Huber 1981, 7.10): residuals psi(r) / mean psi' around the robust
        fit. Their ordinary least squares give the robust fit, with the robust variance.
        """
        fitted = self.loss(self.tokens)
        residuals = np.log(self.losses / fitted)
        bound = _HUBER * self.scale
        inside = float(np.mean(np.abs(residuals) <= bound))
        pseudo = np.clip(residuals, -bound, bound) / max(inside, 0.1)
        inflation = _correlation(pseudo, self.series)
        freedom = max(1, int(len(pseudo) / inflation) - 3)
        least = float((pseudo**2).sum())
        variance = max(least / (len(pseudo) - 3) * inflation, _ROUNDING**2)
        most = least + student_t(freedom) ** 2 * variance
        alphas = np.geomspace(*ALPHAS, _FINE)
        for _ in range(3):  # the full range, then the interval and one alpha beyond each end
            alphas = np.sort(np.append(alphas, self.alpha))  # without it a short interval is missed
            region = _Region(alphas, self.tokens / self.unit, fitted, 1 + pseudo, most)
            held = np.flatnonzero(region.held)
            if len(held) == 0 or held[0] == 0 or held[-1] == len(alphas) - 1:
                return None
            alphas = np.geomspace(alphas[held[0] - 1], alphas[held[-1] + 1], _FINE)
        low, high = region.alphas[held[0]], region.alphas[held[-1]]
        scales = np.log(region.amplitudes[:, held]) / region.alphas[held] + math.log(self.unit)
        return (
            Estimate(self.alpha, float(low), float(high)),
            _exp(Estimate(self.log_scale, float(scales.min()), float(scales.max()))),
            Estimate(
                self.floor,
                max(0.0, float(region.floors[0, held].min())),
                float(region.floors[1, held].max()),
            ),
        )


class _Region:
    """The (A, L_0) of each alpha whose sum of squared relative errors is at most `most`.

    They form an ellipse for each alpha.

    Attributes:
      held: a mask (alphas,), true if the ellipse contains a point with A > 0 and L_0 >= 0.
      amplitudes: the ends of the ellipse along A, (2, alphas).
      floors: the ends of the ellipse along L_0, (2, alphas).
    """

    def __init__(
        self,
        alphas: np.ndarray,
        tokens: np.ndarray,
        fitted: np.ndarray,
        observed: np.ndarray,
        most: float,
    ):
        x = tokens ** -alphas[:, None] / fitted
        one = 1 / fitted
        xx, x1, oo = (x * x).sum(1), (x * one).sum(1), float((one * one).sum())
        xy, oy = (x * observed).sum(1), float((one * observed).sum())
        determinant = np.maximum(xx * oo - x1**2, 1e-300)
        amplitudes, floors = (xy * oo - oy * x1) / determinant, (oy * xx - xy * x1) / determinant
        predicted = amplitudes[:, None] * x + floors[:, None] * one
        room = most - ((predicted - observed) ** 2).sum(1)
        reach = np.sqrt(np.maximum(room, 0) / determinant)
        ends = np.array([[-1.0], [1.0]])
        self.alphas = alphas
        self.amplitudes = np.maximum(amplitudes + ends * reach * math.sqrt(oo), 1e-300)
        self.floors = floors + ends * reach * np.sqrt(xx)
        self.held = (room >= 0) & (self.amplitudes[1] > 1e-300) & (self.floors[1] >= 0)


def _linear(
    powers: np.ndarray, losses: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the A > 0 and L_0 >= 0 that minimise weighted squared relative errors.

    `powers` and `weights` are (alphas, points), `losses` (points,), the results (alphas,).
    """
    weights = weights / losses**2
    xx, x1 = (weights * powers**2).sum(1), (weights * powers).sum(1)
    oo, xy = weights.sum(1), (weights * powers * losses).sum(1)
    oy = (weights * losses).sum(1)
    determinant = np.maximum(xx * oo - x1**2, 1e-300)
    amplitudes, floors = (xy * oo - oy * x1) / determinant, (oy * xx - xy * x1) / determinant
    below = floors < 0
    amplitudes, floors = np.where(below, xy / xx, amplitudes), np.where(below, 0.0, floors)
    rising = amplitudes <= 0  # losses grow with tokens: fit nearly a constant
    return np.where(rising, 1e-12, amplitudes), np.where(rising, oy / oo, floors)


def _correlation(residuals: np.ndarray, series: np.ndarray) -> float:
    """Return the factor by which correlated neighbours inflate variances, at least 1.

    It is (1 + rho) / (1 - rho), where rho is the correlation of consecutive points of a series.
    """
    centred = residuals - residuals.mean()
    together = series[1:] == series[:-1]
    total = float((centred**2).sum())
    if total == 0 or not together.any():
        return 1.0
    rho = float((centred[1:] * centred[:-1])[together].sum()) / total
    rho *= len(residuals) / max(int(together.sum()), 1)
    rho += 3 / len(residuals)  # corrects for the bias from fitting three numbers
    rho = min(max(rho, 0.0), 0.9)
    return (1 + rho) / (1 - rho)
