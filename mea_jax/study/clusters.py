"""Test against chance whether heads mix in groups: clusters of a matrix's rows.

A row of a mixing is a component head, described by its weight in each composite head. A column is a
composite head, described by the weight of each component. Rows form clusters if some partition of
them has a high mean silhouette (Rousseeuw, 1987), compared with matrices whose rows have shuffled
entries. Letters: R rows, E entries of a row, P matrices at a time.
"""

import dataclasses
from typing import Any

import numpy as np

LEAST_ROWS = 3  # fewer have no partition with both several groups and a group of two
LEAST_SHARED = 2  # fewest shared entries of two rows: single numbers are always parallel
_SWEEPS = 5  # iterations of balancing
_BYTES = 64 << 20  # memory for the similarities of shuffled matrices at the same time


@dataclasses.dataclass(frozen=True)
class Clusters:
    """The best partition of rows, and how often shuffled matrices have one as good.

    Attributes:
      silhouette: the mean over rows, in [-1, 1]. It is 1 if rows equal those of their group and
        differ from all others.
      chance: the mean silhouette of the best partitions of shuffled matrices.
      p: (1 + shuffles as good) / (1 + shuffles), exact under the null (Phipson & Smyth, 2010).
      groups: the rows of each group.
    """

    silhouette: float
    chance: float
    p: float
    groups: list[list[int]]


def similarity(x_PRE: np.ndarray, mask_RE: np.ndarray, signed: bool) -> np.ndarray:
    """Return the similarity of all pairs of rows (P, R, R), over the entries shown in both.

    If `signed`, it is |cosine| in [0, 1], because a head's sign is a convention (the next weight
    absorbs it). Otherwise entries are magnitudes, and it is their correlation in [-1, 1].
    """
    shown = mask_RE.astype(np.float64)
    x = x_PRE * shown
    if not signed:
        mean_PR1 = x.sum(-1, keepdims=True) / np.maximum(shown.sum(-1, keepdims=True), 1)
        x = (x_PRE - mean_PR1) * shown
    dot_PRR = x @ np.swapaxes(x, -1, -2)
    power_PRR = np.square(x) @ shown.T  # of row r over the entries shown in row s
    norm_PRR = np.sqrt(power_PRR * np.swapaxes(power_PRR, -1, -2))
    cosine_PRR = np.divide(dot_PRR, norm_PRR, out=np.zeros_like(dot_PRR), where=norm_PRR > 0)
    return np.abs(cosine_PRR) if signed else cosine_PRR


def best_partition(distance_PRR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest mean silhouette (P,) over average-linkage partitions, and labels (P, R).

    The partitions have R - 1 to 2 groups. A label is the index of one of the group's rows.
    """
    count, rows = distance_PRR.shape[:2]
    every = np.arange(count)
    label_PR = np.tile(np.arange(rows), (count, 1))
    sums_PRR, size_PR = distance_PRR.copy(), np.ones((count, rows))  # of pairs between two groups
    best_P, kept_PR = np.full(count, -np.inf), label_PR.copy()
    never_RR = np.tri(rows, dtype=bool)  # excludes the second copy of each pair
    for _ in range(rows - 2):
        pairs_PRR = size_PR[:, :, None] * size_PR[:, None]
        mean_PRR = np.divide(
            sums_PRR, pairs_PRR, out=np.full_like(sums_PRR, np.inf), where=pairs_PRR > 0
        )
        mean_PRR[:, never_RR] = np.inf
        a_P, b_P = np.divmod(mean_PRR.reshape(count, -1).argmin(axis=1), rows)
        sums_PRR[every, a_P] += sums_PRR[every, b_P]
        sums_PRR[every, :, a_P] += sums_PRR[every, :, b_P]
        size_PR[every, a_P] += size_PR[every, b_P]
        size_PR[every, b_P] = 0
        label_PR = np.where(label_PR == b_P[:, None], a_P[:, None], label_PR)
        score_P = silhouette(distance_PRR, label_PR)
        better_P = score_P > best_P
        best_P = np.where(better_P, score_P, best_P)
        kept_PR = np.where(better_P[:, None], label_PR, kept_PR)
    return best_P, kept_PR


def silhouette(distance_PRR: np.ndarray, label_PR: np.ndarray) -> np.ndarray:
    """Return the mean over rows of (b - a) / max(a, b), (P,).

    a is a row's mean distance to the other rows of its group, b the smallest mean distance to
    another group. A row that is alone in its group counts as 0.
    """
    rows = distance_PRR.shape[1]
    member_PRG = (label_PR[:, :, None] == np.arange(rows)).astype(np.float64)
    size_P1G = member_PRG.sum(axis=1, keepdims=True)
    sums_PRG = distance_PRR @ member_PRG
    own_PR = (size_P1G * member_PRG).sum(-1)
    a_PR = (sums_PRG * member_PRG).sum(-1) / np.maximum(own_PR - 1, 1)
    others = (size_P1G > 0) & (member_PRG == 0)
    b_PR = np.where(others, sums_PRG / np.maximum(size_P1G, 1), np.inf).min(-1)
    largest_PR = np.maximum(a_PR, b_PR)
    width_PR = np.divide(b_PR - a_PR, largest_PR, out=np.zeros_like(a_PR), where=largest_PR > 0)
    return np.where(own_PR > 1, width_PR, 0.0).mean(axis=-1)


def balanced(x_PRE: np.ndarray, mask_RE: np.ndarray) -> np.ndarray:
    """Scale rows and columns to equal power over the shown entries (Sinkhorn on squares).

    Without it, a head with larger weights than the others makes all rows similar there, although
    this is no cluster.
    """
    shown, x_PRE = mask_RE.astype(np.float64), x_PRE.copy()
    for _ in range(_SWEEPS):
        for axis in (-1, -2):
            power = (np.square(x_PRE) * shown).sum(axis=axis, keepdims=True)
            scale = np.sqrt(power / np.maximum(shown.sum(axis=axis, keepdims=True), 1))
            x_PRE = np.divide(x_PRE, scale, out=np.zeros_like(x_PRE), where=scale > 0)
    return x_PRE


def shuffled(x_RE: np.ndarray, mask_RE: np.ndarray, count: int, rng: Any) -> np.ndarray:
    """Return `count` copies (P, R, E) in which each row's shown entries are permuted independently.

    Signs move with their entries: with random signs, a matrix whose entries mostly have one sign
    would count as clustered.
    """
    copies = np.tile(x_RE, (count, 1, 1))
    for r, shown_E in enumerate(mask_RE):
        entries = np.flatnonzero(shown_E)
        copies[:, r, entries] = rng.permuted(copies[:, r, entries], axis=-1)
    return copies


def clusters(
    x_RE: np.ndarray, mask_RE: np.ndarray, signed: bool, shuffles: int, seed: int
) -> Clusters | None:
    """Return the clusters of the rows of `x_RE`, using only the entries where `mask_RE` is true.

    Return None if there are fewer than `LEAST_ROWS` rows, if two rows share fewer than
    `LEAST_SHARED` shown entries, or if all shown entries are 0.
    """
    x, rows = np.asarray(x_RE, np.float64), x_RE.shape[0]
    shared_RR = mask_RE.astype(int) @ mask_RE.T.astype(int)
    if rows < LEAST_ROWS or shared_RR.min() < LEAST_SHARED or not np.any(x * mask_RE):
        return None
    x, rng = balanced(x[None], mask_RE)[0], np.random.default_rng(seed)

    def score(copies_PRE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        copies_PRE = balanced(copies_PRE, mask_RE)  # as `x` is
        return best_partition(1 - similarity(copies_PRE, mask_RE, signed))

    found_P, label_PR = score(x[None])
    part = max(_BYTES // (8 * rows * max(rows, x.shape[1])), 1)
    chance_P = np.concatenate(
        [
            score(shuffled(x, mask_RE, min(part, shuffles - done), rng))[0]
            for done in range(0, shuffles, part)
        ]
    )
    as_good = int((chance_P >= found_P[0] - 1e-12).sum())
    groups = [np.flatnonzero(label_PR[0] == g).tolist() for g in np.unique(label_PR[0])]
    return Clusters(
        silhouette=float(found_P[0]),
        chance=float(chance_P.mean()),
        p=(1 + as_good) / (1 + shuffles),
        groups=groups,
    )
