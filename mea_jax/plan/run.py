"""The command: flags, one plan or a sweep, files."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags

from mea_jax import cli
from mea_jax.compress.methods import METHODS
from mea_jax.compress.options import Options
from mea_jax.config.schema import TrainConfig
from mea_jax.errors import UserError, nearest
from mea_jax.plan import compression, compression_report, output
from mea_jax.plan import target as targets
from mea_jax.plan.collectives import slices_of
from mea_jax.plan.compiling import Compiled, DoesNotFit
from mea_jax.plan.programs import decode_program, train_program
from mea_jax.plan.roofline import roofline
from mea_jax.plan.search import describe, sweep, what_fits

CONFIG = cli.define_config_flag()
TOPOLOGY = flags.DEFINE_string("topology", "local", f"what to compile for: {targets.EXAMPLES}")
STEP = flags.DEFINE_string(
    "step", "train", "train, decode (one device), or compress (python -m mea_jax.compress)"
)
SWEEP = flags.DEFINE_bool("sweep", False, "try meshes, remat policies, microbatches; rank them")
BATCH = flags.DEFINE_integer("batch", 16, "rows of a decode step")
CONTEXT = flags.DEFINE_integer("context", None, "cached positions of a decode step; default: T")
KEEP = flags.DEFINE_float("keep", Options.keep, "share of the cache that compress keeps")
METHOD = flags.DEFINE_string("method", Options.method, "of compress: " + ", ".join(METHODS))
TEXT = flags.DEFINE_integer(
    "calibration_tokens", Options.calibration_tokens, "of text that compress calibrates on"
)
REPAIR_TEXT = flags.DEFINE_integer(
    "repair_tokens", 0, "of text that compress repairs on; 0: as many as it calibrates on"
)
HELD_OUT = flags.DEFINE_integer(
    "held_out_tokens", Options.held_out_tokens, "that compress looks at before and after"
)
OUT = flags.DEFINE_string("out", None, "of .json and .png; default plans/<config>_<topology>")
HLO = flags.DEFINE_string(
    "hlo", None, "also write the compiled program's text to this file (of several: one file each)"
)
flags.declare_key_flag("config")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan as JSON values and as text; programs by name, and of each its part of the plan."""

    programs: dict[str, Compiled]
    plan: dict[str, Any]
    text: str
    pictured: dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Step:
    """One kind of plan.

    Attributes:
      own: flags that mean something to this step only.
      plan: compiles and counts.
      remedy: what would fit, as the end of a line, where the program named does not.
    """

    own: tuple[str, ...]
    plan: Callable[[TrainConfig, targets.Target], Planned]
    remedy: Callable[[TrainConfig, targets.Target, str], str]


def say(message: str) -> None:
    """Progress: to the terminal, not into what is piped on."""
    print(message, file=sys.stderr, flush=True)


def plan_of(compiled: Compiled, target: targets.Target, step: str, tokens: int) -> dict[str, Any]:
    roof = roofline(compiled, target)
    return output.summary(compiled, target, roof, step, tokens, compiled.mesh.size)


def _planned(compiled: Compiled, target: targets.Target, step: str, tokens: int) -> Planned:
    """Of a step that is one program."""
    plan = plan_of(compiled, target, step, tokens)
    return Planned({step: compiled}, plan, output.text(plan), {target.name: plan})


# -- the steps -----------------------------------------------------------------------------


def _train(config: TrainConfig, target: targets.Target) -> Planned:
    say(f"compiling the training step for {len(target.devices)} devices")
    tokens = config.batch_size * config.data.context_length
    return _planned(train_program(config, target), target, "train", tokens)


def _train_remedy(config: TrainConfig, target: targets.Target, program: str) -> str:
    found = what_fits(config, target, say)  # by trying
    if found is None:
        return "; neither single windows nor full remat fit: more devices, or more of tensor"
    change = f"--config.accumulate={found.accumulate} --config.model.remat={found.model.remat}"
    return f"; this fits: {change}"


def _decode(config: TrainConfig, target: targets.Target) -> Planned:
    context = CONTEXT.value or config.data.context_length
    say(f"compiling a decode step of {BATCH.value} rows, {context} positions cached")
    compiled = decode_program(config, target, BATCH.value, context)
    return _planned(compiled, target, "decode", BATCH.value)


def _decode_remedy(config: TrainConfig, target: targets.Target, program: str) -> str:
    return "; take fewer rows (--batch) or positions (--context), or an int8 cache"


def _compress(config: TrainConfig, target: targets.Target) -> Planned:
    options = Options(
        keep=KEEP.value,
        method=METHOD.value,
        calibration_tokens=TEXT.value,
        repair_tokens=REPAIR_TEXT.value,
        held_out_tokens=HELD_OUT.value,
        repair="layerwise",
    )
    compression.check_machine(target)
    config = compression.resolved(config, target)
    programs: dict[str, Compiled] = {}
    for name, compiled in compression.compress_programs(config, target, options):
        say(f"compiled {name}, {len(programs) + 1} of {len(compression.PROGRAMS)}")
        programs[name] = compiled
    plan = compression_report.summary(programs, config, target, options)
    return Planned(programs, plan, compression_report.text(plan), plan["programs"])


def _compress_remedy(config: TrainConfig, target: targets.Target, program: str) -> str:
    return compression.remedy(program)


STEPS = {
    "train": Step(("sweep",), _train, _train_remedy),
    "decode": Step(("batch", "context"), _decode, _decode_remedy),
    "compress": Step(
        ("keep", "method", "calibration_tokens", "repair_tokens", "held_out_tokens"),
        _compress,
        _compress_remedy,
    ),
}


# -- one plan, or a sweep ------------------------------------------------------------------


def run(config: TrainConfig, target: targets.Target, out: Path) -> None:
    """Plans the step that the flags name. Raises `UserError` where it does not fit."""
    step = STEPS[STEP.value]
    try:
        planned = step.plan(config, target)
    except DoesNotFit as error:
        what = f"{error.program} " if error.program else ""
        remedy = step.remedy(config, target, error.program)
        raise UserError(f"{target.name}: {what}{error}{remedy}") from error
    if HLO.value:
        _write_programs(planned.programs, Path(HLO.value))
    print(planned.text)
    print(f"\n{_write(planned.plan, planned.pictured, out)}")
    for name, compiled in planned.programs.items():
        if target.chip is not None and output.fits(compiled, target) is False:
            what = f"{name} " if len(planned.programs) > 1 else ""
            over = (compiled.peak - target.chip.memory) / 1e9
            remedy = step.remedy(config, target, name)
            raise UserError(f"{target.name}: {what}does not fit, {over:.2f} GB over{remedy}")


def _write_programs(programs: dict[str, Compiled], path: Path) -> None:
    for name, compiled in programs.items():
        file = path if len(programs) == 1 else path.with_stem(f"{path.stem}_{name}")
        file.write_text(compiled.text)


def _write(plan: Any, pictured: dict[str, dict[str, Any]], out: Path) -> str:
    # Not with_suffix: "lr=1.5" has none.
    name = out.name.removesuffix(".json").removesuffix(".png")
    numbers, picture = out.with_name(f"{name}.json"), out.with_name(f"{name}.png")
    output.write(plan, numbers)
    if all("seconds" in p for p in pictured.values()):
        output.picture(pictured, picture)
        return f"{numbers} and {picture}"
    return str(numbers)


def run_sweep(config: TrainConfig, target: targets.Target, out: Path) -> None:
    """Ranks meshes, remat policies and microbatches that fit."""
    results = sweep(config, target, slices_of(target.devices), say)
    if not results:
        raise UserError(f"{target.name}: nothing fits; more devices, or a smaller model")
    tokens = config.batch_size * config.data.context_length
    plans = {describe(c): plan_of(m, target, "train", tokens) for c, m, _ in results}
    print(f"{target.name}, the shortest step first:")
    for name, plan in plans.items():
        peak = plan["bytes_per_device"]["peak"] / 1e9
        line = f"{peak:7.2f} GB"
        if "seconds" in plan:
            cycles = plan["seconds"]["compute_by_cycles"]
            guess = f", compiler's guess {cycles:.3f} s" if cycles else ""
            line += f"  at least {plan['step_seconds']:.3f} s ({plan['binds']}{guess})"
        print(f"{line}  {name}")
    top = dict(list(plans.items())[:5])
    pictured = {name.replace("--config.", ""): plan for name, plan in top.items()}
    print(f"\n{_write({'plans': plans}, pictured, out)}")


def _check_flags() -> None:
    """Raises `UserError` for values out of range, and for flags of another step."""
    if STEP.value not in STEPS:
        raise UserError(f"--step {STEP.value}: choose {', '.join(STEPS)}")
    for owner, step in STEPS.items():
        every = [flags.FLAGS[name] for name in step.own]
        given = [flag.name for flag in every if flag.present and flag.value is not False]
        if given and owner != STEP.value:
            raise UserError(
                f"--{given[0]} belongs to --step {owner}, not to --step {STEP.value}: leave it out"
            )
    if METHOD.value not in METHODS:
        raise UserError(f"--method {METHOD.value}: {nearest(METHOD.value, METHODS)}")
    if BATCH.value < 1 or (CONTEXT.value or 1) < 1:
        raise UserError("--batch and --context count rows and positions: give at least 1")
    if TEXT.value < 1 or HELD_OUT.value < 1:
        raise UserError(
            "--calibration_tokens and --held_out_tokens count text that goes through the model: "
            "give at least 1"
        )
    if REPAIR_TEXT.value < 0:
        raise UserError(f"--repair_tokens={REPAIR_TEXT.value} must be 0 or more")


def main() -> None:
    config = cli.parse_config(CONFIG)
    _check_flags()
    target = targets.find(TOPOLOGY.value)
    name = re.sub(r"\W+", "_", f"{config.name}_{TOPOLOGY.value}")
    suffix = "_sweep" if SWEEP.value else "" if STEP.value == "train" else f"_{STEP.value}"
    out = Path(OUT.value or Path("plans") / f"{name}{suffix}")
    jax.config.update("jax_enable_compilation_cache", False)  # the dump is what is read
    (run_sweep if SWEEP.value else run)(config, target, out)
