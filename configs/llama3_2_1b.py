"""Llama-3.2-1B: its shape, and continued training of the published model.

    python -m mea_jax.convert from_hf --model meta-llama/Llama-3.2-1B --out runs/llama
    python -m mea_jax.train --config configs/llama3_2_1b.py:runs/llama --workdir runs/llama_more

The argument is the run directory of the import, or of a later run of the same shape. Training
starts from its parameters and uses its tokenizer. Without an argument, training starts from fresh
parameters: `python -m mea_jax.train --config configs/llama3_2_1b.py`, with your own tokenizer.
For a compressed model, which has another shape, use configs/recover.py. configs/mea_1b.py is this
shape with MEA and an untied head.

As published: 1,235,814,400 parameters; 16 layers, 32 query and 8 key/value heads of width 64,
rotary frequencies scaled by 32 from 8,192 positions on, a tied head. The recipe is
our choice for a first test of continued training; it has not been run.
"""

from mea_jax.config.presets import continue_training
from mea_jax.config.schema import default_config


def get_config(checkpoint: str = ""):
    config = default_config()
    config.name = "llama3_2_1b"

    model = config.model
    model.vocab_size = 128_256
    model.d_model, model.n_layers, model.d_ff = 2048, 16, 8192
    model.n_heads, model.n_kv_heads, model.head_dim = 32, 8, 64
    model.hlc, model.head_norm = "none", False
    model.norm_eps = 1e-5
    model.rope_theta = 500_000.0
    model.rope_scaling.kind = "llama3"
    model.rope_scaling.factor = 32.0
    model.rope_scaling.low_freq_factor = 1.0
    model.rope_scaling.high_freq_factor = 4.0
    model.rope_scaling.original_context = 8192
    model.tie_embeddings = True
    model.remat = "dots"

    return continue_training(config, checkpoint, "llama3/tokenizer.json")
