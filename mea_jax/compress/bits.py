"""Divide bits over the slots of a cache: reverse water-filling.

A slot of variance s^2 that is quantised with b bits loses s^2 d_b, where d_b is the distortion of
the best uniform quantiser of a Gaussian. The gain of each further bit is smaller than that of the
one before, so adding the bits one by one, each where it gains most, is the best division.
"""

import functools
import heapq
import math

import numpy as np

from mea_jax.errors import UserError
from mea_jax.model.heads import SINKS
from mea_jax.ops.slots import MOST_BITS, packed_bytes

# The best step of a uniform quantiser of 1 to 8 bits for a Gaussian of variance 1, and its mean
# square error (J. Max, Quantizing for minimum distortion, 1960, table II; computed here).
STEPS = (1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.05687, 0.03076)
DISTORTIONS = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001040, 0.0003043, 0.0000877)


class Division:
    """All divisions of bits over the slots of a layer's keys or values.

    `weights_X` is the variance of each slot, times what an error of it costs. Raise `ValueError` if
    a weight is negative or not finite.
    """

    def __init__(self, weights_X: np.ndarray):
        if not np.all(np.isfinite(weights_X)) or np.any(weights_X < 0):
            raise ValueError("weights must be finite and at least 0")
        self.weights_X = np.asarray(weights_X, np.float64)
        self._order = self._by_gain()

    def _by_gain(self) -> np.ndarray:
        """Return the slots in the order in which they get their bits, (8 X,)."""
        bits, order = np.zeros(len(self.weights_X), np.int64), []
        table = np.asarray(DISTORTIONS)
        heap = [(-w * (table[0] - table[1]), slot) for slot, w in enumerate(self.weights_X)]
        heapq.heapify(heap)
        while heap:
            _, slot = heapq.heappop(heap)
            order.append(slot)
            bits[slot] += 1
            b = int(bits[slot])
            if b < MOST_BITS:
                gain = float(self.weights_X[slot]) * (table[b] - table[b + 1])
                heapq.heappush(heap, (-gain, slot))
        return np.asarray(order, np.int64)

    def bits(self, total: int) -> np.ndarray:
        """Return the bits (X,), int64, that lose least at `total` bits together (at most 8 X)."""
        return np.bincount(self._order[: max(total, 0)], minlength=len(self.weights_X))

    def row(self, total: int) -> str:
        """Return `bits` as a row of `ModelConfig.key_bits`."""
        return "".join(map(str, self.bits(total)))

    def lost(self, total: int) -> float:
        """Return the sum of weights times distortions at `total` bits."""
        return float(self.weights_X @ np.asarray(DISTORTIONS)[self.bits(total)])

    @functools.cached_property
    def fitting(self) -> list[int]:
        """The most bits that fit in 1, 2, .. bytes of a position, up to those of all slots."""
        sizes = range(1, packed_bytes(np.full(len(self.weights_X), MOST_BITS)) + 1)
        return [min(8 * size, len(self._order)) for size in sizes]


def fixed_bytes(slots: int) -> int:
    """Return the bytes of a cache that do not grow with its length: steps and first positions."""
    return 4 * slots + 2 * SINKS * slots


def room(slots: int, keep: float, positions: int) -> int:
    """Return the bytes of a position for `slots` slots at `keep` of the bytes of bfloat16.

    Steps and exact first positions are counted, for a cache of `positions` positions.
    """
    return math.floor((keep * 2 * slots * positions - fixed_bytes(slots)) / positions)


def divide(division: Division, keep: float, positions: int) -> str:
    """Return the bits of the slots of a layer's keys or values, as a row of `ModelConfig.key_bits`.

    Their cache of `positions` positions, with steps and exact first positions, has at most `keep`
    of the bytes of bfloat16. Raise `UserError` if not even one bit fits.
    """
    count = len(division.weights_X)
    size = min(room(count, keep, positions), len(division.fitting))
    if size < 1 or not division.fitting[size - 1]:
        raise UserError(f"--keep={keep} leaves no bit of {count} slots: keep more")
    return division.row(division.fitting[size - 1])


def steps(variances_X: np.ndarray, bits_X: np.ndarray) -> np.ndarray:
    """Return the step of each slot (X,), float64, for Gaussian values; 1 in slots of 0 bits."""
    table = np.asarray((1.0, *STEPS))
    found = np.sqrt(variances_X) * table[bits_X]
    return np.where((bits_X > 0) & (found > 0), found, 1.0)
