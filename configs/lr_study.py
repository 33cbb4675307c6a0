"""The learning-rate study: five variants, ten learning rates, two sizes, on Python's library.

    python -m mea_jax.study run --config configs/lr_study.py --workers 2
    python -m mea_jax.study run --config configs/lr_study.py --list
    python -m mea_jax.study run --config configs/lr_study.py:small

The argument "small" selects MHA and MEA, five learning rates, one size and 200 steps, which take
minutes on a laptop.

The variants cover the paper's claim: MHA, the head norm alone, head mixing alone, both (MEA), and
Differential V1. Learning rates increase by factors of 2 until the baseline no longer learns. The
smaller size has three seeds; the larger size has one seed and fewer learning rates. The schedule is
a warmup, then a cosine to a tenth of the peak. For the results see docs/studies/learning_rate.md.
"""

from mea_jax.errors import UserError
from mea_jax.study.grid import default_study

VARIANTS = {
    "mha": {"hlc": "none", "head_norm": False},
    "mha_norm": {"hlc": "none", "head_norm": True},
    "mea_no_norm": {"hlc": "kv", "head_norm": False},
    "mea": {"hlc": "kv", "head_norm": True},
    "differential_v1": {"variant": "differential_v1", "hlc": "none", "head_norm": False},
}
SIZES = {
    "d128": {"d_model": 128, "n_layers": 4, "d_ff": 352, "n_heads": 4, "n_kv_heads": 4},
    "d192": {"d_model": 192, "n_layers": 6, "d_ff": 512, "n_heads": 6, "n_kv_heads": 6},
}


def get_config(argument: str = ""):
    if argument not in ("", "small"):
        raise UserError(f"configs/lr_study.py has no argument {argument!r}: use small, or none")
    config, small = default_study(), argument == "small"
    config.name = "lr_study_small" if small else "lr_study"
    variants = ("mha", "mea") if small else VARIANTS
    sizes = ("d128",) if small else SIZES
    config.variants = {name: {"model": VARIANTS[name]} for name in variants}
    config.sizes = {name: {"model": SIZES[name]} for name in sizes}
    rates = tuple(5e-4 * (4 if small else 2) ** i for i in range(5 if small else 10))
    config.learning_rates = rates
    config.horizons = (200 if small else 500,)
    config.seeds = (0,) if small else (0, 1, 2)
    config.per_size = {} if small else {"d192": {"seeds": (0,), "learning_rates": rates[1:-1]}}

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
