"""Run the plan command: flags, one plan or a sweep, output files."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags

from mea_jax import cli
from mea_jax.config.schema import TrainConfig
from mea_jax.errors import UserError
from mea_jax.parallel import sharding
from mea_jax.plan import output
from mea_jax.plan import target as targets
from mea_jax.plan.collectives import slices_of
from mea_jax.plan.compiling import Compiled, DoesNotFit
from mea_jax.plan.programs import decode_program, train_program
from mea_jax.plan.roofline import roofline
from mea_jax.plan.search import describe, sweep, what_fits

CONFIG = cli.define_config_flag()
TOPOLOGY = flags.DEFINE_string("topology", "local", f"machine to compile for: {targets.EXAMPLES}")
STEP = flags.DEFINE_enum(
    "step", "train", ["train", "decode"], "step to plan: train, or decode of one token per row"
)
SWEEP = flags.DEFINE_bool(
    "sweep", False, "try meshes, remat policies and microbatches, and rank those that fit"
)
BATCH = flags.DEFINE_integer("batch", 16, "rows of a decode step", lower_bound=1)
CONTEXT = flags.DEFINE_integer(
    "context",
    None,
    "cached positions of a decode step; default: config.data.context_length",
    lower_bound=1,
)
MESH = flags.DEFINE_string(
    "mesh",
    None,
    "devices that divide a decode step, such as expert=2,tensor=4, as in mea_jax.generate; "
    "default: the first",
)
OUT = flags.DEFINE_string(
    "out", None, "path of the .json and .png files; default plans/<config>_<topology>"
)
HLO = flags.DEFINE_string("hlo", None, "also write the compiled program's text to this file")
flags.declare_key_flag("config")


@dataclasses.dataclass(frozen=True)
class Step:
    """One kind of plan.

    Attributes:
      own: flags that apply to this step only.
      compile: returns the compiled program and the number of tokens of one call.
      remedy: returns the end of an error message, a change that would fit.
    """

    own: tuple[str, ...]
    compile: Callable[[TrainConfig, targets.Target], tuple[Compiled, int]]
    remedy: Callable[[TrainConfig, targets.Target], str]


def log(message: str) -> None:
    """Print progress to stderr, so that stdout can be piped."""
    print(message, file=sys.stderr, flush=True)


def plan_of(compiled: Compiled, target: targets.Target, step: str, tokens: int) -> dict[str, Any]:
    """Return the plan of a compiled step as JSON values."""
    roof = roofline(compiled, target)
    return output.summary(compiled, target, roof, step, tokens, compiled.mesh.size)


# -- the steps -----------------------------------------------------------------------------


def _train(config: TrainConfig, target: targets.Target) -> tuple[Compiled, int]:
    log(f"compiling the training step for {len(target.devices)} devices")
    return train_program(config, target), config.batch_size * config.data.context_length


def _train_remedy(config: TrainConfig, target: targets.Target) -> str:
    found = what_fits(config, target, log)  # compiles candidates
    if found is None:
        return "; neither single windows nor full remat fit: use more devices or more tensor shards"
    change = f"--config.accumulate={found.accumulate} --config.model.remat={found.model.remat}"
    return f"; use {change}, which fits"


def _decode(config: TrainConfig, target: targets.Target) -> tuple[Compiled, int]:
    context = CONTEXT.value or config.data.context_length
    mesh = None
    if MESH.value is not None:
        mesh = sharding.requested_mesh(MESH.value, "--mesh", target.devices)
    log(f"compiling a decode step of {BATCH.value} rows with {context} cached positions")
    return decode_program(config, target, BATCH.value, context, mesh), BATCH.value


def _decode_remedy(config: TrainConfig, target: targets.Target) -> str:
    return "; use fewer rows (--batch) or positions (--context), or more devices (--mesh)"


STEPS = {
    "train": Step(("sweep",), _train, _train_remedy),
    "decode": Step(("batch", "context", "mesh"), _decode, _decode_remedy),
}


# -- one plan, or a sweep ------------------------------------------------------------------


def run(config: TrainConfig, target: targets.Target, out: Path) -> None:
    """Plan the step that the flags name. Raises `UserError` if it does not fit."""
    step = STEPS[STEP.value]
    try:
        compiled, tokens = step.compile(config, target)
    except DoesNotFit as error:
        raise UserError(f"{target.name}: {error}{step.remedy(config, target)}") from error
    if HLO.value:
        Path(HLO.value).write_text(compiled.text)
    plan = plan_of(compiled, target, STEP.value, tokens)
    print(output.text(plan))
    print(f"\n{_write(plan, {target.name: plan}, out)}")
    if target.chip is not None and output.fits(compiled, target) is False:
        over = (compiled.peak - target.chip.memory) / 1e9
        remedy = step.remedy(config, target)
        raise UserError(f"{target.name}: does not fit, {over:.2f} GB over{remedy}")


def _write(plan: Any, pictured: dict[str, dict[str, Any]], out: Path) -> str:
    # Not with_suffix, which takes the ".5" of "lr=1.5" for a suffix.
    name = out.name.removesuffix(".json").removesuffix(".png")
    numbers, picture = out.with_name(f"{name}.json"), out.with_name(f"{name}.png")
    output.write(plan, numbers)
    if all("seconds" in p for p in pictured.values()):
        output.picture(pictured, picture)
        return f"{numbers} and {picture}"
    return str(numbers)


def run_sweep(config: TrainConfig, target: targets.Target, out: Path) -> None:
    """Rank meshes, remat policies and microbatches that fit. Raises `UserError` if none fits."""
    results = sweep(config, target, slices_of(target.devices), log)
    if not results:
        raise UserError(f"{target.name}: nothing fits; use more devices or a smaller model")
    tokens = config.batch_size * config.data.context_length
    plans = {describe(c): plan_of(m, target, "train", tokens) for c, m, _ in results}
    print(f"{target.name}, shortest step first:")
    for name, plan in plans.items():
        peak = plan["bytes_per_device"]["peak"] / 1e9
        line = f"{peak:7.2f} GB"
        if "seconds" in plan:
            cycles = plan["seconds"]["compute_by_cycles"]
            guess = f", compiler's estimate {cycles:.3f} s" if cycles else ""
            line += f"  at least {plan['step_seconds']:.3f} s ({plan['binds']}{guess})"
        print(f"{line}  {name}")
    top = dict(list(plans.items())[:5])
    pictured = {name.replace("--config.", ""): plan for name, plan in top.items()}
    print(f"\n{_write({'plans': plans}, pictured, out)}")


def _check_flags() -> None:
    """Raise `UserError` for flags of another step, or that a sweep does not use."""
    if SWEEP.value and HLO.value is not None:
        raise UserError(
            "--hlo writes one program, but --sweep compiles many: leave one of them out"
        )
    for owner, step in STEPS.items():
        every = [flags.FLAGS[name] for name in step.own]
        given = [flag.name for flag in every if flag.present and flag.value is not False]
        if given and owner != STEP.value:
            raise UserError(
                f"--{given[0]} belongs to --step {owner}, not to --step {STEP.value}: leave it out"
            )
    of_training = [name for name in flags.FLAGS if name.startswith("config.mesh.")]
    given = [name for name in of_training if flags.FLAGS[name].present]
    if given and STEP.value == "decode":
        raise UserError(f"--{given[0]} divides a training step: use --mesh for --step decode")


def main() -> None:
    """Parse the flags, then print and write one plan or a sweep."""
    config = cli.parse_config(CONFIG)
    _check_flags()
    target = targets.find(TOPOLOGY.value)
    name = re.sub(r"\W+", "_", f"{config.name}_{TOPOLOGY.value}")
    suffix = "_sweep" if SWEEP.value else "" if STEP.value == "train" else f"_{STEP.value}"
    out = Path(OUT.value or Path("plans") / f"{name}{suffix}")
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program has no dump to read
    (run_sweep if SWEEP.value else run)(config, target, out)
