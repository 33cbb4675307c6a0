"""The learning-rate study: five variants, nine learning rates, two sizes, on Python's library.

    python -m mea_jax.study run --config configs/lr_study.py --workers 2
    python -m mea_jax.study run --config configs/lr_study.py --list

Variants are what the paper's claim is made of: MHA, the head norm alone, head mixing alone, both
(MEA), and Differential V1. Learning rates go by factors of 2 up to where runs diverge. The smaller
size has three seeds, the larger one. Schedule: warmup, then a cosine to a tenth of the peak.
"""

from mea_jax.study.grid import default_study

VARIANTS = {
    "mha": {"hlc": "none", "head_norm": False},
    "mha_norm": {"hlc": "none", "head_norm": True},
    "mea_no_norm": {"hlc": "kv", "head_norm": False},
    "mea": {"hlc": "kv", "head_norm": True},
    "differential_v1": {"variant": "differential_v1", "hlc": "none", "head_norm": False},
}
SIZES = {
    "1m": {"d_model": 128, "n_layers": 4, "d_ff": 352, "n_heads": 4, "n_kv_heads": 4},
    "3m": {"d_model": 192, "n_layers": 6, "d_ff": 512, "n_heads": 6, "n_kv_heads": 6},
}


def get_config():
    config = default_study()
    config.name = "lr_study"
    config.variants = {name: {"model": changes} for name, changes in VARIANTS.items()}
    config.sizes = {name: {"model": changes} for name, changes in SIZES.items()}
    config.learning_rates = tuple(5e-4 * 2**i for i in range(9))
    config.horizons = (500,)
    config.seeds = (0, 1, 2)
    config.per_size = {"3m": {"seeds": (0,)}}

    base = config.base
    base.batch_size = 8
    base.model.vocab_size = 1024
    base.model.head_dim = 32
    base.model.tie_embeddings = False
    base.model.loss_chunk = 0
    base.data.tokenizer = "bpe:1024"
    base.data.context_length = 128
    base.optimizer.warmup_steps = 50
    base.evaluate.every = 50
    base.evaluate.batches = 8
    base.checkpoint.every = 0
    base.checkpoint.minutes = 2.0
    base.checkpoint.keep = 1
    return config
