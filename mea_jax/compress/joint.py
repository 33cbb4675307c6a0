"""Joint repair: train the attention of all layers towards the original's predictions.

It is the trainer's distillation (`config.start`): the loss is KL(original || compressed) of the
next-token distributions, on text without labels, and only the layers' attention is trained, with
the rounding of slots in the forward pass. So it runs on any mesh, is saved every few minutes, and
continues after a kill.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mea_jax.checkpoint.files import write_json
from mea_jax.checkpoint.layerwise import StoredModel, Writer
from mea_jax.checkpoint.load import stored_config, unresolved
from mea_jax.compress.options import Options, joint_tokens
from mea_jax.config.schema import DataConfig, StartConfig, TrainConfig
from mea_jax.train.run import train

BATCH_TOKENS = 4096  # of a step, at least one window
LEARNING_RATE = 2e-4


def config_of(
    source: StoredModel, options: Options, compressed: Path, data: DataConfig, devices: int
) -> TrainConfig:
    """Return the config of the training run.

    Args:
      source: the original, which is the teacher.
      options: those of the compression; `repair_tokens` are read once.
      compressed: the run directory of the compressed model.
      data: the text.
      devices: the number of devices that a batch is split over.
    """
    length = data.context_length
    batch = max(BATCH_TOKENS // (length * devices), 1) * devices
    steps = max(round(joint_tokens(options) / (batch * length)), 1)
    base = source.config
    optimizer = dataclasses.replace(
        base.optimizer,
        learning_rate=LEARNING_RATE,
        warmup_steps=min(20, steps // 5),
        schedule="cosine",
        final_fraction=0.0,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    start = StartConfig(
        checkpoint=str(compressed),
        trainable="attention",
        teacher=str(source.folder),
        distillation=1.0,
    )
    stored = stored_config(compressed, "the compressed model")
    model = dataclasses.replace(unresolved(stored.model), dtype=options.dtype)
    return dataclasses.replace(
        base,
        name=f"{base.name}_joint",
        model=model,
        data=data,
        batch_size=batch,
        accumulate=1,
        steps=steps,
        seed=options.seed + 1,
        optimizer=optimizer,
        start=start,
        evaluate=dataclasses.replace(base.evaluate, every=0),
        checkpoint=dataclasses.replace(base.checkpoint, every=0, minutes=5.0, keep=1),
        log_every=max(steps // 50, 1),
    )


def repair(
    config: TrainConfig, workdir: Path, writer: Writer, log: Callable[[str], Any]
) -> dict[str, Any]:
    """Run or resume the training, write its attention to `writer`; return tokens and seconds."""
    began, seconds = time.monotonic(), workdir / "seconds.json"
    spent = json.loads(seconds.read_text()) if seconds.exists() else 0.0
    train(config, workdir)
    trained = StoredModel(workdir, log)
    for index in range(config.model.n_layers):
        writer.write_layer(index, {"attention": trained.layer(index)["attention"]})
    spent += time.monotonic() - began
    write_json(seconds, spent)
    tokens = config.steps * config.batch_size * config.data.context_length
    return {"tokens": tokens, "steps": config.steps, "seconds": round(spent, 1)}
