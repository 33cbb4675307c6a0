"""Format the table of `mea_jax.study.heads`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
AXES = ("rows", "columns")
LEVEL = 0.01  # the p-value below which the summary counts a test

LEGEND = """\
distance  |M - start| / |start|, Frobenius; start: block identity
own       mean weight of a head's own component (1 at the start)
others    share of squared weights on components that are not a head's own
rank      effective rank (exp of entropy) of the mixing's singular values, in heads
comp.     the same for the composite heads, each scaled to unit power
rows p    p-value of clusters of rows (components), by shuffling; cols p: of columns (composites)
CKA       mean similarity of two heads in [0, 1]: before mixing, after it, of random projections
heads     effective number of heads by CKA: 1 if all are the same"""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not np.isfinite(value) else format(value, form)


def _p(axis: str) -> Callable[[Row], str]:
    return lambda row: _number(row[axis] and row[axis]["p"], ".3f")


def _of(part: str, name: str, form: str) -> Callable[[Row], str]:
    return lambda row: _number(row[part] and row[part][name], form)


_COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("", "layer", lambda row: str(row["layer"])),
    ("", "", lambda row: f"{row['which']}s"),
    ("", "C", lambda row: str(row["components"])),
    ("", "K", lambda row: str(row["composites"])),
    ("", "distance", lambda row: _number(row["distance"], ".3f")),
    ("", "own", lambda row: _number(row["own"], ".2f")),
    ("", "others", lambda row: _number(row["from_others"], ".1%")),
    ("", "rank", lambda row: _number(row["effective_rank"], ".2f")),
    ("", "comp.", lambda row: _number(row["composite_rank"], ".2f")),
    ("rows", "p", _p("rows")),
    ("cols", "p", _p("columns")),
    ("CKA", "before", _of("before", "cka", ".3f")),
    ("", "after", _of("after", "cka", ".3f")),
    ("", "random", _of("chance", "cka", ".3f")),
    ("heads", "before", _of("before", "effective_heads", ".2f")),
    ("", "after", _of("after", "effective_heads", ".2f")),
)


def table(rows: Sequence[Row]) -> str:
    """Return the text table of the rows of one checkpoint."""
    lines = [[above for above, _, _ in _COLUMNS], [name for _, name, _ in _COLUMNS]]
    lines += [[cell(row) for _, _, cell in _COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def summary(rows: Sequence[Row]) -> str:
    """Return one line that counts the significant cluster tests of one checkpoint."""
    found = [row[axis]["p"] for row in rows for axis in AXES if row[axis]]
    if not found:
        return "no cluster tests: too few heads, or no weight outside block identity changed"
    few = sum(p < LEVEL for p in found)
    return (
        f"clusters: {few} of {len(found)} tests at p < {LEVEL} ({LEVEL * len(found):.2g} expected "
        f"by chance), smallest p {min(found):.3f}"
    )
