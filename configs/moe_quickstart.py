"""A small mixture of experts on the Python standard library, in minutes on two CPU cores.

    python -m mea_jax.train --config configs/moe_quickstart.py

The attention is that of quickstart.py at half the width. There are 8 experts, 2 per token.
metrics.jsonl has the routers' losses, and the load of the busiest expert divided by the mean.
"""

from mea_jax.config.presets import apply_variant
from mea_jax.config.schema import default_config


def get_config(variant: str = ""):
    config = default_config()
    config.name = "moe_quickstart"
    config.steps = 200
    config.batch_size = 8

    model = config.model
    model.vocab_size = 2048
    model.d_model, model.n_layers = 128, 4
    model.n_heads, model.n_kv_heads, model.head_dim = 4, 4, 32
    model.n_experts, model.experts_per_token, model.d_expert = 8, 2, 192
    model.tie_embeddings = False
    model.scan_unroll = 4
    model.loss_chunk = 0

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.load_balance = 0.01
    config.optimizer.router_z_loss = 0.001

    config.data.tokenizer = "bpe:2048"
    config.data.context_length = 256

    config.evaluate.every = 100
    config.checkpoint.every = 100
    config.log_every = 10
    return apply_variant(config, variant)
