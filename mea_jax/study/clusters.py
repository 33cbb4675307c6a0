"""Whether heads mix in groups: clusters of a matrix's rows, tested against chance.

A mixing's rows are component heads, each described by what the composite heads take from it; its
columns are composite heads, described by what they take. Rows fall into clusters if some partition
of them has a high mean silhouette (Rousseeuw, 1987), which is compared with that of matrices whose
rows' entries are shuffled. Letters: R rows, E entries of a row, P matrices at a time.
"""

import dataclasses
from typing import Any

import numpy as np

LEAST_ROWS = 3  # of fewer no partition has both more than one group and a group of two
LEAST_SHARED = 2  # entries that two rows must have in common: two numbers are always parallel
_SWEEPS = 5  # of balancing
_BYTES = 64 << 20  # of the similarities of shuffled matrices in memory at one time


@dataclasses.dataclass(frozen=True)
class Clusters:
    """The best partition of rows, and how often chance does as well.

    Attributes:
      silhouette: mean over rows, in [-1, 1]; 1: rows equal their groups and no other.
      chance: its mean over shuffled matrices.
      p: (1 + shuffles as good) / (1 + shuffles), exact under the null (Phipson & Smyth, 2010).
      groups: the rows of each.
    """

    silhouette: float
    chance: float
    p: float
    groups: list[list[int]]


def similarity(x_PRE: np.ndarray, shown_RE: np.ndarray, signed: bool) -> np.ndarray:
    """Likeness of rows (P, R, R) in [-1, 1] over the entries that both show.

    `signed`: |cosine|, since a head's sign is a convention (the next weight takes it). Otherwise
    entries are magnitudes, and this is their correlation.
    """
    shown = shown_RE.astype(np.float64)
    x = x_PRE * shown
    if not signed:
        mean_PR1 = x.sum(-1, keepdims=True) / np.maximum(shown.sum(-1, keepdims=True), 1)
        x = (x_PRE - mean_PR1) * shown
    dot_PRR = x @ np.swapaxes(x, -1, -2)
    power_PRR = np.square(x) @ shown.T  # of row r over the entries that row s shows too
    norm_PRR = np.sqrt(power_PRR * np.swapaxes(power_PRR, -1, -2))
    cosine_PRR = np.divide(dot_PRR, norm_PRR, out=np.zeros_like(dot_PRR), where=norm_PRR > 0)
    return np.abs(cosine_PRR) if signed else cosine_PRR


def best_partition(distance_PRR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The highest mean silhouette (P,) among the partitions of average linkage; its labels (P, R).

    From R - 1 groups down to 2. A label is one of the group's rows.
    """
    count, rows = distance_PRR.shape[:2]
    every = np.arange(count)
    label_PR = np.tile(np.arange(rows), (count, 1))
    sums_PRR, size_PR = distance_PRR.copy(), np.ones((count, rows))  # of pairs between two groups
    best_P, kept_PR = np.full(count, -np.inf), label_PR.copy()
    never_RR = np.tri(rows, dtype=bool)  # each pair once
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
    """Mean over rows of (b - a) / max(a, b), (P,).

    a: a row's mean distance to the others of its group, b: the least to another group. 0 for a row
    alone in its group.
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


def balanced(x_PRE: np.ndarray, shown_RE: np.ndarray) -> np.ndarray:
    """Rows and columns scaled to equal power in what is shown (Sinkhorn's iteration on squares).

    A head that gives or takes more than others makes all rows alike there, which is no cluster.
    """
    shown, x_PRE = shown_RE.astype(np.float64), x_PRE.copy()
    for _ in range(_SWEEPS):
        for axis in (-1, -2):
            power = (np.square(x_PRE) * shown).sum(axis=axis, keepdims=True)
            scale = np.sqrt(power / np.maximum(shown.sum(axis=axis, keepdims=True), 1))
            x_PRE = np.divide(x_PRE, scale, out=np.zeros_like(x_PRE), where=scale > 0)
    return x_PRE


def shuffled(x_RE: np.ndarray, shown_RE: np.ndarray, count: int, rng: Any) -> np.ndarray:
    """`count` copies (P, R, E), each row's shown entries in an order of its own.

    Signs stay with their entries: with random ones, a matrix whose entries are mostly of one sign
    would count as clustered.
    """
    copies = np.tile(x_RE, (count, 1, 1))
    for r, shown_E in enumerate(shown_RE):
        entries = np.flatnonzero(shown_E)
        copies[:, r, entries] = rng.permuted(copies[:, r, entries], axis=-1)
    return copies


def clusters(
    x_RE: np.ndarray, shown_RE: np.ndarray, signed: bool, shuffles: int, seed: int
) -> Clusters | None:
    """Clusters of the rows of `x_RE`, looking only at the entries of `shown_RE`.

    None where there are too few rows, or entries that two rows both show, or nothing but zeros.
    """
    x, rows = np.asarray(x_RE, np.float64), x_RE.shape[0]
    shared_RR = shown_RE.astype(int) @ shown_RE.T.astype(int)
    if rows < LEAST_ROWS or shared_RR.min() < LEAST_SHARED or not np.any(x * shown_RE):
        return None
    x, rng = balanced(x[None], shown_RE)[0], np.random.default_rng(seed)

    def score(copies_PRE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        copies_PRE = balanced(copies_PRE, shown_RE)  # as what is looked at was
        return best_partition(1 - similarity(copies_PRE, shown_RE, signed))

    found_P, label_PR = score(x[None])
    part = max(_BYTES // (8 * rows * max(rows, x.shape[1])), 1)
    chance_P = np.concatenate(
        [
            score(shuffled(x, shown_RE, min(part, shuffles - done), rng))[0]
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
