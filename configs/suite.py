r"""A small model that answers the offline suite of `mea_jax.evaluate --tasks`, in minutes on a CPU.

    python -m mea_jax.evaluate.tasks --out texts/suite.jsonl --documents 60000 --length 600 \
        --tasks passkey,arithmetic,recall,repeat
    python -m mea_jax.train --config configs/suite.py
    python -m studies.harness_suite --out suite
    python -m mea_jax.evaluate --checkpoint runs/suite --include_path suite \
        --tasks mea_suite --out profiles/suite

The model is trained only on texts in the format of the suite, which do not contain the suite's
questions. It is a plain model of Llama's shape, so that it can be exported. For its scores see
docs/evaluation.md.
"""

from mea_jax.config.schema import default_config


def get_config():
    config = default_config()
    config.name = "suite"
    config.steps = 8000
    config.batch_size = 8

    model = config.model
    model.vocab_size = 1536
    model.d_model, model.n_layers, model.d_ff = 128, 4, 352
    model.n_heads, model.n_kv_heads, model.head_dim = 4, 4, 32
    model.hlc, model.head_norm = "none", False
    model.scan_unroll = 4
    model.loss_chunk = 0

    config.data.sources = ({"source": "jsonl", "path": "texts/suite.jsonl"},)
    config.data.tokenizer = "bpe:1536"
    config.data.context_length = 256

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.evaluate.every = 1000
    config.checkpoint.every = 1000
    return config
