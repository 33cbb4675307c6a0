"""Rows of the study of a pretrained model, one small JSON file each: what its page is made of.

A row has no paths and no detail of layers, so that it can be committed. Losses are in nats per
token. Its keys:

- `name`, `kind` ("original", "compress", "format" or "control") and `options`;
- `bytes` of a token's cache, `kept` as a share of bfloat16's;
- `increase`, `error`, `divergence`, `divergence_error`: means over the texts, with standard errors;
- `texts`: for each text the same, and the losses `before` and `after`;
- `held_out_tokens`, `repair_tokens`, `seconds`, `commit`, `jax`;
- `tasks`, if they were run: value and error of each, and the difference from the original;
- `prompts`, if there are any: the greedy continuation of each.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mea_jax.checkpoint.files import disk_errors, write_json
from mea_jax.compress.options import Options, fitting_tokens
from mea_jax.errors import UserError
from mea_jax.evaluate.harness.differences import influences
from studies.halve_table import represent

Row = dict[str, Any]
ORIGINAL = "original"
OPTIONS = ("method", "keep", "budget", "repair", "repair_steps", "repair_tokens")
LOSSES = ("increase", "error", "divergence", "divergence_error")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raise `UserError` if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove it and its stage in stages.json, then run "
            "the same command again"
        ) from error


def update(folder: Path, name: str, part: Mapping[str, Any]) -> Row:
    """Write the row `name` in `folder`, with the keys of `part` new or replaced; return it."""
    file = folder / f"{name}.json"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    row = (read_json(file) if file.exists() else {"name": name}) | dict(part)
    write_json(file, row)
    return row


def read(folder: Path) -> list[Row]:
    """Return all rows of a folder; raise `UserError` if there are none or one cannot be read."""
    rows = [read_json(file) for file in sorted(folder.glob("*.json"))]
    if not rows:
        raise UserError(f"{folder} has no rows: run python -m studies.real_models first")
    return [row for row in rows if "bytes" in row]


def _rounded(value: float | None, digits: int = 6) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return round(value, digits)


def losses(
    kind: str, options: Mapping[str, Any], summary: Mapping[str, Any], names: Mapping[str, str]
) -> Row:
    """Return the losses and bytes of a summary of `mea_jax.compress` as keys of a row.

    `names` are those of the texts, by the sources' names in the summary.
    """
    held_out = summary["held_out"]
    return {
        "kind": kind,
        "options": dict(options),
        "bytes": summary["cache_bytes_per_token"]["after"],
        "kept": _rounded(summary["cache_kept"]),
        **{key: _rounded(held_out[f"mean_{key}"]) for key in LOSSES},
        "texts": {
            names[source]: {key: _rounded(d[key]) for key in ("before", "after", *LOSSES)}
            for source, d in held_out["domains"].items()
        },
        "held_out_tokens": held_out["tokens"],
        "repair_tokens": _spent(summary),
        "jax": summary["versions"]["jax"],
    }


def _spent(summary: Mapping[str, Any]) -> int:
    """Return the tokens that a model was repaired or trained on; 0 for one in closed form."""
    if "joint" in summary:
        return summary["joint"]["tokens"]
    options = Options(**summary["options"])
    return 0 if options.repair == "none" else fitting_tokens(options)


def original(row: Row, before: int) -> Row:
    """Return the row of the original, whose cache has `before` bytes per token, from another."""
    texts = {
        name: {"before": of["before"], "after": of["before"]} | dict.fromkeys(LOSSES, 0.0)
        for name, of in row["texts"].items()
    }
    kept = {key: row[key] for key in ("held_out_tokens", "jax", "commit")}
    none = {"kind": ORIGINAL, "options": {}, "bytes": before, "kept": 1.0, "repair_tokens": 0}
    return none | dict.fromkeys(LOSSES, 0.0) | {"texts": texts, "seconds": 0.0} | kept


def scores(folder: Path, original: Path | None, asked: Sequence[str]) -> list[Row]:
    """Return value and error of each task that `mea_jax.evaluate --log_samples` wrote to `folder`.

    With the folder of the `original`, also the differences from it, with an error that is paired by
    document. Only the `asked` tasks are returned if the results have them, otherwise all, because a
    tag stands for other tasks.
    """
    rows = represent(read_json(folder / "results.json")["results"])
    rows = [row for row in rows if row["task"] in asked] or rows
    names = ("task", "metric", "value", "error", "documents")
    found = [{name: row[name] for name in names} for row in rows]
    if original is None:
        return found
    base = {}
    for row in read_json(original / "results.json")["results"]:
        base[row["task"], row["metric"], row["filter"]] = row
    for one, row in zip(found, rows, strict=True):
        before = base[row["task"], row["metric"], row["filter"]]
        one["difference"] = row["value"] - before["value"]
        one["difference_error"] = _paired((folder, row), (original, before))
    return found


def _paired(one: tuple[Path, Row], other: tuple[Path, Row]) -> float | None:
    """Return the standard error of a difference over documents; None if it is not known."""
    found = []
    for folder, row in (one, other):
        file = folder / "samples" / "checkpoint" / f"{row['task'].replace('/', '_')}.jsonl"
        if not file.exists():  # a group of tasks
            return None
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        chosen = [s for s in samples if s["filter"] == row["filter"]]
        chosen.sort(key=lambda sample: sample["doc_id"])
        try:
            found.append(influences([s["metrics"][row["metric"]] for s in chosen], row["value"]))
        except (ValueError, TypeError):  # a metric that is not a function of means
            return None
    new, old = found
    if new is None or old is None or len(new) != len(old) or len(new) < 2:
        return None
    return float(np.std(new - old, ddof=1) / len(new) ** 0.5)


def continuations(file: Path) -> list[Row]:
    """Return prompts and texts of the JSON lines that `mea_jax.generate --output` wrote."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): remove it and its stage in stages.json, then run "
            "the same command again"
        ) from error
    return [{key: line[key] for key in ("prompt", "text")} for line in lines]
