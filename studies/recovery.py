r"""Continue the training of compressed models and of the original, and compare their losses.

    python -m studies.recovery --model runs/study/mha-0 --work runs/study/compressed \
        --out docs/studies/compression

The starts are the model itself (the control) and the models that `studies.compression` has left in
`--work` at half the cache. Each is trained with configs/recover.py on the same data, with the same
steps and schedule. The best one is trained a second time with the model as its teacher. The
held-out losses are written as rows of `recovery.jsonl`. Finished trainings are not repeated.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors, write_atomically
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
DISTILLED = CompressionName("aligned", "repaired", "layerwise")


def starts(run: Path, work: Path) -> list[tuple[str, Path, bool]]:
    """Return the name, the checkpoint and whether to distill from the original, of each training.

    Raise `UserError` if a compressed model is missing.
    """
    found = [(CONTROL, run, False)]
    for name in STARTS:
        folder = work / run.name / name.folder(KEEP)
        if not folder.exists():
            raise UserError(f"{folder} does not exist: run python -m studies.compression first")
        found.append((name.folder(KEEP), folder, False))
        if name == DISTILLED:
            found.append((f"{name.folder(KEEP)}, taught", folder, True))
    return found


def recovery_config(recipe: str, checkpoint: Path, steps: int, rate: float) -> TrainConfig:
    """Return the config of `recipe` (configs/recover.py) with the study's schedule.

    `rate` is the peak learning rate. Raise `UserError` if `recipe` cannot be read.
    """
    try:
        config = runpy.run_path(recipe)["get_config"](str(checkpoint))
    except OSError as error:
        raise UserError(
            f"--recipe {recipe} cannot be read: {error.strerror}; give a config file"
        ) from error
    config.steps, config.optimizer.learning_rate = steps, rate
    config.optimizer.warmup_steps = steps // 10
    config.evaluate.every = config.checkpoint.every = max(steps // 4, 1)
    return from_config_dict(config)


def rows_of(run: Path, name: str, folder: Path) -> list[Row]:
    """Return the held-out losses of one training, a row per evaluated step."""
    kind, _, seed = run.name.rpartition("-")
    about = {"kind": kind, "seed": int(seed), "start": name}
    metrics = read_metrics(folder / "metrics.jsonl")
    found = {row["step"]: row["loss"] for row in metrics if row["kind"] == "held_out"}
    return [about | {"step": step, "loss": round(loss, 6)} for step, loss in sorted(found.items())]


def recover(run: Path, work: Path, recipe: str, steps: int, rate: float) -> list[Row]:
    """Run all trainings of one model; return their rows."""
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
        raise UserError("--model is missing: add --model runs/study/mha-0")
    for model in map(Path, MODEL.value):
        new = recover(model, Path(WORK.value), RECIPE.value, STEPS.value, RATE.value)
        of = (new[0]["kind"], new[0]["seed"])
        rows = [row for row in read(out) if (row["kind"], row["seed"]) != of] + new
        with disk_errors(out):
            write_atomically(out, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"rows in {out}")


if __name__ == "__main__":
    MODEL = flags.DEFINE_multi_string("model", [], "run directory KIND-SEED; repeated")
    WORK = flags.DEFINE_string("work", "runs/study/compressed", "folder of compressed models")
    OUT = flags.DEFINE_string("out", "docs/studies/compression", "folder for recovery.jsonl")
    RECIPE = flags.DEFINE_string("recipe", "configs/recover.py", "config of the training")
    STEPS = flags.DEFINE_integer("steps", 200, "steps of each training")
    RATE = flags.DEFINE_float("learning_rate", 3e-4, "peak learning rate")
    cli.run(main, "stopped; run the same command again to continue")
