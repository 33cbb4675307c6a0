"""Checkpoints that describe themselves: orbax behind one small interface.

A checkpoint `<workdir>/checkpoints/<step>` holds the training state, the whole config as JSON and
the position in the data. It is restored into an abstract tree that carries target shardings, so
the mesh may differ from the one that wrote it. Saves are asynchronous: the loop goes on while the
previous state is written.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from absl import logging as absl_logging

from mea_jax.config import CheckpointConfig, TrainConfig
from mea_jax.errors import UserError
from mea_jax.train_step import TrainState

FORMAT = 1


@functools.cache  # once a process: each call would wrap the hooks once more
def _quiet_writers() -> None:
    """Keeps the writers' threads from printing tracebacks of their own after a failed write.

    When a write fails, orbax closes its event loop while other writes are under way; each of them
    then complains of the closed loop. The failure itself is raised by `check_for_errors`.
    """
    hook, unraisable = sys.excepthook, sys.unraisablehook

    def about_closed_loop(value: BaseException | None) -> bool:
        return isinstance(value, RuntimeError) and "Event loop is closed" in str(value)

    def quiet_hook(kind, value, trace) -> None:
        if not about_closed_loop(value):
            hook(kind, value, trace)

    def quiet_unraisable(args) -> None:
        if not about_closed_loop(args.exc_value):
            unraisable(args)

    # Not restored at the end: a failed write's threads may outlive the run that started them.
    sys.excepthook, sys.unraisablehook = quiet_hook, quiet_unraisable


def find_checkpoint(path: Path) -> tuple[Path, int | None]:
    """The run directory of a path that names it, its `checkpoints` or one step below; the step.

    Raises `UserError` where there is no checkpoint.
    """
    run, step = path, None
    if path.name.isdigit() and path.parent.name == "checkpoints":
        run, step = path.parent.parent, int(path.name)
    elif path.name == "checkpoints":
        run = path.parent
    if not path.exists():
        raise UserError(f"--checkpoint {path}: no such folder; give a run directory of train")
    if not (run / "checkpoints").is_dir():
        raise UserError(
            f"--checkpoint {path} holds no checkpoints: give a run directory of train, such as "
            "runs/quickstart, or one step of it, runs/quickstart/checkpoints/500"
        )
    return run, step


class Checkpoints:
    """The checkpoints of one run directory. Use as a context manager: leaving waits for writes."""

    def __init__(self, workdir: Path, options: CheckpointConfig | None = None):
        """With no `options` the directory is only read."""
        self.directory = (workdir / "checkpoints").absolute()
        self.pending: int | None = None  # the step whose write may still be under way
        # Orbax logs each phase of each save, and each failure with tracebacks: ours is one line.
        absl_logging.set_verbosity(absl_logging.FATAL)
        _quiet_writers()
        keep = None if options is None else ocp.checkpoint_managers.LatestN(options.keep)
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=options is not None,
                read_only=options is None,
                preservation_policy=keep,
            ),
            item_names=("state", "config", "data"),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_: Any) -> None:
        try:
            self.wait()
        except UserError:
            if kind is None:  # an error that is already on its way out comes first
                raise
        finally:
            self.manager.close()

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, config: TrainConfig, data_digest: str) -> None:
        """Starts writing `state`; returns when its buffers may be reused.

        `data_digest` is `Prepared.digest` of the data that the run reads.

        Raises `UserError` when this or an earlier write failed (disk full, read-only, ...).
        """
        self.wait()  # for the write before, so that an error is told of the step that it belongs to
        self.pending = step
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    config=ocp.args.JsonSave(config.to_dict()),
                    data=ocp.args.JsonSave(
                        {"format": FORMAT, "next_batch": step, "digest": data_digest}
                    ),
                ),
            )
        except Exception as error:
            raise self._write_error(error) from error

    def check(self) -> None:
        """Raises `UserError` when a write under way has failed; does not wait for it."""
        try:
            self.manager.check_for_errors()
        except Exception as error:
            raise self._write_error(error) from error

    def wait(self) -> None:
        """Blocks until what was saved is on disk. Raises `UserError` when it could not be."""
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except Exception as error:
            raise self._write_error(error) from error

    def _write_error(self, error: Exception) -> UserError:
        saved = self.latest()
        safe = f"the run is safe up to step {saved}" if saved is not None else "nothing is saved"
        reason = str(error).strip().splitlines()
        return UserError(
            f"the checkpoint of step {self.pending} could not be written to {self.directory}: "
            f"{reason[0] if reason else type(error).__name__}; {safe}; free space or make the "
            "directory writable, then run the same command again"
        )

    def _read(self, step: int, item: str, how: Any) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise UserError(
                f"checkpoint {self.directory / str(step)} could not be read, it holds no {item} "
                f"that can be restored: {reason[0] if reason else type(error).__name__}"
            ) from error

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of `step`, laid out as `abstract` says: shapes, dtypes and shardings."""
        return self._read(step, "state", ocp.args.StandardRestore(abstract))

    def params(self, step: int, abstract: Any) -> Any:
        """The parameters of `step` alone, laid out as `abstract`: no moments are read."""
        restore_args = ocp.checkpoint_utils.construct_restore_args({"params": abstract})
        how = ocp.args.PyTreeRestore({"params": abstract}, restore_args, partial_restore=True)
        return self._read(step, "state", how)["params"]

    def config(self, step: int) -> TrainConfig:
        """The config inside the checkpoint of `step`: JSON, never code."""
        return TrainConfig.from_dict(self._read(step, "config", ocp.args.JsonRestore()))

    def check_data(self, step: int, data_digest: str) -> None:
        """Raises `UserError` unless the data at hand are those that the checkpoint has read."""
        data = self._read(step, "data", ocp.args.JsonRestore())
        if (found := data.get("format")) != FORMAT:
            raise UserError(
                f"checkpoint {self.directory / str(step)} has format {found}, this version of "
                f"mea_jax reads {FORMAT}"
            )
        if data["digest"] != data_digest:
            raise UserError(
                f"the data have changed since step {step} of {self.directory.parent}: other files "
                "or another tokenizer would mean other tokens; bring the old data back, or choose "
                "another --workdir"
            )
