"""Draw the figures of `mea_jax.study.heads` about the learned mixing, each as PNG and SVG.

The figures are grey: lines differ in shade, pattern and marker instead of colour.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mea_jax import cli
from mea_jax.config.schema import Side

Row = dict[str, Any]
_COLUMNS = 6  # most layers next to each other
_NAMES = {Side.KEY: "keys", Side.VALUE: "values"}
_MARKERS = "osD^vPX*"


def draw(rows: Sequence[Row], folder: Path, text: str) -> list[Path]:
    """Write all figures into `folder` and return their paths.

    They are mixing, spectra and (if heads were compared) redundancy of the newest checkpoint, and
    training if there are several checkpoints. `text`, part of a title, describes the inputs on
    which heads were compared. Raise `OSError` if a figure cannot be written.
    """
    plt = cli.pyplot()
    steps = sorted({row["step"] for row in rows})
    newest = [row for row in rows if row["step"] == steps[-1]]
    drawings: dict[str, Callable[[], Any]] = {
        "mixing": lambda: _mixing(newest),
        "spectra": lambda: _spectra(newest),
    }
    if any(row["after"] for row in newest):
        drawings["redundancy"] = lambda: _redundancy(newest, text)
    if len(steps) > 1:
        drawings["training"] = lambda: _training(rows)
    paths = []
    for name, drawing in drawings.items():
        figure = drawing()
        try:
            for kind in ("png", "svg"):
                paths.append(folder / f"{name}.{kind}")
                figure.savefig(paths[-1], dpi=130)
        finally:
            plt.close(figure)
    return paths


def _of(rows: Sequence[Row], side: Side) -> list[Row]:
    return sorted((r for r in rows if r["which"] == side), key=lambda r: r["layer"])


def _sides(rows: Sequence[Row]) -> list[Side]:
    return [side for side in _NAMES if _of(rows, side)]


def _hinton(axis: Any, mix_CK: np.ndarray) -> None:
    """Draw a Hinton diagram: a square's area is a weight's magnitude, black if positive."""
    plt = cli.pyplot()
    components, composites = mix_CK.shape
    largest = np.abs(mix_CK).max() or 1.0
    axis.set_facecolor("0.72")
    for (c, k), weight in np.ndenumerate(mix_CK):
        edge = 0.95 * math.sqrt(abs(weight) / largest)
        axis.add_patch(
            plt.Rectangle(
                (k - edge / 2, c - edge / 2),
                edge,
                edge,
                facecolor="black" if weight > 0 else "white",
                linewidth=0,
            )
        )
    axis.set(xlim=(-0.5, composites - 0.5), ylim=(components - 0.5, -0.5), aspect="equal")
    axis.set_xticks([0, composites - 1])
    axis.set_yticks([0, components - 1])
    axis.tick_params(labelsize=7, length=2)


def _mixing(rows: Sequence[Row]) -> Any:
    """Draw the mixing of every layer, keys above values."""
    plt = cli.pyplot()
    sides = _sides(rows)
    layers = max(len(_of(rows, side)) for side in sides)
    wide = min(layers, _COLUMNS)
    lines = math.ceil(layers / wide)
    high, across = max(r["components"] for r in rows), max(r["composites"] for r in rows)
    size = 1.5 if across <= 16 else 2.4
    figure, axes = plt.subplots(
        lines * len(sides),
        wide,
        figsize=(
            max(size * wide + 0.6, 5.2),
            (size * max(high / across, 0.3) + 0.3) * lines * len(sides) + 0.8,
        ),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for place, side in enumerate(sides):
        for number, row in enumerate(_of(rows, side)):
            line, column = divmod(number, wide)
            axis = axes[line * len(sides) + place][column]
            axis.set_visible(True)
            _hinton(axis, np.asarray(row["mixing"], np.float64))
            axis.set_title(f"{_NAMES[side]}, layer {row['layer']}", fontsize=8)
    signed = all(row["kind"] == "heads" for row in rows)
    figure.supxlabel("composite head (what attention reads)", fontsize=9)
    figure.supylabel("component head (what is cached)", fontsize=9)
    colours = (
        "black: positive, white: negative" if signed else "frequency and dense: magnitude alone"
    )
    title = f"Mixing of heads at step {rows[0]['step']}"
    area = "area: size of the weight, against the largest of its panel"
    figure.suptitle(f"{title}\n{area}; {colours}", fontsize=10)
    return figure


def _start(row: Row) -> float:
    """Return the singular value of block identity; all are equal if C divides K."""
    return math.sqrt(row["composites"] / row["components"])


def _shade(number: int, count: int) -> str:
    """Return the grey of layer `number` of `count`: light for the first, black for the last."""
    return str(0.7 * (1 - number / max(count - 1, 1)))


def _panels(sides: Sequence[str], lines: int = 1, height: float = 3.6) -> tuple[Any, Any]:
    plt = cli.pyplot()
    return plt.subplots(
        lines,
        len(sides),
        figsize=(4.4 * len(sides) + 0.4, height * lines + 0.5),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )


def _line(number: int, count: int) -> dict[str, Any]:
    """Return the line options of layer `number` of `count`."""
    return {
        "color": _shade(number, count),
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.2,
    }


def _spectra(rows: Sequence[Row]) -> Any:
    """Draw the singular values of every layer's mixing."""
    sides = _sides(rows)
    figure, axes = _panels(sides)
    for axis, side in zip(axes[0], sides, strict=True):
        found = _of(rows, side)
        for number, row in enumerate(found):
            values = np.asarray(row["singular_values"], np.float64)
            style = _line(number, len(found))
            if len(values) > 40:  # a dense mixing has a value for each feature
                style["marker"] = None
            axis.plot(np.arange(1, len(values) + 1), values, label=f"{row['layer']}", **style)
        axis.axhline(_start(found[0]), color="black", linestyle=":", linewidth=1)
        axis.set(title=f"mixing of {_NAMES[side]}", xlabel="index of the singular value")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("singular value")
    axes[0][0].set_ylim(bottom=0)
    if len(rows) // len(sides) <= 12:
        axes[0][-1].legend(title="layer", fontsize=7, title_fontsize=8, frameon=False)
    shades = "light: first layer, black: last; dotted: block identity"
    figure.suptitle(
        f"Singular values of the mixing at step {rows[0]['step']}\n{shades}", fontsize=10
    )
    return figure


def _redundancy(rows: Sequence[Row], text: str) -> Any:
    """Draw the mean similarity of two heads before and after mixing, over layers."""
    sides = [side for side in _sides(rows) if all(r["after"] for r in _of(rows, side))]
    figure, axes = _panels(sides)
    styles = {
        "before": ("components (before mixing)", "o", "--", "0.45"),
        "after": ("composites (after mixing)", "s", "-", "black"),
        "chance": ("random projections", "x", ":", "0.45"),
    }
    for axis, side in zip(axes[0], sides, strict=True):
        found = _of(rows, side)
        layers = [row["layer"] for row in found]
        for part, (label, marker, line, colour) in styles.items():
            values = [np.nan if (x := row[part]["cka"]) is None else x for row in found]
            axis.plot(layers, values, line, marker=marker, color=colour, markersize=5, label=label)
        axis.set(title=_NAMES[side], xlabel="layer", ylim=(0, 1))
        axis.set_xticks(layers if len(layers) <= 16 else layers[::4])
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean CKA of two heads (1: the same)")
    axes[0][-1].legend(fontsize=8, frameon=False)
    figure.suptitle(f"Similarity of heads at step {rows[0]['step']}, {text}", fontsize=10)
    return figure


def _training(rows: Sequence[Row]) -> Any:
    """Draw distance, weights from other heads, rank and CKA over training, a line per layer."""
    # Label, value of a row, value at step 0 if it is known, and top of the axis if it is fixed.
    Measure = tuple[str, Callable[[Row], float | None], float | None, float | None]
    measured: list[Measure] = [
        ("distance from\nblock identity", lambda row: row["distance"], 0.0, None),
        ("share of weight\nfrom other heads", lambda row: row["from_others"], 0.0, None),
        ("effective rank\nin heads", lambda row: row["effective_rank"], None, _most(rows)),
        ("mean CKA\nafter mixing", lambda row: row["after"] and row["after"]["cka"], None, 1.0),
    ]
    measured = [m for m in measured if any(m[1](row) is not None for row in rows)]
    sides = _sides(rows)
    figure, axes = _panels(sides, len(measured), 1.9)
    for column, side in enumerate(sides):
        found = _of(rows, side)
        layers = sorted({row["layer"] for row in found})
        for line, (name, of, first, top) in enumerate(measured):
            axis = axes[line][column]
            for number, layer in enumerate(layers):
                mine = sorted((r for r in found if r["layer"] == layer), key=lambda r: r["step"])
                points = [(r["step"], np.nan if of(r) is None else of(r)) for r in mine]
                if first is not None and mine[0]["distance"] is not None and mine[0]["step"]:
                    points = [(0, first), *points]
                axis.plot(
                    *zip(*points, strict=True), label=f"{layer}", **_line(number, len(layers))
                )
            axis.set_ylim(0, top)
            axis.set_xlim(0, 1.04 * max(row["step"] for row in rows) or 1)
            if column == 0:
                axis.set_ylabel(name, fontsize=9)
            axis.grid(alpha=0.3)
        axes[0][column].set_title(_NAMES[side])
        axes[-1][column].set_xlabel("step")
    if len(layers) <= 12:
        axes[0][-1].legend(title="layer", fontsize=6, title_fontsize=7, frameon=False, ncols=2)
    figure.suptitle("Over training (light: first layer, black: last)", fontsize=10)
    return figure


def _most(rows: Sequence[Row]) -> float:
    """Return 1.05 times the largest rank that a mixing can have."""
    return 1.05 * max(min(row["components"], row["composites"]) for row in rows)
