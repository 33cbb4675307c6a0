"""Draws the figures of a report, each understandable on its own."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mea_jax import cli
from mea_jax.evaluate.table import short

Report = Mapping[str, Any]
_MARKERS = "osD^vPX*"
_COLUMNS = 4  # models side by side in the heat maps


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw the parts that the report contains: loss.png, positions.png, passkey.png, speed.png.

    Return the paths. Raise `OSError` if a file cannot be written.
    """
    plt = cli.pyplot()
    drawings = {"loss": _loss, "positions": _positions, "passkey": _passkey, "speed": _speed}
    paths = []
    for part, drawing in drawings.items():
        if part in report["models"][0]:
            figure = drawing(report)
            path = folder / f"{part}.png"
            try:
                figure.savefig(path, dpi=130)
            finally:
                plt.close(figure)
            paths.append(path)
    return paths


def _compared(models: Sequence[Any]) -> bool:
    return len(models) > 1


def _shown(models: Sequence[Any]) -> Sequence[Any]:
    """Return the models to draw: all but the first, which is the baseline, unless it is alone."""
    return models[1:] if _compared(models) else models


def _error(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _loss(report: Report) -> Any:
    plt = cli.pyplot()
    models, first = report["models"], report["models"][0]
    domains = [name for name in first["loss"] if name != "all"]
    domains = [*domains, "all"] if len(domains) > 1 else domains
    shown, key = _shown(models), "increase" if _compared(models) else "loss"
    figure, axes = plt.subplots(
        figsize=(8, 1.6 + 0.2 * len(shown) + 0.34 * len(domains) * max(len(shown), 1.6)),
        layout="constrained",
    )
    height = 0.8 / len(shown)
    for i, model in enumerate(shown):
        where = np.arange(len(domains)) + (i - (len(shown) - 1) / 2) * height
        cells = [model["loss"][name] for name in domains]
        axes.barh(
            where,
            [cell[key] for cell in cells],
            height=0.9 * height,
            xerr=[
                _error(cell["increase_error" if key == "increase" else "error"]) for cell in cells
            ],
            capsize=2,
            color=f"C{i + 1}" if _compared(models) else "C0",
            label=_label(model, first),
        )
        for y, cell in zip(where, cells, strict=True):
            words = f" {cell[key]:+.4f}" if key == "increase" else f" {cell[key]:.3f}"
            end = cell[key] + _error(cell["increase_error" if key == "increase" else "error"])
            axes.text(max(end, 0.0), y, words, va="center", fontsize=8)
    axes.set_yticks(range(len(domains)), [_domain(first, name) for name in domains])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.18)
    axes.set_xlabel("nats per token, with standard errors over documents")
    if _compared(models):
        axes.set_title(f"Held-out loss above that of {first['name']}, by source of text")
        figure.legend(frameon=False, fontsize=8, loc="outside lower center")
    else:
        axes.set_title(f"Held-out loss of {first['name']}, by source of text")
    axes.grid(axis="x", alpha=0.3)
    return figure


def _label(model: Any, first: Any) -> str:
    """Return a model's name with the size of its cache."""
    size, whole = (m["cache"]["bytes_per_token"] for m in (model, first))
    share = f", {size / whole:.3g}x {first['name']}" if model is not first else ""
    return f"{model['name']} ({size:,.0f} cache bytes per token{share})"


def _domain(first: Any, name: str) -> str:
    cell = first["loss"][name]
    return f"{short(name)}\n{cell['documents']:,} documents, {cell['tokens']:,} tokens"


def _positions(report: Report) -> Any:
    plt = cli.pyplot()
    models, first = report["models"], report["models"][0]
    compared = _compared(models)
    key, error = ("increase", "increase_error") if compared else ("loss", "error")
    buckets = first["positions"]["all"]
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for i, model in enumerate(_shown(models)):
        cells = model["positions"]["all"]
        values = [math.nan if cell[key] is None else cell[key] for cell in cells]
        # Side by side, so that the error bars of several models do not overlap.
        where = np.arange(len(cells)) + 0.06 * (i - (len(models) - 2) / 2)
        axes.errorbar(
            where,
            values,
            [_error(cell[error]) for cell in cells],
            marker=_MARKERS[i % len(_MARKERS)],
            capsize=3,
            color=f"C{i + 1}" if compared else "C0",
            label=_label(model, first),
        )
    labels = [f"{b['from']:,}-{b['to']:,}\n{b['tokens']:,} tokens" for b in buckets]
    axes.set_xticks(range(len(buckets)), labels, fontsize=8)
    axes.set_xlabel("preceding tokens of the same document in the window")
    axes.set_ylabel("nats per token, with standard errors")
    if compared:
        axes.axhline(0, color="black", linewidth=0.8)
        title = f"Held-out loss above that of {first['name']}, by length of context"
    else:
        title = f"Held-out loss of {first['name']}, by length of context"
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _passkey(report: Report) -> Any:
    plt = cli.pyplot()
    models, window = report["models"], report["window"]
    cells = models[0]["passkey"]
    lengths = list(dict.fromkeys(cell["length"] for cell in cells))
    depths = list(dict.fromkeys(cell["depth"] for cell in cells))
    columns = min(len(models), _COLUMNS)
    bands = -(-len(models) // columns)
    wide = max(3.4, 0.62 * len(depths) + 1.5)
    high = max(2.2, 0.42 * len(lengths) + 1.2)
    figure, grid = plt.subplots(
        2 * bands,
        columns,
        figsize=(wide * columns + 1.2, high * 2 * bands + 0.6),
        layout="constrained",
        squeeze=False,
    )
    worst = max(12.0, *(row["nats"] for model in models for row in model["passkey"]))
    samples = cells[0]["samples"]
    scores = (
        ("exact", "share of keys right", "viridis", 1.0, ".0%"),
        ("nats", "nats per answer", "viridis_r", worst, ".1f"),
    )
    for number, (key, title, colors, top, how) in enumerate(scores):
        image: Any = None
        for i in range(bands * columns):
            axes = grid[2 * (i // columns) + number][i % columns]
            if i >= len(models):
                axes.axis("off")
                continue
            table = {(r["length"], r["depth"]): r[key] for r in models[i]["passkey"]}
            values = np.array([[table[n, d] for d in depths] for n in lengths])
            image = axes.imshow(values, cmap=colors, vmin=0, vmax=top, aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                dark = (value / top < 0.6) != (key == "nats")
                color = "white" if dark else "black"
                axes.text(x, y, format(value, how), ha="center", va="center", color=color, size=8)
            axes.set_xticks(range(len(depths)), [f"{d:g}" for d in depths])
            labels = [f"{n:,}" + ("\n(window)" if n == window else "") for n in lengths]
            axes.set_yticks(range(len(lengths)), labels, fontsize=8)
            axes.set_title(f"{models[i]['name']}: {title}", fontsize=9)
            if i % columns == 0:
                axes.set_ylabel("tokens of context")
            axes.set_xlabel("depth of the key (0: beginning, 1: end)", fontsize=8)
        chosen = [row for band in range(bands) for row in grid[2 * band + number]]
        figure.colorbar(image, ax=chosen, fraction=0.03)
    keys = report["options"]["needles"]
    of = f"one of {keys} five-digit keys" if keys > 1 else "a five-digit key"
    figure.suptitle(f"Finding {of} in filler text, {samples} examples per cell", fontsize=11)
    return figure


def _speed(report: Report) -> Any:
    plt = cli.pyplot()
    models = report["models"]
    kinds = [("tokens_per_second", "tokens per second", "Decoding")]
    if "prefill_seconds" in models[0]["speed"][0]:
        kinds.append(("prefill_seconds", "seconds", "Prefill"))
    size = (1 + 5 * len(kinds), 4.2)
    figure, grid = plt.subplots(1, len(kinds), figsize=size, layout="constrained", squeeze=False)
    panels = grid[0]
    for axes, (key, unit, title) in zip(panels, kinds, strict=True):
        for i, model in enumerate(models):
            contexts = [row["context"] for row in model["speed"]]
            middle = np.array([row[key]["median"] for row in model["speed"]])
            low = middle - [row[key]["low"] for row in model["speed"]]
            high = np.array([row[key]["high"] for row in model["speed"]]) - middle
            axes.errorbar(
                contexts,
                middle,
                [low, high],
                marker=_MARKERS[i % len(_MARKERS)],
                capsize=3,
                color=f"C{i}",
                label=_label(model, models[0]),
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.minorticks_off()
        axes.set(xlabel="tokens in the cache" if axes is panels[0] else "tokens of the prompt")
        axes.set_ylabel(unit)
        axes.set_title(title)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    for axes in panels[1:]:
        axes.set_yscale("log")
    panels[0].legend(frameon=False, fontsize=8)
    rows, repeats = models[0]["speed"][0]["rows"], report["options"]["repeats"]
    device, dtype = report["machine"]["device"], models[0]["dtype"]
    if (mesh := report["options"]["mesh"]) is not None:
        device = f"{device}, mesh {mesh}"
    together = f"{rows} sequences" if rows > 1 else "one sequence"
    between = " " if len(kinds) > 1 else "\n"
    figure.suptitle(
        f"Speed of {together} on {device}, {dtype}:{between}"
        f"medians and quartiles of {repeats} rounds",
        fontsize=11,
    )
    return figure
