"""Estimates with confidence intervals, and the functions that several fits share."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

LEVEL = 0.95  # the confidence level of every interval


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and the interval that contains the true value with probability `LEVEL`.

    `low` and `high` are None if the data determine the number but not its spread.
    """

    value: float
    low: float | None = None
    high: float | None = None


def student_t(freedom: int) -> float:
    """Return the t with P(|T| <= t) = `LEVEL` for Student's T with `freedom` degrees of freedom.

    Raise `ValueError` if `freedom` is below 1.
    """
    if freedom < 1:
        raise ValueError("no degree of freedom is left: freedom must be 1 or more")
    return float(scipy.stats.t.ppf((1 + LEVEL) / 2, freedom))


def jackknife(whole: float, without: Sequence[float]) -> Estimate:
    """Return the estimate `whole` with Tukey's jackknife interval.

    Args:
      whole: the number computed from all n independent units.
      without: the same number computed without each of the units, (n,).

    The variance is (n - 1) / n times the sum of squares about the mean of `without`. The interval
    uses Student's t with n - 1 degrees of freedom. There is no interval for fewer than 3 units:
    with 2 it would be 13 standard errors wide.
    """
    count = len(without)
    if count < 3:
        return Estimate(whole)
    spread = float(np.std(np.asarray(without))) * math.sqrt(count - 1)
    reach = student_t(count - 1) * spread
    return Estimate(whole, whole - reach, whole + reach)


def two_digits(value: float) -> str:
    """Format a learning rate that a message proposes, such as 0.0013 or 3e-05."""
    return f"{value:.2g}"


def step_of(rates: Sequence[float]) -> float:
    """Return the geometric mean ratio of neighbouring learning rates in a grid; 2 for one value."""
    if len(rates) < 2:
        return 2.0
    return (max(rates) / min(rates)) ** (1 / (len(rates) - 1))
