"""Tests of complete runs in this process: their files, resuming, and stopping."""

import itertools
import json
import math
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import mea_jax.train.loop
from mea_jax.config.parse import from_dict
from mea_jax.config.schema import MeshConfig
from mea_jax.data.pipeline import train_batches
from mea_jax.data.prepare import prepare
from mea_jax.errors import UserError
from mea_jax.parallel import sharding
from mea_jax.train.diagnostics import compile_diagnostics, mixing_distance
from mea_jax.train.run import train
from mea_jax.train.step import compile_train_step, create_state
from tests.helpers import assert_equal, change, params_of
from tests.whole_runs import (
    MEASURED,
    SimulatedKill,
    restore_state,
    rows_of,
    train_on_one_device,
    train_until,
)

STEPS = 8


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Return (config, run directory, summary) of an uninterrupted run on one device."""
    config, workdir = tiny(), tmp_path_factory.mktemp("runs") / "whole"
    return config, workdir, train_on_one_device(config, workdir)


# -- files of a run -------------------------------------------------------------------------


def test_run_directory(finished):
    config, workdir, _ = finished
    assert {path.name for path in workdir.iterdir()} == {
        ".lock",
        "config.json",
        "tokenizer",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "loss.png",
        "summary.json",
    }
    resolved = change(config, **{"model.attention_kernel": "einsum", "model.hlc_form": "folded"})
    assert from_dict(json.loads((workdir / "config.json").read_text())) == resolved
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "8"}


def test_summary(finished):
    config, workdir, summary = finished
    stored = json.loads((workdir / "summary.json").read_text())
    assert stored == json.loads(json.dumps(summary))
    assert stored["steps"] == STEPS
    params = params_of(config.model)
    assert stored["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    assert stored["held_out_loss"] < math.log(264)
    assert 0 <= stored["data_wait_share"] < 1
    # Every byte is a token, and each document has one more.
    assert stored["held_out_bits_per_byte"] > stored["held_out_loss"] / math.log(2)
    assert set(stored["baseline_bits_per_byte"]) == {"gzip -9", "xz -9e"}


def test_metrics_rows(finished):
    _, workdir, summary = finished
    rows = rows_of(workdir)
    by_kind = {
        kind: [row["step"] for row in rows if row["kind"] == kind]
        for kind in ("train", "held_out", "diagnostics")
    }
    assert by_kind == {
        "train": list(range(1, STEPS + 1)),
        "held_out": [4, STEPS],
        "diagnostics": [4, STEPS],
    }
    train_rows = [row for row in rows if row["kind"] == "train"]
    assert all(math.isfinite(row[k]) for row in train_rows for k in ("loss", "grad_norm"))
    assert all(row["flops_per_second"] > 0 and row["tokens"] <= 8 * 32 for row in train_rows)
    held_out = [row for row in rows if row["kind"] == "held_out"]
    assert held_out[-1]["loss"] == pytest.approx(summary["held_out_loss"])
    assert held_out[-1]["loss"] < held_out[0]["loss"]


def test_diagnostics_rows(finished):
    config, workdir, _ = finished
    rows = [row for row in rows_of(workdir) if row["kind"] == "diagnostics"]
    layers, heads = config.model.n_layers, config.model.n_heads
    for row in rows:
        for name in ("attention_entropy", "attention_logit_max", "head_output_rms"):
            assert np.shape(row[name]) == (layers, heads)
        entropy = np.array(row["attention_entropy"])
        assert (entropy > 0).all()
        assert (entropy < math.log(config.data.context_length)).all()
        assert (np.array(row["head_output_rms"]) > 0).all()
        for which in ("key", "value"):
            assert (np.array(row[f"mixing_distance/{which}"]) > 0).all()


def test_diagnostics_of_a_fresh_model(tiny, finished):
    config = finished[0]
    prepared = prepare(config.data, log=lambda line: None)
    batch = next(train_batches(prepared, seed=0, batch_size=8, threads=0, prefetch=0))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        found = compile_diagnostics(config, mesh)(create_state(config, mesh).params, batch)
    for which in ("key", "value"):
        np.testing.assert_array_equal(found[f"mixing_distance/{which}"], np.zeros(2))
    # Fresh queries and keys are nearly orthogonal: the entropy is near that of even attention, the
    # maximum.
    real = batch["segment_ids"] > 0
    even = np.log(batch["positions"][real] + 1.0).mean()
    entropy = np.asarray(found["attention_entropy"])
    assert (entropy <= even + 1e-4).all()
    assert (entropy > 0.5 * even).all()


def test_mixing_distance_is_relative(tiny):
    config = tiny(**{"model.key_components": 2})
    params = params_of(config.model)
    params["layers_0"]["attention"]["key_mixing"][1] *= 1.5
    found = mixing_distance(config, params)
    np.testing.assert_allclose(found["mixing_distance/key"], [0, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(found["mixing_distance/value"], [0, 0])
    assert mixing_distance(tiny(**{"model.hlc": "none"}), params_of(tiny().model)) == {}


# -- resuming -------------------------------------------------------------------------------


def assert_same_run(config, workdir, whole):
    assert_equal(restore_state(config, workdir, STEPS), restore_state(config, whole, STEPS))
    assert rows_of(workdir, MEASURED) == rows_of(whole, MEASURED)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_cut_run_ends_as_if_it_had_not_been(finished, devices, tmp_path, step):
    """Runs cut before the first checkpoint, right after it and later end the same, bit for bit.

    Parameters, moments and rows of metrics are equal, and no row is written twice.
    """
    config, whole, _ = finished
    devices(1)
    train_until(step, config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    summary = train(config, tmp_path)
    assert summary["timed_steps"] == STEPS - (4 if step > 4 else 0)
    assert_same_run(config, tmp_path, whole)


@pytest.mark.slow
def test_cut_between_the_last_checkpoint_and_the_summary(finished, devices, tmp_path):
    config, whole, expected = finished
    devices(1)

    def stop(*_):
        raise SimulatedKill

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mea_jax.checkpoint.metrics, "plot_loss", stop)
        with pytest.raises(SimulatedKill):
            train(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    summary = train(config, tmp_path)
    assert summary["held_out_loss"] == expected["held_out_loss"]
    assert_same_run(config, tmp_path, whole)


@pytest.mark.slow
def test_a_line_cut_in_the_middle_is_dropped(finished, devices, tmp_path):
    config, whole, _ = finished
    devices(1)
    train_until(6, config, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "kind": "tr')
    train(config, tmp_path)
    assert_same_run(config, tmp_path, whole)


@pytest.mark.slow
def test_resumed_on_other_meshes(finished, devices, tmp_path):
    """A run on data 8, then fsdp 4 x tensor 2, then one device has the losses of one device."""
    config, whole, _ = finished
    stages = [
        ({"mesh": MeshConfig(8, 1, 1)}, 8, 3),
        ({"mesh": MeshConfig(1, 4, 2)}, 8, 5),
        ({"mesh": MeshConfig(1, 1, 1)}, 1, None),
    ]
    for changes, count, cut in stages:
        devices(count)
        stage = change(config, **changes, **{"checkpoint.every": 2})
        if cut:
            train_until(cut, stage, tmp_path)
        else:
            train(stage, tmp_path)
    found = [row["loss"] for row in rows_of(tmp_path) if row["kind"] == "train"]
    expected = [row["loss"] for row in rows_of(whole) if row["kind"] == "train"]
    # Float32 sums in a different order, magnified by Adam's division over 8 steps.
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_resumed_on_another_microbatch(finished, devices, tmp_path, monkeypatch):
    """With four microbatches after step 4, the tokens, their order and the losses are the same."""
    config, whole, _ = finished
    devices(1)
    train_until(6, config, tmp_path)
    seen = []

    def watched(*args, **kwargs):
        for batch in train_batches(*args, **kwargs):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(mea_jax.train.loop, "train_batches", watched)
    assert train(change(config, accumulate=4), tmp_path)["timed_steps"] == 4
    prepared = prepare(config.data, log=lambda line: None)
    expected_batches = train_batches(prepared, seed=0, batch_size=8, threads=0, prefetch=0)
    for batch, wanted in zip(seen, itertools.islice(expected_batches, 4, 8), strict=True):
        assert_equal(batch, wanted)
    found, expected = ([r for r in rows_of(w) if r["kind"] == "train"] for w in (tmp_path, whole))
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    losses, expected_losses = ([row["loss"] for row in rows] for rows in (found, expected))
    np.testing.assert_array_equal(losses[:4], expected_losses[:4])
    # Float32 sums in a different order, magnified by Adam's division over 4 steps.
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)


def test_a_finished_run_is_reported_and_left_alone(finished, capsys, devices):
    config, workdir, summary = finished

    def snapshot():
        files = [path for path in workdir.rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = snapshot()
    devices(1)
    again = train(config, workdir)
    out = capsys.readouterr().out
    assert f"{workdir} is finished: 8 steps are done" in out
    assert summary["text"] in out
    assert again["held_out_loss"] == summary["held_out_loss"]
    assert snapshot() == before


def test_batches_are_those_of_the_step(finished):
    """Step i of a run uses batch i of the seed: its loss is that of a separate step."""
    config, workdir, _ = finished
    prepared = prepare(config.data, log=lambda line: None)
    batches = train_batches(prepared, seed=config.seed, batch_size=8, start_step=4)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        _, metrics = compile_train_step(config, mesh)(
            restore_state(config, workdir, step=4), next(batches)
        )
    row = next(r for r in rows_of(workdir) if r["kind"] == "train" and r["step"] == 5)
    assert float(metrics["loss"]) == row["loss"]
    assert float(metrics["grad_norm"]) == row["grad_norm"]


RUN = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
devices = jax.devices()
jax.devices = lambda *_: devices[:1]
from mea_jax import cli
from mea_jax.config.schema import TrainConfig
from mea_jax.config import parse
from mea_jax.train.loop import Loop
from mea_jax.train.run import train
cli.enable_compilation_cache()
report = Loop.report_step
def slow(self, step, *args):
    if step == 6:
        print("step 6", flush=True)
        import time; time.sleep(60)
    return report(self, step, *args)
Loop.report_step = slow
train(parse.from_dict(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
"""


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_process_resumes(finished, devices, tmp_path):
    """After SIGKILL in the middle of step 6, the same command ends as an uninterrupted run."""
    config, whole, _ = finished
    given, workdir = tmp_path / "given.json", tmp_path / "run"
    given.write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-c", RUN, str(given), str(workdir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "step 6\n"
    deadline = time.monotonic() + 30  # the checkpoint of step 4 is written while training goes on
    while not (workdir / "checkpoints" / "4").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert rows_of(workdir)[-1]["step"] == 5
    devices(1)
    train(config, workdir)
    assert_same_run(config, workdir, whole)


# -- runs that must not continue ------------------------------------------------------------


def test_another_config_in_the_same_directory(finished, devices):
    config, workdir, _ = finished
    devices(1)
    other = change(config, seed=3, **{"model.d_ff": 64, "optimizer.learning_rate": 1e-4})
    with pytest.raises(UserError) as error:
        train(other, workdir)
    line = str(error.value)
    for expected in ("seed: 0 -> 3", "model.d_ff: 48 -> 64", "learning_rate: 0.003 -> 0.0001"):
        assert expected in line
    assert "--workdir" in line
    assert "n_layers" not in line
    # Options of execution may change: it is the same run.
    same = change(config, log_every=3, **{"model.remat": "full", "data.prefetch": 4})
    assert train(same, workdir)["steps"] == STEPS
