"""Divide the bytes of a cache between layers, keys and values, by what an error in each costs.

The Fisher information (fisher.py) predicts the divergence of the predictions for any bits. It can
also be measured, at a few totals of bits, for the keys and the values of each layer alone
(bits_probe.py). It is nearly proportional to the predicted one, so between two measured points its
logarithm is interpolated in the logarithm of that, and beyond them it is proportional to it. Which
bytes each side should get is then a knapsack problem, which `budgets.allot` solves exactly.
"""

import math
from collections.abc import Sequence

import numpy as np

from mea_jax.compress import bits
from mea_jax.compress.budgets import POSITIONS, allot
from mea_jax.compress.probe import Sensitivity
from mea_jax.errors import UserError

POINTS = (2, 4)  # bits a slot, on average, at which a side is measured
_LEAST = 1e-9  # nats: the least divergence that is told from none


def predicted(division: bits.Division, measured: Sensitivity) -> list[float]:
    """Return the divergence at each of `division.fitting`, from that at `POINTS`.

    `measured.residuals` and `measured.losses` are the lost costs and divergences at the points.
    """
    lost = np.log([max(value, _LEAST) for value in measured.residuals])
    worse = np.log([max(value, _LEAST) for value in measured.losses])
    order = np.argsort(lost)
    lost, worse = lost[order], np.maximum.accumulate(worse[order])
    at = np.log([max(division.lost(total), _LEAST) for total in division.fitting])
    found = np.interp(at, lost, worse)
    below, above = at < lost[0], at > lost[-1]
    found = np.where(below, worse[0] + at - lost[0], found)
    return np.exp(np.where(above, worse[-1] + at - lost[-1], found)).tolist()


def divide(
    divisions: Sequence[bits.Division], losses: Sequence[Sequence[float]], keep: float
) -> list[str]:
    """Return rows of `ModelConfig.key_bits` or `value_bits` for the sides of all layers.

    Args:
      divisions: the divisions of each side of each layer.
      losses: the divergence at each of their `fitting`.
      keep: the share of bfloat16's bytes to keep of all of them together.

    Raises:
      UserError: not even one byte for each fits.
    """
    counts = [len(division.weights_X) for division in divisions]
    total = keep * 2 * sum(counts) * POSITIONS - sum(map(bits.fixed_bytes, counts))
    total = math.floor(total / POSITIONS)
    if total < len(divisions):
        raise UserError(f"--keep={keep} leaves no bit of {sum(counts)} slots: keep more")
    costs = [list(range(1, len(division.fitting) + 1)) for division in divisions]
    chosen = allot(costs, losses, total)
    return [
        division.row(division.fitting[option])
        for division, option in zip(divisions, chosen, strict=True)
    ]
