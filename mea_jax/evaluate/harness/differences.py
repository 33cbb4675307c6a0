"""Turn the harness's results into rows and compare two models, paired by document.

A metric's value is a function of means over documents. Its standard error is therefore that of the
mean of each document's influence on the value (the delta method). The error of a difference is that
of the mean, over documents, of the difference between both models' influences. For accuracies,
which are plain means, this equals the error of the paired t-test.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_CLOSE = 1e-6  # relative tolerance for matching a reported value to a function below


def influences(values: Sequence[Any], reported: float) -> np.ndarray | None:
    """Return each document's influence (n,) on a `reported` metric.

    The known functions of means are the mean itself and the perplexity (exp of minus the mean
    log-probability); for pairs (log-probability, size in words or bytes) the perplexity and the
    bits per unit. Return None if `reported` matches none of them.
    """
    x = np.asarray(values, np.float64)
    if x.ndim == 1:
        mean = x.mean()
        for value, slope in ((mean, 1.0), (math.exp(min(-mean, 700)), -math.exp(min(-mean, 700)))):
            if math.isclose(value, reported, rel_tol=_CLOSE, abs_tol=1e-12):
                return slope * (x - mean)
    elif x.ndim == 2 and x.shape[1] == 2:
        logs, sizes = x.T
        ratio = logs.sum() / sizes.sum()
        own = -(logs - ratio * sizes) / sizes.mean()
        for value, slope in (
            (math.exp(min(-ratio, 700)), math.exp(min(-ratio, 700))),
            (-ratio / math.log(2), 1 / math.log(2)),
        ):
            if math.isclose(value, reported, rel_tol=_CLOSE):
                return slope * own
    return None


def _error(influence_n: np.ndarray) -> float | None:
    n = len(influence_n)
    return float(influence_n.std(ddof=1) / n**0.5) if n > 1 else None


def _samples(results: Mapping[str, Any], task: str, metric: str, chosen: str) -> list[Any] | None:
    """Return a metric's values in the documents' order, or None unless all are numeric."""
    rows = [s for s in results["samples"].get(task, ()) if s["filter"] == chosen and metric in s]
    values = [row[metric] for row in sorted(rows, key=lambda row: row["doc_id"])]
    numbers = (bool, int, float, np.number)

    def usable(value: Any) -> bool:
        parts = value if isinstance(value, (tuple, list)) else (value,)
        return all(isinstance(part, numbers) for part in parts)

    return values if values and all(map(usable, values)) else None


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per task, metric and filter of the harness's results.

    Each row is {"task", "metric", "filter", "value", "error", "documents"}. `error` is the standard
    error of the harness, or ours if it reports none, or None.
    """
    found = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            values = _samples(results, task, metric, chosen)
            if not isinstance(error, (int, float)) and values is not None:
                influence = _influence(values, float(value))
                error = None if influence is None else _error(influence)
            counts = results["n-samples"].get(task, {})
            found.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": chosen,
                    "value": float(value),
                    "error": float(error) if isinstance(error, (int, float)) else None,
                    "documents": len(values) if values else counts.get("effective"),
                }
            )
    return found


def _influence(values: list[Any], reported: float) -> np.ndarray | None:
    try:
        return influences(values, reported)
    except ValueError:  # values of different shapes
        return None


def differences(results: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return `rows` of `results` with the values of `baseline` and the differences from them.

    Adds "baseline", "baseline_error", "difference" and "difference_error". The latter is paired by
    document; it is None for groups of tasks and for metrics that are not a function of means.
    """
    before = {(r["task"], r["metric"], r["filter"]): r for r in rows(baseline)}
    found = []
    for row in rows(results):
        key = row["task"], row["metric"], row["filter"]
        base = before[key]
        pair = []
        for one, value in ((results, row["value"]), (baseline, base["value"])):
            values = _samples(one, *key)
            pair.append(None if values is None else _influence(values, value))
        new, old = pair
        error = _error(new - old) if new is not None and old is not None else None
        found.append(
            row
            | {
                "baseline": base["value"],
                "baseline_error": base["error"],
                "difference": row["value"] - base["value"],
                "difference_error": error,
            }
        )
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as text, with the baseline's values and the differences if they have them."""
    compared = bool(found) and "difference" in found[0]
    several = len({row["filter"] for row in found}) > 1
    heads = ["task", "metric", *(["filter"] if several else [])]
    heads += ["baseline", "value", "difference"] if compared else ["value"]
    lines = [[*heads, "documents"]]
    for row in found:
        cells = [row["task"], row["metric"], *([row["filter"]] if several else [])]
        if compared:
            cells.append(_with_error(row["baseline"], row["baseline_error"]))
        cells.append(_with_error(row["value"], row["error"]))
        if compared:
            cells.append(_with_error(row["difference"], row["difference_error"], "+"))
        lines.append([*cells, f"{row['documents'] or ''}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = 3 if several else 2
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    text = f"{value:{sign}.4f}"
    return text if error is None or not math.isfinite(error) else f"{text} ±{error:.4f}"
