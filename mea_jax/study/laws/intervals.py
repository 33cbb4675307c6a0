"""Numbers with intervals, and what the fits share to make them."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95  # of every interval


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds the true one with probability `LEVEL`.

    `low` and `high` are None where the data give a number but say nothing of its spread.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the interval holds `value`. False without an interval."""
        return self.low is not None and self.high is not None and self.low <= value <= self.high


@functools.lru_cache
def student_t(freedom: int, level: float = LEVEL) -> float:
    """The t with P(|T| <= t) = `level`, T of Student's distribution.

    From its finite series (Abramowitz and Stegun, 26.7.3 and 26.7.4), by bisection. In numpy's
    absence of quantiles, and to 1e-9.
    """
    if freedom < 1:
        raise ValueError("no degree of freedom")
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(2 + odd, freedom + 1, 2):  # the term of cos^(power - 2)
        total += term
        term *= cosine**2 * (power - 1) / power
    if odd:
        return (angle + math.sin(angle) * total) * 2 / math.pi
    return math.sin(angle) * total


def jackknife(whole: float, without: Sequence[float]) -> Estimate:
    """`whole` with an interval from the same number without each of the independent units.

    Tukey's: the variance is (n - 1) / n times the sum of squares about the mean of `without`; the
    interval has Student's t of n - 1 degrees of freedom. None below 3 units: with 2 it would be 13
    standard errors wide.
    """
    count = len(without)
    if count < 3:
        return Estimate(whole)
    spread = float(np.std(np.asarray(without))) * math.sqrt(count - 1)
    reach = student_t(count - 1) * spread
    return Estimate(whole, whole - reach, whole + reach)


def two_digits(value: float) -> str:
    """For learning rates to add: 0.0013, 3e-05."""
    return f"{value:.2g}"


def step_of(rates: Sequence[float]) -> float:
    """The ratio of neighbours in a grid of learning rates, its geometric mean; 2 for one value."""
    if len(rates) < 2:
        return 2.0
    return (max(rates) / min(rates)) ** (1 / (len(rates) - 1))
