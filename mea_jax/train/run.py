"""Run one training run, from its config to its summary."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from mea_jax.checkpoint.manager import Checkpoints, Position
from mea_jax.checkpoint.run_directory import RunDirectory, stored_dtype
from mea_jax.config.schema import TrainConfig
from mea_jax.data.multi_host import prepare_together
from mea_jax.errors import UserError
from mea_jax.ops.resolve import resolve
from mea_jax.parallel import sharding
from mea_jax.parallel.preemption import StopRequest
from mea_jax.train import memory
from mea_jax.train.guards import rewind_distance
from mea_jax.train.loop import Loop
from mea_jax.train.summary import finish
from mea_jax.train.warm_start import Start


def train(
    config: TrainConfig,
    workdir: Path,
    profile_steps: tuple[int, int] | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Train, resume or report the run of `config` in `workdir`, and return its summary.

    A finished run is only reported. Otherwise the run starts from the first of these that exists:
    the newest checkpoint in `workdir` that is not damaged, the parameters of
    `config.start.checkpoint`, a fresh initialisation from `config.seed`.

    Each process of a distributed run calls this function. Steps from the first to the last of
    `profile_steps` are traced into `workdir`/profile.

    Raises:
      UserError: an input is wrong, a disk cannot be written, or another process uses `workdir`.
      preemption.Preempted: `stop` was requested, and the run is saved.
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
            print(f"{workdir} is finished: {config.steps} steps are done. To train again, choose")
            print("another --workdir. The summary of this run:\n")
            print(summary["text"])
        _check_profile(profile_steps, config.steps, run)
        return summary

    with run.claim():
        start = Start(config, mesh, run.log)
        untrained = (workdir / "checkpoints" / "0").exists()  # runs save from step 1 on
        if untrained or not (workdir / "checkpoints").exists():
            start.check(workdir)  # fail before data are prepared
        if untrained:
            raise UserError(
                f"{workdir} contains a model that no run has trained: to train it, give --config "
                f"configs/recover.py:{workdir} and another --workdir"
            )
        prepared = prepare_together(config.data, config.model.vocab_size, log=run.log)
        keeping = (workdir, config.checkpoint, rewind_distance(config.guards))
        with jax.set_mesh(mesh), Checkpoints(*keeping) as checkpoints:
            step = checkpoints.newest_good(run.log) or 0
            if step == 0:
                start.check(workdir, prepared.tokenizer)
                position = Position(0, prepared.digest)
            else:
                position = checkpoints.position(step, prepared.digest)
            loop = Loop(config, mesh, prepared, run, checkpoints, start, stop)
            state = loop.resume(step, position)
            if step:
                run.log(f"resuming from step {step} of {config.steps}")
            _check_profile(profile_steps, step, run)
            run.write_config(prepared.tokenizer if step else start.tokenizer(prepared.tokenizer))
            state = loop.run(state, step, profile_steps)
            return finish(loop, state)


def _check_profile(steps: tuple[int, int] | None, done: int, run: RunDirectory) -> None:
    if steps and done >= steps[1]:
        run.log(f"no profile: steps {steps[0]} to {steps[1]} are done, the run is at step {done}")
