"""Write a run's metrics.jsonl, TensorBoard events and loss.png, and show its progress bar."""

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors, to_json, write_atomically


class EventFile:
    """A TensorBoard event file of scalars, written in the calling thread.

    tensorboardX's SummaryWriter writes in another thread. On a full disk this thread ends with
    tracebacks that no caller can catch, and again at exit.
    """

    FLUSH_SECONDS = 30.0
    _number = itertools.count()  # names contain the second, in which a process may open several

    def __init__(self, directory: Path, purge_step: int):
        """Open a file in which `purge_step` and later steps replace those of earlier files.

        Raise `OSError` if the disk refuses.
        """
        # These take a second to import.
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2, summary_pb2
        directory.mkdir(parents=True, exist_ok=True)
        suffix = f".{os.getpid()}.{next(self._number)}"
        self._file = event_file_writer.EventsWriter(str(directory / "events"), suffix)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=purge_step, session_log=start)
        self._flushed = time.monotonic()

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the scalars of a step by their names. Raise `OSError` if the disk refuses."""
        values = [
            self._summary.Summary.Value(tag=name, simple_value=value)
            for name, value in scalars.items()
        ]
        self._write(step=step, summary=self._summary.Summary(value=values))
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def _write(self, **content: Any) -> None:
        self._file.write_event(self._event.Event(wall_time=time.time(), **content))

    def close(self) -> None:
        """Close the file. Raise `OSError` if the disk refuses the rest."""
        self._file.close()


class MetricsWriter:
    """A writer that appends rows to metrics.jsonl and scalars to TensorBoard.

    Each row is flushed immediately. Rows of steps after `start_step` were written by a run that was
    interrupted after its last checkpoint: they are dropped, since those steps run again. So are
    rows of `start_step` itself whose kind is in `redo`.
    """

    def __init__(self, workdir: Path, start_step: int, redo: Sequence[str] = ()):
        def keep(row):
            return row["step"] < start_step or (
                row["step"] == start_step and row["kind"] not in redo
            )

        self.path = workdir / "metrics.jsonl"
        with disk_errors(self.path):
            kept = [row for row in read_metrics(self.path) if keep(row)]
            write_atomically(self.path, "".join(to_json(row) + "\n" for row in kept))
            self.file = self.path.open("a")
            self.board = EventFile(workdir / "tensorboard", start_step + 1)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Write one row {"step", "kind", ...}, with arrays as lists; TensorBoard gets their means.

        Numbers that are not finite are null in the file. Raise `UserError` if the disk refuses.
        """
        row = {name: np.asarray(value).tolist() for name, value in values.items()}
        with disk_errors(self.path):
            self.file.write(to_json({"step": step, "kind": kind} | row) + "\n")
            self.file.flush()
            means = {f"{kind}/{name}": float(np.mean(value)) for name, value in values.items()}
            self.board.add(step, means)

    def close(self) -> None:
        """Close both files. Raise `UserError` if the disk refuses the rest."""
        with disk_errors(self.path), contextlib.closing(self.file):
            self.board.close()


class NoWriter:
    """The `MetricsWriter` of every process except the first; it writes nothing."""

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, up to a line that a kill has cut short."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Progress:
    """A progress bar with loss, speed and ETA on a terminal; otherwise a line every 15 s."""

    LINE_SECONDS = 15.0

    def __init__(self, start: int, total: int, enabled: bool = True):
        self.total, self.start, self.began = total, start, time.monotonic()
        self.last_line = self.began
        self.lines = enabled and not sys.stderr.isatty()
        self.bar = tqdm.tqdm(
            total=total,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not enabled or self.lines,
        )

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show that `step` updates are done, with the loss and the speed."""
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", False)
        self.bar.update(step - self.bar.n)
        now = time.monotonic()
        if self.lines and (now - self.last_line > self.LINE_SECONDS or step == self.total):
            self.last_line = now
            left = (now - self.began) / (step - self.start) * (self.total - step)
            sys.stderr.write(
                f"step {step}/{self.total}  loss {loss:.3f}  "
                f"{tokens_per_second:,.0f} tokens/s  ETA {left:.0f} s\n"
            )

    def log(self, line: str) -> None:
        """Print a line above the bar."""
        if not self.bar.disable:
            tqdm.tqdm.write(line, file=sys.stderr)
        elif self.lines:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()


def plot_loss(
    workdir: Path, title: str, bits_per_nat: float | None, baselines: Mapping[str, float]
) -> Path:
    """Draw loss.png from metrics.jsonl: training and held-out loss against the step.

    Args:
      workdir: the run directory.
      title: the title of the figure.
      bits_per_nat: bits per byte of held-out text for one nat per token; gives a second axis.
      baselines: bits per byte of other compressors by name, as horizontal lines.

    Returns:
      The path of loss.png. Raises `UserError` if the disk refuses it.
    """
    plt = cli.pyplot()
    rows = read_metrics(workdir / "metrics.jsonl")

    def losses_of(kind: str) -> np.ndarray:  # as floats: null is nan
        points = [(row["step"], row["loss"]) for row in rows if row["kind"] == kind]
        return np.array(points, np.float64).reshape(-1, 2)

    train, held = losses_of("train"), losses_of("held_out")
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if len(train):
        axis.plot(train[:, 0], train[:, 1], color="0.75", linewidth=0.8, label="training, per step")
        window = max(len(train) // 20, 1)
        smooth = np.convolve(train[:, 1], np.ones(window) / window, mode="valid")
        axis.plot(train[window - 1 :, 0], smooth, color="C0", label="training, running mean")
    if len(held):
        axis.plot(held[:, 0], held[:, 1], "o-", color="C1", markersize=4, label="held-out")
    _mark_events(axis, rows)
    losses = np.concatenate([train[:, 1], held[:, 1]])
    losses = losses[np.isfinite(losses)]
    marks = [bits / bits_per_nat for bits in baselines.values()] if bits_per_nat else []
    if len(losses):
        low = min([losses.min(), *marks])
        axis.set_ylim(low - 0.1 * (losses.max() - low), losses.max() * 1.03)
    axis.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axis.grid(alpha=0.3)
    if bits_per_nat:
        second = axis.secondary_yaxis(
            "right",
            functions=(
                lambda y: np.asarray(y) * bits_per_nat,
                lambda y: np.asarray(y) / bits_per_nat,
            ),
        )
        second.set_ylabel("bits per byte of held-out text")
        for (name, bits), style in zip(baselines.items(), ("--", ":"), strict=False):
            label = f"{name}: {bits:.2f} bits per byte"
            axis.axhline(bits / bits_per_nat, color="0.3", linestyle=style, label=label)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
    path = workdir / "loss.png"
    with disk_errors(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _mark_events(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw vertical lines at the steps where a guard acted."""
    kinds = {
        "skipped_update": ("update skipped", "0.4", ":"),
        "spike": ("spike", "C3", "--"),
        "rewind": ("rewound to here", "C3", "-"),
    }
    for kind, (label, color, style) in kinds.items():
        # A spike begins before the step that detects it; a rewind's step is where it goes back to.
        where = "first" if kind == "spike" else "step"
        steps = [row[where] for row in rows if row["kind"] == kind]
        for number, step in enumerate(steps):
            axis.axvline(
                step,
                color=color,
                linestyle=style,
                linewidth=0.8,
                label=f"{label} ({len(steps)})" if number == 0 else None,
            )
