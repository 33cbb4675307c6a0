"""Checks of a model's config; a `UserError` names the wrong key."""

from mea_jax.config.schema import (
    ACTIVATIONS,
    ATTENTION_KERNELS,
    NORMS,
    POSITIONS,
    REMAT_POLICIES,
    VARIANTS,
    ModelConfig,
    Side,
)
from mea_jax.errors import one_of, require

_ADDRESSES = 2**63  # bytes
_BASELINE_OFF = (
    ("hlc", "none"),
    ("head_norm", False),
    ("qk_norm", False),
    ("gate", "none"),
    ("qkv_bias", False),
    ("key_mean", False),
    ("out_bias", False),
    ("attention_scale", 0.0),
)


def validate_model(model: ModelConfig) -> None:
    """Raise `UserError` for the first option of a model that cannot work on any machine."""
    at = "config.model"
    for name in (
        "vocab_size",
        "d_model",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "d_ff",
        "scan_unroll",
        "norm_eps",
    ):
        value = getattr(model, name)
        require(value > 0, f"{at}.{name}={value} must be positive")
    require(
        model.attention_scale >= 0,
        f"{at}.attention_scale={model.attention_scale} must be positive, or 0 for 1/sqrt(head_dim)",
    )
    require(
        model.rope_theta >= 1,
        f"{at}.rope_theta={model.rope_theta} must be 1 or more, so that frequencies decrease",
    )
    require(
        model.n_heads % model.n_kv_heads == 0,
        f"{at}.n_heads={model.n_heads} is not a multiple of n_kv_heads={model.n_kv_heads}: "
        "choose a multiple, because all query groups have the same size",
    )
    rotary = model.positions == "rope" or "frequency" in (model.key_mixing, model.value_mixing)
    require(
        model.head_dim % 2 == 0 or not rotary,
        f"{at}.head_dim={model.head_dim} must be even: rotary positions rotate pairs of features",
    )
    one_of(f"{at}.variant", model.variant, VARIANTS)
    one_of(f"{at}.hlc", model.hlc, ("kv", "k", "v", "none"))
    one_of(f"{at}.key_mixing", model.key_mixing, ("heads", "frequency"))
    one_of(f"{at}.value_mixing", model.value_mixing, ("heads", "dense"))
    one_of(f"{at}.hlc_order", model.hlc_order, ("before", "after"))
    one_of(f"{at}.hlc_init", model.hlc_init, ("identity", "normal"))
    one_of(f"{at}.hlc_form", model.hlc_form, ("auto", "folded", "explicit"))
    one_of(f"{at}.norms", model.norms, NORMS)
    one_of(f"{at}.activation", model.activation, ACTIVATIONS)
    one_of(f"{at}.qk_norm_over", model.qk_norm_over, ("head", "all"))
    one_of(f"{at}.gate", model.gate, ("none", "head", "feature"))
    one_of(f"{at}.positions", model.positions, POSITIONS)
    one_of(f"{at}.attention_kernel", model.attention_kernel, ATTENTION_KERNELS)
    one_of(f"{at}.dtype", model.dtype, ("auto", "float32", "bfloat16"))
    one_of(f"{at}.backend", model.backend, ("auto", "xla", "cpu"))
    one_of(f"{at}.remat", model.remat, REMAT_POLICIES)
    require(model.loss_chunk >= 0, f"{at}.loss_chunk={model.loss_chunk} must be 0 or more")
    _validate_layers(model)
    _validate_bits(model)
    _validate_slots(model)
    for side in Side:
        name, counts = f"{at}.{side}_components", model.components(side)
        require(
            len(counts) == model.n_layers,
            f"{name} lists {len(counts)} layers, but n_layers={model.n_layers}: list one number "
            "per layer, or give one for all",
        )
        for layer, count in enumerate(counts):
            where = f"{name}={count} (layer {layer})"
            require(count >= 1, f"{where} must be at least 1")
            require(
                count <= model.n_kv_heads,
                f"{where} exceeds n_kv_heads={model.n_kv_heads}: "
                "choose as many component heads as composite heads, or fewer",
            )
            require(
                count == model.n_kv_heads
                or model.mixes(side)
                or (model.variant == "collaborative" and side == Side.KEY),
                f"{where} is below n_kv_heads={model.n_kv_heads}, but "
                f"hlc={model.hlc!r} does not mix {side}s: set it to n_kv_heads, or change hlc",
            )

    _validate_experts(model)
    _validate_variant(model)
    count = least_parameters(model)
    # 16 bytes per parameter: float32 parameters, two moments, gradients.
    require(
        16 * count < _ADDRESSES,
        f"{at} describes about {count:.0e} parameters, which no computer can address: "
        "correct the size that is too large",
    )


def _validate_layers(model: ModelConfig) -> None:
    """Check the options that have a value per layer, except component heads."""
    at, windows, thetas = "config.model", model.windows(), model.thetas()
    for name, values in (("window", windows), ("layer_thetas", thetas)):
        require(
            len(values) == model.n_layers,
            f"{at}.{name} lists {len(values)} layers, but n_layers={model.n_layers}: list one "
            "value per layer",
        )
    require(min(windows) >= 0, f"{at}.window={min(windows)} must be positive, or 0 for no window")
    require(
        not any(windows) or model.variant != "talking_heads",
        f"{at}.window has no effect on variant='talking_heads': set it to None",
    )
    require(
        model.layer_thetas is None or model.positions == "rope",
        f"{at}.layer_thetas needs rotary positions, but positions={model.positions!r}: set it to "
        "None",
    )
    for theta in model.layer_thetas or ():
        require(
            theta == 0 or theta >= 1,
            f"{at}.layer_thetas={theta} must be 1 or more, or 0 for a layer without positions",
        )


def _validate_bits(model: ModelConfig) -> None:
    """Check the bits of cached slots, and the part of keys that is not cached."""
    require(
        not model.key_mean
        or (model.mixes(Side.KEY) and model.hlc_order == "before" and model.positions != "alibi"),
        "config.model.key_mean=True needs component key heads, mixed before their norm, and no "
        "ALiBi: set it to False",
    )
    for side in Side:
        name, rows = f"config.model.{side}_bits", model.bits(side)
        if rows is None:
            continue
        require(
            model.mixes(side) and model.hlc_order == "before" and model.positions != "alibi",
            f"{name} needs component heads of {side}s, mixed before their norm, and no ALiBi: set "
            "it to None",
        )
        counts = set(model.components(side))
        width = max(counts) * model.head_dim
        require(
            len(counts) == 1 and len(rows) == model.n_layers,
            f"{name} lists {len(rows)} layers, but n_layers={model.n_layers}: list one string for "
            "each, with equally many component heads in all",
        )
        for layer, row in enumerate(rows):
            require(
                len(row) == width and set(row) <= set("012345678"),
                f"{name} of layer {layer} must be {width} digits from 0 to 8, one for each feature "
                "of each component head",
            )


def _validate_slots(model: ModelConfig) -> None:
    """Check which features of component heads are cached."""
    for side, row in ((Side.KEY, model.key_slots), (Side.VALUE, model.value_slots)):
        if not row:
            continue
        name, counts = f"config.model.{side}_slots", set(model.components(side))
        require(
            model.mixes(side) and model.hlc_order == "before" and model.bits(side) is None,
            f"{name} needs component heads of {side}s, mixed before their norm, without "
            f'{side}_bits: set it to ""',
        )
        width = max(counts) * model.head_dim
        require(
            len(counts) == 1 and len(row) == width and set(row) <= set("01") and "1" in row,
            f"{name} must be {width} digits 0 or 1, one for each feature of each component head, "
            "with equally many component heads in all layers, and not all 0",
        )
        pairs = [row[i : i + model.head_dim] for i in range(0, width, model.head_dim)]
        half = model.head_dim // 2
        require(
            side == Side.VALUE or all(pair[:half] == pair[half:] for pair in pairs),
            f"{name} must have both features of a rotary pair, or neither: feature f of a head and "
            f"f + {half}",
        )


def _validate_experts(model: ModelConfig) -> None:
    at, experts = "config.model", model.n_experts
    require(experts >= 0, f"{at}.n_experts={experts} must be positive, or 0 for a dense model")
    for name in ("experts_per_token", "d_expert"):
        value = getattr(model, name)
        require(
            value > 0 if experts else value == 0,
            f"{at}.{name}={value} must be positive with n_experts={experts}"
            if experts
            else f"{at}.{name}={value} needs experts, but n_experts=0 has none: set it to 0",
        )
    require(
        not experts or model.activation == "silu",
        f"{at}.activation={model.activation!r} has no effect on experts, which use silu: set it to "
        "'silu', or n_experts to 0",
    )
    require(
        model.experts_per_token <= experts,
        f"{at}.experts_per_token={model.experts_per_token} exceeds n_experts={experts}: "
        "choose a smaller number",
    )


def least_parameters(model: ModelConfig) -> int:
    """Return the number of parameters, without small ones such as norms and gates."""
    d, h, kv, layers = model.d_model, model.head_dim, model.n_kv_heads, model.n_layers
    keys = model.components(Side.KEY)
    queries = sum(keys) if model.variant == "collaborative" else layers * model.n_heads
    total = (1 if model.tie_embeddings else 2) * model.vocab_size * d + model.max_positions * d
    width = model.n_experts * (3 * model.d_expert + 1) if model.n_experts else 3 * model.d_ff
    total += d * (layers * (width + model.n_heads * h) + queries * h)
    for side in Side:
        pair = 0
        if model.mixes(side):
            pair = {"heads": 1, "frequency": h, "dense": h * h}[model.mixing_kind(side)]
        total += sum(c * (d * h + pair * kv) for c in model.components(side))
    return total


def _validate_variant(model: ModelConfig) -> None:
    at, is_baseline = "config.model", model.variant != "mea"
    for name, off in _BASELINE_OFF:
        value = getattr(model, name)
        require(
            not is_baseline or value == off,
            f"{at}.{name}={value!r} belongs to variant 'mea', but variant={model.variant!r}: "
            f"set {name} to {off!r}",
        )
    require(
        model.variant != "talking_heads" or model.attention_kernel in ("auto", "einsum"),
        f"{at}.attention_kernel={model.attention_kernel!r} cannot run talking_heads, which mixes "
        "the logits of all heads: set it to 'auto'",
    )
    if model.variant == "differential_v1":
        for name in ("n_heads", "n_kv_heads"):
            value = getattr(model, name)
            require(
                value % 2 == 0,
                f"{at}.{name}={value} must be even: differential_v1 uses pairs of heads",
            )
    for side, kind in ((Side.KEY, model.key_mixing), (Side.VALUE, model.value_mixing)):
        require(
            kind == "heads" or model.mixes(side),
            f"{at}.{side}_mixing={kind!r} needs mixing of {side}s, but hlc={model.hlc!r} "
            "has none: set it to 'heads', or change hlc",
        )
    require(
        model.qk_norm_over == "head" or (model.qk_norm and not model.mixes(Side.KEY)),
        f"{at}.qk_norm_over='all' needs qk_norm and unmixed keys, but qk_norm={model.qk_norm} and "
        f"hlc={model.hlc!r}: set it to 'head'",
    )
    require(
        model.hlc_order == "before" or model.mixes(Side.KEY),
        f"{at}.hlc_order='after' needs mixing of keys, but hlc={model.hlc!r} has none: set it to "
        "'before', or change hlc",
    )
    require(
        model.max_positions >= 0 and (model.max_positions > 0) == (model.positions == "learned"),
        f"{at}.max_positions={model.max_positions} with positions={model.positions!r}: set it "
        "to the length of the longest document for learned positions, and to 0 for all others",
    )


def validate_from_scratch(model: ModelConfig) -> None:
    """Raise `UserError` if `model` cannot be trained from a fresh initialisation.

    In block identity each component head serves K/C consecutive composite heads, so C must divide
    K. A compressed model that is read from a checkpoint may have any C. If a token has one expert,
    whose weight is divided by itself, the router gets no gradient.
    """
    require(
        model.experts_per_token != 1 or not model.normalise_router,
        "config.model.normalise_router=True with experts_per_token=1 makes every weight 1, so the "
        "router would not learn: set it to False",
    )
    if model.variant == "collaborative":  # its rows accept any number of shared keys
        return
    for side in Side:
        for layer, count in enumerate(model.components(side)):
            require(
                model.n_kv_heads % count == 0,
                f"config.model.{side}_components={count} (layer {layer}) does not divide "
                f"n_kv_heads={model.n_kv_heads}: training from scratch starts from block identity; "
                "choose a divisor, or start from a compressed checkpoint",
            )
