"""Run a grid: `python -m mea_jax.study run --config configs/lr_study.py`.

The runs of a cell train in one program, or in several of at most `at_once` runs. Runs with a row in
the store are finished and are not repeated; unfinished programs resume from their checkpoint.
`--shard i/n` runs every n-th program, to divide a grid among n machines. `--workers` starts several
processes on this machine.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from mea_jax import cli
from mea_jax.checkpoint.lock import hold
from mea_jax.checkpoint.manager import Checkpoints, Position
from mea_jax.data.pipeline import held_out_batches, train_batches
from mea_jax.data.prepare import Prepared, prepare
from mea_jax.errors import UserError
from mea_jax.parallel import preemption
from mea_jax.parallel.host import accelerator_attached
from mea_jax.parallel.preemption import Preempted, StopRequest
from mea_jax.study.grid import Cell, Grid, Member, grid_of
from mea_jax.study.histories import History, row_of
from mea_jax.study.store import Store, key_of
from mea_jax.study.vmapped import Sweep
from mea_jax.train.saving import SaveTimes

LogFn = Callable[[str], Any]
_EVERY = 15.0  # seconds between progress lines


class GridProgress:
    """The progress of the grid in FLOPs, with the remaining time."""

    def __init__(self, whole: float, log: LogFn):
        self.whole, self.done, self.log = whole, 0.0, log
        self.began = self.last_report = time.monotonic()

    def tick(self, work: float, line: str) -> None:
        """Add `work` finished FLOPs; print `line` and the progress at most every `_EVERY` s."""
        self.done += work
        now = time.monotonic()
        if now - self.last_report >= _EVERY:
            self.last_report = now
            left = (now - self.began) * (self.whole - self.done) / max(self.done, 1.0)
            self.log(f"{line}; grid {self.done / self.whole:.0%} done, ETA {left / 60:.0f} min")


class SweepRun:
    """Runs of one cell that train together."""

    def __init__(self, grid: Grid, cell: Cell, members: Sequence[Member], out: Path, log: LogFn):
        self.grid, self.cell, self.members, self.log = grid, cell, tuple(members), log
        about = json.dumps([cell.config.to_dict(), [vars(m) for m in members]], sort_keys=True)
        digest = hashlib.sha256(about.encode()).hexdigest()[:8]
        name = f"{cell.variant}-{cell.size}-{cell.steps}-{digest}"
        self.folder = out / "unfinished" / name
        self.sweep = Sweep(cell.config, members, jax.devices())
        self.histories = [History(grid.spikes) for _ in members]

    def train(self, store: Store, watch: GridProgress, stop: StopRequest) -> None:
        """Train from the newest checkpoint to the end and append a row for each run to `store`.

        Raise `UserError` if the data has no held-out text, and `Preempted` after a checkpoint if
        `stop` was requested.
        """
        config = self.cell.config
        self.folder.mkdir(parents=True, exist_ok=True)
        prepared = prepare(config.data, config.model.vocab_size, log=lambda line: None)
        with (
            hold(self.folder, self.log),
            jax.set_mesh(self.sweep.mesh),
            Checkpoints(self.folder, config.checkpoint) as checkpoints,
            stop.deferred(),
        ):
            start = checkpoints.newest_good(self.log) or 0
            began = time.monotonic()
            if start:
                position = checkpoints.position(start, prepared.digest)
                assert position.guards is not None
                stored = position.guards["histories"]
                self.histories = [History(self.grid.spikes).restored(s) for s in stored]
                self.spent = float(position.guards["seconds"])
                state = checkpoints.restore(start, self.sweep.abstract_state())
                watch.done += start / config.steps * self.cell.work() * len(self.members)
                self.log(f"{self.cell}: resuming from step {start}")
            else:
                state, self.spent = self.sweep.create(), 0.0
                self._note(0, self._losses(state, prepared, config.evaluate.batches))
            state = self._loop(state, start, prepared, checkpoints, watch, stop, began)
            losses = self._losses(state, prepared, None)
            seconds = (self.spent + time.monotonic() - began) / len(self.members)
            for member, history, loss in zip(self.members, self.histories, losses, strict=True):
                store.append(row_of(self.cell, member, history, float(loss), seconds))
        shutil.rmtree(self.folder)

    def _loop(self, state, start, prepared: Prepared, checkpoints, watch, stop, began) -> Any:
        config, saves = self.cell.config, SaveTimes(self.cell.config.checkpoint, stop)
        seeds = self.sweep.seeds
        read = functools.partial(
            train_batches,
            prepared,
            batch_size=config.batch_size,
            start_step=start,
            threads=config.data.read_threads,
            prefetch=config.data.prefetch,
            skip_bad=config.data.bad_input == "skip",
        )
        batches = [read(seed=seed) for seed in seeds]
        work = self.cell.work() / config.steps * len(self.members)
        pending: tuple[int, Any] | None = None
        for step in range(start + 1, config.steps + 1):
            state, metrics = self.sweep.step(state, self.sweep.put([next(b) for b in batches]))
            if pending is not None:
                self._take(*pending, watch, work)
            pending = (step, metrics)
            evaluating = config.evaluate.every and step % config.evaluate.every == 0
            saving = saves.due(step) and step < config.steps
            if evaluating or saving or step == config.steps:
                self._take(*pending, watch, work)
                pending = None
            if evaluating and step < config.steps:
                self._note(step, self._losses(state, prepared, config.evaluate.batches))
            if saving:
                spent = self.spent + time.monotonic() - began
                last_report = {"histories": [h.state() for h in self.histories], "seconds": spent}
                position = Position(step, prepared.digest, last_report)
                checkpoints.save(step, state, self.sweep.config, position)
                saves.saved()
                if saves.stopping:
                    checkpoints.wait()
                    raise Preempted(f"{self.cell}: stopped after step {step}, which is saved")
        return state

    def _take(self, step: int, metrics: Any, watch: GridProgress, work: float) -> None:
        """Fetch the metrics of a step, add them to the histories and report progress."""
        found = jax.device_get(metrics)
        for history, loss, skipped in zip(
            self.histories, found["loss"], found["skipped"], strict=True
        ):
            history.feed(step, float(loss), bool(skipped))
        low, high = np.nanmin(found["loss"]), np.nanmax(found["loss"])
        line = f"{self.cell}, {len(self.members)} runs: step {step}, losses {low:.3f} to {high:.3f}"
        watch.tick(work, line)

    def _losses(self, state: Any, prepared: Prepared, batches: int | None) -> np.ndarray:
        """Return the held-out loss of each run, nats per token."""
        size, total = self.cell.config.batch_size, np.zeros((2, len(self.members)))
        for batch in held_out_batches(prepared, batch_size=size, max_batches=batches):
            sums = jax.device_get(self.sweep.evaluate(state.params, batch))
            total += np.stack([sums["nll"], sums["tokens"]])
        if not total[1].all():
            raise UserError(
                f"cell {self.cell}: no held-out text: increase base.data.held_out_fraction"
            )
        return total[0] / total[1]

    def _note(self, step: int, losses: np.ndarray) -> None:
        tokens = step * self.cell.config.batch_size * self.cell.config.data.context_length
        for history, loss in zip(self.histories, losses, strict=True):
            history.curve.append([tokens, float(loss)])


def run(
    grid: Grid, out: Path, log: LogFn, stop: StopRequest, shard: tuple[int, int] = (0, 1)
) -> int:
    """Train the runs of `shard` that the store in `out` lacks and return their number.

    `shard` (i, n) selects the programs whose number is i modulo n. Raise `UserError` if the store
    contains rows of another grid or malformed rows, or if the data of a cell is unusable.
    """
    store = Store(out)
    store.claim(grid.fingerprint)
    wanted = []
    for number, (cell, members) in enumerate(grid.chunks()):
        if number % shard[1] == shard[0]:
            wanted.append((cell, members))
    done = {key_of(row) for row in store.rows()}
    chunks = []
    for cell, members in wanted:
        missing = tuple(m for m in members if _key(cell, m) not in done)
        if missing:
            chunks.append((cell, missing))
    count = sum(len(members) for _, members in chunks)
    total = sum(len(members) for _, members in wanted)
    log(f"{count} of {total} runs to do, in {len(chunks)} programs")
    watch = GridProgress(sum(cell.work() * len(members) for cell, members in chunks), log)
    for cell, members in chunks:
        began = time.monotonic()
        SweepRun(grid, cell, members, out, log).train(store, watch, stop)
        log(f"{cell}: {len(members)} runs in {time.monotonic() - began:.0f} s")
        jax.clear_caches()  # no later program has the same shape
    return count


def _key(cell: Cell, member: Member) -> tuple:
    return cell.variant, cell.size, cell.steps, member.learning_rate, member.seed


def parse_shard(text: str) -> tuple[int, int]:
    """Parse a shard such as "0/4" into (0, 4); raise `UserError` if it is malformed."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--shard={text} is not a shard: expected i/n with 0 <= i < n, such as 0/4")
    return int(index), int(count)


def without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return a command line without the flags `names`, given as --name=value or --name value."""
    kept: list[str] = []
    skipping = False
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        flag = word.startswith("-") and name in names
        if not (flag or skipping):
            kept.append(word)
        skipping = flag and not equals
    return kept


def _work(workers: int, shard: tuple[int, int]) -> None:
    """Start the command `workers` times, each with its part of shard and cores, and wait.

    Raise `UserError` if an accelerator is attached, if there are fewer cores than workers, or if a
    worker failed.
    """
    if accelerator_attached():
        raise UserError("--workers is for CPUs, but an accelerator is attached: remove --workers")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= workers <= len(cores):
        raise UserError(f"--workers={workers} must be from 1 to {len(cores)}, this machine's cores")
    index, count = shard
    kept = without(sys.argv[1:], ("workers", "shard"))
    command = [sys.executable, "-m", "mea_jax.study", "run", *kept]
    started = []
    for k in range(workers):
        share = f"--shard={index + k * count}/{count * workers}"
        mine = functools.partial(os.sched_setaffinity, 0, cores[k::workers])
        started.append(subprocess.Popen([*command, share], preexec_fn=mine))
    try:
        statuses = [process.wait() for process in started]
    except BaseException:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        raise
    if failed := [status for status in statuses if status]:
        raise UserError(f"{len(failed)} of {workers} workers failed: fix the errors printed above")


def table(grid: Grid, out: Path) -> str:
    """Return one line per cell with its size, tokens, and the number of finished runs."""
    done = {key_of(row) for row in Store(out).rows()}
    lines = []
    for cell in grid.cells:
        have = sum(_key(cell, m) in done for m in cell.members)
        lines.append(
            f"{cell!s:<44} {cell.parameters() / 1e6:7.2f} M  {cell.tokens() / 1e6:8.1f} M tokens  "
            f"{have:3d} of {len(cell.members):3d} runs done"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the command `run` with its flags."""
    grid = grid_of(cli.given_config(CONFIG, "configs/lr_study.py"))
    out, shard = Path(OUT.value or Path("runs") / grid.name), parse_shard(SHARD.value)
    if LIST.value:
        print(table(grid, out))
        return
    if WORKERS.value != 1:
        Store(out).claim(grid.fingerprint)  # before several workers try to
        _work(WORKERS.value, shard)
        return
    cli.enable_compilation_cache()
    with preemption.listen() as stop, contextlib.redirect_stdout(sys.stderr):
        run(grid, out, functools.partial(print, flush=True), stop, shard)
    print(f"rows in {out / 'rows.jsonl'}; next: python -m mea_jax.study report --store {out}")


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file(
        "config",
        None,
        "study config, such as configs/lr_study.py; --config.seeds='(0,1)' overrides a key",
    )
    OUT = flags.DEFINE_string("out", None, "directory of the store (default: runs/STUDY_NAME)")
    SHARD = flags.DEFINE_string("shard", "0/1", "i/n: run every n-th program, starting at number i")
    WORKERS = flags.DEFINE_integer("workers", 1, "number of processes that share the CPU cores")
    LIST = flags.DEFINE_bool("list", False, "print the grid and how many of its runs are done")
    flags.declare_key_flag("config")
    cli.run(main, "stopped; run the same command to resume", training=False)
