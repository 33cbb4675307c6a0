"""Lay out a run directory, and check that only one run uses it."""

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
    """Return the dtype of the run in `path`, or None. A run with "auto" keeps what was resolved."""
    try:
        return json.loads((path / "config.json").read_text())["model"]["dtype"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def stored_config(path: Path) -> TrainConfig | None:
    """Return the config of the run in `path`, with "auto" resolved, or None if there is no run.

    Raise `UserError` if the config is damaged.
    """
    path = path / "config.json"
    if not path.exists():
        return None
    try:
        # Through the dataclasses: a key that was added after the run gets its default.
        return from_dict(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); choose another --workdir") from error


class RunDirectory:
    """The directory of one run.

    It contains `config.json`, `tokenizer/`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
    `loss.png`, `summary.json`, `.lock` and, if a checkpoint was damaged, `damaged/`. Only the first
    process writes these files except checkpoints; all processes check the directory.

    Raises:
      UserError: if the directory belongs to another config or cannot be written, or not every
        process sees it.
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
        """Check that all processes see the same folder, since all of them write checkpoints to it.

        Raise `UserError` on all processes if one does not.
        """
        there = self.path.absolute() / f".shared-{uuid.uuid4().hex}"
        there = Path(processes.broadcast(str(there)))
        probe, problem = self.path / there.name, None
        if self.first:
            probe.write_text("")
        processes.raise_on_all(None)
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
            processes.raise_on_all(problem)
        finally:
            if self.first:
                probe.unlink(missing_ok=True)

    def _check_config(self) -> None:
        old = stored_config(self.path)
        if old is not None and (lines := differences(old.to_dict(), self.config.to_dict())):
            more = old.steps < self.config.steps and self.finished() is not None
            remedy = (
                f"this run is finished; to train further from it, give --config.start.checkpoint="
                f"{self.path} and another --workdir"
                if more
                else "choose another --workdir, or set these keys back to resume"
            )
            raise UserError(
                f"{self.path} contains a run with another config ({'; '.join(lines)}): {remedy}"
            )

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other runs from training in this directory within the block.

        Raise `UserError` on all processes if another run already does.
        """
        with contextlib.ExitStack() as stack:
            problem = None
            if self.first:
                try:
                    self._lock = stack.enter_context(lock.hold(self.path, self.log))
                except UserError as error:
                    problem = str(error)
            processes.raise_on_all(problem)
            yield

    def check_claim(self) -> None:
        """Raise `UserError` if another process has taken this directory since `claim`."""
        if self._lock is not None:
            self._lock.check()

    def finished(self) -> dict[str, Any] | None:
        """Return the summary of a finished run, or None."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def log(self, line: str) -> None:
        """Print a line on stderr, on the first process only."""
        if self.first:
            print(line, file=sys.stderr, flush=True)

    def write_config(self, tokenizer) -> None:
        """Write the config, with "auto" resolved, and the tokenizer; `UserError` if this fails."""
        if not self.first:
            return
        write_json(self.path / "config.json", self.config.to_dict())
        directory = self.path / "tokenizer"
        with disk_errors(directory):
            directory.mkdir(exist_ok=True)
            tokenizer.save(directory)

    def open_metrics(self, start_step: int, redo: Sequence[str] = ()) -> MetricsWriter | NoWriter:
        """Return the metrics writer of this process; only the first process's writes files."""
        return MetricsWriter(self.path, start_step, redo) if self.first else NoWriter()

    def write_summary(self, summary: dict[str, Any]) -> None:
        if self.first:
            write_json(self.path / "summary.json", summary)
