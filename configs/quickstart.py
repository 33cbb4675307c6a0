"""A small MEA on the Python standard library, in minutes on two CPU cores.

python -m mea_jax.train --config configs/quickstart.py
"""

from mea_jax.config.presets import apply_variant
from mea_jax.config.schema import default_config

PROMPT = '''def read_lines(path):
    """Return the lines of a text file, without their line ends."""
    with open(path) as'''


def get_config(variant: str = ""):
    config = default_config()
    config.name = "quickstart"
    config.steps = 500
    config.batch_size = 8

    model = config.model
    model.vocab_size = 4096
    model.d_model, model.n_layers, model.d_ff = 256, 6, 704
    model.n_heads, model.n_kv_heads, model.head_dim = 8, 8, 32
    model.tie_embeddings = False
    model.scan_unroll = 6  # on a CPU the stacked arrays of a rolled scan cost a third of the step
    model.loss_chunk = 0

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50

    config.data.tokenizer = "bpe:4096"
    config.data.context_length = 256

    config.evaluate.every = 100
    config.evaluate.sample_prompt = PROMPT
    config.checkpoint.every = 100
    config.log_every = 1
    return apply_variant(config, variant)
