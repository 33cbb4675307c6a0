"""Train a model, resume an interrupted run, or print the summary of a finished one.

The same command does all three:

python -m mea_jax.train --config configs/quickstart.py
python -m mea_jax.train --config configs/quickstart.py:mha --config.optimizer.learning_rate=1e-3
python -m mea_jax.train --config configs/recover.py:runs/quickstart

Without --config, the run in --workdir is resumed or reported with its stored config. To train on
several machines, start the same command on each: with --distributed where a TPU pod or Slurm
assigns the processes, otherwise with --coordinator HOST:PORT --num_processes N --process_id I.
"""

import dataclasses
from pathlib import Path

from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.load import unresolved
from mea_jax.checkpoint.run_directory import stored_config
from mea_jax.config.schema import TrainConfig
from mea_jax.errors import UserError
from mea_jax.parallel import preemption
from mea_jax.train import profiling
from mea_jax.train.run import train


def _stored() -> TrainConfig | None:
    """Return the config of the run in --workdir; None if --config is given or no run is stored.

    So a run is resumed without the files that its config file reads, such as the checkpoint of
    configs/recover.py.
    """
    if CONFIG.value is not None or not WORKDIR.value:
        return None
    config = stored_config(Path(WORKDIR.value))
    return config and dataclasses.replace(config, model=unresolved(config.model))


def main() -> None:
    """Parse the flags, join the other processes and train."""
    config = _stored() or cli.parse_config(CONFIG)
    if "://" in (WORKDIR.value or ""):
        raise UserError(f"--workdir {WORKDIR.value} is a URL: give a folder or a mounted bucket")
    text = PROFILE.value
    profile_steps = None if text is None else profiling.parse_steps(text, config.steps)
    cli.join_processes(config.to_dict())
    cli.enable_compilation_cache()
    with preemption.listen() as stop:
        workdir = Path(WORKDIR.value or Path("runs") / config.name)
        train(config, workdir, profile_steps, stop)


if __name__ == "__main__":
    CONFIG = cli.define_config_flag()
    WORKDIR = flags.DEFINE_string("workdir", None, "run directory; default runs/<config name>")
    PROFILE = flags.DEFINE_string(
        "profile_steps", None, "FIRST:LAST, the steps to trace into <workdir>/profile for xprof"
    )
    cli.define_process_flags()
    flags.declare_key_flag("config")
    cli.run(main)
