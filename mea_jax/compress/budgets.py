"""How many heads each layer keeps, of keys and of values, at one total of cache bytes.

Keys need far more heads than values, and the first layer more than the others, by how much differs
from model to model: so it is measured. For each layer, and for its keys and values apart, it is
measured how far predictions move with that one thing compressed to each number of heads; the best
choice at a total of bytes is then a knapsack, solved exactly.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mea_jax.config.schema import ModelConfig
from mea_jax.errors import UserError
from mea_jax.generate.decode import empty_cache, serving
from mea_jax.model.kv_cache import count_bytes

BUDGETS = ("uniform", "measured", "repaired", "residual")
LAYERS = ("full", "deep", "half")
_POSITIONS = 128  # of the cache whose arrays are counted
ROUNDING = 0.005  # of a share: as whole heads count those that are so close to them


def cache_bytes(model: ModelConfig) -> list[tuple[int, int]]:
    """Bytes per position of each layer's keys (with their scalars) and values, in bfloat16.

    Counted from the arrays that a generator would make. `model` is resolved.
    """
    empty = functools.partial(empty_cache, serving(model), 1, _POSITIONS, jnp.bfloat16)
    found = []
    for layer in jax.eval_shape(empty).layers:
        scalars = [] if layer.inverse_rms_BKS is None else [layer.inverse_rms_BKS]
        key = count_bytes([layer.key]) + sum(x.size * x.dtype.itemsize for x in scalars)
        found.append((key // _POSITIONS, count_bytes([layer.value]) // _POSITIONS))
    return found


def choose_layers(words: str, n_layers: int) -> list[int]:
    """Which layers are compressed: all ("full"), all but the first sixteenth ("deep": all but 3 of
    48), the middle half ("half": 12 to 35 of 48), or a list such as "2,4-7".

    Raises `UserError` for anything else.
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
                f"--layers={words}: expected {', '.join(LAYERS)}, or numbers such as 2,4-7"
            )
        chosen.update(range(int(first_word), int(last_word) + 1))
    if not chosen or max(chosen) >= n_layers:
        raise UserError(f"--layers={words}: the model has layers 0 to {n_layers - 1}")
    return sorted(chosen)


def heads_kept(keep: float, heads: int) -> float:
    """Return the component heads of a layer that make up `keep` of its cache, maybe not whole.

    Shares such as 0.333 of three heads count as whole heads. Raises `UserError` for less than one.
    """
    if not 0 < keep <= 1:
        raise UserError(f"--keep={keep} must lie in (0, 1]: the share of the cache that stays")
    found = keep * heads
    if abs(found - round(found)) <= ROUNDING * found:
        found = float(round(found))
    if found < 1:
        raise UserError(
            f"--keep={keep} leaves less than one of {heads} heads: keep {1 / heads:.3g} or more"
        )
    return found


def uniform(keep: float, heads: int) -> int:
    """Return the component heads of every layer at `keep` of the cache.

    Raises `UserError` where `keep` is no whole number of heads, with the shares that are.
    """
    found = heads_kept(keep, heads)
    if found != int(found):
        below = math.floor(found)
        raise UserError(
            f"--keep={keep} cannot be met by the same number of heads in every layer: of {heads} "
            f"key/value heads, {below} are {below / heads:.3g} of the cache and {below + 1} are "
            f"{(below + 1) / heads:.3g}; give one of these, or --budget measured, which gives "
            "layers different numbers"
        )
    return int(found)


def allot(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], total: int
) -> list[int]:
    """The option of each item that makes the sum of losses least, at a cost of at most `total`.

    Args:
      costs: whole numbers, of each option of each item.
      losses: alike; what lies below 0 counts as 0.
      total: of costs.

    Returns:
      The number of each item's option. Exact, by dynamic programming over costs.

    Raises:
      ValueError: even the cheapest options cost more than `total`.
    """
    unit = math.gcd(*(cost for options in costs for cost in options))
    room = total // unit
    best: list[float] = [0.0] * (room + 1)
    choices: list[list[int]] = []
    for options, worse in zip(costs, losses, strict=True):
        new, chosen = [math.inf] * (room + 1), [-1] * (room + 1)
        for number, (cost, loss) in enumerate(zip(options, worse, strict=True)):
            for used in range(cost // unit, room + 1):
                value = best[used - cost // unit] + max(loss, 0.0)
                if value < new[used]:
                    new[used], chosen[used] = value, number
        best = new
        choices.append(chosen)
    if best[room] == math.inf:
        raise ValueError("the cheapest options cost more than the total")
    found = []
    for options, chosen in zip(reversed(costs), reversed(choices), strict=True):
        found.append(chosen[room])
        room -= options[chosen[room]] // unit
    return found[::-1]
