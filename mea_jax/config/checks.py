"""Checks of a config before anything is built; a `UserError` names the wrong key."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from mea_jax.config.rope_checks import validate_rope_scaling
from mea_jax.config.schema import (
    ATTENTION_KERNELS,
    POSITIONS,
    REMAT_POLICIES,
    SCHEDULES,
    TRAINABLE,
    VARIANTS,
    ModelConfig,
    Side,
    TrainConfig,
    flatten,
)
from mea_jax.errors import UserError, nearest, shown

# Upper bounds of loop counts, so that a typing error is reported immediately.
_AT_MOST = {"model.n_layers": 10_000, "data.prefetch": 1_000, "data.read_threads": 1_000}
_LONGEST_NAME = 255  # bytes, of a folder on common file systems
_ADDRESSES = 2**63  # bytes
_SMALLEST, _LARGEST = 2.0**-126, 2.0**128  # float32's least normal number, and past its largest


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _one_of(path: str, value: str, allowed: Iterable[str]) -> None:
    _require(value in (names := tuple(allowed)), f"{path}={shown(value)}: {nearest(value, names)}")


def validate(config: TrainConfig) -> None:
    """Raise `UserError` for the first option that cannot work on any machine."""
    for key, value in flatten(dataclasses.asdict(config)).items():
        _validate_value(f"config.{key}", value)
    for path, most in _AT_MOST.items():
        value = _value(config, path)
        _require(value <= most, f"config.{path}={value} must be at most {most:,}")
    _validate_model(config.model)
    validate_rope_scaling(config)
    data, optim = config.data, config.optimizer
    for path in (
        "steps",
        "batch_size",
        "accumulate",
        "log_every",
        "data.context_length",
        "data.prefetch",
        "data.read_threads",
        "checkpoint.keep",
        "evaluate.batches",
        "evaluate.sample_tokens",
    ):
        _positive(config, path)
    _require(0 <= config.seed < 2**31, f"config.seed={config.seed} must be in [0, 2^31)")
    _require(
        config.name not in ("", ".", "..")
        and "/" not in config.name
        and len(config.name.encode()) <= _LONGEST_NAME,
        f"config.name={shown(config.name)} must be the name of a folder below runs/, without "
        f"'/' and of at most {_LONGEST_NAME} bytes",
    )
    _require(len(data.sources) > 0, "config.data.sources is empty: name at least one source")
    for i, source in enumerate(data.sources):
        path = f"config.data.sources[{i}].weight"
        _require(0 < source.weight < math.inf, f"{path}={source.weight} must be positive")
    _require(
        0 <= data.held_out_fraction < 1,
        f"config.data.held_out_fraction={data.held_out_fraction} must be 0 or more and below 1",
    )
    _require(
        not all(source.held_out for source in data.sources),
        "config.data.sources: every source is held_out; add one for training",
    )
    _require(
        config.batch_size % config.accumulate == 0,
        f"config.accumulate={config.accumulate} does not divide batch_size={config.batch_size}: "
        "choose a divisor",
    )
    _validate_start(config)
    _one_of("config.optimizer.schedule", optim.schedule, SCHEDULES)
    _require(
        0 <= optim.warmup_steps < config.steps or config.steps == 1,
        f"config.optimizer.warmup_steps={optim.warmup_steps} must be 0 or more, and below "
        f"steps={config.steps}: shorten the warmup or lengthen the run",
    )
    rate = optim.learning_rate
    _require(rate > 0, f"config.optimizer.learning_rate={rate} must be positive")
    for name in ("weight_decay", "clip_norm", "z_loss", "load_balance", "router_z_loss"):
        value = getattr(optim, name)
        _require(value >= 0, f"config.optimizer.{name}={value} must be 0 or more")
    for name in ("load_balance", "router_z_loss"):
        value = getattr(optim, name)
        _require(
            value == 0 or config.model.n_experts > 0,
            f"config.optimizer.{name}={value} needs a router, but config.model.n_experts=0 has "
            "none: set it to 0",
        )
    for name in ("b1", "b2"):
        value = getattr(optim, name)
        _require(0 <= value < 1, f"config.optimizer.{name}={value} must be in [0, 1)")
    _require(optim.eps > 0, f"config.optimizer.eps={optim.eps} must be positive")
    for name in ("every", "sample_temperature"):
        value = getattr(config.evaluate, name)
        _require(value >= 0, f"config.evaluate.{name}={value} must be 0 or more")
    for path in (
        "checkpoint.every",
        "checkpoint.minutes",
        "checkpoint.keep_every",
        "guards.max_skipped",
        "guards.spike_steps",
        "guards.max_rewinds",
    ):
        value = _value(config, path)
        _require(value >= 0, f"config.{path}={value} must be 0 or more")
    smoothing = config.guards.spike_smoothing
    _require(smoothing >= 1, f"config.guards.spike_smoothing={smoothing} must be 1 or more")
    margin = config.guards.spike_margin
    _require(margin > 0, f"config.guards.spike_margin={margin} must be positive")
    _require(
        config.guards.spike_steps > 0 or not config.guards.rewind,
        "config.guards.rewind=True needs spike detection: set config.guards.spike_steps above 0",
    )
    _one_of("config.data.bad_input", data.bad_input, ("stop", "skip"))
    for name in ("final_fraction", "decay_fraction"):
        value = getattr(optim, name)
        _require(0 <= value <= 1, f"config.optimizer.{name}={value} must be in [0, 1]")
    _require(
        config.model.positions != "learned" or data.context_length <= config.model.max_positions,
        f"config.model.max_positions={config.model.max_positions} is below "
        f"data.context_length={data.context_length}: set it to the context length or more, because "
        "one document can fill a window",
    )
    _require(
        data.context_length > 1 or not config.evaluate.sample_prompt,
        f"config.evaluate.sample_prompt={shown(config.evaluate.sample_prompt)} cannot be continued "
        "within data.context_length=1: set it to '', or use longer windows",
    )
    sizes = dataclasses.asdict(config.mesh)
    slices = sizes.pop("slices")
    for axis, size in sizes.items():
        _require(size == -1 or size > 0, f"config.mesh.{axis}={size} must be positive, or -1")
    _require(slices > 0, f"config.mesh.slices={slices} must be positive")
    _require(
        sizes["data"] == -1 or sizes["data"] % slices == 0,
        f"config.mesh.data={sizes['data']} is not a multiple of slices={slices}: choose a "
        "multiple, because data is the axis that spans slices",
    )
    _require(
        list(sizes.values()).count(-1) <= 1,
        "config.mesh: only one axis can be -1 (all remaining devices): set the others to numbers",
    )


def _validate_start(config: TrainConfig) -> None:
    start, at = config.start, "config.start"
    _one_of(f"{at}.trainable", start.trainable, TRAINABLE)
    share = start.distillation
    _require(0 <= share <= 1, f"{at}.distillation={share} must be in [0, 1]")
    _require(
        share == 0 or start.teacher != "",
        f"{at}.distillation={share} needs a teacher model: set {at}.teacher",
    )
    _require(
        share > 0 or start.teacher == "",
        f"{at}.teacher={shown(start.teacher)} has no effect with distillation=0: set "
        f"{at}.distillation above 0, at most 1, or remove the teacher",
    )


def _validate_value(path: str, value: Any) -> None:
    """Check one option by the rules for its type."""
    if isinstance(value, str):
        _require("\0" not in value, f"{path}={shown(value)} contains a null character: remove it")
        # Paths and texts are written and printed as UTF-8.
        valid = not any("\ud800" <= letter <= "\udfff" for letter in value)
        _require(valid, f"{path}={shown(value)} is not valid UTF-8: replace the invalid characters")
    elif isinstance(value, float):
        # The config is stored as JSON, which has no such numbers.
        _require(math.isfinite(value), f"{path}={value} must be a finite number")
        _require(
            value == 0 or _SMALLEST <= abs(value) < _LARGEST,
            f"{path}={value} is {'0' if abs(value) < 1 else 'infinite'} in float32, the "
            "precision of a run: choose a number between 1.2e-38 and 3.4e38",
        )
    elif isinstance(value, tuple):  # sources, or component heads
        for i, item in enumerate(value):
            leaves = item if isinstance(item, dict) else {}
            for key, leaf in leaves.items():
                _validate_value(f"{path}[{i}].{key}", leaf)


def _value(config: TrainConfig, path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = getattr(value, key)
    return value


def _positive(config: TrainConfig, path: str) -> None:
    value = _value(config, path)
    _require(value > 0, f"config.{path}={value} must be positive")


def _validate_model(model: ModelConfig) -> None:
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
        _require(value > 0, f"{at}.{name}={value} must be positive")
    _require(
        model.rope_theta >= 1,
        f"{at}.rope_theta={model.rope_theta} must be 1 or more, so that frequencies decrease",
    )
    _require(
        model.n_heads % model.n_kv_heads == 0,
        f"{at}.n_heads={model.n_heads} is not a multiple of n_kv_heads={model.n_kv_heads}: "
        "choose a multiple, because all query groups have the same size",
    )
    rotary = model.positions == "rope" or "frequency" in (model.key_mixing, model.value_mixing)
    _require(
        model.head_dim % 2 == 0 or not rotary,
        f"{at}.head_dim={model.head_dim} must be even: rotary positions rotate pairs of features",
    )
    _one_of(f"{at}.variant", model.variant, VARIANTS)
    _one_of(f"{at}.hlc", model.hlc, ("kv", "k", "v", "none"))
    _one_of(f"{at}.key_mixing", model.key_mixing, ("heads", "frequency"))
    _one_of(f"{at}.value_mixing", model.value_mixing, ("heads", "dense"))
    _one_of(f"{at}.hlc_order", model.hlc_order, ("before", "after"))
    _one_of(f"{at}.hlc_init", model.hlc_init, ("identity", "normal"))
    _one_of(f"{at}.hlc_form", model.hlc_form, ("auto", "folded", "explicit"))
    _one_of(f"{at}.gate", model.gate, ("none", "head", "feature"))
    _one_of(f"{at}.positions", model.positions, POSITIONS)
    _one_of(f"{at}.attention_kernel", model.attention_kernel, ATTENTION_KERNELS)
    _one_of(f"{at}.dtype", model.dtype, ("auto", "float32", "bfloat16"))
    _one_of(f"{at}.backend", model.backend, ("auto", "xla", "cpu"))
    _one_of(f"{at}.remat", model.remat, REMAT_POLICIES)
    _require(model.loss_chunk >= 0, f"{at}.loss_chunk={model.loss_chunk} must be 0 or more")
    for side in Side:
        name, counts = f"{at}.{side}_components", model.components(side)
        _require(
            len(counts) == model.n_layers,
            f"{name} lists {len(counts)} layers, but n_layers={model.n_layers}: list one number "
            "per layer, or give one for all",
        )
        for layer, count in enumerate(counts):
            where = f"{name}={count} (layer {layer})"
            _require(count >= 1, f"{where} must be at least 1")
            _require(
                count <= model.n_kv_heads,
                f"{where} exceeds n_kv_heads={model.n_kv_heads}: "
                "choose as many component heads as composite heads, or fewer",
            )
            _require(
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
    _require(
        16 * count < _ADDRESSES,
        f"{at} describes about {count:.0e} parameters, which no computer can address: "
        "correct the size that is too large",
    )


def _validate_experts(model: ModelConfig) -> None:
    at, experts = "config.model", model.n_experts
    _require(experts >= 0, f"{at}.n_experts={experts} must be positive, or 0 for a dense model")
    for name in ("experts_per_token", "d_expert"):
        value = getattr(model, name)
        _require(
            value > 0 if experts else value == 0,
            f"{at}.{name}={value} must be positive with n_experts={experts}"
            if experts
            else f"{at}.{name}={value} needs experts, but n_experts=0 has none: set it to 0",
        )
    _require(
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
    for name, off in (("hlc", "none"), ("head_norm", False), ("qk_norm", False), ("gate", "none")):
        value = getattr(model, name)
        _require(
            not is_baseline or value == off,
            f"{at}.{name}={value!r} belongs to variant 'mea', but variant={model.variant!r}: "
            f"set {name} to {off!r}",
        )
    _require(
        model.variant != "talking_heads" or model.attention_kernel in ("auto", "einsum"),
        f"{at}.attention_kernel={model.attention_kernel!r} cannot run talking_heads, which mixes "
        "the logits of all heads: set it to 'auto'",
    )
    if model.variant == "differential_v1":
        for name in ("n_heads", "n_kv_heads"):
            value = getattr(model, name)
            _require(
                value % 2 == 0,
                f"{at}.{name}={value} must be even: differential_v1 uses pairs of heads",
            )
    for side, kind in ((Side.KEY, model.key_mixing), (Side.VALUE, model.value_mixing)):
        _require(
            kind == "heads" or model.mixes(side),
            f"{at}.{side}_mixing={kind!r} needs mixing of {side}s, but hlc={model.hlc!r} "
            "has none: set it to 'heads', or change hlc",
        )
    _require(
        model.hlc_order == "before" or model.mixes(Side.KEY),
        f"{at}.hlc_order='after' needs mixing of keys, but hlc={model.hlc!r} has none: set it to "
        "'before', or change hlc",
    )
    _require(
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
    _require(
        model.experts_per_token != 1 or not model.normalise_router,
        "config.model.normalise_router=True with experts_per_token=1 makes every weight 1, so the "
        "router would not learn: set it to False",
    )
    if model.variant == "collaborative":  # its rows accept any number of shared keys
        return
    for side in Side:
        for layer, count in enumerate(model.components(side)):
            _require(
                model.n_kv_heads % count == 0,
                f"config.model.{side}_components={count} (layer {layer}) does not divide "
                f"n_kv_heads={model.n_kv_heads}: training from scratch starts from block identity; "
                "choose a divisor, or start from a compressed checkpoint",
            )
