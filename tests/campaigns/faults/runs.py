"""Training processes of a campaign: started, waited for, killed, compared."""

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

STEPS, EVERY = 60, 5  # as in config/schema.py
LIMIT = 400.0  # seconds that a process may take before it counts as hanging
REFERENCES = threading.Lock()  # trials that run at the same time share the runs without a fault
SLOW = "wait=0.01"  # so that moments inside the loop are as likely as those before it
_MEASURED = ("tokens_per_second", "flops_per_second", "mfu")
_WORDS = "a quick brown fox jumps over the lazy dog while seven wizards box by moonlight"


class Failed(Exception):
    """A trial did not end as it should have; the words say how."""


def expect(condition: bool, words: str) -> None:
    """Raises `Failed` unless `condition`."""
    if not condition:
        raise Failed(words)


class Process:
    """A training process, its end, and what it printed on stderr."""

    def __init__(self, popen: subprocess.Popen, log: Path):
        self.popen, self.log = popen, log

    def wait(self, limit: float = LIMIT) -> int:
        """The exit status. Raises `Failed` when it hangs, or ends with a traceback."""
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
    """The folder of one trial, the corpus and the reference runs of the campaign beside it."""

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
        """A victim on the trial's run directory; `guarded` keeps the guard under trial in work."""
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
        """Starts a victim and waits for its end, which must have this `status`; its words."""
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
    """Of a victim: one CPU device, programs compiled once for the whole campaign."""
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": cpu_devices.flags(1),
        "MEA_JAX_CACHE": str(campaign / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(campaign / "cache" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }


def write_corpus(folder: Path, files: int = 40) -> None:
    """Short text files, always the same."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(files):
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choice(_WORDS.split(), 60 + i)))


@contextlib.contextmanager
def small_disk(where: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `where`. Raises `OSError` where that is not permitted."""
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
    """Waits for `condition()` while the process runs."""
    deadline = time.monotonic() + limit
    while not condition() and process.running:
        expect(time.monotonic() < deadline, f"not seen within {limit:g} s")
        time.sleep(0.0005)


def reference(trial: Scratch, name: str, *faults: str, flags: tuple[str, ...] = ()) -> Path:
    """A run without the fault, made once for the campaign."""
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
    """Names of the complete checkpoints of a run."""
    return [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]


# -- what two runs have in common -----------------------------------------------------------


def rows(workdir: Path, without_steps: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Rows of training and evaluation, without what a clock measured."""
    return [
        {key: value for key, value in row.items() if key not in _MEASURED}
        for row in read_metrics(workdir / "metrics.jsonl")
        if row["kind"] in ("train", "held_out", "diagnostics") and row["step"] not in without_steps
    ]


def events(workdir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(workdir / "metrics.jsonl") if row["kind"] == kind]


def order(path: Path, without_steps: tuple[int, ...] = ()) -> dict[int, str]:
    """The digest of the batch that each step was last trained on."""
    found: dict[int, str] = {}
    for line in path.read_text().splitlines():
        try:
            step, digest = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        if step not in without_steps:
            found[step] = digest
    return found


def final_state(workdir: Path) -> Any:
    """The last checkpoint's state, on one device."""
    with Checkpoints(workdir) as checkpoints:
        config = checkpoints.config(STEPS)
        mesh = sharding.make_mesh(type(config.mesh)(), jax.devices()[:1])
        return jax.device_get(checkpoints.restore(STEPS, abstract_state(config, mesh)))


def expect_same(trial: Scratch, reference: Path, without_steps: tuple[int, ...] = ()) -> None:
    """The trial's run ended as the one in `reference` did, bit for bit."""
    found, wanted = rows(trial.workdir, without_steps), rows(reference / "run", without_steps)
    different = [a["step"] for a, b in zip(found, wanted, strict=False) if a != b]
    expect(
        found == wanted,
        f"other metrics: {len(found)} rows, not {len(wanted)}, first difference at {different[:1]}",
    )
    kept = order(trial.order, without_steps)
    expect(kept == order(reference / "order.jsonl", without_steps), "other batches")
    a, b = final_state(trial.workdir), final_state(reference / "run")
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)
    expect(all(jax.tree.leaves(same)), "other parameters or moments at the end")
