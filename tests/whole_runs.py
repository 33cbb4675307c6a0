"""Whole runs in process, cut short or not, and what they leave behind."""

import jax
import pytest

from mea_jax.checkpoint.manager import Checkpoints
from mea_jax.checkpoint.metrics import read_metrics
from mea_jax.config.schema import MeshConfig
from mea_jax.parallel import sharding
from mea_jax.train.loop import Loop
from mea_jax.train.run import train
from mea_jax.train.step import abstract_state

# What a row says about the machine rather than about the run.
MEASURED = ("tokens_per_second", "flops_per_second", "mfu")


class Cut(BaseException):
    """Stands for a kill: no handler of ours may catch it."""


def train_until(step, config, workdir):
    """A run that is cut short when its loop reports this step, before whatever follows."""
    report = Loop.report_step

    def stop(self, at, *args):
        if at == step:
            raise Cut
        return report(self, at, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "report_step", stop)
        with pytest.raises(Cut):
            train(config, workdir)


def train_on_one_device(config, workdir):
    """As `train`, for fixtures that outlive a test: its summary."""
    everything = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: everything[:1])
        return train(config, workdir)


def final_state(config, workdir, step):
    """The state of a checkpoint on the first device."""
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(step, abstract_state(config, mesh))


def rows_of(workdir, measured=()):
    """Rows of metrics.jsonl without the `measured` columns."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]
