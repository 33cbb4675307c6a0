"""Presets that configs share: baselines (`configs/quickstart.py:mha`) and continued training."""

from ml_collections import config_dict

from mea_jax.config.schema import VARIANTS
from mea_jax.errors import UserError, nearest

VARIANT_ARGUMENTS = ("mha", "gqa", "mqa", "head_norm", "no_norm", "gated", *VARIANTS[1:])


def apply_variant(config: config_dict.ConfigDict, variant: str) -> config_dict.ConfigDict:
    """Turn an MEA config into a baseline of the same shape, in place, and rename the run.

    "" leaves MEA as configured. "no_norm" removes the head norm and "head_norm" the mixing. "mha",
    "gqa" and "mqa" remove both; "mha" has as many key/value heads as query heads, "gqa" as many as
    configured (a quarter of the query heads if that is all), "mqa" one. "gated" replaces the mixing
    and the head norm with one gate per head. Other names are the variants of model/variants.py.
    Raises `UserError` for an unknown name.
    """
    if variant not in ("", *VARIANT_ARGUMENTS):
        raise UserError(
            f"the config has no variant {variant!r}: {nearest(variant, VARIANT_ARGUMENTS)}"
        )
    model = config.model
    if variant not in ("", "no_norm"):
        model.hlc = "none"
        model.head_norm = variant == "head_norm"
        model.key_components = model.value_components = None
        model.key_mixing = model.value_mixing = "heads"
        model.hlc_order = "before"
    if variant == "no_norm":
        model.head_norm = False
    if variant == "mha":
        model.n_kv_heads = model.n_heads
    if variant == "mqa":
        model.n_kv_heads = 1
    if variant == "gqa" and model.n_kv_heads == model.n_heads:
        # An MEA config with K = N does not define a GQA; a quarter is the common choice.
        model.n_kv_heads = max(model.n_heads // 4, 1)
    if variant == "gated":
        model.gate = "head"
    if variant in VARIANTS:
        model.variant = variant
    if variant:
        config.name = f"{config.name}_{variant}"
    return config


def continue_training(
    config: config_dict.ConfigDict, checkpoint: str, tokenizer: str
) -> config_dict.ConfigDict:
    """Set the recipe for continued training of a published model, in place.

    It starts from `checkpoint`, the run directory of the import, and uses its tokenizer. If
    `checkpoint` is "", it starts from fresh parameters and uses the file `tokenizer`.
    """
    config.steps = 1_000
    config.batch_size = 64
    config.optimizer.learning_rate = 1e-5 if checkpoint else 1e-3
    config.optimizer.warmup_steps = 50

    config.start.checkpoint = checkpoint
    # As in configs/mea_1b.py, which documents the source of the files.
    config.data.sources = ({"source": "tfds:c4/en:3.1.0", "weight": 1.0},)
    config.data.tokenizer = f"{checkpoint}/tokenizer" if checkpoint else tokenizer
    config.data.context_length = 4096
    config.data.held_out_fraction = 1e-4

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.evaluate.every = 250
    config.checkpoint.every = 250
    return config
