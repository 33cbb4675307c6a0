"""Find the heads that share a component: the cheapest partition of K heads into C groups."""

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

_EXACT = 10  # up to this many heads, all 2^K groups are tried; above, groups are merged greedily

Cost = Callable[[tuple[int, ...]], float]


def partition(heads: int, groups: int, cost: Cost) -> list[tuple[int, ...]]:
    """Return the partition of `heads` heads into `groups` groups with the least sum of `cost`.

    It is exact up to ten heads (dynamic programming over subsets). Above, the two groups whose
    union adds the least cost are merged until `groups` are left.
    """
    cost = functools.cache(cost)
    return (_exact if heads <= _EXACT else _joined)(heads, groups, cost)


def _exact(heads: int, groups: int, cost: Cost) -> list[tuple[int, ...]]:
    members = [tuple(h for h in range(heads) if s >> h & 1) for s in range(1 << heads)]

    @functools.cache
    def best(left: int, count: int) -> tuple[float, tuple[int, ...]]:
        """Return the least cost of `count` groups of the heads in bits `left`, and the groups."""
        if count == 0:
            return (0.0, ()) if left == 0 else (np.inf, ())
        first = left & -left  # the loop chooses the group that contains this head
        found: tuple[float, tuple[int, ...]] = (np.inf, ())
        rest = left ^ first
        subset = rest
        while True:
            group = subset | first
            behind, others = (
                best(left ^ group, count - 1) if left ^ group or count == 1 else (np.inf, ())
            )
            if behind < np.inf and (total := behind + cost(members[group])) < found[0]:
                found = total, (group, *others)
            if subset == 0:
                return found
            subset = (subset - 1) & rest

    return [members[group] for group in best((1 << heads) - 1, groups)[1]]


def _joined(heads: int, groups: int, cost: Cost) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [(h,) for h in range(heads)]
    while len(found) > groups:

        def added(pair: Sequence[tuple[int, ...]]) -> float:
            return cost(tuple(sorted(pair[0] + pair[1]))) - cost(pair[0]) - cost(pair[1])

        a, b = min(itertools.combinations(found, 2), key=added)
        found = [g for g in found if g not in (a, b)] + [tuple(sorted(a + b))]
    return sorted(found)


def one_hot(groups: Sequence[tuple[int, ...]], heads: int) -> np.ndarray:
    """Return a partition as a mixing matrix (C, K) of zeros and ones."""
    mix_CK = np.zeros((len(groups), heads))
    for c, group in enumerate(groups):
        mix_CK[c, list(group)] = 1.0
    return mix_CK
