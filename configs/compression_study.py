"""The models of docs/studies/compression.md: 5.9M parameters on three domains of text.

    python -m mea_jax.train --config configs/compression_study.py:mha,0 --workdir runs/study/mha-0

The argument is a kind of attention and a seed: "mha", "mea" (head mixing and head norm), or "gqa"
(8 query and 4 key/value heads, with normed queries and keys, as in Qwen3). The texts are those that
`python -m studies.texts` writes to the folder `texts`.
"""

from mea_jax.config.schema import default_config
from mea_jax.errors import UserError, nearest

KINDS = ("mha", "mea", "gqa")


def get_config(argument: str = "mha,0"):
    kind, _, seed = argument.partition(",")
    if kind not in KINDS or not (seed or "0").isdigit():
        raise UserError(
            f"{argument!r} must be KIND,SEED with one of the kinds {', '.join(KINDS)}: "
            f"{nearest(kind, KINDS)}"
        )
    config = default_config()
    config.name, config.seed = f"compression_study_{kind}_{seed or 0}", int(seed or 0)
    config.steps = 2400
    config.batch_size = 8

    model = config.model
    model.vocab_size = 2048
    model.d_model, model.n_layers, model.d_ff = 256, 6, 704
    model.n_heads, model.head_dim = 8, 32
    model.n_kv_heads = 4 if kind == "gqa" else 8
    model.hlc = "kv" if kind == "mea" else "none"
    model.head_norm = kind == "mea"
    model.qk_norm = kind == "gqa"
    model.tie_embeddings = False
    model.scan_unroll = 6
    model.loss_chunk = 0

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100

    config.data.tokenizer = "bpe:2048"
    config.data.context_length = 256
    config.data.sources = (
        {"source": "python_stdlib"},
        {"source": "jsonl", "path": "texts/english.jsonl"},
        {"source": "jsonl", "path": "texts/mathematics.jsonl"},
    )
    config.data.held_out_fraction = 0.03

    config.evaluate.every = 400
    config.checkpoint.every = 400
    config.log_every = 10
    return config
