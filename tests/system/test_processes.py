"""Distributed runs on one machine: equal results for any number of processes; error lines."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mea_jax.checkpoint.manager import Checkpoints
from mea_jax.checkpoint.metrics import read_metrics
from mea_jax.config.schema import MeshConfig
from mea_jax.parallel import sharding
from mea_jax.train.run import train
from mea_jax.train.step import abstract_state
from tests.helpers import assert_close, change
from tests.paths import ROOT
from tests.system.process_programs import CONFIG, FINISHED, FOUR, KILLED

STEPS, SAVED = 5, 3
DEVICES = 4  # of the entire run, divided among its processes


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start(arguments, devices=1, **environment):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(processes, timeout=240):
    """Wait for all processes, kill those that remain, and return [(exit status, stderr)]."""
    processes = list(processes)  # starts them all if it is a generator
    deadline, found = time.monotonic() + timeout, []
    try:
        for process in processes:
            _, err = process.communicate(timeout=max(deadline - time.monotonic(), 0))
            found.append((process.returncode, err))
    finally:
        for process in processes:
            process.kill()
    return found


def train_command(config_file, address, count, index, *arguments):
    return [
        *("-m", "mea_jax.train", "--config", config_file, "--coordinator", address),
        *("--num_processes", count, "--process_id", index, "--startup_timeout", 60, *arguments),
    ]


def train_together(config_file, count, workdir):
    address = free_address()
    found = ends(
        start(
            train_command(config_file, address, count, index, "--workdir", workdir),
            devices=DEVICES // count,
        )
        for index in range(count)
    )
    for status, err in found:
        assert status == 0, err[-3000:]
    return found


@pytest.fixture(scope="module")
def config(tiny):
    return tiny(
        steps=STEPS,
        **{
            "mesh": MeshConfig(1, 2, 2),
            "checkpoint.every": SAVED,
            "checkpoint.keep": 3,
            "evaluate.sample_prompt": "a quick",
            "evaluate.sample_tokens": 4,
        },
    )


@pytest.fixture(scope="module")
def config_file(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "tree.json").write_text(json.dumps(config.to_dict()))
    (folder / "conf.py").write_text(CONFIG.format(path=str(folder / "tree.json")))
    return folder / "conf.py"


def cut_after_checkpoint(whole, workdir):
    """Copy a run to the state that a kill after its checkpoint of step SAVED leaves."""
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    for name in ("summary.json", "loss.png"):
        (workdir / name).unlink()
    return workdir


def alone(config, workdir):
    """Train in this process, on as many devices as a distributed run."""
    everything = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: everything[:DEVICES])
        return train(config, workdir)


@pytest.fixture(scope="module")
def runs(config, config_file, tmp_path_factory):
    """Train with 1, 2 and 4 processes and resume that of 2 with 1 and with 4; return the folder."""
    folder = tmp_path_factory.mktemp("runs")
    alone(config, folder / "1")
    train_together(config_file, 2, folder / "2")
    for name in ("2 to 1", "2 to 4"):
        cut_after_checkpoint(folder / "2", folder / name)
    alone(config, folder / "2 to 1")
    address = free_address()
    given = folder / "four.json"  # no sample: the run of two tests it, and it takes time to compile
    given.write_text(json.dumps(change(config, **{"evaluate.sample_prompt": ""}).to_dict()))
    found = ends(
        start(["-c", FOUR, address, index, given, folder / "4", folder / "2 to 4"])
        for index in range(4)
    )
    for status, err in found:
        assert status == 0, err[-3000:]
    return folder


@pytest.mark.parametrize("name", ["2", "4", "2 to 1", "2 to 4"])
def test_any_number_of_processes_is_the_same_run(config, runs, name):
    """Fresh and resumed runs have equal losses at every step and equal final parameters."""
    one, other = (read_metrics(runs / run / "metrics.jsonl") for run in ("1", name))
    assert [(row["step"], row["kind"]) for row in one] == [
        (row["step"], row["kind"]) for row in other
    ]
    for a, b in zip(one, other, strict=True):
        for key in ("loss", "grad_norm", "tokens", "attention_entropy"):
            if key in a:
                # Float32 sums over devices differ in order, and Adam magnifies the difference.
                np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=f"{key} {a['step']}")
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    states = []
    for run in ("1", name):
        with Checkpoints(runs / run) as checkpoints:
            states.append(checkpoints.restore(STEPS, abstract_state(config, mesh)))
    assert int(states[1].step) == STEPS
    assert_close(states[0].params, states[1].params, rtol=1e-4, atol=1e-6)
    summaries = [json.loads((runs / run / "summary.json").read_text()) for run in ("1", name)]
    assert summaries[1].get("sample", summaries[0]["sample"]) == summaries[0]["sample"]
    assert "sample" in summaries[1] or "4" in name
    assert summaries[1]["held_out_loss"] == pytest.approx(summaries[0]["held_out_loss"], rel=1e-5)


def test_a_resumed_run_really_began_with_the_others_checkpoint(runs):
    for name in ("2 to 1", "2 to 4"):
        summary = json.loads((runs / name / "summary.json").read_text())
        assert summary["timed_steps"] == STEPS - SAVED
        kept = {path.name for path in (runs / name / "checkpoints").iterdir()}
        assert kept == {str(SAVED), str(STEPS)}
        assert not list((runs / name).glob(".shared*"))


# -- errors ---------------------------------------------------------------------------------


def one_line(err):
    """Return the line "error: ..." of `err`, which must be the only one and the last line."""
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:], err
    assert "Traceback" not in err
    assert "Check failure stack trace" not in err
    return lines[-1]


def test_a_process_that_never_comes(config_file, tmp_path):
    """A missing process is one error line, where jax alone would abort with a stack trace."""
    address = free_address()
    command = train_command(config_file, address, 3, 0, "--workdir", tmp_path / "run")
    ((status, err),) = ends([start([*command, "--startup_timeout", 1])], timeout=60)
    line = one_line(err)
    assert status == 2
    for part in (f"1 of 3 processes came to {address} within 1 s", "processes 1, 2 did not"):
        assert part in line
    assert not (tmp_path / "run").exists()


def test_no_cluster(config_file, tmp_path):
    command = ["-m", "mea_jax.train", "--config", config_file, "--workdir", tmp_path / "run"]
    ((status, err),) = ends([start([*command, "--distributed"])], timeout=60)
    assert status == 2
    assert "found no TPU pod, Slurm job or other cluster" in one_line(err)
    assert "--coordinator HOST:PORT" in err


def test_a_cluster_job_whose_other_process_never_comes(config_file, tmp_path):
    """A Slurm job, which jax detects from its variables, reports a missing process in one line.

    With jax alone it would abort with a stack trace.
    """
    port = int(free_address().partition(":")[2])
    slurm = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": "1"}
    slurm = {f"SLURM_{key}": value for key, value in (slurm | {"LOCALID": "0"}).items()}
    arguments = ["--workdir", tmp_path / "run", "--distributed", "--startup_timeout", 1]
    command = ["-m", "mea_jax.train", "--config", config_file, *arguments]
    process = start(command, **slurm, JAX_COORDINATOR_PORT=str(port))
    ((status, err),) = ends([process], timeout=60)
    assert status == 2
    line = one_line(err)
    assert "did not all start within 1 s: this is process 1 of 2" in line
    assert f"localhost:{port}" in line


def test_configs_that_differ(config_file, tmp_path):
    address, workdir = free_address(), tmp_path / "run"
    other = ["--workdir", workdir, "--config.seed=3"]
    found = ends(
        [
            start(train_command(config_file, address, 2, 0, "--workdir", workdir)),
            start(train_command(config_file, address, 2, 1, *other)),
        ],
        timeout=60,
    )
    for status, err in found:
        assert status == 2
        line = one_line(err)
        assert "process 1 on " in line
        assert "differs from process 0: seed is 3, not 0" in line
    assert not workdir.exists()


def test_other_data_on_another_host(config_file, corpus, tmp_path):
    """All processes end with the same line if the text differs between the hosts.

    Each host has its own cache and its own copy of the text; that of process 1 is different.
    """
    address = free_address()
    processes = []
    for index in range(2):
        home = tmp_path / str(index)
        shutil.copytree(corpus, home / "corpus")
        source = "--config.data.sources=({'source': 'text', 'path': '~/corpus'},)"
        arguments = ["--workdir", tmp_path / "run", source, "--config.data.cache_dir=~/cache"]
        command = train_command(config_file, address, 2, index, *arguments)
        processes.append(start(command, devices=2, HOME=str(home)))
    (tmp_path / "1" / "corpus" / "zz.txt").write_text("one more document " * 9)
    for status, err in ends(processes, timeout=60):
        assert status == 2
        assert "process 1 on " in one_line(err)
        assert f"has different data from process 0, in {tmp_path / '1' / 'cache'}" in err


def test_a_mistake_of_one_process_ends_all(config_file, tmp_path):
    """Only process 0 reads text; if it fails, the processes that wait for it end with its line."""
    address = free_address()
    source = f"--config.data.sources=({{'source': 'text', 'path': '{tmp_path / 'none'}'}},)"
    arguments = ["--workdir", tmp_path / "run", source]
    commands = [train_command(config_file, address, 2, index, *arguments) for index in range(2)]
    began = time.monotonic()
    found = ends([start(command, devices=2) for command in commands], timeout=60)
    assert time.monotonic() - began < 60
    assert [status for status, _ in found] == [2, 2]
    mistake = f"{tmp_path / 'none'}: no such file or folder"
    assert one_line(found[0][1]).startswith(f"error: {mistake}")
    assert re.match(rf"error: process 0 on \S+ ended: {mistake}", one_line(found[1][1]))


def test_a_run_directory_that_is_not_shared(config_file, tmp_path):
    address = free_address()
    commands = [
        train_command(config_file, address, 2, index, "--workdir", tmp_path / str(index))
        for index in range(2)
    ]
    short = "import mea_jax.checkpoint.run_directory as r; r._SHARED_SECONDS = 0.5; "
    short += "import runpy, sys; sys.argv = sys.argv[1:]; "
    short += "runpy.run_module('mea_jax.train', run_name='__main__', alter_sys=True)"
    found = ends([start(["-c", short, *c[1:]], devices=2) for c in commands], timeout=60)
    for status, err in found:
        assert status == 2
        assert f"has the run directory {tmp_path / '1'}, which is not {tmp_path / '0'}" in err
        assert "same --workdir" in one_line(err)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(victim):
    """The other ends with one line, unless process 0, which runs jax's coordinator, is killed."""
    names = f"ADDRESS, VICTIM, INDEX = {free_address()!r}, {victim}, "
    processes = [start(["-c", f"{names}{index}\n{KILLED}"]) for index in range(2)]
    found = ends(processes, timeout=60)
    assert found[victim][0] == -9
    status, err = found[1 - victim]
    if victim == 0:
        assert status in (1, -6)
    else:
        assert status == 1
        assert "the connection to another process was lost" in one_line(err)


def test_no_thread_of_ours_is_left_when_a_run_ends():
    """Python would end it inside of jax's client, which sometimes aborts a finished process."""
    address = free_address()
    found = []
    for index in range(2):
        text = FINISHED.replace("ADDRESS", repr(address)).replace("INDEX", str(index))
        found.append(start(["-c", text]))
    for status, err in ends(found):
        assert status == 0, err
