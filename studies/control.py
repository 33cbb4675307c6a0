r"""Train the uncompressed model as long as a joint repair trains a compressed one: its control.

    python -m studies.control --checkpoint runs/smollm2 --repair_tokens 131072 \
        --held_out_source text:FILE,jsonl:FILE --measurements measurements --out control

The steps, batches, text and optimizer are those of `--repair joint` with the same options
(`mea_jax.compress.joint.config_of`), and only the attention is trained. But the loss is the plain
cross-entropy, and there is no teacher. So a gain that comes from more training alone is visible.
Writes the run directory to `--out`, and the summary of `mea_jax.compress` to `control.json` in it.
The same command continues after a kill.
"""

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.files import write_json
from mea_jax.checkpoint.layerwise import StoredModel
from mea_jax.checkpoint.load import unresolved
from mea_jax.cli import progress
from mea_jax.compress import budgets, damage, joint, option_flags
from mea_jax.compress.calibration import CalibrationTexts
from mea_jax.compress.measurements import SHARED, Measurements
from mea_jax.compress.options import Options, joint_tokens
from mea_jax.config.schema import StartConfig
from mea_jax.errors import UserError
from mea_jax.model.layer_spec import layer_specs
from mea_jax.ops.resolve import resolve
from mea_jax.train.run import train

METHOD = "control"  # in the summary


def measure(checkpoint: Path, out: Path, options: Options, measurements: Path) -> dict[str, Any]:
    """Train the control in `out`, and return its summary, as `damage.summarise` returns it.

    `options.repair_tokens` are the tokens of the training; 0: `calibration_tokens`. Measurements
    of the original are stored in the folder `measurements` and reused from there. Raise `UserError`
    for options, a model or data that cannot work.
    """
    file = out / "control.json"
    if file.exists():
        return json.loads(file.read_text())
    if not joint_tokens(options):
        raise UserError("--repair_tokens=0 and --calibration_tokens=0 leave no text to train on")
    began = time.monotonic()
    source = StoredModel(checkpoint, _log)
    auto = dataclasses.replace(unresolved(source.config.model), dtype=options.dtype)
    model = resolve(auto, jax.devices(), source.config.data.context_length)
    texts = CalibrationTexts(source, options, _log)
    measured = Measurements(measurements, source, model, texts, options)
    before = measured.calibrate()

    config = joint.config_of(source, options, source.folder, texts.data, len(jax.devices()))
    start = StartConfig(checkpoint=str(source.folder), trainable="attention")
    config = dataclasses.replace(config, name=f"{source.config.name}_control", start=start)
    train(config, out)

    trained, stream = StoredModel(out, _log), texts.held_out(out / "held_out")
    stream.embed(model, trained.top())
    for index in progress(range(model.n_layers), "evaluating, layers"):
        stream.advance(layer_specs(model)[index], trained.layer(index))
    after = stream.losses(model, trained.top(), measured.held_out())
    cache = budgets.cache_bytes(model)
    summary = damage.summarise(
        dataclasses.replace(options, method=METHOD, keep=1.0),
        (cache, cache),
        [{"layer": index} for index in range(model.n_layers)],
        (before, after),
        [],
        model.n_kv_heads,
    )
    tokens = config.steps * config.batch_size * config.data.context_length
    seconds = round(time.monotonic() - began, 1)
    summary["joint"] = {"tokens": tokens, "steps": config.steps, "seconds": seconds}
    write_json(file, summary)
    shutil.rmtree(out / "held_out")
    return json.loads(file.read_text())


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    if CHECKPOINT.value is None or OUT.value is None or MEASUREMENTS.value is None:
        raise UserError(
            "--checkpoint, --out or --measurements is missing: give all three, such as "
            "--checkpoint runs/quickstart --out control --measurements measurements"
        )
    options = option_flags.options(repair="joint")
    cli.enable_compilation_cache()
    folders = Path(CHECKPOINT.value), Path(OUT.value)
    loss = measure(*folders, options, Path(MEASUREMENTS.value))["held_out"]
    print(
        f"{loss['mean_increase']:+.4f} nats, mean of the sources, after "
        f"{joint_tokens(options):,} tokens; {OUT.value} contains control.json"
    )


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, option_flags.CHECKPOINT)
    OUT = flags.DEFINE_string("out", None, "run directory for the control")
    MEASUREMENTS = flags.DEFINE_string("measurements", None, option_flags.MEASUREMENTS)
    option_flags.define(*SHARED, "repair_tokens")
    cli.run(main, "stopped; run the same command again to continue", training=False)
