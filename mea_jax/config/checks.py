"""Checks of a config before anything is built; a `UserError` names the wrong key."""

import dataclasses
import math
from typing import Any

from mea_jax.config.model_checks import validate_model
from mea_jax.config.rope_checks import validate_rope_scaling
from mea_jax.config.schema import (
    SCHEDULES,
    TRAINABLE,
    TrainConfig,
    flatten,
)
from mea_jax.errors import one_of, require, shown

# Upper bounds of loop counts, so that a typing error is reported immediately.
_AT_MOST = {"model.n_layers": 10_000, "data.prefetch": 1_000, "data.read_threads": 1_000}
_LONGEST_NAME = 255  # bytes, of a folder on common file systems
_SMALLEST, _LARGEST = 2.0**-126, 2.0**128  # float32's least normal number, and past its largest


def validate(config: TrainConfig) -> None:
    """Raise `UserError` for the first option that cannot work on any machine."""
    for key, value in flatten(dataclasses.asdict(config)).items():
        _validate_value(f"config.{key}", value)
    for path, most in _AT_MOST.items():
        value = _value(config, path)
        require(value <= most, f"config.{path}={value} must be at most {most:,}")
    validate_model(config.model)
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
    require(0 <= config.seed < 2**31, f"config.seed={config.seed} must be in [0, 2^31)")
    require(
        config.name not in ("", ".", "..")
        and "/" not in config.name
        and len(config.name.encode()) <= _LONGEST_NAME,
        f"config.name={shown(config.name)} must be the name of a folder below runs/, without "
        f"'/' and of at most {_LONGEST_NAME} bytes",
    )
    require(len(data.sources) > 0, "config.data.sources is empty: name at least one source")
    for i, source in enumerate(data.sources):
        path = f"config.data.sources[{i}].weight"
        require(0 < source.weight < math.inf, f"{path}={source.weight} must be positive")
    require(
        0 <= data.held_out_fraction < 1,
        f"config.data.held_out_fraction={data.held_out_fraction} must be 0 or more and below 1",
    )
    require(
        not all(source.held_out for source in data.sources),
        "config.data.sources: every source is held_out; add one for training",
    )
    require(
        config.batch_size % config.accumulate == 0,
        f"config.accumulate={config.accumulate} does not divide batch_size={config.batch_size}: "
        "choose a divisor",
    )
    _validate_start(config)
    one_of("config.optimizer.schedule", optim.schedule, SCHEDULES)
    require(
        0 <= optim.warmup_steps < config.steps or config.steps == 1,
        f"config.optimizer.warmup_steps={optim.warmup_steps} must be 0 or more, and below "
        f"steps={config.steps}: shorten the warmup or lengthen the run",
    )
    rate = optim.learning_rate
    require(rate > 0, f"config.optimizer.learning_rate={rate} must be positive")
    for name in ("weight_decay", "clip_norm", "z_loss", "load_balance", "router_z_loss"):
        value = getattr(optim, name)
        require(value >= 0, f"config.optimizer.{name}={value} must be 0 or more")
    for name in ("load_balance", "router_z_loss"):
        value = getattr(optim, name)
        require(
            value == 0 or config.model.n_experts > 0,
            f"config.optimizer.{name}={value} needs a router, but config.model.n_experts=0 has "
            "none: set it to 0",
        )
    for name in ("b1", "b2"):
        value = getattr(optim, name)
        require(0 <= value < 1, f"config.optimizer.{name}={value} must be in [0, 1)")
    require(optim.eps > 0, f"config.optimizer.eps={optim.eps} must be positive")
    for name in ("every", "sample_temperature"):
        value = getattr(config.evaluate, name)
        require(value >= 0, f"config.evaluate.{name}={value} must be 0 or more")
    for path in (
        "checkpoint.every",
        "checkpoint.minutes",
        "checkpoint.keep_every",
        "guards.max_skipped",
        "guards.spike_steps",
        "guards.max_rewinds",
    ):
        value = _value(config, path)
        require(value >= 0, f"config.{path}={value} must be 0 or more")
    smoothing = config.guards.spike_smoothing
    require(smoothing >= 1, f"config.guards.spike_smoothing={smoothing} must be 1 or more")
    margin = config.guards.spike_margin
    require(margin > 0, f"config.guards.spike_margin={margin} must be positive")
    require(
        config.guards.spike_steps > 0 or not config.guards.rewind,
        "config.guards.rewind=True needs spike detection: set config.guards.spike_steps above 0",
    )
    one_of("config.data.bad_input", data.bad_input, ("stop", "skip"))
    for name in ("final_fraction", "decay_fraction"):
        value = getattr(optim, name)
        require(0 <= value <= 1, f"config.optimizer.{name}={value} must be in [0, 1]")
    require(
        config.model.positions != "learned" or data.context_length <= config.model.max_positions,
        f"config.model.max_positions={config.model.max_positions} is below "
        f"data.context_length={data.context_length}: set it to the context length or more, because "
        "one document can fill a window",
    )
    require(
        data.context_length > 1 or not config.evaluate.sample_prompt,
        f"config.evaluate.sample_prompt={shown(config.evaluate.sample_prompt)} cannot be continued "
        "within data.context_length=1: set it to '', or use longer windows",
    )
    sizes = dataclasses.asdict(config.mesh)
    slices = sizes.pop("slices")
    for axis, size in sizes.items():
        require(size == -1 or size > 0, f"config.mesh.{axis}={size} must be positive, or -1")
    require(slices > 0, f"config.mesh.slices={slices} must be positive")
    require(
        sizes["data"] == -1 or sizes["data"] % slices == 0,
        f"config.mesh.data={sizes['data']} is not a multiple of slices={slices}: choose a "
        "multiple, because data is the axis that spans slices",
    )
    require(
        list(sizes.values()).count(-1) <= 1,
        "config.mesh: only one axis can be -1 (all remaining devices): set the others to numbers",
    )


def _validate_start(config: TrainConfig) -> None:
    start, at = config.start, "config.start"
    one_of(f"{at}.trainable", start.trainable, TRAINABLE)
    share = start.distillation
    require(0 <= share <= 1, f"{at}.distillation={share} must be in [0, 1]")
    require(
        share == 0 or start.teacher != "",
        f"{at}.distillation={share} needs a teacher model: set {at}.teacher",
    )
    require(
        share > 0 or start.teacher == "",
        f"{at}.teacher={shown(start.teacher)} has no effect with distillation=0: set "
        f"{at}.distillation above 0, at most 1, or remove the teacher",
    )


def _validate_value(path: str, value: Any) -> None:
    """Check one option by the rules for its type."""
    if isinstance(value, str):
        require("\0" not in value, f"{path}={shown(value)} contains a null character: remove it")
        # Paths and texts are written and printed as UTF-8.
        valid = not any("\ud800" <= letter <= "\udfff" for letter in value)
        require(valid, f"{path}={shown(value)} is not valid UTF-8: replace the invalid characters")
    elif isinstance(value, float):
        # The config is stored as JSON, which has no such numbers.
        require(math.isfinite(value), f"{path}={value} must be a finite number")
        require(
            value == 0 or _SMALLEST <= abs(value) < _LARGEST,
            f"{path}={value} is {'0' if abs(value) < 1 else 'infinite'} in float32, the "
            "precision of a run: choose a number between 1.2e-38 and 3.4e38",
        )
    elif isinstance(value, tuple):  # sources, or a value per layer
        for i, item in enumerate(value):
            if not isinstance(item, dict):
                _validate_value(f"{path}[{i}]", item)
                continue
            for key, leaf in item.items():
                _validate_value(f"{path}[{i}].{key}", leaf)


def _value(config: TrainConfig, path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = getattr(value, key)
    return value


def _positive(config: TrainConfig, path: str) -> None:
    value = _value(config, path)
    require(value > 0, f"config.{path}={value} must be positive")
