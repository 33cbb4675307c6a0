r"""MEA at 124M parameters on your own text, for one GPU or a small TPU slice in some hours.

    python -m mea_jax.train --config configs/mea_125m.py \
        --config.data.sources="({'source': 'text', 'path': 'corpus/**/*.txt'},)"

Baselines of the same shape: configs/mea_125m.py:mha, :gqa and :no_norm.

The shape is that of GPT-2 small with SwiGLU: D 768, 12 layers, 12 heads of width 64. The tokenizer
is a byte-level BPE of 50,304 tokens, trained on the text. Without an override the run reads the
Python standard library, which is enough to test the machine but far too little to train on. No
result has been measured yet.
"""

from mea_jax.config.presets import apply_variant
from mea_jax.config.schema import default_config


def get_config(variant: str = ""):
    config = default_config()
    config.name = "mea_125m"
    config.steps = 10_000
    config.batch_size = 256  # windows of 1024: 262k tokens
    config.accumulate = 16

    model = config.model
    model.vocab_size = 50_304
    model.d_model, model.n_layers, model.d_ff = 768, 12, 2048
    model.n_heads, model.n_kv_heads, model.head_dim = 12, 12, 64
    model.tie_embeddings = True
    model.remat = "dots"
    model.loss_chunk = 256

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 500

    config.data.tokenizer = "bpe:50304"
    config.data.context_length = 1024
    config.data.read_threads = 2

    config.mesh.data = -1
    config.evaluate.every = 500
    config.checkpoint.every = 500
    return apply_variant(config, variant)
