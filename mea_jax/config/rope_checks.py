"""Checks of the scaling of rotary positions."""

import math

from mea_jax.config.schema import ROPE_SCALINGS, TrainConfig, layer_configs
from mea_jax.errors import UserError, nearest, shown


def validate_rope_scaling(config: TrainConfig) -> None:
    """Raise `UserError` for the first option of `config.model.rope_scaling` that cannot work."""
    at, model, window = "config.model.rope_scaling", config.model, config.data.context_length
    rope = model.rope_scaling
    scaled = [(model.rope_theta, "rope_theta")]
    if model.layer_thetas is not None:
        layers = (layer for layer in layer_configs(model) if layer.rope_scaling == rope)
        scaled = [(layer.rope_theta, "layer_thetas") for layer in layers if layer.rope_theta]
    theta, option = min(scaled, default=(math.inf, ""))
    if rope.kind not in ROPE_SCALINGS:
        raise UserError(f"{at}.kind={shown(rope.kind)}: {nearest(rope.kind, ROPE_SCALINGS)}")
    yarn = rope.kind == "yarn"
    for correct, message in (
        (rope.factor >= 1, f".factor={rope.factor} must be 1 or more"),
        (
            rope.kind != "none" or rope.factor == 1,
            f".factor={rope.factor} has no effect with kind='none': set kind to one of "
            f"{', '.join(ROPE_SCALINGS[1:])}, or factor to 1",
        ),
        (
            0 < rope.low_freq_factor < rope.high_freq_factor and rope.original_context > 0,
            " must have 0 < low_freq_factor < high_freq_factor and a positive original_context",
        ),
        (
            0 < rope.beta_slow < rope.beta_fast,
            f".beta_slow={rope.beta_slow} must be positive and below beta_fast={rope.beta_fast}",
        ),
        *(
            (value >= 0, f".{name}={value} must be positive, or 0 for the default")
            for name in ("attention_factor", "mscale", "mscale_all_dim")
            for value in (getattr(rope, name),)
        ),
        (
            not yarn or theta > 1,
            f".kind='yarn' needs config.model.{option}={theta} above 1: it compares frequencies",
        ),
        (
            rope.kind != "dynamic" or model.positions != "rope" or window <= rope.original_context,
            f".original_context={rope.original_context} is below data.context_length={window}: "
            "with kind='dynamic' no positions beyond it are supported, so shorten the windows",
        ),
    ):
        if not correct:
            raise UserError(at + message)
