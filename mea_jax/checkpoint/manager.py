"""Checkpoints that describe themselves: orbax behind one small interface.

A checkpoint `<workdir>/checkpoints/<step>` holds the training state, the whole config as JSON, the
run's position (where it stands in the data, what its guards know) and digests of all its files. It
is restored into an abstract tree that carries target shardings, so the mesh may differ from the
one that wrote it.

Saves are asynchronous: the loop goes on while a thread waits for orbax, which writes `<step>.part`,
seals that with digests and renames it to `<step>`. So a folder whose name is a number is whole,
whatever killed the run; and what happened to it later shows when it is read.
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
from mea_jax.checkpoint.orbax_store import missing, names_of, plain_path, quiet_threads
from mea_jax.checkpoint.published import refuse_published
from mea_jax.config.parse import from_dict
from mea_jax.config.schema import CheckpointConfig, TrainConfig
from mea_jax.errors import UserError
from mea_jax.model.params import TrainState
from mea_jax.parallel import processes

FORMAT = 2
_UNSEALED = 1  # the format before digests
_LEFTOVER = re.compile(r"\d+\.(part|old)\b.*")  # of a run that was killed


@dataclass(frozen=True)
class Position:
    """Where a run stands, apart from its arrays."""

    next_batch: int  # number of the first batch not yet trained on
    digest: str  # `Prepared.digest` of the data that the run reads
    guards: Mapping[str, Any] | None = None  # `Guards.state`; None in checkpoints of format 1


def find_checkpoint(path: Path, option: str = "--checkpoint") -> tuple[Path, int | None]:
    """The run directory of a path that names it, its `checkpoints` or one step below; the step.

    Raises `UserError`, which names `option`, where there is no checkpoint.
    """
    run, step = path, None
    if path.name.isdigit() and path.parent.name == "checkpoints":
        run, step = path.parent.parent, int(path.name)
    elif path.name == "checkpoints":
        run = path.parent
    refuse_published(path, option)
    if not (run / "checkpoints").is_dir():
        raise UserError(
            f"{option} {path} holds no checkpoints: give a run directory of train, such as "
            "runs/quickstart, or one step of it, runs/quickstart/checkpoints/500"
        )
    return run, step


class Checkpoints:
    """The checkpoints of one run directory. Use as a context manager: leaving waits for writes."""

    def __init__(self, workdir: Path, options: CheckpointConfig | None = None, rewindable: int = 0):
        """With no `options` the directory is only read.

        With `rewindable` a checkpoint at least so many steps older than the newest is always kept,
        if there was one.
        """
        self.directory = (workdir / "checkpoints").absolute()
        self._plain = plain_path(self.directory)  # as orbax takes it
        self.aside = (workdir / "damaged").absolute()
        self.options, self.rewindable = options, rewindable
        self.pending: int | None = None  # the step whose write may still be under way
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        # Orbax logs each phase of each save, and each failure with tracebacks: ours is one line.
        absl_logging.set_verbosity(absl_logging.FATAL)
        quiet_threads()
        self._writer: ocp.AsyncCheckpointer | None = None
        if options is not None:
            if processes.is_first():
                self._prepare()
            # Folders made beside the training would, where they cannot be made, be waited for until
            # a time limit of many minutes.
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
            except Exception as error:  # of a failed write once more
                problem = problem or self._write_error(error)
        if problem is not None and kind is None:  # else what is already on its way out comes first
            raise problem

    # -- what there is ---------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None. It may be damaged: see `newest_good`."""
        return max(self.steps(), default=None)

    def damage(self, step: int, share: bool = True) -> str | None:
        """Return what is wrong with the checkpoint of `step`, in a few words, or None.

        With `share` each process of the run reads a part of the files; otherwise the first reads
        all. The answer is the same on all.
        """
        index, count = (jax.process_index(), jax.process_count()) if share else (0, 1)
        found = None
        if share or processes.is_first():
            folder = self.directory / str(step)
            found = digests.damage(folder, index, count)
            if not (folder / digests.FILE).exists() and self._unsealed(folder):
                found = digests.links(folder)  # all that can be said of it
        return processes.any_of(found)

    def _unsealed(self, folder: Path) -> bool:
        """Whether this is a checkpoint of the format that had no digests."""
        try:
            return json.loads((folder / "data" / "metadata").read_text())["format"] == _UNSEALED
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return False

    def newest_good(
        self, say: Callable[[str], Any], below: int | None = None, share: bool = True
    ) -> int | None:
        """The newest step (under `below`) whose checkpoint is as it was written; None: there is
        none at all. `say` is told of each damaged one that was passed over.

        Where the directory is written, damaged ones are moved to `<workdir>/damaged`, since the run
        will write the same steps again; nothing is deleted.

        Raises `UserError` when all checkpoints are damaged.
        """
        steps: list[int] = json.loads(processes.broadcast(json.dumps(self.steps())))
        steps = [step for step in steps if below is None or step < below]
        bad: dict[int, str] = {}
        for step in reversed(steps):
            if (problem := self.damage(step, share)) is None:
                for number, words in bad.items():
                    where = self._set_aside(number) if self.options is not None else None
                    kept = f", moved to {where}" if where else ""
                    say(f"the checkpoint of step {number} is damaged: {words}{kept}")
                if bad:
                    say(f"falling back to the checkpoint of step {step}")
                return step
            bad[step] = problem
        if bad:
            listed = "; ".join(f"step {number}: {words}" for number, words in bad.items())
            anew = ", or choose another --workdir to start anew" if self.options else ""
            raise UserError(
                f"every checkpoint in {self.directory} is damaged ({listed}): bring good copies "
                f"back{anew}"
            )
        return None

    def _set_aside(self, step: int) -> Path | None:
        """Moves a checkpoint out of the way, by the first process; where it lies now."""
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
                    f"{error.strerror}; move it away by hand"
                )
        processes.agree(problem)
        return target

    def forget_after(self, step: int) -> None:
        """Removes checkpoints newer than `step`: the run has gone back and will write them anew."""
        self.wait()
        if processes.is_first():
            for newer in self.steps():
                if newer > step:
                    self._remove(newer)
        processes.agree(None)

    def _remove(self, step: int) -> None:
        old = self.directory / f"{step}.old"  # no longer a checkpoint, however far removal comes
        os.rename(self.directory / str(step), old)
        shutil.rmtree(old)

    # -- writing ---------------------------------------------------------------------------

    def save(self, step: int, state: TrainState, config: TrainConfig, position: Position) -> None:
        """Starts writing `state`; returns when its buffers may be reused.

        Raises `UserError` when this or an earlier write failed (disk full, read-only, ...).
        """
        assert self._writer is not None
        self.wait()  # for the write before, so that an error is told of the step that it belongs to
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
        what = (step, names_of(state))
        self._thread = threading.Thread(target=self._complete, args=what, daemon=True)
        self._thread.start()

    def _complete(self, step: int, shapes: dict[str, tuple[int, ...]]) -> None:
        """Waits for orbax; then checks, seals, renames and removes what is no longer kept."""
        part = self.directory / f"{step}.part"
        try:
            assert self._writer is not None
            self._writer.wait_until_finished()
            if processes.is_first():
                if problem := missing(part / "state", shapes):
                    raise OSError(f"what was written cannot be read back: {problem}")
                digests.seal(part)
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
        if self.rewindable:
            kept.update([step for step in steps if step <= steps[-1] - self.rewindable][-1:])
        for step in steps:
            if step not in kept:
                self._remove(step)

    def writing(self) -> bool:
        """Whether a save is still on its way to disk."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raises `UserError` when a write under way has failed; does not wait for it."""
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise self._write_error(error) from error

    def wait(self) -> None:
        """Blocks until what was saved is on disk. Raises `UserError` when it could not be."""
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
            f"checkpoint {self.directory / str(step)} could not be read, it holds no {item} "
            f"that can be restored: {reason[0] if reason else type(error).__name__}"
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
        """The state of `step`, laid out as `abstract` says: shapes, dtypes and shardings."""
        handler = ocp.StandardCheckpointHandler()
        return self._arrays(step, handler, ocp.args.StandardRestore(abstract))

    def params(self, step: int, abstract: Any) -> Any:
        """The parameters of `step` alone, laid out as `abstract`: no moments are read."""
        restore_args = ocp.checkpoint_utils.construct_restore_args({"params": abstract})
        how = ocp.args.PyTreeRestore({"params": abstract}, restore_args, partial_restore=True)
        return self._arrays(step, ocp.PyTreeCheckpointHandler(), how)["params"]

    def config(self, step: int) -> TrainConfig:
        """The config inside the checkpoint of `step`: JSON, never code."""
        try:
            return from_dict(self._json(step, "config"))
        except UserError as error:
            raise UserError(f"checkpoint {self.directory / str(step)}: {error}") from error

    def position(self, step: int, data_digest: str) -> Position:
        """Where the run of `step` stands.

        Raises `UserError` unless `data_digest` is that of the data that the checkpoint has read.
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
                f"{_UNSEALED} and {FORMAT}"
            )
        if position.digest != data_digest:
            raise UserError(
                f"the data have changed since step {step} of {self.directory.parent} (checkpoint "
                f"{folder}): other files or another tokenizer would mean other tokens; bring the "
                "old data back, or choose another --workdir"
            )
        return position
