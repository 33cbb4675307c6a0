"""Divide bits over the slots of a cache by their variances: reverse water-filling.

A slot of variance s^2 that is quantised with b bits loses s^2 d_b, where d_b is the distortion of
the best uniform quantiser of a Gaussian. The gain of each further bit is smaller than that of the
one before, so adding the bits one by one, each where it gains most, is the best division.
"""

import heapq
import math

import numpy as np

from mea_jax.errors import UserError
from mea_jax.model.heads import SINKS
from mea_jax.ops.slots import MOST_BITS, Layout

# The best step of a uniform quantiser of 1 to 8 bits for a Gaussian of variance 1, and its mean
# square error (J. Max, Quantizing for minimum distortion, 1960, table II; computed here).
STEPS = (1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.05687, 0.03076)
DISTORTIONS = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001040, 0.0003043, 0.0000877)


def allocate(weights_X: np.ndarray, total: int) -> np.ndarray:
    """Return the bits (X,), int64, that minimise sum of weights d_b at `total` bits together.

    Args:
      weights_X: the variance of each slot, times what an error of it costs.
      total: the number of bits; at most 8 X are used.

    Raises:
      ValueError: a weight is negative or not finite.
    """
    if not np.all(np.isfinite(weights_X)) or np.any(weights_X < 0):
        raise ValueError("weights must be finite and at least 0")
    bits = np.zeros(len(weights_X), np.int64)
    gains = [(-w * (DISTORTIONS[0] - DISTORTIONS[1]), slot) for slot, w in enumerate(weights_X)]
    heapq.heapify(gains)
    for _ in range(min(total, MOST_BITS * len(weights_X))):
        _, slot = heapq.heappop(gains)
        bits[slot] += 1
        b = int(bits[slot])
        if b < MOST_BITS:
            gain = float(weights_X[slot]) * (DISTORTIONS[b] - DISTORTIONS[b + 1])
            heapq.heappush(gains, (-gain, slot))
    return bits


def steps(variances_X: np.ndarray, bits_X: np.ndarray) -> np.ndarray:
    """Return the step of each slot (X,), float64, for Gaussian values; 1 in slots of 0 bits."""
    table = np.asarray((1.0, *STEPS))
    found = np.sqrt(variances_X) * table[bits_X]
    return np.where((bits_X > 0) & (found > 0), found, 1.0)


def divide(variances_X: np.ndarray, keep: float, positions: int) -> str:
    """Return the bits of the slots of a layer's keys or values, as a row of `ModelConfig.key_bits`.

    Their cache of `positions` positions, with steps and exact first positions, has at most `keep`
    of the bytes of bfloat16. Raise `UserError` if not even one bit fits.
    """
    slots_count = len(variances_X)
    fixed = 4 * slots_count + 2 * SINKS * slots_count  # bytes of the steps and first positions
    room = math.floor((keep * 2 * slots_count * positions - fixed) / positions)
    total = min(8 * room, MOST_BITS * slots_count)
    while total > 0:
        found = tuple(int(b) for b in allocate(variances_X, total))
        if Layout(found).bytes <= room:  # pieces that fill a byte may need one more
            return "".join(map(str, found))
        total -= 1
    raise UserError(f"--keep={keep} leaves no bit of {slots_count} slots: keep more")
