r"""Run the study of compression: every method at several shares of the cache, on several models.

    python -m studies.compression --model runs/study/mha-0 --model runs/study/gqa-0 \
        --work runs/study/compressed --out docs/studies/compression

A model is a run directory named KIND-SEED (`configs/compression_study.py`). Each compression is a
row of `rows.jsonl` in `--out`, and each layer's measurements are a row of `layers.jsonl`. Existing
rows are not computed again, so a stopped study continues. `--keep`, `--method`, `--budget`,
`--repair` and `--effort` select a part of it. `python -m studies.compression_figures` draws both.
"""

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors, write_atomically
from mea_jax.checkpoint.layerwise import StoredModel
from mea_jax.compress.methods import METHODS
from mea_jax.compress.options import Options
from mea_jax.compress.run import compress
from mea_jax.errors import UserError

KEEPS = (0.5, 0.25, 0.75, 0.125)  # the most important first, in case the study is stopped
OURS = ("aligned", "frequency")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CompressionName:
    """The options that distinguish a compression of a model from the others."""

    method: str
    budget: str
    repair: str
    effort: int = 1  # factor of the usual repair steps, and of the text for them

    def folder(self, keep: float) -> str:
        effort = f"-x{self.effort}" if self.effort > 1 else ""
        return f"{self.method}-{self.budget}-{self.repair}{effort}-{keep:g}"

    def of(self, options: Options, keep: float) -> Options:
        """Return `options` with the values of this compression."""
        return dataclasses.replace(
            options,
            method=self.method,
            budget=self.budget,
            repair=self.repair,
            keep=keep,
            repair_steps=self.effort * options.repair_steps,
            repair_tokens=0 if self.effort == 1 else self.effort * options.calibration_tokens,
        )


def variants(keep: float) -> Iterator[CompressionName]:
    """Yield the compressions to try at a share of the cache."""
    able = [method for method in METHODS if method != "bits" or keep <= 0.5]
    yield from (CompressionName(method, "uniform", "none") for method in able)
    yield from (CompressionName(method, "measured", "none") for method in OURS)
    yield from (CompressionName(method, "repaired", "layerwise") for method in OURS)
    if keep == 0.5:  # ablations of the best compression
        yield from (CompressionName(method, "repaired", "layerwise", effort=4) for method in OURS)
        yield from (CompressionName(method, "repaired", "blockwise") for method in OURS)
        yield from (
            CompressionName(method, "uniform", "layerwise") for method in ("svd", "aligned")
        )
        yield CompressionName("aligned", "residual", "none")
        yield from (
            CompressionName("aligned", budget, "output") for budget in ("uniform", "measured")
        )
        yield CompressionName("aligned", "measured", "layerwise")


def _rounded(value: float | None) -> float | None:
    """Round to a millionth; return None for an unknown value, such as a single batch's error."""
    return None if value is None or not math.isfinite(value) else round(value, 6)


def row_of(model: str, name: CompressionName, summary: dict[str, Any], seconds: float) -> Row:
    """Return a compression's summary as a row of `rows.jsonl`."""
    kind, _, seed = model.rpartition("-")
    options, held_out = summary["options"], summary["held_out"]
    domains = {Path(name).stem: d for name, d in held_out["domains"].items()}
    return {
        "kind": kind,
        "seed": int(seed),
        **dataclasses.asdict(name),
        **{key: options[key] for key in ("keep", "repair_steps", "repair_tokens")},
        "cache_kept": round(summary["cache_kept"], 6),
        "bytes": summary["cache_bytes_per_token"]["after"],
        **{
            name: _rounded(held_out[f"mean_{name}"])
            for name in ("increase", "error", "divergence", "divergence_error")
        },
        "domains": {name: round(d["increase"], 6) for name, d in domains.items()},
        "before": {name: round(d["before"], 6) for name, d in domains.items()},
        "tokens": held_out["tokens"],
        "keys": [layer["keys"] for layer in summary["layers"]],
        "values": [layer["values"] for layer in summary["layers"]],
        "seconds": round(seconds, 1),
    }


def layers_of(model: str, summary: dict[str, Any]) -> list[Row]:
    """Return the measured sensitivities of a compression as rows of `layers.jsonl`."""
    kind, _, seed = model.rpartition("-")
    options = summary["options"]
    about = {"kind": kind, "seed": int(seed), "method": options["method"]}
    about["repaired"] = options["budget"] == "repaired"
    return [
        about
        | {"layer": s["layer"], "which": s["side"]}
        | {name: [round(x, 6) for x in s[name]] for name in ("residuals", "losses")}
        for s in summary["sensitivities"]
        if s["losses"]
    ]


class Study:
    """The finished rows, and the folders for compressed models (`work`) and results (`out`)."""

    def __init__(self, work: Path, out: Path):
        self.work, self.out = work, out
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        self.rows, self.layers = read(out / "rows.jsonl"), read(out / "layers.jsonl")

    def done(self, model: str, name: CompressionName, keep: float) -> bool:
        kind, _, seed = model.rpartition("-")
        wanted = {"kind": kind, "seed": int(seed), "keep": keep, **dataclasses.asdict(name)}
        return any(all(row[k] == value for k, value in wanted.items()) for row in self.rows)

    def compress(self, run: Path, name: CompressionName, keep: float, options: Options) -> Row:
        """Compress `run` and return its row. The compressed model is kept only if `keep` is 0.5."""
        folder, began = self.work / run.name, time.monotonic()
        asked = name.of(options, keep)
        out = folder / name.folder(keep)
        if (out / "compression.json").exists():  # stopped before its row was written
            summary = json.loads((out / "compression.json").read_text())
        else:
            summary = compress(run, out, asked, folder / "measurements")
        if keep != 0.5:
            shutil.rmtree(out)
        row = row_of(run.name, name, summary, time.monotonic() - began)
        self.rows.append(row)
        known = ("kind", "seed", "method", "repaired")
        have = {tuple(layer[k] for k in known) for layer in self.layers}
        new = layers_of(run.name, summary)
        self.layers += [layer for layer in new if tuple(layer[k] for k in known) not in have]
        self._write("rows.jsonl", self.rows)
        self._write("layers.jsonl", self.layers)
        return row

    def _write(self, name: str, rows: list[Row]) -> None:
        lines = sorted(json.dumps(row) for row in rows)
        with disk_errors(self.out / name):
            write_atomically(self.out / name, "".join(line + "\n" for line in lines))


def read(path: Path) -> list[Row]:
    """Return the rows of a file, or none if it does not exist.

    Raise `UserError` if it is damaged.
    """
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): fix or remove it") from error


def _runs() -> list[Path]:
    runs = [Path(name) for name in MODEL.value]
    if not runs:
        raise UserError("no model given: add --model runs/study/mha-0")
    for run in runs:
        if not run.name.rpartition("-")[2].isdigit():
            raise UserError(
                f"--model {run} has no seed in its name: give a run directory named KIND-SEED, "
                "such as mha-0"
            )
    return runs


def _chosen() -> list[tuple[float, CompressionName]]:
    """Return the shares and variants that the flags select. Raise `UserError` if there are none."""
    asked: dict[str, list[Any]] = {
        "method": METHOD.value,
        "budget": BUDGET.value,
        "repair": REPAIR.value,
        "effort": EFFORT.value,
    }
    found = [
        (keep, name)
        for keep in KEEPS
        if not KEEP.value or keep in KEEP.value
        for name in variants(keep)
        if all(not of or getattr(name, field) in of for field, of in asked.items())
    ]
    if not found:
        said = " ".join(f"--{k} {x}" for k, of in {"keep": KEEP.value, **asked}.items() for x in of)
        raise UserError(f"{said}: no compression of the study matches; remove one of these flags")
    return found


def main() -> None:
    cli.enable_compilation_cache()
    study, runs = Study(Path(WORK.value), Path(OUT.value)), _runs()
    heads = {run: StoredModel(run, print).config.model.n_kv_heads for run in runs}
    options = Options(
        held_out_tokens=HELD_OUT.value,
        calibration_tokens=CALIBRATION.value,
        measure_tokens=MEASURE.value,
        repair_steps=STEPS.value,
    )
    wanted = [
        (run, name, keep)
        for keep, name in _chosen()
        for run in runs
        if keep * heads[run] >= 1
        if not study.done(run.name, name, keep)
    ]
    for number, (run, name, keep) in enumerate(wanted, start=1):
        print(f"{number}/{len(wanted)}  {run.name}  {name.folder(keep)}", file=sys.stderr)
        row = study.compress(run, name, keep, options)
        print(
            f"{run.name:<8} {name.method:<12} {name.budget:<9} {name.repair:<10} "
            f"{row['cache_kept']:6.1%} {row['increase']:+.4f} nats, {row['seconds']:.0f} s",
            flush=True,
        )
    print(f"{len(study.rows)} rows in {study.out / 'rows.jsonl'}")


if __name__ == "__main__":
    MODEL = flags.DEFINE_multi_string("model", [], "run directory KIND-SEED; repeated")
    WORK = flags.DEFINE_string("work", "runs/study/compressed", "folder for compressed models")
    OUT = flags.DEFINE_string(
        "out", "docs/studies/compression", "folder for rows.jsonl and layers.jsonl"
    )
    HELD_OUT = flags.DEFINE_integer(
        "held_out_tokens", 98_304, "maximum number of held-out tokens for the loss"
    )
    CALIBRATION = flags.DEFINE_integer(
        "calibration_tokens", Options.calibration_tokens, "tokens of training text for calibration"
    )
    MEASURE = flags.DEFINE_integer(
        "measure_tokens", Options.measure_tokens, "tokens on which budgets are measured"
    )
    STEPS = flags.DEFINE_integer("repair_steps", Options.repair_steps, "steps for each layer")
    KEEP = flags.DEFINE_multi_float("keep", [], "shares of the cache; default: all")
    METHOD = flags.DEFINE_multi_string("method", [], "methods; default: all")
    BUDGET = flags.DEFINE_multi_string("budget", [], "kinds of budgets; default: all")
    EFFORT = flags.DEFINE_multi_integer("effort", [], "factors of the repair; default: all")
    REPAIR = flags.DEFINE_multi_string("repair", [], "kinds of repair; default: all")
    cli.run(main, "stopped; run the same command again to continue")
