"""A run's directory: what lies where, and the checks that keep two runs apart."""

import contextlib
import json
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mea_jax.checkpoint import lock
from mea_jax.checkpoint.files import disk_errors, make_writable, write_json
from mea_jax.checkpoint.metrics import MetricsWriter, NoWriter
from mea_jax.config.parse import from_dict
from mea_jax.config.schema import TrainConfig, differences
from mea_jax.errors import UserError
from mea_jax.parallel import processes

_SHARED_SECONDS = 15.0  # that a shared file system may take to show a new file to other hosts


def stored_dtype(path: Path) -> str | None:
    """The dtype of the run that `path` holds: a run started with "auto" stays what it was."""
    try:
        return json.loads((path / "config.json").read_text())["model"]["dtype"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def stored_config(path: Path) -> TrainConfig | None:
    """The config of the run that `path` holds, "auto" resolved; None: there is no run.

    Raises `UserError` where it is damaged.
    """
    path = path / "config.json"
    if not path.exists():
        return None
    try:
        # Through the dataclasses: a key younger than the run has its default.
        return from_dict(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); choose another --workdir") from error


class RunDirectory:
    """`config.json`, `tokenizer/`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `loss.png`
    and `summary.json` below `path`; `.lock` and, if need be, `damaged/`. Only the first process
    writes; all of them check.

    Raises `UserError` when the directory belongs to another config or cannot be written, or when
    not every process sees it.
    """

    def __init__(self, path: Path, config: TrainConfig):
        self.path, self.config = path, config
        self.first = processes.is_first()
        self._lock: lock.Lock | None = None
        self._check_config()
        if self.first:
            try:
                make_writable(path)
            except OSError as error:
                raise UserError(
                    f"run directory {path} cannot be written: {error.strerror}; choose another "
                    "with --workdir"
                ) from error
        if processes.is_distributed():
            self._check_shared()

    def _check_shared(self) -> None:
        """Checkpoints are written by all processes, so all must see the first one's folder."""
        there = self.path.absolute() / f".shared-{uuid.uuid4().hex}"
        there = Path(processes.broadcast(str(there)))
        probe, problem = self.path / there.name, None
        if self.first:
            probe.write_text("")
        processes.agree(None)
        until = time.monotonic() + _SHARED_SECONDS
        while not probe.exists() and problem is None:
            if time.monotonic() > until:
                problem = (
                    f"{processes.name()} has the run directory {self.path.absolute()}, which is "
                    f"not {there.parent} of process 0: give every process the same --workdir, on a "
                    "file system that all hosts share"
                )
            time.sleep(0.1)
        try:
            processes.agree(problem)
        finally:
            if self.first:
                probe.unlink(missing_ok=True)

    def _check_config(self) -> None:
        old = stored_config(self.path)
        if old is not None and (lines := differences(old.to_dict(), self.config.to_dict())):
            more = old.steps < self.config.steps and self.finished() is not None
            remedy = (
                f"this run is finished; to train on from it, give --config.start.checkpoint="
                f"{self.path} and another --workdir"
                if more
                else "choose another --workdir, or set these keys back to resume"
            )
            raise UserError(
                f"{self.path} holds a run of another config ({'; '.join(lines)}): {remedy}"
            )

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Keeps other processes from training in this directory.

        Raises `UserError` when one does so already.
        """
        with contextlib.ExitStack() as stack:
            problem = None
            if self.first:
                try:
                    self._lock = stack.enter_context(lock.hold(self.path, self.say))
                except UserError as error:
                    problem = str(error)
            processes.agree(problem)
            yield

    def check_claim(self) -> None:
        """Raises `UserError` where another process has taken this directory since `claim`."""
        if self._lock is not None:
            self._lock.check()

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that is done, or None."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def say(self, line: str) -> None:
        """A line on stderr, from the first process."""
        if self.first:
            print(line, file=sys.stderr, flush=True)

    def write_config(self, tokenizer) -> None:
        """Stores the config, with "auto" resolved, and the tokenizer."""
        if not self.first:
            return
        write_json(self.path / "config.json", self.config.to_dict())
        directory = self.path / "tokenizer"
        with disk_errors(directory):
            directory.mkdir(exist_ok=True)
            tokenizer.save(directory)

    def open_metrics(self, start_step: int, redo: Sequence[str] = ()) -> MetricsWriter | NoWriter:
        """The writer of this process; those of other processes write nowhere."""
        return MetricsWriter(self.path, start_step, redo) if self.first else NoWriter()

    def write_summary(self, summary: dict[str, Any]) -> None:
        if self.first:
            write_json(self.path / "summary.json", summary)
