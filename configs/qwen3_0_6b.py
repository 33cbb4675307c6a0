"""Qwen3-0.6B (arXiv 2505.09388): its shape, and continued training of the published model.

    python -m mea_jax.convert from_hf --model Qwen/Qwen3-0.6B --out runs/qwen3
    python -m mea_jax.train --config configs/qwen3_0_6b.py:runs/qwen3 --workdir runs/qwen3_more

The argument is the run directory of the import, or of a later run of the same shape. Training
starts from its parameters and uses its tokenizer. Without an argument, training starts from fresh
parameters: `python -m mea_jax.train --config configs/qwen3_0_6b.py`, with your own tokenizer.
For a compressed model, which has another shape, use configs/recover.py.

As published: 596,049,920 parameters, 440,467,456 of them in the layers; 28 layers, 16 query and 8
key/value heads of width 128 with QK-norm, a tied head. The recipe is our choice for a first test of
continued training; it has not been run.
"""

from mea_jax.config.presets import continue_training
from mea_jax.config.schema import default_config


def get_config(checkpoint: str = ""):
    config = default_config()
    config.name = "qwen3_0_6b"

    model = config.model
    model.vocab_size = 151_936
    model.d_model, model.n_layers, model.d_ff = 1024, 28, 3072
    model.n_heads, model.n_kv_heads, model.head_dim = 16, 8, 128
    model.hlc, model.head_norm = "none", False
    model.qk_norm = True
    model.norm_eps = 1e-6
    model.rope_theta = 1_000_000.0
    model.tie_embeddings = True
    model.remat = "dots"

    return continue_training(config, checkpoint, "qwen3/tokenizer.json")
