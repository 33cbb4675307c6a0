"""The paper's pretraining run (arXiv 2601.19611): LLaMA-3.2-1B shape, 500B tokens.

    python -m mea_jax.train --config configs/mea_1b.py --workdir /mnt/shared/mea_1b

Baselines of the same shape: configs/mea_1b.py:mha, :gqa (the paper's Transformer) and :no_norm.

The paper states: D 2048, 16 layers, 32 query and 8 key/value heads of width 64, feed-forward 8192,
vocabulary 128,256, an untied head; AdamW with weight decay 0.1, 20M tokens per batch, 25,000 steps,
1,000 of warmup, cosine to a tenth of the peak; MEA stays stable up to a peak of 3e-3. Our choices,
which it does not state: betas 0.9 and 0.95, clipping at 1, sequences of 8192 tokens. Expected
result (the paper's Table 1, MEA): 46.39 on average over its six tasks. We have not run it yet.
"""

from mea_jax.config.presets import apply_variant
from mea_jax.config.schema import default_config


def get_config(variant: str = ""):
    config = default_config()
    config.name = "mea_1b"
    config.steps = 25_000
    config.batch_size = 2_432  # windows of 8192: 19.9M tokens
    config.accumulate = 19  # 128 windows at a time

    model = config.model
    model.vocab_size = 128_256
    model.d_model, model.n_layers, model.d_ff = 2048, 16, 8192
    model.n_heads, model.n_kv_heads, model.head_dim = 32, 8, 64
    model.rope_theta = 500_000.0
    model.rope_scaling.kind = "llama3"
    model.rope_scaling.factor = 32.0
    model.rope_scaling.low_freq_factor = 1.0
    model.rope_scaling.high_freq_factor = 4.0
    model.rope_scaling.original_context = 8192
    model.tie_embeddings = False
    model.remat = "dots"
    model.loss_chunk = 512

    optimizer = config.optimizer
    optimizer.learning_rate = 3e-3 if variant == "" else 1e-3  # the paper's best of each
    optimizer.warmup_steps = 1_000
    optimizer.weight_decay = 0.1

    # English C4 as TFDS prepares it, below ~/tensorflow_datasets or a "path" set here. For the
    # published files use {"source": "jsonl", "path": "c4/en/c4-train.*.json.gz"}. See docs/data.md.
    config.data.sources = ({"source": "tfds:c4/en:3.1.0", "weight": 1.0},)
    config.data.tokenizer = "llama3/tokenizer.json"  # a copy of the tokenizer you train with
    config.data.context_length = 8192
    config.data.held_out_fraction = 1e-4
    config.data.read_threads = 8

    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.evaluate.every = 1_000
    config.evaluate.batches = 1
    config.checkpoint.every = 500
    config.log_every = 10
    return apply_variant(config, variant)
