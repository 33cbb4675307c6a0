"""The config of the runs that faults are tested on.

    python -m mea_jax.train --config tests/campaigns/faults/config.py:FOLDER

FOLDER contains text files. A run takes seconds and saves a checkpoint every few steps.
"""

from mea_jax.config.schema import default_config


def get_config(folder: str = ""):
    config = default_config()
    config.name = "faults"
    config.steps = 60
    config.batch_size = 8
    config.log_every = 1

    model = config.model
    model.vocab_size = 264
    model.d_model, model.n_layers, model.d_ff = 32, 2, 48
    model.n_heads, model.n_kv_heads, model.head_dim = 4, 4, 8
    model.dtype, model.backend = "float32", "xla"
    model.loss_chunk = 0

    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 5

    config.data.sources = ({"source": "text", "path": folder},)
    config.data.tokenizer = "bytes"
    config.data.context_length = 32
    config.data.held_out_fraction = 0.2
    config.data.prefetch = 2

    config.evaluate.every = 20
    config.evaluate.batches = 1
    config.checkpoint.every = 5
    config.checkpoint.keep = 3
    return config
