"""Draw the tables and figures of the study of compression from its rows.

    python -m studies.compression_figures --data docs/studies/compression

Reads `rows.jsonl` and, if they exist, `layers.jsonl` (both from `studies.compression`) and
`recovery.jsonl` (from `studies.recovery`). Writes `tables.md` and a figure of each to the same
folder.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors, write_atomically
from mea_jax.errors import UserError
from studies.compression import KEEPS, CompressionName, Row, read, variants
from studies.recovery import CONTROL, KEEP, STARTS

KINDS = {"mha": "MHA", "mea": "MEA", "gqa": "GQA, QK-norm"}
PAPER = CompressionName("svd", "uniform", "none")
_BASE, _OWN = (
    CompressionName("aligned", "uniform", "none"),
    CompressionName("frequency", "uniform", "none"),
)
BEST = CompressionName("aligned", "repaired", "layerwise")
SHORT = (
    PAPER,
    CompressionName("gqa_mean", "uniform", "none"),
    _BASE,
    _OWN,
    CompressionName("aligned", "measured", "none"),
    CompressionName("frequency", "measured", "none"),
    CompressionName("aligned", "measured", "output"),
    BEST,
    CompressionName("frequency", "repaired", "layerwise"),
)
_STYLES = {  # compressions in the figure of losses: colour, marker, line
    PAPER: ("#c0392b", "o", "-"),
    CompressionName("gqa_mean", "uniform", "none"): ("#e59866", "v", ":"),
    CompressionName("gqa_aligned", "uniform", "none"): ("#b7950b", "^", ":"),
    _BASE: ("#1f618d", "s", ":"),
    CompressionName("aligned", "measured", "none"): ("#1f618d", "s", "--"),
    BEST: ("#1f618d", "s", "-"),
    _OWN: ("#117a65", "D", ":"),
    CompressionName("frequency", "measured", "none"): ("#117a65", "D", "--"),
    CompressionName("frequency", "repaired", "layerwise"): ("#117a65", "D", "-"),
}


def words(name: CompressionName) -> str:
    """Return the label of a compression in tables and legends."""
    budget = {"uniform": "", "measured": ", measured", "residual": ", by residual"}
    said = name.method + budget.get(name.budget, ", measured repaired")
    repair = {"output": ", W_O refitted", "layerwise": ", repaired", "blockwise": ", in blocks"}
    if name == PAPER:
        return "svd (the paper)"
    if name.effort > 1:
        said += f", {name.effort} times the repair"
    if name.budget == "repaired" and name.repair == "layerwise":
        return said
    return said + repair.get(name.repair, "")


def name_of(row: Row) -> CompressionName:
    return CompressionName(row["method"], row["budget"], row["repair"], row["effort"])


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows that have these values, sorted by seed."""
    found = [r for r in rows if all(r[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda r: r["seed"])


def of_name(rows: Iterable[Row], kind: str, name: CompressionName, keep: float) -> list[Row]:
    """Return the rows of one compression of one kind of model, sorted by seed."""
    return [r for r in select(rows, kind=kind, keep=keep) if name_of(r) == name]


def ratios(
    rows: Sequence[Row], kind: str, name: CompressionName, keep: float, value: str = "increase"
) -> list[float]:
    """Return `value` over that of the paper's method at the same `keep`, for each seed."""
    own, paper = (
        {r["seed"]: r[value] for r in of_name(rows, kind, n, keep) if value in r}
        for n in (name, PAPER)
    )
    return [own[seed] / paper[seed] for seed in sorted(own) if seed in paper]


def share(ratio: float) -> str:
    """Format a ratio: "1/66.2" if it is between 0 and 1, otherwise "1.10"."""
    return f"1/{1 / ratio:.3g}" if 0 < ratio < 1 else f"{ratio:.2f}"


def _seeds(values: Sequence[float], form: str) -> str:
    """Format one number per seed: "+0.0112, +0.0131", or "-" without any."""
    return ", ".join(format(value, form) for value in values) or "-"


def increases_table(rows: Sequence[Row], keep: float) -> str:
    """Return the table of increases of every variant and kind of model at a share of the cache."""
    kinds = [kind for kind in KINDS if select(rows, kind=kind, keep=keep)]
    lines = [
        "| | " + " | ".join(f"{KINDS[kind]} | of the paper's" for kind in kinds) + " |",
        "|---|" + "---|---|" * len(kinds),
    ]
    for name in variants(keep):
        cells = []
        for kind in kinds:
            found = of_name(rows, kind, name, keep)
            parts = ", ".join(share(ratio) for ratio in ratios(rows, kind, name, keep))
            cells.append(_seeds([r["increase"] for r in found], "+.4f"))
            cells.append(parts if name != PAPER else "")
        if any(cell not in ("-", "") for cell in cells):
            lines.append(f"| {words(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short_table(rows: Sequence[Row], keep: float = 0.5) -> str:
    """Return the short table of increases: means over seeds, and their ratios to the paper's."""
    return _means(rows, keep, "increase of held-out loss, nats", "increase", "error", "+.4f")


def divergence_table(rows: Sequence[Row], keep: float = 0.5) -> str:
    """Return the short table of divergences: means over seeds, and their ratios to the paper's."""
    title = "KL(original, compressed), held out, nats"
    return _means(rows, keep, title, "divergence", "divergence_error", ".4f")


def _means(rows: Sequence[Row], keep: float, title: str, value: str, error: str, form: str) -> str:
    kinds = [kind for kind in KINDS if select(rows, kind=kind, keep=keep)]
    lines = [
        f"| {title} | " + " | ".join(KINDS[kind] for kind in kinds) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for name in SHORT:
        cells = []
        for kind in kinds:
            found = [r for r in of_name(rows, kind, name, keep) if value in r]
            parts = ratios(rows, kind, name, keep, value)
            cell = format(np.mean([r[value] for r in found]), form) if found else "-"
            if found and all(r.get(error) is not None for r in found):
                cell += f" ±{np.linalg.norm([r[error] for r in found]) / len(found):.4f}"
            if found and parts and name != PAPER:
                cell += f", {share(float(np.mean(parts)))}"
            cells.append(cell)
        if set(cells) != {"-"}:
            lines.append(f"| {words(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def domains_table(rows: Sequence[Row], keep: float) -> str:
    """Return the table of increases per domain, means over seeds, for the paper's and three more.

    The others are `aligned` with uniform budgets, with measured budgets, and the best compression.
    """
    shown = (PAPER, _BASE, CompressionName("aligned", "measured", "none"), BEST)
    domains = list(rows[0]["domains"])
    lines = [
        "| | | " + " | ".join(domains) + " |",
        "|---|---|" + "---|" * len(domains),
    ]
    for kind in KINDS:
        for name in shown:
            found = of_name(rows, kind, name, keep)
            if found:
                means = [np.mean([r["domains"][d] for r in found]) for d in domains]
                cells = " | ".join(f"{mean:+.4f}" for mean in means)
                lines.append(f"| {KINDS[kind]} | {words(name)} | {cells} |")
    return "\n".join(lines)


def heads_table(rows: Sequence[Row], keep: float) -> str:
    """Return the table of the heads per layer that measured budgets chose for `aligned`."""
    lines = ["| | seed | | keys | values |", "|---|---|---|---|---|"]
    for kind in KINDS:
        for row in select(rows, kind=kind, keep=keep):
            if row["budget"] in ("measured", "repaired") and row["method"] == "aligned":
                keys, values = (" ".join(map(str, row[which])) for which in ("keys", "values"))
                name = words(name_of(row))
                lines.append(f"| {KINDS[kind]} | {row['seed']} | {name} | {keys} | {values} |")
    return "\n".join(dict.fromkeys(lines))


def draw_losses(rows: Sequence[Row], path: Path) -> None:
    """Draw the increase of the loss against the cache kept, with a panel per kind of model."""
    plt = cli.pyplot()
    kinds = [kind for kind in KINDS if select(rows, kind=kind)]
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(max(4.6 * len(kinds), 7), 5.4), sharey=True, squeeze=False
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        for name, (colour, marker, line) in _STYLES.items():
            points = []
            for keep in sorted(KEEPS):
                found = of_name(rows, kind, name, keep)
                if found:
                    points.append((keep, [r["increase"] for r in found]))
            if not points:
                continue
            xs, many = [p[0] for p in points], [p[1] for p in points]
            ys = [max(float(np.mean(m)), 1e-4) for m in many]
            style: dict[str, Any] = {"color": colour, "linestyle": line, "marker": marker}
            axis.plot(xs, ys, markersize=5, label=words(name), **style)
            for x, m in zip(xs, many, strict=True):
                axis.plot([x, x], [max(min(m), 1e-4), max(max(m), 1e-4)], color=colour, lw=1)
        axis.set(title=KINDS[kind], xlabel="share of the cache kept", yscale="log")
        axis.set_xlim(0.1, 0.78)
        axis.set_xticks(sorted(KEEPS), [f"{keep:.3g}".lstrip("0") for keep in sorted(KEEPS)])
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("increase of held-out loss, nats per token")
    handles, labels = max((a.get_legend_handles_labels() for a in axes[0]), key=lambda h: len(h[0]))
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("Loss against cache, without training (bars: seeds)")
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    _save(figure, path)


def draw_layers(layers: Sequence[Row], path: Path, method: str = "aligned") -> None:
    """Draw the cost of compressing one layer's keys or values to half of their heads."""
    plt = cli.pyplot()
    kinds = [kind for kind in KINDS if select(layers, kind=kind, method=method)]
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(max(4.6 * len(kinds), 7), 4), sharey=True, squeeze=False
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        for which, colour in (("key", "#1f618d"), ("value", "#d68910")):
            for repaired, line in ((False, "-"), (True, ":")):
                found = select(layers, kind=kind, method=method, which=which, repaired=repaired)
                for seed in sorted({row["seed"] for row in found}):
                    mine = sorted(select(found, seed=seed), key=lambda r: r["layer"])
                    half = len(mine[0]["losses"]) // 2 - 1
                    ys = [max(row["losses"][half], 1e-5) for row in mine]
                    label = f"{which}s" + (", after 40 steps of repair" if repaired else "")
                    style: dict[str, Any] = {"color": colour, "marker": "os"[seed % 2]}
                    style["label"] = None if seed else label
                    axis.plot([r["layer"] for r in mine], ys, line, markersize=4, **style)
        axis.set(title=KINDS[kind], xlabel="layer", yscale="log")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("divergence of predictions, nats per token")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("Each layer alone at half of its heads (markers: seeds)")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    _save(figure, path)


def recovery_table(rows: Sequence[Row]) -> str:
    """Return the table of held-out losses over the control's, before and after recovery."""
    lines = [
        "| | seed | start | over the control before | after | loss after |",
        "|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        for seed in sorted({row["seed"] for row in rows if row["kind"] == kind}):
            mine = select(rows, kind=kind, seed=seed)
            for start in dict.fromkeys(row["start"] for row in mine):
                losses, control = ends(mine, start), ends(mine, CONTROL)
                before, after = (a - b for a, b in zip(losses, control, strict=True))
                said = f"| {KINDS[kind]} | {seed} | {start_words(start)} | "
                lines.append(said + f"{before:+.4f} | {after:+.4f} | {losses[1]:.4f} |")
    return "\n".join(lines)


def start_words(start: str) -> str:
    """Return the label of a start of `recovery.jsonl` in tables and legends."""
    folder, *taught = start.split(", ")
    known = {name.folder(KEEP): words(name) for name in STARTS}
    return ", ".join([known.get(folder, folder), *taught])


def ends(rows: Sequence[Row], start: str) -> tuple[float, float]:
    """Return a start's first and last loss."""
    of = sorted(select(rows, start=start), key=lambda row: row["step"])
    return of[0]["loss"], of[-1]["loss"]


def draw_recovery(rows: Sequence[Row], path: Path) -> None:
    """Draw the loss of each start over that of the control at the same step."""
    plt = cli.pyplot()
    kinds = [kind for kind in KINDS if select(rows, kind=kind)]
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(max(4.6 * len(kinds), 6.5), 4), sharey=True, squeeze=False
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        mine = select(rows, kind=kind)
        first = min(row["seed"] for row in mine)
        control = {row["step"]: row["loss"] for row in select(mine, seed=first, start=CONTROL)}
        for start in dict.fromkeys(row["start"] for row in mine if row["start"] != CONTROL):
            of = sorted(select(mine, seed=first, start=start), key=lambda row: row["step"])
            axis.plot(
                [row["step"] for row in of],
                [row["loss"] - control[row["step"]] for row in of],
                marker="o", markersize=4, label=start_words(start),
            )  # fmt: skip
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_yscale("symlog", linthresh=0.01)
        axis.set(title=f"{KINDS[kind]}, seed {first}", xlabel="steps of training on")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("held-out loss over the control's, nats")
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.suptitle("Half the cache, trained on beside the uncompressed model")
    figure.tight_layout()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    plt = cli.pyplot()
    with disk_errors(path):
        figure.savefig(path, dpi=130)
    plt.close(figure)


def sections(data: Path) -> list[tuple[str, str]]:
    """Return titles and tables of the existing rows. Raise `UserError` if there are none."""
    rows = read(data / "rows.jsonl")
    if not rows:
        raise UserError(f"{data} has no rows.jsonl: run python -m studies.compression first")
    found = []
    for keep in sorted(KEEPS, reverse=True):
        if select(rows, keep=keep):
            found.append((f"{keep:.3g} of the cache", increases_table(rows, keep)))
    if select(rows, keep=0.5):
        found.insert(0, ("In short, half the cache, means of the seeds", short_table(rows)))
        if any("divergence" in row for row in rows):
            found.insert(1, ("How far predictions move", divergence_table(rows)))
        found.append(("By domain, half the cache, mean of the seeds", domains_table(rows, 0.5)))
        found.append(("Heads chosen, half the cache", heads_table(rows, 0.5)))
    if recovery := read(data / "recovery.jsonl"):
        found.append(("Trained on, half the cache", recovery_table(recovery)))
    return found


def redraw(data: Path) -> str:
    """Write the tables and all figures; return the tables' text."""
    text = "".join(f"## {title}\n\n{table}\n\n" for title, table in sections(data))
    with disk_errors(data / "tables.md"):
        write_atomically(data / "tables.md", text)
    draw_losses(read(data / "rows.jsonl"), data / "losses.png")
    if layers := read(data / "layers.jsonl"):
        draw_layers(layers, data / "layers.png")
    if recovery := read(data / "recovery.jsonl"):
        draw_recovery(recovery, data / "recovery.png")
    return text


def main() -> None:
    print(redraw(Path(DATA.value)))


if __name__ == "__main__":
    DATA = flags.DEFINE_string(
        "data", "docs/studies/compression", "folder that contains the rows and gets the results"
    )
    cli.run(main, "stopped")
