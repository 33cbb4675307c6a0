"""Trains compressed models on, and the original as long: what of the difference stays?

    python -m studies.recovery --model runs/study/mha-0 --work runs/study/compressed \\
        --out docs/studies/compression

Starts are the model itself (the control) and what `studies.compression` has left in `--work`
at half the cache. Each is trained by configs/recover.py with the same data, steps and schedule, the
best one a second time with the model as its teacher; the held-out losses become rows of
`recovery.jsonl`. What is finished is not trained again.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors, write_whole
from mea_jax.checkpoint.metrics import read_metrics
from mea_jax.config.parse import from_config_dict, from_dict
from mea_jax.config.schema import TrainConfig
from mea_jax.errors import UserError
from mea_jax.train.run import train
from studies.compression import CompressionName, Row, read

KEEP = 0.5
CONTROL = "original"
STARTS = (
    CompressionName("svd", "uniform", "none"),
    CompressionName("aligned", "uniform", "none"),
    CompressionName("aligned", "repaired", "layerwise"),
    CompressionName("frequency", "repaired", "layerwise"),
)
TAUGHT = CompressionName("aligned", "repaired", "layerwise")


def starts(run: Path, work: Path) -> list[tuple[str, Path, bool]]:
    """Name, checkpoint and whether the original teaches, of each training. Raises `UserError`."""
    found = [(CONTROL, run, False)]
    for name in STARTS:
        folder = work / run.name / name.folder(KEEP)
        if not folder.exists():
            raise UserError(f"{folder} is not there: run python -m studies.compression first")
        found.append((name.folder(KEEP), folder, False))
        if name == TAUGHT:
            found.append((f"{name.folder(KEEP)}, taught", folder, True))
    return found


def recovery_config(recipe: str, checkpoint: Path, steps: int, rate: float) -> TrainConfig:
    """configs/recover.py with the study's schedule. Raises `UserError`."""
    try:
        config = runpy.run_path(recipe)["get_config"](str(checkpoint))
    except OSError as error:
        raise UserError(f"--recipe {recipe} cannot be read: {error.strerror}") from error
    config.steps, config.optimizer.learning_rate = steps, rate
    config.optimizer.warmup_steps = steps // 10
    config.evaluate.every = config.checkpoint.every = max(steps // 4, 1)
    return from_config_dict(config)


def rows_of(run: Path, name: str, folder: Path) -> list[Row]:
    """The held-out losses of one training."""
    kind, _, seed = run.name.rpartition("-")
    about = {"kind": kind, "seed": int(seed), "start": name}
    metrics = read_metrics(folder / "metrics.jsonl")
    found = {row["step"]: row["loss"] for row in metrics if row["kind"] == "held_out"}
    return [about | {"step": step, "loss": round(loss, 6)} for step, loss in sorted(found.items())]


def recover(run: Path, work: Path, recipe: str, steps: int, rate: float) -> list[Row]:
    """All trainings of one model; their rows."""
    rows: list[Row] = []
    for name, checkpoint, taught in starts(run, work):
        config = recovery_config(recipe, checkpoint, steps, rate)
        if taught:
            config = _with_teacher(config, run)
        folder = work / run.name / "recovered" / name.replace(", ", "-")
        print(f"{run.name}: {name}", file=sys.stderr)
        train(config, folder)
        new = rows_of(run, name, folder)
        rows += new
        print(f"{run.name} {name:<40} {new[0]['loss']:.4f} > {new[-1]['loss']:.4f}", flush=True)
    return rows


def _with_teacher(config: TrainConfig, run: Path) -> TrainConfig:
    tree: dict[str, Any] = config.to_dict()
    tree["start"] |= {"teacher": str(run), "distillation": 0.9}
    return from_dict(tree)


def main() -> None:
    cli.enable_compilation_cache()
    out = Path(OUT.value) / "recovery.jsonl"
    if not MODEL.value:
        raise UserError("no model given: add --model runs/study/mha-0")
    for model in map(Path, MODEL.value):
        new = recover(model, Path(WORK.value), RECIPE.value, STEPS.value, RATE.value)
        of = (new[0]["kind"], new[0]["seed"])
        rows = [row for row in read(out) if (row["kind"], row["seed"]) != of] + new
        with disk_errors(out):
            write_whole(out, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"rows in {out}")


if __name__ == "__main__":
    MODEL = flags.DEFINE_multi_string("model", [], "run directory KIND-SEED; repeated")
    WORK = flags.DEFINE_string("work", "runs/study/compressed", "folder of compressed models")
    OUT = flags.DEFINE_string("out", "docs/studies/compression", "folder for recovery.jsonl")
    RECIPE = flags.DEFINE_string("recipe", "configs/recover.py", "config of the training")
    STEPS = flags.DEFINE_integer("steps", 200, "of each training")
    RATE = flags.DEFINE_float("learning_rate", 3e-4, "at its peak")
    cli.run(main, "stopped; the same command goes on")
