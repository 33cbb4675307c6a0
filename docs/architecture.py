"""Draw docs/architecture.svg, README's picture of one MEA attention layer.

python docs/architecture.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

BLUE, ORANGE, GREEN, GREY = "#dbe8f6", "#fbe3cc", "#dcefdc", "#eeeeee"


def box(axis, x, y, width, text, color, height=0.62, bold=False):
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0.02,rounding_size=0.1",
        facecolor=color,
        edgecolor="0.35",
        linewidth=0.9,
    )
    axis.add_patch(patch)
    weight = "bold" if bold else "normal"
    axis.text(x, y, text, ha="center", va="center", fontsize=9.5, fontweight=weight)


def heads(axis, x, y, count, color, label, note=""):
    """Draw a row of small squares, one per head."""
    step = 0.26
    for i in range(count):
        left = x + (i - (count - 1) / 2) * step - 0.1
        axis.add_patch(
            plt.Rectangle((left, y - 0.13), 0.2, 0.26, facecolor=color, edgecolor="0.35", lw=0.8)
        )
    axis.text(x, y - 0.34, label, ha="center", va="center", fontsize=8.5)
    if note:
        style = {"fontsize": 8.5, "style": "italic", "color": "#a04000"}
        axis.text(x, y - 0.58, note, ha="center", va="center", **style)


def arrow(axis, start, end):
    axis.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.3", "lw": 1.0, "shrinkA": 0}
    )


def main() -> None:
    figure, axis = plt.subplots(figsize=(10, 4.6), layout="constrained")
    axis.set(xlim=(0, 14.6), ylim=(0.1, 6.4))
    axis.axis("off")
    rows = {"query": 5.5, "key": 3.5, "value": 1.5}
    box(axis, 0.8, 3.5, 1.1, "x\n(B, T, D)", GREY, height=0.9)
    for (name, y), letter in zip(rows.items(), "qkv", strict=True):
        arrow(axis, (1.4, 3.5), (2.1, y))
        box(axis, 2.7, y, 1.1, f"$W_{letter}$", BLUE)
        arrow(axis, (3.3, y), (4.0, y))
        if name == "query":
            heads(axis, 5.0, y, 8, BLUE, "N query heads")
            arrow(axis, (6.2, y), (10.1, 4.25))
            continue
        heads(axis, 4.7, y, 4, ORANGE, "C component heads", "all that the cache holds")
        arrow(axis, (5.4, y), (6.0, y))
        box(axis, 6.65, y, 1.2, f"mix $M_{letter}$\n(C, K)", ORANGE, height=0.8, bold=True)
        arrow(axis, (7.3, y), (7.75, y))
        heads(axis, 8.85, y, 8, GREEN, "K composite heads")
        arrow(axis, (9.95, y), (10.15, 3.6 if name == "key" else 2.95))
    box(axis, 10.85, 3.6, 1.3, "causal\nattention", GREY, height=1.2)
    arrow(axis, (11.55, 3.6), (11.75, 3.6))
    box(axis, 12.4, 3.6, 1.25, "RMSNorm\nper head", ORANGE, height=0.9, bold=True)
    arrow(axis, (13.07, 3.6), (13.35, 3.6))
    box(axis, 13.9, 3.6, 0.95, "$W_o$", BLUE)
    axis.text(
        6.65,
        0.45,
        "In training $W M$ is folded into one projection: no cost per token.  "
        "Orange is what MEA adds to multi-head attention.",
        ha="center",
        fontsize=9,
        color="0.25",
    )
    figure.savefig(Path(__file__).with_name("architecture.svg"))


if __name__ == "__main__":
    main()
