"""Requests as trees of tokens, and trees in rows of few lengths: little is computed that is not
asked for, and nothing twice.

A request is tokens to read and, for the last few of them, the token that should follow. Sorted,
requests with a common beginning are neighbours; those that share enough become one tree, in
depth-first order, whose attention (attention.tree_attention) sees from each token the path to it.
So a question with four answers, or many questions after the same solved examples, cost their
common beginning once. Trees are packed into rows, the largest first, smaller ones into the gaps.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_SHARED = 0.25  # of a request's tokens: so much in common, and it joins its neighbour's tree
_GRAIN = 32  # row lengths are multiples of it
_LENGTHS = 16  # of rows that are tried for a class of trees
_SAMPLE = 512  # trees that they are tried on
_CLASS = 4  # the largest tree of a class over the smallest that opens a row of its own
_WORTH = 4  # times a common beginning: so large a tree may become for its sake
_SEVERAL = 3  # of the largest trees of a class: row lengths for up to so many are tried
_LONGEST = 8192  # of a row for several trees
_FILLED = 0.93  # of a row's positions, on average
_FEW = 0.05  # of all tokens: so few left, and they go into rows of the class before


@dataclass(frozen=True)
class Request:
    """`tokens` to read; `targets`, as many as are scored, follow the last ones of them."""

    tokens: list[int]
    targets: list[int]


@dataclass(frozen=True)
class Tree:
    """Requests with a common beginning; n positions in depth-first order, all numbers from 0."""

    tokens_n: np.ndarray  # int32
    positions_n: np.ndarray  # int32, depths
    reach_n: np.ndarray  # int32, where the subtree below each position ends
    places_m: np.ndarray  # int32, positions whose next token is scored
    targets_m: np.ndarray  # int32, that token
    scored: list[tuple[int, list[int]]]  # number of a request, its entries of the two above

    @property
    def size(self) -> int:
        return len(self.tokens_n)


@dataclass(frozen=True)
class Rows:
    """Rows of one length: numbers of trees in each, in `batches` of `size` rows."""

    length: int
    rows: list[list[int]]
    size: int

    @property
    def batches(self) -> int:
        return -(-len(self.rows) // self.size)

    def batch(self, number: int) -> list[list[int]]:
        """The rows of one batch; the last may have fewer than `size`."""
        return self.rows[number * self.size : (number + 1) * self.size]

    @property
    def computed(self) -> int:
        """Positions of all batches, padding included."""
        return self.batches * self.size * self.length


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix of two lists of tokens."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class _Growing:
    """A tree that requests join in sorted order."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.reach: list[int] = []
        self.path: list[int] = []  # places of the last request's tokens
        self.pairs: dict[tuple[int, int], int] = {}
        self.scored: list[tuple[int, list[int]]] = []

    def _leave(self, depth: int) -> None:
        for place in self.path[depth:]:
            self.reach[place] = len(self.tokens)
        del self.path[depth:]

    def add(self, number: int, request: Request, shared: int) -> None:
        self._leave(shared)
        new, size = request.tokens[shared:], len(self.tokens)
        self.tokens += new
        self.positions += range(shared, len(request.tokens))
        self.reach += [0] * len(new)
        self.path += range(size, size + len(new))
        places = self.path[len(self.path) - len(request.targets) :]
        found = zip(places, request.targets, strict=True)
        self.scored.append((number, [self.pairs.setdefault(p, len(self.pairs)) for p in found]))

    def done(self) -> Tree:
        self._leave(0)
        pairs = np.array(list(self.pairs), np.int32).reshape(-1, 2)
        return Tree(
            tokens_n=np.array(self.tokens, np.int32),
            positions_n=np.array(self.positions, np.int32),
            reach_n=np.array(self.reach, np.int32),
            places_m=pairs[:, 0],
            targets_m=pairs[:, 1],
            scored=self.scored,
        )


def build_trees(requests: Sequence[Request], capacity: int, branches: bool = True) -> list[Tree]:
    """Trees of at most `capacity` positions (or one request) that hold all of `requests`; larger
    ones, up to `_WORTH` times, for a long beginning that would be computed again in each.

    Without `branches` only a request that continues another joins it: each tree is one path.
    """
    order = sorted(range(len(requests)), key=lambda i: requests[i].tokens)
    trees, tree, last = [], _Growing(), Request([], [])
    for i in order:
        request = requests[i]
        shared, size = common(last.tokens, request.tokens), len(request.tokens)
        joins = shared >= _SHARED * size if branches else shared == len(last.tokens)
        most = max(capacity, _WORTH * shared)
        if tree.tokens and not (joins and len(tree.tokens) + size - shared <= most):
            trees.append(tree.done())
            tree, shared = _Growing(), 0
        tree.add(i, request, shared if tree.tokens else 0)
        last = request
    return [*trees, tree.done()] if tree.tokens else trees


def fill(sizes: Sequence[int], length: int, opening: int) -> tuple[list[list[int]], list[int]]:
    """Best fit of `sizes`, which fall: members of each row of `length`, and what is left over.

    Only sizes of at least `opening` open a row; the others fill gaps, or are left.
    """
    rows: list[list[int]] = []
    gaps: list[tuple[int, int]] = []  # (free positions, row), sorted
    left = []
    for i, size in enumerate(sizes):
        at = bisect.bisect_left(gaps, (size, -1))
        if at < len(gaps):
            free, row = gaps.pop(at)
        elif size >= opening:
            free, row = length, len(rows)
            rows.append([])
        else:
            left.append(i)
            continue
        rows[row].append(i)
        if free > size:
            bisect.insort(gaps, (free - size, row))
    return rows, left


def _best_length(sizes: Sequence[int], opening: int, capacity: int, width: int, ways: int) -> int:
    """The row length at which `sizes`, which fall, cost least for each of their tokens, of those
    that are well filled; where none is, the best filled one.

    A position costs 1 for products with weights, and length / (12 width) for attention, all of
    whose scores up to the diagonal are computed; a row of padding costs like any other.
    """
    stride = max(1, len(sizes) // _SAMPLE)
    sample, multiple = sizes[::stride], ways if stride == 1 else 1
    shortest = -(-sizes[0] // _GRAIN) * _GRAIN
    longest = max(shortest, capacity, min(_SEVERAL * shortest, _LONGEST))
    step = max(1, (longest - shortest) // (_GRAIN * _LENGTHS)) * _GRAIN

    def cost(length: int) -> tuple[float, float]:
        rows, _ = fill(sample, length, opening)
        count = -(-len(rows) // multiple) * multiple
        padding = count * length / sum(sample[i] for row in rows for i in row)
        return max(padding, 1 / _FILLED), padding * (1 + length / (12 * width))

    return min(range(shortest, longest + 1, step), key=cost)


def plan(
    sizes: Sequence[int], *, capacity: int, width: int, budget: int, ways: int = 1
) -> list[Rows]:
    """Rows that hold trees of these sizes.

    Args:
      sizes: positions of each tree.
      capacity: of a row, about: it is longer for trees that are, or that fit it badly.
      width: of the model, which says what attention costs beside the rest.
      budget: positions of a batch, about; the batches of a length are of one size, as few rows of
        padding as possible.
      ways: the number of rows of a batch is a multiple of it.
    """
    left = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    total, planned = sum(sizes), []
    while left:
        falling = [sizes[i] for i in left]
        opening = -(-falling[0] // _CLASS)
        small = sum(size for size in falling if size < opening)
        if small < _FEW * total:
            opening = 0
        length = _best_length(falling, opening, capacity, width, ways)
        rows, rest = fill(falling, length, opening)
        most = max(ways, budget // length // ways * ways)
        size = math.ceil(math.ceil(len(rows) / math.ceil(len(rows) / most)) / ways) * ways
        planned.append(Rows(length, [[left[i] for i in row] for row in rows], size))
        left = [left[i] for i in rest]
    return planned


def laid_out(
    rows: Sequence[Sequence[int]], trees: Sequence[Tree], length: int, size: int, branches: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Iterator[tuple[int, int, Tree]]]:
    """A batch (size, length), int32: tokens, positions, and reach (0 in padding) or, without
    `branches`, segment ids; and where each tree begins: (row, place, tree)."""
    arrays = tuple(np.zeros((size, length), np.int32) for _ in range(3))
    tokens_BT, positions_BT, marks_BT = arrays
    starts = []
    for row, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members, start=1):
            tree = trees[member]
            where = row, slice(start, start + tree.size)
            tokens_BT[where], positions_BT[where] = tree.tokens_n, tree.positions_n
            marks_BT[where] = tree.reach_n + start if branches else number
            starts.append((row, start, tree))
            start += tree.size
    return tokens_BT, positions_BT, marks_BT, iter(starts)
