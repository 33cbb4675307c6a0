"""Merge requests with common prefixes into token trees and packs the trees into rows.

This computes every common prefix once and wastes few positions on padding.

A request is a sequence of tokens and, for the last few of them, the token that should follow.
Sorting puts requests with a common prefix next to each other; those that share enough become one
tree in depth-first order. In its attention (attention.tree_attention), each token sees the path to
it. So the common prefix of a question with four answers, or of many questions after the same solved
examples, is computed once. Trees are packed into rows of few lengths, the largest first, smaller
ones into the gaps.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_SHARED = 0.25  # a request joins its neighbour's tree if they share this part of its tokens
_GRAIN = 32  # row lengths are multiples of this
_LENGTHS = 16  # row lengths tried for a class of trees, about
_SAMPLE = 512  # trees used to compare row lengths, about
_CLASS = 4  # size of a class's largest tree over that of the smallest that may open a row
_WORTH = 4  # a tree may grow to this many times its common prefix
_SEVERAL = 3  # row lengths up to this many times a class's largest tree are tried
_LONGEST = 8192  # positions of the longest row tried for several trees
_FILLED = 0.93  # average share of a row's positions above which better filling is not preferred
_FEW = 0.05  # if smaller trees have less than this share of all tokens, they join this class


@dataclass(frozen=True)
class Request:
    """Input `tokens`, and the `targets` that should follow the last len(targets) of them."""

    tokens: list[int]
    targets: list[int]


@dataclass(frozen=True)
class Tree:
    """Requests with a common prefix: n positions in depth-first order, m scored next tokens."""

    tokens_n: np.ndarray  # int32
    positions_n: np.ndarray  # int32, depths from 0
    reach_n: np.ndarray  # int32, one past the last position of the subtree below each position
    places_m: np.ndarray  # int32, indices of the positions whose next token is scored
    targets_m: np.ndarray  # int32, that token
    scored: list[tuple[int, list[int]]]  # (index of a request, its indices in the two above)

    @property
    def size(self) -> int:
        return len(self.tokens_n)


@dataclass(frozen=True)
class Rows:
    """Rows of one length, each a list of tree indices, in `batches` of `size` rows."""

    length: int
    rows: list[list[int]]
    size: int

    @property
    def batches(self) -> int:
        return -(-len(self.rows) // self.size)

    def batch(self, number: int) -> list[list[int]]:
        """Return the rows of one batch; the last batch may have fewer than `size`."""
        return self.rows[number * self.size : (number + 1) * self.size]

    @property
    def computed(self) -> int:
        """The number of positions of all batches, including padding."""
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
    """A tree under construction; requests are added in sorted order."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.reach: list[int] = []
        self.path: list[int] = []  # indices of the last request's tokens
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
    """Merge all of `requests` into trees of at most `capacity` positions.

    A tree may exceed that for a single request, or up to `_WORTH` times a common prefix, which
    would otherwise be computed again in each tree. Without `branches` a request joins a tree only
    if it continues the last one, so each tree is one path.
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
    """Pack `sizes`, in descending order, into rows of `length` by best fit.

    Only sizes of at least `opening` open a row; the others fill gaps or are left over. Return the
    indices in each row, and the indices left over.
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


def _best_length(
    sizes: Sequence[int], opening: int, capacity: int, width: int, batch_shards: int
) -> int:
    """Return the row length with the lowest cost per token of `sizes`, in descending order.

    Only row lengths whose rows are filled to `_FILLED` are compared; if there are none, return the
    best filled one. A position costs 1 for products with weights, and length / (12 width) for
    attention, which computes all scores up to the diagonal. Rows of padding cost the same as
    others.
    """
    stride = max(1, len(sizes) // _SAMPLE)
    sample, multiple = sizes[::stride], batch_shards if stride == 1 else 1
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
    sizes: Sequence[int], *, capacity: int, width: int, budget: int, batch_shards: int = 1
) -> list[Rows]:
    """Pack trees of these sizes into rows of few lengths.

    Args:
      sizes: positions of each tree.
      capacity: approximate length of a row; rows are longer for trees that are longer or would fill
        it badly.
      width: D of the model, which determines the cost of attention relative to the rest.
      budget: approximate number of positions of a batch. All batches of a row length have the same
        size, chosen for the fewest rows of padding.
      batch_shards: the number of rows of a batch is a multiple of this.
    """
    left = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    total, planned = sum(sizes), []
    while left:
        falling = [sizes[i] for i in left]
        opening = -(-falling[0] // _CLASS)
        small = sum(size for size in falling if size < opening)
        if small < _FEW * total:
            opening = 0
        length = _best_length(falling, opening, capacity, width, batch_shards)
        rows, rest = fill(falling, length, opening)
        most = max(batch_shards, budget // length // batch_shards * batch_shards)
        size = (
            math.ceil(math.ceil(len(rows) / math.ceil(len(rows) / most)) / batch_shards)
            * batch_shards
        )
        planned.append(Rows(length, [[left[i] for i in row] for row in rows], size))
        left = [left[i] for i in rest]
    return planned


def batch_arrays(
    rows: Sequence[Sequence[int]], trees: Sequence[Tree], length: int, size: int, branches: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Iterator[tuple[int, int, Tree]]]:
    """Lay out a batch of `rows` as int32 arrays (size, length).

    Return tokens, positions, and marks: `reach` with `branches`, otherwise segment ids; padding is
    0. The fourth result yields (row, first position, tree) for each tree.
    """
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
