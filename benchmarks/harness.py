"""Shared code of the benchmarks: interleaved timing, machine description, tables, figures."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rows = Sequence[Mapping[str, Any]]


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2, inner: int = 1
) -> dict[str, list[float]]:
    """Return seconds per call, `repeats` values for each run, in rounds of one value of each.

    A value is the mean of `inner` calls, for runs that are too short for the clock.
    """
    for run in runs.values():
        for _ in range(warmup):
            jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(inner):
                jax.block_until_ready(run())
            times[name].append((time.perf_counter() - start) / inner)
    return times


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, minimum and maximum in milliseconds."""
    return {
        "median_ms": round(1e3 * statistics.median(seconds), 3),
        "min_ms": round(1e3 * min(seconds), 3),
        "max_ms": round(1e3 * max(seconds), 3),
    }


def ratios(times: Mapping[str, Sequence[float]], base: str) -> dict[str, list[float]]:
    """Divide each run's values by those of `base` in the same round."""
    return {
        name: [a / b for a, b in zip(seconds, times[base], strict=True)]
        for name, seconds in times.items()
    }


def machine() -> dict[str, Any]:
    """Return machine, versions, commit and command, as needed to reproduce a measurement."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    device = jax.devices()[0]
    return {
        "platform": platform.platform(),
        "device": device.device_kind if device.platform != "cpu" else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "command": sys.argv,
    }


def write_json(path: str | Path, rows: Rows) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"machine": machine(), "rows": list(rows)}, indent=1) + "\n")


def print_table(rows: Rows, columns: Mapping[str, tuple[str, str]]) -> None:
    """Print `rows`; `columns` maps a key to (heading, format). A missing value is left blank."""
    texts = [
        [format(row[k], f) if row.get(k) is not None else "" for k, (_, f) in columns.items()]
        for row in rows
    ]
    heads = [heading for heading, _ in columns.values()]
    widths = [max(map(len, column)) for column in zip(heads, *texts, strict=True)]
    for line in (heads, *texts):
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def lines(
    path: str | Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Plot one line per series, each a list of (x, y)."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, points), marker in zip(series.items(), "osD^vPX*", strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, label=name)
    axes.set(title=title, xlabel=x, ylabel=y)
    if log_x:
        axes.set_xscale("log", base=2)
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def bars(
    path: str | Path, values: Mapping[str, Sequence[float]], *, title: str, x: str, base: float
) -> None:
    """Plot one bar per name: its median, with minimum and maximum, and a line at `base`."""
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(values) + 1.3), layout="constrained")
    names = list(values)[::-1]
    medians = [statistics.median(values[name]) for name in names]
    below = [m - min(values[n]) for n, m in zip(names, medians, strict=True)]
    above = [max(values[n]) - m for n, m in zip(names, medians, strict=True)]
    axes.barh(names, medians, xerr=[below, above], color="#4878a8", capsize=3)
    axes.axvline(base, color="black", linewidth=1)
    for i, median in enumerate(medians):
        axes.text(0.01 * max(medians), i, f"{median:.3f}", va="center", color="white")
    axes.set(title=title, xlabel=x)
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
