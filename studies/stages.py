"""Run a study's stages: commands that a user could type, each in a process of its own.

The stages run one after another in separate processes, so that each frees its memory. Finished
stages are listed in `stages.json` and not repeated, so the same study continues after a kill.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mea_jax.checkpoint.files import disk_errors, write_json
from mea_jax.errors import UserError, nearest

Call = Callable[[list[str]], int]  # runs a command and returns its exit status


def check_keys(config: Mapping[str, Any], kinds: Mapping[str, Any], example: str) -> None:
    """Raise `UserError` unless `config` has the keys of `kinds`, with values of their types.

    `example` is a config file that the message names.
    """
    for key in config:
        if key not in kinds:
            raise UserError(f"unknown config key config.{key}: {nearest(key, kinds)}")
    for key, kind in kinds.items():
        if key not in config:
            raise UserError(f"config.{key} is missing: add it as in {example}")
        if not isinstance(config[key], kind):
            raise UserError(
                f"config.{key}={config[key]!r} has the wrong type: set it as in {example}"
            )


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command: `python -m module` with the arguments `words`.

    Attributes:
      name: the name in `stages.json`.
      module: the module.
      words: its arguments.
      result: a path that the command creates as its last action and refuses to create twice; "":
        the command can be repeated.
      kept: True if later stages read `result`, so that the stage is repeated if it is gone.
    """

    name: str
    module: str
    words: tuple[str, ...]
    result: str = ""
    kept: bool = False

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self.words]


class FinishedStages:
    """The finished commands by stage, stored in `stages.json` of the folder `out`.

    `begun.json` has the commands that were started, and the seconds that they took so far.
    """

    def __init__(self, out: Path):
        self.file, self.begun_file = out / "stages.json", out / "begun.json"
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        self.commands = _read(self.file)
        self.begun = _read(self.begun_file)

    def has(self, stage: Stage) -> bool:
        """Return whether `stage` is finished. Raise `UserError` if another command finished it."""
        if stage.name not in self.commands:
            return False
        self._check(self.commands[stage.name], stage)
        return not stage.kept or Path(stage.result).exists()

    def _check(self, stored: list[str], stage: Stage) -> None:
        words = [stage.module, *stage.words]
        if stored != words:
            differing = sorted(set(stored) ^ set(words))
            raise UserError(
                f"{self.file.parent} contains {stage.name} with other options "
                f"({', '.join(differing)}): choose another --out, or remove the folder"
            )

    def has_result(self, stage: Stage) -> bool:
        """Return whether an earlier process ended after it had written the stage's result."""
        if not stage.result or not Path(stage.result).exists():
            return False
        self._check(self.begun.get(stage.name, {"command": []})["command"], stage)
        return True

    def begin(self, stage: Stage) -> None:
        repeated = stage.name in self.commands  # its result is gone, so its time is, too
        seconds = 0.0 if repeated else self.seconds(stage)
        self.begun[stage.name] = {"command": [stage.module, *stage.words], "seconds": seconds}
        write_json(self.begun_file, self.begun)

    def seconds(self, stage: Stage) -> float:
        """Return the seconds that a stage's processes took, without those of killed studies."""
        return self.begun.get(stage.name, {}).get("seconds", 0.0)

    def add_seconds(self, stage: Stage, seconds: float) -> None:
        self.begun[stage.name]["seconds"] += seconds
        write_json(self.begun_file, self.begun)

    def add(self, stage: Stage) -> None:
        self.commands[stage.name] = [stage.module, *stage.words]
        write_json(self.file, self.commands)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): remove it") from error


def call(command: list[str]) -> int:
    """Run a command in a process of its own, which inherits the lock; return its exit status."""
    return subprocess.run(command, close_fds=False).returncode


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of the folder `out`, or raise `UserError` if a process has it.

    Commands inherit it. So it is held until the last one ends, even if the study itself was killed.
    """
    path = out / "lock"
    with disk_errors(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.set_inheritable(file, True)
    try:
        _lock(file, out)
        yield
    finally:
        os.close(file)


def _lock(file: int, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"--out {out} is in use by another study, or by the last command of a killed one: wait "
            "until it ends, or choose another folder"
        ) from error


def run(
    todo: Sequence[Stage],
    done: FinishedStages,
    log: Callable[[str], Any],
    call: Call = call,
    collect: Callable[[Stage], Any] = lambda stage: None,
) -> None:
    """Run the stages of `todo` that are not `done`, in order.

    `log` logs a line. `collect(stage)` reads a stage's results, before it counts as finished. Raise
    `UserError` if a stage fails, if `done` contains stages with other options, or if another study
    runs in the same folder.
    """
    with _locked(done.file.parent):
        _run([stage for stage in todo if not done.has(stage)], done, log, call, collect)


def _run(
    left: Sequence[Stage],
    done: FinishedStages,
    log: Callable[[str], Any],
    call: Call,
    collect: Callable[[Stage], Any],
) -> None:
    for number, stage in enumerate(left, start=1):
        head = f"[{number}/{len(left)}] {stage.name}"
        log(f"{head}: {shlex.join(stage.command[1:])}")
        began = time.monotonic()
        if not done.has_result(stage):
            done.begin(stage)
            try:
                status = call(stage.command)
            finally:
                done.add_seconds(stage, time.monotonic() - began)
            if status:
                raise UserError(
                    f"stage '{stage.name}' failed with status {status}: fix the error logged "
                    "above, then run the same command again to continue"
                )
        collect(stage)
        done.add(stage)
        log(f"{head}: {time.monotonic() - began:.0f} s")
