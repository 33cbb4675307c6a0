"""Save and restore self-contained checkpoints, with orbax behind one small interface.

A checkpoint `<workdir>/checkpoints/<step>` contains the training state, the entire config as JSON,
the run's position (in the data, and the state of its guards) and checksums of all its files. It is
restored into an abstract tree that carries target shardings, so the mesh may differ from the one
that wrote it.

Saves are asynchronous: training continues while a thread waits for orbax to write `<step>.part`,
adds the checksums and renames the folder to `<step>`. So a folder whose name is a number is
complete, whatever killed the run, and later damage is detected when it is read.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from mea_jax.checkpoint import digests
from mea_jax.checkpoint.orbax_store import array_shapes, missing, plain_path, quiet_threads
from mea_jax.checkpoint.published import refuse_published
from mea_jax.config.parse import from_dict
from mea_jax.config.schema import CheckpointConfig, TrainConfig
from mea_jax.errors import UserError
from mea_jax.model.params import TrainState
from mea_jax.parallel import processes

FORMAT = 2
_UNSEALED = 1  # the format before checksums
_LEFTOVER = re.compile(r"\d+\.(part|old)\b.*")  # of a run that was killed


@dataclass(frozen=True)
class Position:
    """The position of a run: its state besides the arrays."""

    next_batch: int  # number of the first batch not yet trained on
    digest: str  # `Prepared.digest` of the data that the run reads
    guards: Mapping[str, Any] | None = None  # `Guards.state`; None in checkpoints of format 1


def find_checkpoint(path: Path, option: str = "--checkpoint") -> tuple[Path, int | None]:
    """Return the run directory and step of a path.

    The path is a run directory or its `checkpoints` (then the step is None), or one step below.
    Raise `UserError`, which names `option`, if there are no checkpoints.
    """
    run, step = path, None
    if path.name.isdigit() and path.parent.name == "checkpoints":
        run, step = path.parent.parent, int(path.name)
    elif path.name == "checkpoints":
        run = path.parent
    refuse_published(path, option)
    if not (run / "checkpoints").is_dir():
        raise UserError(
            f"{option} {path} contains no checkpoints: give a run directory of train, such as "
            "runs/quickstart, or one step of it, runs/quickstart/checkpoints/500"
        )
    return run, step


class Checkpoints:
    """The checkpoints of one run directory; a context manager that waits for writes at its end."""

    def __init__(
        self, workdir: Path, options: CheckpointConfig | None = None, rewind_distance: int = 0
    ):
        """Open the checkpoints of `workdir`: to read and write, or only to read without `options`.

        With `rewind_distance`, a checkpoint at least that many steps older than the newest is
        always kept, if there is one. Raise `UserError` if the directory cannot be written.
        """
        self.directory = (workdir / "checkpoints").absolute()
        self._plain = plain_path(self.directory)  # as orbax takes it
        self.aside = (workdir / "damaged").absolute()
        self.options, self.rewind_distance = options, rewind_distance
        self.pending: int | None = None  # the step whose write may still be under way
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        # Orbax logs each phase of each save, and tracebacks of each failure; we print one line.
        absl_logging.set_verbosity(absl_logging.FATAL)
        quiet_threads()
        self._writer: ocp.AsyncCheckpointer | None = None
        if options is not None:
            if processes.is_first():
                self._prepare()
            # If orbax made folders asynchronously and this failed, it would wait for them until a
            # timeout of many minutes.
            how = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            handler = ocp.CompositeCheckpointHandler()
            self._writer = ocp.AsyncCheckpointer(handler, async_options=how)

    def _prepare(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            raise UserError(
                f"{error.filename or self.directory} cannot be written: {error.strerror}; make "
                "it writable, or choose another --workdir"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_: Any) -> None:
        problem: BaseException | None = None
        try:
            self.wait()
        except Exception as error:
            problem = error
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:  # a failed write, raised a second time
                problem = problem or self._write_error(error)
        if problem is not None and kind is None:  # an exception of the block takes precedence
            raise problem

    # -- listing and verifying -------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def latest(self) -> int | None:
        """Return the newest complete checkpoint's step, or None. It may be damaged."""
        return max(self.steps(), default=None)

    def damage(self, step: int, share: bool = True) -> str | None:
        """Return a short description of the damage to the checkpoint of `step`, or None.

        With `share` each process of the run reads a part of the files; otherwise the first reads
        all. The result is the same on all processes.
        """
        index, count = (jax.process_index(), jax.process_count()) if share else (0, 1)
        found = None
        if share or processes.is_first():
            folder = self.directory / str(step)
            found = digests.damage(folder, index, count)
            if not (folder / digests.FILE).exists() and self._unsealed(folder):
                found = digests.links(folder)  # nothing else can be verified
        return processes.first_problem(found)

    def _unsealed(self, folder: Path) -> bool:
        """Return whether this is a checkpoint of the format without checksums."""
        try:
            return json.loads((folder / "data" / "metadata").read_text())["format"] == _UNSEALED
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return False

    def newest_good(
        self, log: Callable[[str], Any], below: int | None = None, share: bool = True
    ) -> int | None:
        """Return the newest step (under `below`) whose checkpoint is undamaged.

        If there are no checkpoints, return None. `log` receives a line for each damaged checkpoint
        that is skipped. If this object may write, damaged checkpoints are moved to
        `<workdir>/damaged`, since the run will write the same steps again; nothing is deleted.

        Raise `UserError` if all checkpoints are damaged, or one cannot be moved.
        """
        steps: list[int] = json.loads(processes.broadcast(json.dumps(self.steps())))
        steps = [step for step in steps if below is None or step < below]
        bad: dict[int, str] = {}
        for step in reversed(steps):
            if (problem := self.damage(step, share)) is None:
                for number, words in bad.items():
                    where = self._set_aside(number) if self.options is not None else None
                    kept = f", moved to {where}" if where else ""
                    log(f"the checkpoint of step {number} is damaged: {words}{kept}")
                if bad:
                    log(f"falling back to the checkpoint of step {step}")
                return step
            bad[step] = problem
        if bad:
            listed = "; ".join(f"step {number}: {words}" for number, words in bad.items())
            anew = ", or choose another --workdir to start a new run" if self.options else ""
            raise UserError(
                f"every checkpoint in {self.directory} is damaged ({listed}): restore good copies"
                f"{anew}"
            )
        return None

    def _set_aside(self, step: int) -> Path | None:
        """Let the first process move a checkpoint to `damaged`. Return its new path there."""
        problem, target = None, None
        if processes.is_first():
            names = [str(step), *(f"{step}-{n}" for n in range(1, 1000))]
            target = next(p for p in (self.aside / name for name in names) if not p.exists())
            try:
                self.aside.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(target)
            except OSError as error:
                problem = (
                    f"the damaged checkpoint of step {step} cannot be moved to {target}: "
                    f"{error.strerror}; move it away manually"
                )
        processes.raise_on_all(problem)
        return target

    def forget_after(self, step: int) -> None:
        """Remove checkpoints newer than `step`: the run was rewound and will write them again."""
        self.wait()
        if processes.is_first():
            for newer in self.steps():
                if newer > step:
                    self._remove(newer)
        processes.raise_on_all(None)

    def _remove(self, step: int) -> None:
        old = self.directory / f"{step}.old"  # not a checkpoint, even if the removal is interrupted
        os.rename(self.directory / str(step), old)
        shutil.rmtree(old)

    # -- writing ---------------------------------------------------------------------------

    def save(self, step: int, state: TrainState, config: TrainConfig, position: Position) -> None:
        """Start writing `state`, and return when its buffers may be reused.

        Raise `UserError` if this or an earlier write failed (disk full, read-only, ...).
        """
        assert self._writer is not None
        self.wait()  # for the write before, so that its error names the right step
        self.pending = step
        content = {
            "format": FORMAT,
            "next_batch": position.next_batch,
            "digest": position.digest,
            "guards": position.guards,
        }
        try:
            self._writer.save(
                self._plain / f"{step}.part",
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    config=ocp.args.JsonSave(config.to_dict()),
                    data=ocp.args.JsonSave(content),
                ),
            )
        except Exception as error:
            raise self._write_error(error) from error
        what = (step, array_shapes(state))
        self._thread = threading.Thread(target=self._complete, args=what, daemon=True)
        self._thread.start()

    def _complete(self, step: int, shapes: dict[str, tuple[int, ...]]) -> None:
        """Wait for orbax; then verify, add checksums, rename, and remove old checkpoints."""
        part = self.directory / f"{step}.part"
        try:
            assert self._writer is not None
            self._writer.wait_until_finished()
            if processes.is_first():
                if problem := missing(part / "state", shapes):
                    raise OSError(f"the written files cannot be read back: {problem}")
                digests.write_checksums(part)
                os.rename(part, self.directory / str(step))
                digests.sync_folder(self.directory)
                self._keep()
        except BaseException as error:
            self._failure = error

    def _keep(self) -> None:
        assert self.options is not None
        steps, every = self.steps(), self.options.keep_every
        kept = set(steps[-self.options.keep :])
        kept.update(step for step in steps if every and step % every == 0)
        if self.rewind_distance:
            kept.update([step for step in steps if step <= steps[-1] - self.rewind_distance][-1:])
        for step in steps:
            if step not in kept:
                self._remove(step)

    def writing(self) -> bool:
        """Return whether a save is still being written to disk."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise `UserError` if an asynchronous write has failed; do not wait for it."""
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise self._write_error(error) from error

    def wait(self) -> None:
        """Wait until the last save is on disk. Raise `UserError` if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _write_error(self, error: BaseException) -> BaseException:
        if processes.lost_another(error):
            return error
        saved = self.latest()
        safe = f"the run is safe up to step {saved}" if saved is not None else "nothing is saved"
        reason = str(error).strip().splitlines()
        return UserError(
            f"the checkpoint of step {self.pending} could not be written to {self.directory}: "
            f"{reason[0] if reason else type(error).__name__}; {safe}; free space or make the "
            "directory writable, then run the same command again"
        )

    # -- reading ---------------------------------------------------------------------------

    def _unreadable(self, step: int, item: str, error: Exception) -> UserError:
        reason = str(error).strip().splitlines()
        return UserError(
            f"checkpoint {self.directory / str(step)} could not be read, its {item} cannot be "
            f"restored: {reason[0] if reason else type(error).__name__}; use another checkpoint"
        )

    def _json(self, step: int, item: str) -> Any:
        try:
            return json.loads((self.directory / str(step) / item / "metadata").read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise self._unreadable(step, item, error) from error

    def _arrays(self, step: int, handler: Any, how: Any) -> Any:
        try:
            with ocp.Checkpointer(handler) as reader:
                return reader.restore(self._plain / str(step) / "state", args=how)
        except Exception as error:
            raise self._unreadable(step, "state", error) from error

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Return the state of `step`, with the shapes, dtypes and shardings of `abstract`.

        Raise `UserError` if it cannot be read.
        """
        handler = ocp.StandardCheckpointHandler()
        return self._arrays(step, handler, ocp.args.StandardRestore(abstract))

    def params(self, step: int, abstract: Any) -> Any:
        """Return only the parameters of `step`, laid out as `abstract`; no moments are read.

        Raise `UserError` if they cannot be read.
        """
        restore_args = ocp.checkpoint_utils.construct_restore_args({"params": abstract})
        how = ocp.args.PyTreeRestore({"params": abstract}, restore_args, partial_restore=True)
        return self._arrays(step, ocp.PyTreeCheckpointHandler(), how)["params"]

    def config(self, step: int) -> TrainConfig:
        """Return the config inside the checkpoint of `step`: JSON, never code.

        Raise `UserError` if it cannot be read, or is not valid.
        """
        tree = self._json(step, "config")
        try:
            return from_dict(tree)
        except UserError as error:
            raise UserError(f"checkpoint {self.directory / str(step)}: {error}") from error

    def position(self, step: int, data_digest: str) -> Position:
        """Return the position of the run at `step`.

        Raise `UserError` unless `data_digest` is the digest of the data that the run has read, or
        if the position cannot be read.
        """
        folder, data = self.directory / str(step), self._json(step, "data")
        try:
            version = data["format"]
            position = Position(data["next_batch"], data["digest"], data.get("guards"))
        except (LookupError, TypeError) as error:
            raise self._unreadable(step, "data", error) from error
        if version not in (_UNSEALED, FORMAT):
            raise UserError(
                f"checkpoint {folder} has format {version}, this version of mea_jax reads "
                f"{_UNSEALED} and {FORMAT}: use the version that wrote it"
            )
        if position.digest != data_digest:
            raise UserError(
                f"the data have changed since step {step} of {self.directory.parent} (checkpoint "
                f"{folder}): different files or another tokenizer give different tokens; restore "
                "the old data, or choose another --workdir"
            )
        return position
