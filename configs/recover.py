r"""Continued training of a trained model, mainly of a compressed one ("recovery").

    python -m mea_jax.train --config configs/recover.py:runs/compressed

The argument is a run directory or one of its steps: the initial parameters, model, data and batch
size are those of that checkpoint. The schedule is that of the paper's continued pretraining (arXiv
2601.19611): AdamW, peak 1.6e-5, cosine to 0. It is meant for 30B parameters and 22B tokens. The
steps and the warmup here are a guess for a first test, and small models tolerate a far larger peak
learning rate. To train only the attention, with the original model as a teacher:

    python -m mea_jax.train --config configs/recover.py:runs/compressed \
        --config.optimizer.learning_rate=3e-4 --config.start.trainable=attention \
        --config.start.teacher=runs/quickstart --config.start.distillation=0.9

For other text set --config.data.sources=..., and --config.data.tokenizer=runs/compressed/tokenizer
if the tokenizer is "bpe:<size>", which would otherwise be trained again. A run that has begun
does not need its checkpoint: `python -m mea_jax.train --workdir runs/compressed_recovered` resumes
it.
"""

import dataclasses
from pathlib import Path

from mea_jax.checkpoint.load import stored_config, unresolved
from mea_jax.config.schema import default_config
from mea_jax.errors import UserError


def get_config(checkpoint: str = ""):
    if not checkpoint:
        raise UserError(
            "configs/recover.py needs a checkpoint: use --config configs/recover.py:runs/NAME"
        )
    path = Path(checkpoint)
    try:
        source = stored_config(path, "the checkpoint")
    except UserError as error:
        raise UserError(
            f"{error}; if the run has begun, resume it with --workdir and without --config"
        ) from error
    config = default_config()
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    config.name = f"{run.resolve().name[:100]}_recovered"
    config.seed = source.seed + 1  # otherwise the first batches would be the source's first
    config.start.checkpoint = checkpoint

    kept = dataclasses.replace(source, model=unresolved(source.model)).to_dict()
    config.model.update(kept["model"])
    config.data.update(kept["data"] | {"sources": tuple(kept["data"]["sources"])})
    config.batch_size, config.accumulate = source.batch_size, source.accumulate
    config.steps = 500

    config.optimizer.learning_rate = 1.6e-5
    config.optimizer.warmup_steps = 20
    config.optimizer.schedule = "cosine"
    config.optimizer.final_fraction = 0.0

    config.evaluate.every = 100
    config.checkpoint.every = 100
    config.log_every = 1
    return config
