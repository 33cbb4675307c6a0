"""The arguments that every config takes: `configs/quickstart.py:mha` is its MHA baseline."""

from ml_collections import config_dict

from mea_jax.config import VARIANTS
from mea_jax.errors import UserError, nearest

VARIANT_ARGUMENTS = ("mha", "gqa", "mqa", "head_norm", "no_norm", "gated", *VARIANTS[1:])


def apply_variant(config: config_dict.ConfigDict, variant: str) -> config_dict.ConfigDict:
    """Turns an MEA config into one of its baselines or rivals of the same shape; renames the run.

    "" is MEA as configured. Less of it: "no_norm" without the head norm; "head_norm" without the
    mixing; "mha", "gqa", "mqa" without both, with as many key/value heads as query heads, as many
    as before (a quarter if that is all), or one. Rivals: "gated" (the mixing and the head norm
    give way to a gate a head), and the variants of variants.py by name.
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
        # An MEA config whose K equals N has no GQA of its own; a quarter is the common choice.
        model.n_kv_heads = max(model.n_heads // 4, 1)
    if variant == "gated":
        model.gate = "head"
    if variant in VARIANTS:
        model.variant = variant
    if variant:
        config.name = f"{config.name}_{variant}"
    return config
