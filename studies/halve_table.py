"""Write the report of `studies.halve`: the paper's results, and those that the paper omits."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mea_jax.errors import UserError

Row = dict[str, Any]
# The metric that represents a task is the first of these that it reports.
METRICS = ("acc_norm", "exact_match", "acc", "f1", "bits_per_byte", "perplexity")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove stages.json in --out, then run the same "
            "command again"
        ) from error


def _tasks(folder: Path) -> list[Row]:
    """Return a row per task: value and difference from the original, with standard errors."""
    file = folder / "results.json"
    return represent(_read(file)["results"]) if file.exists() else []


def represent(rows: Sequence[Row]) -> list[Row]:
    """Return the row of each task's metric that represents it."""
    found: dict[str, Row] = {}
    for row in rows:
        rank = METRICS.index(row["metric"]) if row["metric"] in METRICS else len(METRICS)
        if row["task"] not in found or rank < found[row["task"]]["rank"]:
            found[row["task"]] = row | {"rank": rank}
    return [{k: v for k, v in row.items() if k != "rank"} for row in found.values()]


def _mean(tasks: Sequence[Row]) -> Row | None:
    """Return the mean over tasks, with an error that assumes independent tasks; None without."""
    if not tasks:
        return None
    result: Row = {}
    for name in ("value", "baseline", "difference"):
        result[name] = sum(row[name] for row in tasks) / len(tasks)
        errors = [row["error" if name == "value" else f"{name}_error"] for row in tasks]
        if all(error is not None for error in errors):
            result[f"{name}_error"] = sum(e**2 for e in errors) ** 0.5 / len(tasks)
    return result


def collect(out: Path, names: Sequence[str], trained: Sequence[str]) -> Row:
    """Return {"models": a row per model}, read from the results of the stages in `out`.

    `names` are compressed models, `trained` are the control and the recovered models. Raise
    `UserError` if a result cannot be read.
    """
    rows: list[Row] = []
    for name in (*names, *trained):
        original, own = _read(out / "profiles" / name / "report.json")["models"]
        tasks = _tasks(out / "tasks" / name)
        if not rows:  # the original is measured with each model; its first measurement is used
            rows.append(_row("original", original, original))
            base = [
                row | {"value": row["baseline"], "error": row["baseline_error"]} for row in tasks
            ]
            rows[0]["tasks"] = base
            rows[0]["mean"] = _mean(base)
        row = _row(name, own, original) | {"tasks": tasks, "mean": _mean(tasks)}
        if name in names:
            summary = _read(out / name / "compression.json")
            row |= {
                key: summary["options"][key] for key in ("method", "budget", "repair", "layers")
            }
        rows.append(row)
    return {"models": rows}


def _row(name: str, own: Mapping[str, Any], original: Mapping[str, Any]) -> Row:
    loss = own["loss"]["all"]
    row: Row = {
        "name": name,
        "bytes_per_token": own["cache"]["bytes_per_token"],
        "kept": own["cache"]["bytes_per_token"] / original["cache"]["bytes_per_token"],
        **{key: loss[key] for key in ("loss", "increase", "increase_error")},
        "speed": [],
    }
    if own is not original:
        row["speed"] = [
            {"context": s["context"], "over_original": s["over_first"]}
            for s in own.get("speed", ())
        ]
    return row


def _signed(value: float, error: float | None) -> str:
    return f"{value:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def markdown(report: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the report as a Markdown page."""
    rows = report["models"]
    heads = ["model", "cache, bytes per token", "kept", "loss", "increase"]
    heads += [f"decode at {s['context']:,}" for s in rows[1]["speed"]]
    lines = [heads]
    for row in rows:
        cells = [
            row["name"].replace("_", " "),
            f"{row['bytes_per_token']:,.0f}",
            f"{row['kept']:.1%}",
        ]
        increase = _signed(row["increase"], row["increase_error"])
        cells += [f"{row['loss']:.4f}", "" if row is rows[0] else increase]
        speeds = [f"{s['over_original']['median']:.2f}x" for s in row["speed"]]
        lines.append(cells + speeds + [""] * (len(heads) - len(cells) - len(speeds)))
    steps = config["recover"].get("steps", 0)
    text = f"# {config['name']}\n\n"
    text += (
        "Held-out loss is in nats per token. Increases are over the original, paired by document. "
    )
    text += '"control" and "recovered" are the original and the compressed models after '
    text += (
        f"{steps} further steps. Decoding speed is relative to the original, measured in turn.\n\n"
    )
    text += _table(lines)
    if rows[0]["tasks"]:
        tasks = [row["task"] for row in rows[0]["tasks"]]
        lines = [["model", *(f"{r['task']} ({r['metric']})" for r in rows[0]["tasks"]), "mean"]]
        for row in rows:
            found = {t["task"]: t for t in row["tasks"]}
            cells = [_score(found[name], row is rows[0]) for name in tasks]
            lines.append(
                [row["name"].replace("_", " "), *cells, _score(row["mean"], row is rows[0])]
            )
        text += (
            "\n## Tasks\n\nTasks are from lm-evaluation-harness. Brackets contain the difference "
        )
        text += "from the original and its standard error, paired by document.\n\n" + _table(lines)
    return text


def _score(row: Row, original: bool) -> str:
    value = f"{row['value']:.4f}"
    if original:
        return value
    return f"{value} ({_signed(row['difference'], row.get('difference_error'))})"


def _table(lines: list[list[str]]) -> str:
    head, *rest = ["| " + " | ".join(cells) + " |" for cells in lines]
    rule = "|" + "|".join(["---"] * len(lines[0])) + "|"
    return "\n".join([head, rule, *rest]) + "\n"
