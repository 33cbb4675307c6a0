"""Write a study's report: `python -m mea_jax.study report --store DIR --out DIR2`.

Writes `report.md` with the tables of `study fit`, `fit.json`, and figures as PNG and SVG, which are
readable without colour. The report depends on the rows alone and takes well under a minute.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors, write_atomically, write_json
from mea_jax.errors import UserError
from mea_jax.study.fit import fit_store, tables
from mea_jax.study.store import Row

_MARKERS, _LINES = "osD^vPX*", ("-", "--", "-.", ":")
_GREYS = ("#000000", "#1f5fa8", "#b4441f", "#2f7d4f", "#7a4a9a", "#8a6d00", "#666666", "#0f8b8d")
Style = dict[str, Any]


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """Return matplotlib line options for each variant; marker and line differ before colour."""
    names = sorted({row["variant"] for row in rows})
    return {
        name: {
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _LINES[i % len(_LINES)],
            "color": _GREYS[i % len(_GREYS)],
        }
        for i, name in enumerate(names)
    }


def cells(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Return the (size, steps) of all rows, the smallest model first."""
    found = {(row["size"], row["steps"]): row.get("parameters", 0) for row in rows}
    return sorted(found, key=lambda cell: (found[cell], cell[1]))


def _panels(rows: Sequence[Row], label: str) -> tuple[Any, list[tuple[Any, list[Row]]]]:
    """Return a figure, and its axes with the rows of each: one axis per (size, steps)."""
    plt = cli.pyplot()
    found = cells(rows)
    figure, axes = plt.subplots(
        1, len(found), figsize=(max(5.2 * len(found), 6), 4.4), squeeze=False, sharey=True
    )
    panels = []
    for axis, (size, steps) in zip(axes[0], found, strict=True):
        mine = [row for row in rows if (row["size"], row["steps"]) == (size, steps)]
        about = mine[0]
        title = f"{size}: N = {about['parameters'] / 1e6:.2f} M, D = {about['tokens'] / 1e6:.2f} M"
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        panels.append((axis, mine))
    axes[0][0].set_ylabel(label)
    return figure, panels


def draw_rates(rows: Sequence[Row], fits: dict[str, Any]) -> Any:
    """Draw the loss against the peak learning rate: means, ranges over seeds, lost runs on top.

    A run is lost if it diverged or did not learn.
    """
    figure, panels = _panels(rows, "held-out loss, nats per token")
    good = [row["loss"] for row in rows if not row["diverged"]]
    top = max(np.quantile(good, 0.9), min(good) + 0.3) if good else 1.0
    variant_rows, low = styles(rows), min(good) - 0.03 if good else 0.0
    strip = 0.04 * len(variant_rows) * (top - low)  # above the losses, for lost runs
    high = top + strip
    limits = {(f["size"], f["tokens"]): f["learned_below"] or np.inf for f in fits["stability"]}

    def lost(row: Row) -> bool:
        limit = limits[row["size"], row["tokens"]]
        return row["diverged"] or row["loss"] > limit

    for axis, mine in panels:
        for number, (name, style) in enumerate(variant_rows.items()):
            of = [row for row in mine if row["variant"] == name]
            rates = sorted({row["learning_rate"] for row in of})
            groups = [[r for r in of if r["learning_rate"] == rate] for rate in rates]
            kept = [(rate, [r["loss"] for r in g if not lost(r)]) for rate, g in
                    zip(rates, groups, strict=True)]  # fmt: skip
            whole = [(rate, losses) for rate, losses in kept if losses]
            if whole:
                axis.plot([r for r, _ in whole], [np.mean(ls) for _, ls in whole], label=name,
                          markersize=4, **style)  # fmt: skip
                ends = ([f(ls) for _, ls in whole] for f in (min, max))
                axis.fill_between([r for r, _ in whole], *ends, color=style["color"], alpha=0.1)
            for rate, group in zip(rates, groups, strict=True):
                if count := sum(map(lost, group)):
                    height = high - (number + 0.5) * strip / len(variant_rows)
                    axis.plot([rate], [height], marker="x", color=style["color"], zorder=4)
                    if len(group) > 1:
                        axis.annotate(f"{count}/{len(group)}", (rate, height), fontsize=6, zorder=4,
                                      xytext=(5, -2), textcoords="offset points")  # fmt: skip
        axis.set(xscale="log", xlabel="peak learning rate", ylim=(low, high))
        if any(map(lost, mine)):
            axis.axhspan(top, high, facecolor="white", edgecolor="#999999", zorder=3)
    panels[0][0].legend(fontsize=8, frameon=False)
    title = "Loss against learning rate (bands: seeds; x: seeds that diverged or did not learn)"
    figure.suptitle(title, fontsize=10)
    return figure


def draw_tokens(rows: Sequence[Row], fits: dict[str, Any]) -> Any:
    """Draw the held-out loss against tokens at each variant's own best peak, with its law."""
    figure, panels = _panels(rows, "held-out loss, nats per token")
    for axis, mine in panels:
        for name, style in styles(rows).items():
            of = [row for row in mine if row["variant"] == name and not row["diverged"]]
            if not of:
                continue
            best = min(of, key=lambda row: row["loss"])["learning_rate"]
            points = [p for r in of if r["learning_rate"] == best for p in r["curve"] if p[0]]
            xs = sorted({p[0] for p in points})
            ys = [np.mean([p[1] for p in points if p[0] == x]) for x in xs]
            variant_rows = {k: v for k, v in style.items() if k != "linestyle"}
            axis.plot(
                xs, ys, linestyle="", markersize=4, label=f"{name}, peak {best:.3g}", **variant_rows
            )
            fitted = [
                f for f in fits["loss_in_tokens"]
                if (f["variant"], f["size"], f["learning_rate"]) == (name, mine[0]["size"], best)
                and f["tokens"] == mine[0]["tokens"] and f["alpha"]
            ]  # fmt: skip
            for law in fitted:
                grid = np.geomspace(min(xs), max(xs), 60)
                alpha, scale = law["alpha"]["value"], law["scale"]["value"]
                curve = (scale / grid) ** alpha + law["floor"]["value"]
                axis.plot(grid, curve, linestyle=style["linestyle"], color=style["color"], lw=1)
        axis.set(xscale="log", xlabel="tokens")
        axis.legend(fontsize=7, frameon=False)
    title = "Loss against tokens at each variant's best peak (lines: fits, where they hold)"
    figure.suptitle(title, fontsize=10)
    return figure


def draw_robustness(rows: Sequence[Row], fits: dict[str, Any]) -> Any:
    """Draw the learning-rate sensitivity of each variant, with its interval."""
    plt = cli.pyplot()
    found = [f for f in fits["sensitivity"] if f["value"]]
    figure, axis = plt.subplots(figsize=(7, 0.4 * max(len(found), 3) + 1.4))
    for y, f in enumerate(reversed(found)):
        value = f["value"]
        axis.barh(y, value["value"], color="#bbbbbb", edgecolor="black")
        if value["low"] is not None:
            axis.plot([value["low"], value["high"]], [y, y], color="black")
    names = [f"{f['variant']}, {f['size']}" for f in reversed(found)]
    axis.set_yticks(range(len(found)), names)
    axis.set(xlabel="mean loss above the best over the grid of peaks, nats")
    axis.set_title(
        "Learning-rate sensitivity (lower is more robust; lines: intervals)", fontsize=10
    )
    return figure


def draw_law(rows: Sequence[Row], fits: dict[str, Any]) -> Any:
    """Draw the best peak against size, variants next to each other."""
    from matplotlib.ticker import NullLocator

    plt = cli.pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.4))
    variant_rows = styles(rows)
    for number, (name, style) in enumerate(variant_rows.items()):
        found = [f for f in fits["optimum"] if f["variant"] == name and f["learning_rate"]]
        beside = 1.04 ** (
            number - (len(variant_rows) - 1) / 2
        )  # variants of one size differ by less
        xs = [f["parameters"] * beside for f in found]
        ys = [f["learning_rate"]["value"] for f in found]
        if xs:
            ends = [(f["learning_rate"]["low"], f["learning_rate"]["high"]) for f in found]
            errors = np.array(
                [(0, 0) if None in (low, high) else (y - low, high - y)
                 for y, (low, high) in zip(ys, ends, strict=True)]
            ).T  # fmt: skip
            axis.errorbar(xs, ys, yerr=np.maximum(errors, 0), capsize=2, label=name, **style)
    axis.set(xscale="log", yscale="log", xlabel="N, parameters without embeddings")
    sizes: dict[str, list[int]] = {}
    for row in rows:
        sizes.setdefault(row["size"], []).append(row["parameters"])
    ticks = {size: float(np.mean(some)) for size, some in sizes.items()}
    axis.set_xticks(list(ticks.values()), [f"{s}\n{n / 1e6:.2f} M" for s, n in ticks.items()])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(min(ticks.values()) / 1.3, max(ticks.values()) * 1.3)
    axis.set(ylabel="best peak learning rate")
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False)
    title = "Best learning rate against size (none shown: at an edge, or no fit)"
    figure.suptitle(title, fontsize=10)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Sequence[Row], dict[str, Any]], Any]]] = {
    "loss_rates": ("Loss against learning rate", draw_rates),
    "loss_tokens": ("Loss against tokens", draw_tokens),
    "sensitivity": ("Learning-rate sensitivity", draw_robustness),
    "best_rates": ("Best learning rate against size", draw_law),
}


def report(store: Path, out: Path, baseline: str | None = None) -> str:
    """Write report.md, fit.json and the figures into `out`; return the Markdown.

    Raise `UserError` if the store has no rows, or none of `baseline`, or if `out` cannot be
    written.
    """
    plt = cli.pyplot()
    rows, fits = fit_store(store, baseline)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "fit.json", fits)
    command = f"python -m mea_jax.study report --store {store} --out {out}"
    command += f" --baseline {baseline}" if baseline else ""
    text = f"# {store.name}\n\n{len(rows)} runs, {fits['runs']['diverged']} of them diverged. "
    text += f"Everything below is generated from `rows.jsonl` by `{command}`.\n"
    for name, (title, draw) in FIGURES.items():
        figure = draw(rows, fits)
        figure.tight_layout()
        with disk_errors(out):
            for kind in ("png", "svg"):
                figure.savefig(out / f"{name}.{kind}", dpi=130)
        plt.close(figure)
        text += f"\n## {title}\n\n![{title}]({name}.png)\n"
    for title, table in tables(fits):
        text += f"\n## {title}\n\n{table}\n"
    with disk_errors(out):
        write_atomically(out / "report.md", text)
    return text


def main() -> None:
    """Run the command `report` with its flags."""
    if not STORE.value:
        raise UserError("no store given: add --store runs/lr_study")
    out = Path(OUT.value or STORE.value)
    report(Path(STORE.value), out, BASELINE.value)
    print(f"wrote {out / 'report.md'}, and {', '.join(FIGURES)} as .png and .svg", file=sys.stdout)


if __name__ == "__main__":
    STORE = flags.DEFINE_string("store", None, "directory that contains rows.jsonl")
    OUT = flags.DEFINE_string("out", None, "output directory (default: the store)")
    BASELINE = flags.DEFINE_string("baseline", None, "variant to compare with (default: mha)")
    cli.run(main, "stopped")
