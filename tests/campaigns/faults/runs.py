"""Start, await, kill and compare the training processes of a campaign."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mea_jax.checkpoint.manager import Checkpoints
from mea_jax.checkpoint.metrics import read_metrics
from mea_jax.parallel import sharding
from mea_jax.train.step import abstract_state
from tests import cpu_devices
from tests.paths import ROOT

STEPS, EVERY = 60, 5  # as in config.py
LIMIT = 400.0  # seconds that a process may take before it counts as hanging
REFERENCES = threading.Lock()  # concurrent trials share the runs without a fault
SLOW = "wait=0.01"  # so that a random moment is as likely inside the loop as before it
_MEASURED = ("tokens_per_second", "flops_per_second", "mfu")
_WORDS = "a quick brown fox jumps over the lazy dog while seven wizards box by moonlight"


class Failed(Exception):
    """An unexpected end of a trial, which the message describes."""


def expect(condition: bool, words: str) -> None:
    """Raise `Failed` with the message `words` unless `condition` is true."""
    if not condition:
        raise Failed(words)


class Process:
    """A training process and its stderr."""

    def __init__(self, popen: subprocess.Popen, log: Path):
        self.popen, self.log = popen, log

    def wait(self, limit: float = LIMIT) -> int:
        """Return the exit status; raise `Failed` if the process hangs or prints a traceback."""
        try:
            status = self.popen.wait(limit)
        except subprocess.TimeoutExpired as error:
            self.popen.kill()
            self.popen.wait()
            raise Failed(f"no end within {limit:g} s") from error
        words = self.said()
        expect("Traceback" not in words, f"a traceback: {words[-2000:]}")
        return status

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.popen.send_signal(number)

    @property
    def running(self) -> bool:
        return self.popen.poll() is None


class Scratch:
    """The folder of one trial, next to the corpus and the reference runs of its campaign."""

    def __init__(self, campaign: Path, name: str, rng: random.Random, remove: str | None = None):
        self.campaign, self.path, self.rng = campaign, campaign / name, rng
        self.remove = remove
        self.path.mkdir()
        self.workdir, self.order = self.path / "run", self.path / "order.jsonl"
        self._processes: list[Process] = []

    def start(
        self,
        *faults: str,
        flags: tuple[str, ...] = (),
        workdir: Path | None = None,
        order: Path | None = None,
        corpus: Path | None = None,
        guarded: bool = False,
    ) -> Process:
        """Start a victim in the trial's run directory; `guarded` leaves all guards enabled."""
        removed = [f"remove={self.remove}"] if self.remove and not guarded else []
        corpus = corpus or self.campaign / "corpus"
        command = [
            *(sys.executable, "-m", "tests.campaigns.faults.victim"),
            *(f"order={order or self.order}", *faults, *removed, "--"),
            *("--config", f"tests/campaigns/faults/config.py:{corpus}"),
            *("--workdir", str(workdir or self.workdir), *flags),
        ]
        log = self.path / f"log-{len(self._processes)}.txt"
        with log.open("w") as out:
            popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment(self.campaign),
                stdout=subprocess.DEVNULL,
                stderr=out,
            )
        self._processes.append(process := Process(popen, log))
        return process

    def run(self, *faults: str, status: int = 0, **options: Any) -> str:
        """Run a victim to its end, which must have exit status `status`; return its stderr."""
        process = self.start(*faults, **options)
        found = process.wait()
        words = process.said()
        expect(found == status, f"exit status {found}, not {status}: {words[-600:]}")
        return words

    def close(self, keep: bool) -> None:
        for process in self._processes:
            process.popen.kill()
            process.popen.wait()
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)


def environment(campaign: Path) -> dict[str, str]:
    """Return the environment of victims: one CPU device, programs compiled once per campaign."""
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": cpu_devices.flags(1),
        "MEA_JAX_CACHE": str(campaign / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(campaign / "cache" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }


def write_corpus(folder: Path, files: int = 40) -> None:
    """Write short text files, always the same."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(files):
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choice(_WORDS.split(), 60 + i)))


@contextlib.contextmanager
def small_disk(where: Path, size: int) -> Iterator[None]:
    """Mount a file system of `size` bytes at `where`; raise `OSError` if that is not permitted."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError("mounting a file system is not permitted here") from error
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def until(condition: Any, process: Process, limit: float = 60.0) -> None:
    """Wait for `condition()` while the process runs; raise `Failed` after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition() and process.running:
        expect(time.monotonic() < deadline, f"condition not met within {limit:g} s")
        time.sleep(0.0005)


def reference(trial: Scratch, name: str, *faults: str, flags: tuple[str, ...] = ()) -> Path:
    """Make a run without the fault, once per campaign; return its folder."""
    path = trial.campaign / "references" / name
    with REFERENCES:
        if path.exists():
            return path
        scratch = path.with_name(f"{name}.incomplete")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        run, order = scratch / "run", scratch / "order.jsonl"
        trial.run(*faults, flags=flags, workdir=run, order=order, guarded=True)
        scratch.rename(path)
    return path


def steps_of(workdir: Path) -> list[str]:
    """Return the names of the complete checkpoints of a run."""
    return [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]


# -- comparison of two runs ----------------------------------------------------------------


def rows(workdir: Path, without_steps: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Return the rows of training and evaluation, without measured speeds."""
    return [
        {key: value for key, value in row.items() if key not in _MEASURED}
        for row in read_metrics(workdir / "metrics.jsonl")
        if row["kind"] in ("train", "held_out", "diagnostics") and row["step"] not in without_steps
    ]


def events(workdir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(workdir / "metrics.jsonl") if row["kind"] == kind]


def order(path: Path, without_steps: tuple[int, ...] = ()) -> dict[int, str]:
    """Return the checksum of the batch that each step was last trained on."""
    found: dict[int, str] = {}
    for line in path.read_text().splitlines():
        try:
            step, digest = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        if step not in without_steps:
            found[step] = digest
    return found


def restore_state(workdir: Path) -> Any:
    """Return the state of the last checkpoint, without sharding."""
    with Checkpoints(workdir) as checkpoints:
        config = checkpoints.config(STEPS)
        mesh = sharding.make_mesh(type(config.mesh)(), jax.devices()[:1])
        return jax.device_get(checkpoints.restore(STEPS, abstract_state(config, mesh)))


def expect_same(trial: Scratch, reference: Path, without_steps: tuple[int, ...] = ()) -> None:
    """Raise `Failed` unless the trial's run ended bit-equal to the one in `reference`."""
    found, wanted = rows(trial.workdir, without_steps), rows(reference / "run", without_steps)
    different = [a["step"] for a, b in zip(found, wanted, strict=False) if a != b]
    expect(
        found == wanted,
        f"other metrics: {len(found)} rows, not {len(wanted)}; first difference at {different[:1]}",
    )
    kept = order(trial.order, without_steps)
    expect(kept == order(reference / "order.jsonl", without_steps), "different batches")
    a, b = restore_state(trial.workdir), restore_state(reference / "run")
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)
    expect(all(jax.tree.leaves(same)), "different final parameters or moments")
