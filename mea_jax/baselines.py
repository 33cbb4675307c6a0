"""The arguments that every config takes: `configs/quickstart.py:mha` is its MHA baseline."""

from ml_collections import config_dict

from mea_jax.errors import UserError, nearest


def apply_variant(config: config_dict.ConfigDict, variant: str) -> config_dict.ConfigDict:
    """Turns an MEA config into one of its baselines of the same shape, and renames the run.

    "" MEA as configured; "no_norm" MEA without the head norm; "gqa" the same number of key/value
    heads without mixing or head norm; "mha" likewise with a key/value head for every query head.
    """
    variants = ("", "mha", "gqa", "no_norm")
    if variant not in variants:
        raise UserError(
            f"the config has no variant {variant!r}: {nearest(variant, [v for v in variants if v])}"
        )
    model = config.model
    if variant in ("mha", "gqa"):
        model.hlc, model.head_norm = "none", False
        model.key_components = model.value_components = None
    if variant == "mha":
        model.n_kv_heads = model.n_heads
    if variant == "gqa" and model.n_kv_heads == model.n_heads:
        # An MEA config whose K equals N has no GQA of its own; a quarter is the common choice.
        model.n_kv_heads = max(model.n_heads // 4, 1)
    if variant == "no_norm":
        model.head_norm = False
    if variant:
        config.name = f"{config.name}_{variant}"
    return config
