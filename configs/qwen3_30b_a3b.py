"""Qwen3-30B-A3B (arXiv 2505.09388): 128 experts, 8 per token.

    python -m mea_jax.train --config configs/qwen3_30b_a3b.py --workdir /mnt/shared/qwen3_30b_a3b
    python -m mea_jax.plan --config configs/qwen3_30b_a3b.py --topology v5p:4x4x4

As published: 30.5B parameters, 29.9B without embeddings, 3.3B active; 48 layers, 32 query and 4
key/value heads of width 128 with QK-norm, an untied head. `configs/qwen3_30b_a3b.py:mea` is the
same shape with MEA: mixing of heads, and a norm of each head's output.

The weight of the load-balancing loss, 0.001, is that of the published model's configuration. Other
details of its training are not published, so the rest of the recipe is our choice. It has not been
run.
"""

from mea_jax.config.schema import default_config
from mea_jax.errors import UserError, nearest


def get_config(variant: str = ""):
    if variant not in ("", "mea"):
        raise UserError(f"the config has no variant {variant!r}: {nearest(variant, ('mea',))}")
    config = default_config()
    config.name = f"qwen3_30b_a3b_{variant}" if variant else "qwen3_30b_a3b"
    config.steps = 25_000
    config.batch_size = 512  # windows of 8192: 4.2M tokens
    config.accumulate = 8  # 64 windows at a time

    model = config.model
    model.vocab_size = 151_936
    model.d_model, model.n_layers = 2048, 48
    model.n_heads, model.n_kv_heads, model.head_dim = 32, 4, 128
    model.n_experts, model.experts_per_token, model.d_expert = 128, 8, 768
    model.normalise_router = True
    model.qk_norm = True
    model.norm_eps = 1e-6
    model.rope_theta = 1_000_000.0
    model.tie_embeddings = False
    model.hlc = "kv" if variant else "none"
    model.head_norm = bool(variant)
    model.remat = "dots"

    optimizer = config.optimizer
    optimizer.learning_rate = 1e-3
    optimizer.warmup_steps = 1_000
    optimizer.load_balance = 1e-3

    # As in mea_1b.py, which documents the source of the files.
    config.data.sources = ({"source": "tfds:c4/en:3.1.0", "weight": 1.0},)
    config.data.tokenizer = "qwen3/tokenizer.json"  # a copy of the tokenizer you train with
    config.data.context_length = 8192
    config.data.held_out_fraction = 1e-4
    config.data.read_threads = 8

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 4
    config.evaluate.every = 1_000
    config.evaluate.batches = 1
    config.checkpoint.every = 500
    return config
