r"""Continued training in longer windows, on pass keys in addition to the run's own text.

    python -m mea_jax.evaluate.tasks --out texts/passkeys.jsonl --documents 20000 --length 2600 \
        --tasks passkey
    python -m mea_jax.train --config configs/longer.py:runs/study/mha-0 \
        --workdir runs/study/mha-long-0

The argument is a run directory or one of its steps. A small model that was trained on short windows
of plain text finds no pass keys. After this run it finds them, so that the effect of compression on
retrieval can be measured (`python -m mea_jax.evaluate --parts passkey`). Windows are four times as
long, batches a quarter as large, and half of the text is `texts/passkeys.jsonl`.
"""

import dataclasses
from pathlib import Path

from mea_jax.checkpoint.load import stored_config, unresolved
from mea_jax.config.schema import default_config
from mea_jax.errors import UserError

LONGER = 4


def get_config(checkpoint: str = ""):
    if not checkpoint:
        raise UserError(
            "configs/longer.py needs a checkpoint: use --config configs/longer.py:runs/NAME"
        )
    path = Path(checkpoint)
    source = stored_config(path, "the checkpoint")
    config = default_config()
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    config.name = f"{run.resolve().name[:100]}_long"
    config.seed = source.seed + 1
    config.start.checkpoint = checkpoint

    kept = dataclasses.replace(source, model=unresolved(source.model)).to_dict()
    config.model.update(kept["model"])
    config.data.update(kept["data"])
    # A tokenizer that is trained at the start would differ, because the text differs.
    config.data.tokenizer = str(run / "tokenizer")
    config.data.context_length = LONGER * source.data.context_length
    own = sum(item.weight for item in source.data.sources)
    keys = {"source": "jsonl", "path": "texts/passkeys.jsonl", "weight": own}
    config.data.sources = (*kept["data"]["sources"], keys)
    config.batch_size = max(source.batch_size // LONGER, 1)
    config.steps = 800

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 50

    config.evaluate.every = 200
    config.checkpoint.every = 200
    config.log_every = 10
    return config
