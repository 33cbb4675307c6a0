"""Draw the figure of the study of a pretrained model: increase of the loss against bytes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors
from studies.real_model_rows import ORIGINAL, Row

TICKS = (1, 0.667, 0.5, 0.333, 0.25, 0.1875, 0.125)
_COLOURS = {  # by the part of a label before the first comma
    "bits": "#1f618d",
    "aligned": "#117a65",
    "svd": "#c0392b",
    "gqa_mean": "#e59866",
    "KIVI": "#6c3483",
    "integers in groups": "#7f8c8d",
    "Hadamard": "#b7950b",
    "control: trained": "#000000",
}
_STYLES = {
    "layer-wise repair": ("^", "-."),
    "joint repair": ("D", "-"),
    "measured": ("s", "--"),
    "by information": ("s", "-"),
}


def _style(label: str) -> dict[str, Any]:
    colour = _COLOURS.get(label.split(",")[0], "#34495e")
    ours = label.split(",")[-1].strip()
    marker, line = _STYLES.get(ours, ("o", ":"))
    return {"color": colour, "marker": marker, "linestyle": line, "markersize": 6}


def floor_of(values: Sequence[float]) -> float:
    """Return where values at or below 0 are drawn: a third of the smallest one above 0."""
    positive = [value for value in values if value > 0]
    return min(positive) / 3 if positive else 1e-4


def draw(labelled: Sequence[tuple[str, Row]], path: Path) -> None:
    """Draw mean increases with their errors into the file `path`, with a line for each label.

    Values at or below 0 have no logarithm; they are open markers on a line at the bottom. Raise
    `UserError` if the disk is full or `path` is not writable.
    """
    plt = cli.pyplot()
    figure, axis = plt.subplots(figsize=(11, 6), layout="constrained")
    shown = [(label, row) for label, row in labelled if row["kind"] != ORIGINAL]
    floor = floor_of([row["increase"] for _, row in shown])
    for label in dict.fromkeys(label for label, _ in shown):
        mine = sorted((row for name, row in shown if name == label), key=lambda row: row["kept"])
        xs = [row["kept"] for row in mine]
        ys = [max(row["increase"], floor) for row in mine]
        errors = [row["error"] or 0.0 for row in mine]
        # A bar ends at the floor if the value less its error is lower.
        below = [min(e, y - floor) for y, e in zip(ys, errors, strict=True)]
        above = [
            max(row["increase"] + e - y, 0.0) for row, y, e in zip(mine, ys, errors, strict=True)
        ]
        style = _style(label)
        axis.errorbar(xs, ys, yerr=[below, above], label=label, capsize=3, lw=1.4, **style)
        unseen = [x for x, row in zip(xs, mine, strict=True) if row["increase"] <= 0]
        marker, colour = style["marker"], style["color"]
        axis.plot(
            unseen, [floor] * len(unseen), marker, mfc="white", mec=colour, ms=8, zorder=5
        )  # hides the filled marker
    if any(row["increase"] <= 0 for _, row in shown):
        axis.axhline(floor, color="grey", lw=0.8, ls=":")
        note = "open markers: no increase (0 or below)"
        axis.annotate(
            note, (0.01, floor), xycoords=("axes fraction", "data"), xytext=(0, 5),
            textcoords="offset points", fontsize=9, color="dimgrey",
        )  # fmt: skip
    axis.set(xscale="log", yscale="log")
    kept = [row["kept"] for _, row in shown]
    axis.set_xlim(min(kept) / 1.1, max(kept) * 1.1)
    ticks = [tick for tick in TICKS if min(kept) / 1.1 < tick < max(kept) * 1.1]
    axis.set_xticks(ticks, [f"{100 * tick:.4g}%" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("share of the bytes of a bfloat16 cache", fontsize=11)
    axis.set_ylabel("increase of the held-out loss, nats per token, mean of the texts", fontsize=11)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=10)
    high = max(max(row["increase"], floor) for _, row in shown)
    axis.set_ylim(floor / 1.4, 10 ** (math.log10(high) + 0.2))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    plt.close(figure)
