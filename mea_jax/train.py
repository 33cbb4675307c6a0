"""Trains a model, or resumes or reports a run: the same command does all three.

python -m mea_jax.train --config configs/quickstart.py
python -m mea_jax.train --config configs/quickstart.py:mha --config.optimizer.learning_rate=1e-3
python -m mea_jax.train --config configs/recover.py:runs/quickstart

Without --config, a run of --workdir is resumed or reported by its own. On several machines the same
command on each, with --distributed where a TPU pod or Slurm says who belongs together, else with
--coordinator HOST:PORT --num_processes N --process_id I.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from absl import flags

from mea_jax import cli, memory, preemption, profiling, sharding
from mea_jax.backends import resolve
from mea_jax.checkpoint import Checkpoints, Position
from mea_jax.config import TrainConfig
from mea_jax.cpu_kernels import accelerator_attached, keep_freed_memory
from mea_jax.data.shared import prepare_together
from mea_jax.errors import UserError
from mea_jax.guards import rewindable
from mea_jax.loop import Loop
from mea_jax.preemption import StopRequest
from mea_jax.run_directory import RunDirectory, stored_config, stored_dtype
from mea_jax.start import Start
from mea_jax.summary import finish
from mea_jax.trained import unresolved


def train(
    config: TrainConfig,
    workdir: Path,
    profile_steps: tuple[int, int] | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Trains, or resumes, or finds finished, the run of `config` in `workdir`; its summary.

    What a run starts from, in this order: a finished run is only reported; else the newest
    checkpoint in `workdir` that is not damaged; else the parameters of `config.start.checkpoint`;
    else a fresh initialisation from `config.seed`.
    With several processes each of them calls this. The first and last of `profile_steps` are traced
    into `workdir`/profile, with those between.

    Raises:
      UserError: every mistake of the user's, a disk that refuses, another process in `workdir`.
      preemption.Preempted: `stop` was requested; the run is saved.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        keep_freed_memory()
    mesh = sharding.make_mesh(config.mesh, devices)
    dtype = stored_dtype(workdir) if config.model.dtype == "auto" else None
    model = dataclasses.replace(config.model, dtype=dtype) if dtype else config.model
    split = (mesh.shape["tensor"], mesh.shape["sequence"])
    model = resolve(model, devices, config.data.context_length, *split)
    config = dataclasses.replace(config, model=model)
    sharding.check_divisible(config, mesh)
    memory.check_fits(config, mesh)
    run = RunDirectory(workdir, config)
    if (summary := run.finished()) is not None:
        if run.first:
            print(f"{workdir} is finished: {config.steps} steps are done. To train anew, choose")
            print("another --workdir; to read the result again:\n")
            print(summary["text"])
        _check_profile(profile_steps, config.steps, run)
        return summary

    with run.claim() as held:
        start = Start(config, mesh, run.say)
        untrained = (workdir / "checkpoints" / "0").exists()  # no run saves before its first step
        if untrained or not (workdir / "checkpoints").exists():
            start.check(workdir)  # refused before data are prepared for it
        if untrained:
            raise UserError(
                f"{workdir} holds a model that no run has trained yet: to train it, give --config "
                f"configs/recover.py:{workdir} and a --workdir of the run's own"
            )
        prepared = prepare_together(config.data, config.model.vocab_size, log=run.say)
        keeping = (workdir, config.checkpoint, rewindable(config.guards))
        with jax.set_mesh(mesh), Checkpoints(*keeping) as checkpoints:
            step = checkpoints.newest_good(run.say) or 0
            if step == 0:
                start.check(workdir, prepared.tokenizer)
                position = Position(0, prepared.digest)
            else:
                position = checkpoints.position(step, prepared.digest)
            loop = Loop(config, mesh, prepared, run, checkpoints, start, stop, held)
            state = loop.resume(step, position)
            if step:
                run.say(f"resuming from step {step} of {config.steps}")
            _check_profile(profile_steps, step, run)
            run.write_config(prepared.tokenizer if step else start.tokenizer(prepared.tokenizer))
            state = loop.run(state, step, profile_steps)
            return finish(loop, state)


def _check_profile(steps: tuple[int, int] | None, done: int, run: RunDirectory) -> None:
    if steps and done >= steps[1]:
        run.say(f"no profile: steps {steps[0]} to {steps[1]} lie before step {done}, already done")


def _stored() -> TrainConfig | None:
    """The config of the run in --workdir, where no --config is given: a run needs none to go on.

    So it does not need what its config file reads either, as configs/recover.py a checkpoint.
    """
    if CONFIG.value is not None or not WORKDIR.value:
        return None
    config = stored_config(Path(WORKDIR.value))
    return config and dataclasses.replace(config, model=unresolved(config.model))


def main() -> None:
    if not accelerator_attached():
        keep_freed_memory()  # before jax has threads: each would keep freed memory of its own
    config = _stored() or cli.parse_config(CONFIG)
    if "://" in (WORKDIR.value or ""):
        raise UserError(f"--workdir {WORKDIR.value}: give a folder; mount the bucket as a path")
    text = PROFILE.value
    profile_steps = None if text is None else profiling.parse_steps(text, config.steps)
    cli.join_processes(config.to_dict())
    cli.enable_compilation_cache()
    with preemption.listen() as stop:
        workdir = Path(WORKDIR.value or Path("runs") / config.name)
        train(config, workdir, profile_steps, stop)


if __name__ == "__main__":
    CONFIG = cli.define_config_flag()
    WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; default runs/<config name>")
    PROFILE = flags.DEFINE_string(
        "profile_steps", None, "FIRST:LAST, steps to trace into <workdir>/profile for xprof"
    )
    cli.define_process_flags()
    flags.declare_key_flag("config")
    cli.run(main)
