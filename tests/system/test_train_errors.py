"""Errors that end a training run: losses that are not finite, disks that cannot be written."""

import contextlib
import errno
import math
import os
import re
import subprocess
import types

import jax
import pytest

import mea_jax.train.step
from mea_jax.checkpoint.manager import Checkpoints
from mea_jax.checkpoint.metrics import read_metrics
from mea_jax.data.pipeline import train_batches
from mea_jax.data.prepare import prepare
from mea_jax.errors import UserError
from mea_jax.parallel import sharding
from mea_jax.train.loop import Loop
from mea_jax.train.run import train
from mea_jax.train.step import abstract_state, compile_eval_step


def test_a_diverged_run_names_a_checkpoint_that_is_good(tiny, devices, tmp_path):
    """A checkpoint that the error calls good has a finite loss; the error may also name none.

    The learning rate is so high that the update of step 1 ruins the model without an error.
    """
    devices(1)
    config = tiny(**{"optimizer.learning_rate": 1e30, "checkpoint.every": 1})
    with pytest.raises(UserError, match=r"after step \d+; last good checkpoint: ") as error:
        train(config, tmp_path)
    named = re.search(r"last good checkpoint: step (\d+)", str(error.value))
    if named is None:
        return
    prepared = prepare(config.data, log=lambda line: None)
    batch = next(train_batches(prepared, seed=0, batch_size=8, threads=0, prefetch=0))
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    with Checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(int(named[1]), abstract_state(config, mesh))
    with jax.set_mesh(mesh):
        sums = compile_eval_step(config, mesh)(state.params, batch)
    assert math.isfinite(sums["nll"]), f"step {named[1]} is not a good checkpoint"


def test_too_many_updates_left_out(tiny, devices, tmp_path, monkeypatch):
    """One line names the step; no bad update was applied, so all losses stay finite."""
    devices(1)
    original = mea_jax.train.step._gradients

    def gradients(*args):
        found, nll, tokens = original(*args)
        return jax.tree.map(lambda g: g * math.nan, found), nll, tokens

    monkeypatch.setattr(mea_jax.train.step, "_gradients", gradients)
    config = tiny(**{"guards.max_skipped": 2, "checkpoint.every": 1})
    expected = r"norm is nan .* at step 3: 3 of .* are left out, more than config\.guards\.max"
    with pytest.raises(UserError, match=expected) as error:
        train(config, tmp_path)
    assert "\n" not in str(error.value)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "skipped_update"] == [1, 2]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert all(math.isfinite(loss) for loss in losses)


def test_a_failed_write_ends_the_run_at_the_next_step(tiny, devices, tmp_path, monkeypatch):
    """Waiting for the next save or for the end would lose hours of work."""
    devices(1)
    reported: list[int] = []
    report_step = Loop.report_step

    def watched(self, step, *args):
        if step == 5:
            self.checkpoints._thread.join()  # by now the write has failed
        reported.append(step)
        return report_step(self, step, *args)

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Loop, "report_step", watched)
    monkeypatch.setattr(mea_jax.checkpoint.manager.digests, "write_checksums", full)
    expected = r"checkpoint of step 4 could not be written .*No space left.*nothing is saved"
    with pytest.raises(UserError, match=expected):
        train(tiny(), tmp_path)
    assert reported[-1] == 5


@pytest.mark.parametrize("call", ["write", "config", "plot", "summary"])
def test_full_disk(tiny, devices, tmp_path, monkeypatch, call):
    """A full disk is one clear line, whichever file cannot be written."""
    devices(1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "write":
        write = mea_jax.checkpoint.metrics.MetricsWriter.write

        def failing(self, step, *args):
            if step == 3:
                broken = types.SimpleNamespace(write=full, close=self.file.close)
                monkeypatch.setattr(self, "file", broken)
            return write(self, step, *args)

        monkeypatch.setattr(mea_jax.checkpoint.metrics.MetricsWriter, "write", failing)
    elif call == "config":
        monkeypatch.setattr("os.replace", full)
    elif call == "plot":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    else:
        replace = os.replace

        def selective(source, target):
            return full() if str(target).endswith("summary.json") else replace(source, target)

        monkeypatch.setattr("os.replace", selective)
    with pytest.raises(UserError, match="No space left on device"):
        train(tiny(), tmp_path)


def test_a_disk_that_is_really_full(tiny, devices, small_disk):
    devices(1)
    config = tiny(**{"model.d_ff": 2048})  # half a million parameters and two moments, 4 bytes each
    with pytest.raises(UserError, match=r"written|space"):
        train(config, small_disk / "run")


def test_a_disk_that_is_full_from_the_start(tiny, devices, small_disk):
    devices(1)
    with contextlib.suppress(OSError):
        (small_disk / "filler").write_bytes(b"x" * (1 << 20))
    with pytest.raises(UserError, match="No space left on device"):
        train(tiny(), small_disk / "run")


def test_read_only_disk(tiny, devices, small_disk):
    devices(1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"cannot be written: Read-only.*--workdir"):
        train(tiny(), small_disk / "run")


def test_run_directory_that_cannot_be_made(tiny, devices, tmp_path):
    devices(1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: Not a directory.*--workdir"):
        train(tiny(), tmp_path / "file" / "run")


def test_damaged_config_json(tiny, devices, tmp_path):
    devices(1)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        train(tiny(), tmp_path)


def test_closing_after_a_failed_write_adds_nothing(tiny, tmp_path, monkeypatch):
    """An error that orbax raises again at the end neither hides the first nor follows it."""

    def fail():
        raise OSError(errno.EROFS, "Read-only file system")

    for kind in (None, ValueError):
        checkpoints = Checkpoints(tmp_path / "run", tiny().checkpoint)
        monkeypatch.setattr(checkpoints._writer, "close", fail)
        if kind is None:
            with pytest.raises(UserError, match=r"could not be written.*Read-only"):
                checkpoints.__exit__(None, None, None)
        else:
            checkpoints.__exit__(kind, kind("first"), None)
