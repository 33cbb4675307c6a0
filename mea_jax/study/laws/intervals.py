"""Numbers with intervals, and what the fits share to make them."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

LEVEL = 0.95  # of every interval


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds the true one with probability `LEVEL`.

    `low` and `high` are None where the data give a number but say nothing of its spread.
    """

    value: float
    low: float | None = None
    high: float | None = None


def student_t(freedom: int) -> float:
    """The t with P(|T| <= t) = `LEVEL`, T of Student's distribution with `freedom` degrees."""
    if freedom < 1:
        raise ValueError("no degree of freedom")
    return float(scipy.stats.t.ppf((1 + LEVEL) / 2, freedom))


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
