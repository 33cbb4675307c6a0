"""Helpers that train complete or interrupted runs in this process and read their results."""

import jax
import pytest

from mea_jax.checkpoint.manager import Checkpoints
from mea_jax.checkpoint.metrics import read_metrics
from mea_jax.config.schema import MeshConfig
from mea_jax.parallel import sharding
from mea_jax.train.loop import Loop
from mea_jax.train.run import train
from mea_jax.train.step import abstract_state

# The columns that depend on the machine.
MEASURED = ("tokens_per_second", "flops_per_second", "mfu")


class SimulatedKill(BaseException):
    """A simulated kill, a `BaseException` that no handler of the package may catch."""


def train_until(step, config, workdir):
    """Train, and interrupt the run when its loop reports `step`."""
    report = Loop.report_step

    def stop(self, at, *args):
        if at == step:
            raise SimulatedKill
        return report(self, at, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "report_step", stop)
        with pytest.raises(SimulatedKill):
            train(config, workdir)


def train_on_one_device(config, workdir):
    """Train on the first device and return the summary; for fixtures whose scope exceeds a test."""
    everything = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: everything[:1])
        return train(config, workdir)


def restore_state(config, workdir, step):
    """Restore the state of a checkpoint on the first device."""
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(step, abstract_state(config, mesh))


def rows_of(workdir, measured=()):
    """Return the rows of metrics.jsonl without the `measured` columns."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]
