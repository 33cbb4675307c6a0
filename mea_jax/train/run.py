"""One training run, from its config to its summary."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from mea_jax.checkpoint.manager import Checkpoints, Position
from mea_jax.checkpoint.run_directory import RunDirectory, stored_dtype
from mea_jax.config.schema import TrainConfig
from mea_jax.data.multi_host import prepare_together
from mea_jax.errors import UserError
from mea_jax.ops.backend import resolve
from mea_jax.parallel import sharding
from mea_jax.parallel.preemption import StopRequest
from mea_jax.train import memory
from mea_jax.train.guards import rewindable
from mea_jax.train.loop import Loop
from mea_jax.train.summary import finish
from mea_jax.train.warm_start import Start


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

    with run.claim():
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
            loop = Loop(config, mesh, prepared, run, checkpoints, start, stop)
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
