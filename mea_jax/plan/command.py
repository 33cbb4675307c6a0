"""The command: flags, one plan or a sweep, files."""

import re
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from mea_jax import cli
from mea_jax.config import TrainConfig
from mea_jax.errors import UserError
from mea_jax.plan import report
from mea_jax.plan import target as targets
from mea_jax.plan.collectives import slices_of
from mea_jax.plan.programs import Compiled, DoesNotFit, decode_program, train_program
from mea_jax.plan.roofline import roofline
from mea_jax.plan.sweep import describe, sweep, what_fits

CONFIG = cli.define_config_flag()
TOPOLOGY = flags.DEFINE_string("topology", "local", f"what to compile for: {targets.EXAMPLES}")
STEP = flags.DEFINE_string("step", "train", "train, or decode (one device)")
BATCH = flags.DEFINE_integer("batch", 16, "rows of a decode step")
CONTEXT = flags.DEFINE_integer("context", None, "cached positions of a decode step; default: T")
SWEEP = flags.DEFINE_bool("sweep", False, "try meshes, remat policies, microbatches; rank them")
OUT = flags.DEFINE_string("out", None, "of .json and .png; default plans/<config>_<topology>")
HLO = flags.DEFINE_string("hlo", None, "also write the compiled program's text to this file")
flags.declare_key_flag("config")


def say(message: str) -> None:
    """Progress: to the terminal, not into what is piped on."""
    print(message, file=sys.stderr, flush=True)


def plan_of(compiled: Compiled, target: targets.Target, step: str, tokens: int) -> dict[str, Any]:
    roof = roofline(compiled, target)
    return report.summary(compiled, target, roof, step, tokens, compiled.mesh.size)


def run(config: TrainConfig, target: targets.Target, out: Path) -> None:
    """Plans the one step that the flags name. Raises `UserError` where it does not fit."""
    length = config.data.context_length
    try:
        if STEP.value == "decode":
            context = CONTEXT.value or length
            say(f"compiling a decode step of {BATCH.value} rows, {context} positions cached")
            compiled = decode_program(config, target, BATCH.value, context)
            tokens = BATCH.value
        else:
            say(f"compiling the training step for {len(target.devices)} devices")
            compiled, tokens = train_program(config, target), config.batch_size * length
    except DoesNotFit as error:
        raise UserError(f"{target.name}: {error}{_remedy(config, target)}") from error
    if HLO.value:
        Path(HLO.value).write_text(compiled.text)
    plan = plan_of(compiled, target, STEP.value, tokens)
    print(report.text(plan))
    files = _write(plan, {target.name: plan}, out)
    print(f"\n{files}")
    if report.fits(compiled, target) is False:
        over = compiled.peak - plan["memory_per_device"]
        raise UserError(
            f"{target.name}: does not fit, {over / 1e9:.2f} GB over{_remedy(config, target)}"
        )


def _remedy(config: TrainConfig, target: targets.Target) -> str:
    """What would fit, found by trying, as the end of a line."""
    if STEP.value == "decode":
        return "; take fewer rows (--batch) or positions (--context), or an int8 cache"
    found = what_fits(config, target, say)
    if found is None:
        return "; neither single windows nor full remat fit: more devices, or more of tensor"
    change = f"--config.accumulate={found.accumulate} --config.model.remat={found.model.remat}"
    return f"; this fits: {change}"


def _write(plan: Any, pictured: dict[str, dict[str, Any]], out: Path) -> str:
    report.write(plan, out.with_suffix(".json"))
    if all("seconds" in p for p in pictured.values()):
        report.picture(pictured, out.with_suffix(".png"))
        return f"{out.with_suffix('.json')} and {out.with_suffix('.png')}"
    return str(out.with_suffix(".json"))


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


def main() -> None:
    config = cli.parse_config(CONFIG)
    if STEP.value not in ("train", "decode"):
        raise UserError(f"--step {STEP.value}: choose train or decode")
    if BATCH.value < 1 or (CONTEXT.value or 1) < 1:
        raise UserError("--batch and --context count rows and positions: give at least 1")
    if SWEEP.value and STEP.value != "train":
        raise UserError("--sweep tries meshes and remat of training: leave out --step")
    target = targets.find(TOPOLOGY.value)
    name = re.sub(r"\W+", "_", f"{config.name}_{TOPOLOGY.value}")
    suffix = "_sweep" if SWEEP.value else "" if STEP.value == "train" else f"_{STEP.value}"
    out = Path(OUT.value or Path("plans") / f"{name}{suffix}")
    jax.config.update("jax_enable_compilation_cache", False)  # the dump is what is read
    (run_sweep if SWEEP.value else run)(config, target, out)
