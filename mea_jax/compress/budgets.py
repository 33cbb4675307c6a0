"""Choose the number of key heads and of value heads of each layer, at a given total of cache bytes.

Keys need far more heads than values, and the first layer needs more than the others. By how much
differs between models, so it is measured: for each layer, and separately for its keys and values,
the divergence of the predictions when only they are compressed, to each number of heads. The best
choice at a total of bytes is then a knapsack problem, which is solved exactly.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.config.schema import ModelConfig
from mea_jax.errors import UserError
from mea_jax.generate.decode import empty_cache, serving
from mea_jax.model.kv_cache import count_bytes

BUDGETS = ("uniform", "information", "measured", "repaired", "residual")
LAYERS = ("full", "deep", "half")
POSITIONS = 4096  # length of the cache whose arrays are counted
ROUNDING = 0.005  # a number of heads this close to an integer, relatively, counts as that integer


def cache_bytes(model: ModelConfig) -> list[tuple[float, float]]:
    """Return the bytes per position of each layer's keys (with their scalars) and values.

    They are counted from the bfloat16 arrays that a generator would create for `POSITIONS`. With
    slots of few bits they are not integers. `model` is resolved.
    """
    empty = functools.partial(empty_cache, serving(model), 1, POSITIONS, jnp.bfloat16)
    found = []
    for layer in jax.eval_shape(empty).layers:
        scalars = [] if layer.inverse_rms_BKS is None else [layer.inverse_rms_BKS]
        key = count_bytes([layer.key]) + sum(x.size * x.dtype.itemsize for x in scalars)
        value = count_bytes([layer.value])
        found.append((key / POSITIONS, value / POSITIONS))
    return found


def choose_layers(words: str, n_layers: int) -> list[int]:
    """Return the numbers of the layers to compress, in ascending order.

    `words` selects all layers ("full"), all but the first sixteenth ("deep": all but 3 of 48), the
    middle half ("half": 12 to 35 of 48), or a list such as "2,4-7". Raise `UserError` for anything
    else.
    """
    if words in LAYERS:
        first = {"full": 0, "deep": math.ceil(n_layers / 16), "half": n_layers // 4}[words]
        last = n_layers - n_layers // 4 if words == "half" else n_layers
        return list(range(first, last))
    chosen: set[int] = set()
    for part in words.split(","):
        first_word, _, last_word = part.strip().partition("-")
        last_word = last_word or first_word
        if not (first_word.isdigit() and last_word.isdigit()):
            raise UserError(
                f"--layers={words} names no layers: give {', '.join(LAYERS)}, or numbers such as "
                "2,4-7"
            )
        chosen.update(range(int(first_word), int(last_word) + 1))
    if not chosen or max(chosen) >= n_layers:
        raise UserError(
            f"--layers={words}: the model has layers 0 to {n_layers - 1}; choose among these"
        )
    return sorted(chosen)


def heads_kept(keep: float, heads: int) -> float:
    """Return the number of component heads that `keep` of a layer's cache amounts to.

    It may be fractional, but a share such as 0.333 of three heads counts as one head. Raise
    `UserError` if `keep` is outside (0, 1] or leaves less than one head.
    """
    found = _heads(keep, heads)
    if found < 1:
        raise UserError(
            f"--keep={keep} leaves less than one of {heads} heads: keep {1 / heads:.3g} or more, "
            "or give --method frequency, which keeps single slots of all layers"
        )
    return found


def slots_kept(keep: float, heads: int, width: int) -> float:
    """Return `keep` as a number of heads of `width` features, with any number of rotary pairs.

    Raise `UserError` if `keep` is outside (0, 1] or leaves no pair.
    """
    found = _heads(keep, heads)
    if round(found * width / 2) < 1:
        raise UserError(
            f"--keep={keep} leaves no rotary pair of {heads * width // 2}: keep "
            f"{2 / (heads * width):.3g} or more"
        )
    return found


def _heads(keep: float, heads: int) -> float:
    if not 0 < keep <= 1:
        raise UserError(f"--keep={keep} must be in (0, 1]: give the share of the cache to keep")
    found = keep * heads
    return float(round(found)) if abs(found - round(found)) <= ROUNDING * found else found


def uniform(keep: float, heads: int) -> int:
    """Return the number of component heads of every layer at `keep` of the cache.

    Raise `UserError` if `keep` is not a whole number of heads; the message gives the nearest shares
    that are.
    """
    found = heads_kept(keep, heads)
    if found != int(found):
        below = math.floor(found)
        raise UserError(
            f"--keep={keep} is not a whole number of heads per layer: of {heads} key/value heads, "
            f"{below} are {below / heads:.3g} of the cache and {below + 1} are "
            f"{(below + 1) / heads:.3g}; give one of these, or --budget measured, which chooses "
            "the number of heads for each layer, or --method frequency with all layers, which "
            "keeps single slots"
        )
    return int(found)


def allot(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], total: int
) -> list[int]:
    """Return the options that minimise the sum of losses, at a total cost of at most `total`.

    Args:
      costs: the integer cost of each option of each item.
      losses: the loss of each option of each item; a negative loss counts as 0.
      total: the upper bound of the sum of costs.

    Returns:
      The index of each item's option. It is exact, by dynamic programming over costs.

    Raises:
      ValueError: the cheapest options cost more than `total`.
    """
    unit = math.gcd(*(cost for options in costs for cost in options))
    room = total // unit
    best = np.zeros(room + 1)  # the least loss of the items so far, at each total
    choices = []
    for options, worse in zip(costs, losses, strict=True):
        new, chosen = np.full(room + 1, np.inf), np.full(room + 1, -1)
        for number, (cost, loss) in enumerate(zip(options, worse, strict=True)):
            if (start := cost // unit) > room:
                continue
            value = best[: room + 1 - start] + max(loss, 0.0)
            less = value < new[start:]
            new[start:] = np.where(less, value, new[start:])
            chosen[start:] = np.where(less, number, chosen[start:])
        best = new
        choices.append(chosen)
    if best[room] == math.inf:
        raise ValueError("the cheapest options cost more than the total")
    found = []
    for options, chosen in zip(reversed(costs), reversed(choices), strict=True):
        found.append(int(chosen[room]))
        room -= options[found[-1]] // unit
    return found[::-1]
