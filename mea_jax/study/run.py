"""Runs a grid: `python -m mea_jax.study run --config configs/lr_study.py`.

Each cell's runs train in one program (`sweep`). Rows of finished runs are in the store and not done
again; what is unfinished goes on from its checkpoint. `--shard i/n` takes every n-th program, for
as many machines; `--workers` starts as many processes on this one.
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

Say = Callable[[str], Any]
_EVERY = 15.0  # seconds between lines of progress


class GridProgress:
    """How much of the grid is done, and when the rest will be."""

    def __init__(self, whole: float, say: Say):
        self.whole, self.done, self.say = whole, 0.0, say
        self.began = self.told = time.monotonic()

    def tick(self, work: float, line: str) -> None:
        """`work` more FLOPs are done; tells now and then."""
        self.done += work
        now = time.monotonic()
        if now - self.told >= _EVERY:
            self.told = now
            left = (now - self.began) * (self.whole - self.done) / max(self.done, 1.0)
            self.say(f"{line}; grid {self.done / self.whole:.0%}, ETA {left / 60:.0f} min")


class Chunk:
    """Runs of one cell that train together."""

    def __init__(self, grid: Grid, cell: Cell, members: Sequence[Member], out: Path, say: Say):
        self.grid, self.cell, self.members, self.say = grid, cell, tuple(members), say
        about = json.dumps([cell.config.to_dict(), [vars(m) for m in members]], sort_keys=True)
        digest = hashlib.sha256(about.encode()).hexdigest()[:8]
        name = f"{cell.variant}-{cell.size}-{cell.steps}-{digest}"
        self.folder = out / "unfinished" / name
        self.sweep = Sweep(cell.config, members, jax.devices())
        self.histories = [History(grid.spikes) for _ in members]

    def train(self, store: Store, watch: GridProgress, stop: StopRequest) -> None:
        """From its newest checkpoint to the rows of all its runs."""
        config = self.cell.config
        self.folder.mkdir(parents=True, exist_ok=True)
        prepared = prepare(config.data, config.model.vocab_size, log=lambda line: None)
        with (
            hold(self.folder, self.say),
            jax.set_mesh(self.sweep.mesh),
            Checkpoints(self.folder, config.checkpoint) as checkpoints,
            stop.deferred(),
        ):
            start = checkpoints.newest_good(self.say) or 0
            began = time.monotonic()
            if start:
                position = checkpoints.position(start, prepared.digest)
                assert position.guards is not None
                stored = position.guards["histories"]
                self.histories = [History(self.grid.spikes).restored(s) for s in stored]
                self.spent = float(position.guards["seconds"])
                state = checkpoints.restore(start, self.sweep.abstract_state())
                watch.done += start / config.steps * self.cell.work() * len(self.members)
                self.say(f"{self.cell}: going on from step {start}")
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
                told = {"histories": [h.state() for h in self.histories], "seconds": spent}
                position = Position(step, prepared.digest, told)
                checkpoints.save(step, state, self.sweep.config, position)
                saves.saved()
                if saves.stopping:
                    checkpoints.wait()
                    raise Preempted(f"{self.cell}: stopped after step {step}, which is saved")
        return state

    def _take(self, step: int, metrics: Any, watch: GridProgress, work: float) -> None:
        """The metrics of a step, to the histories."""
        found = jax.device_get(metrics)
        for history, loss, skipped in zip(
            self.histories, found["loss"], found["skipped"], strict=True
        ):
            history.feed(step, float(loss), bool(skipped))
        low, high = np.nanmin(found["loss"]), np.nanmax(found["loss"])
        line = f"{self.cell}, {len(self.members)} runs: step {step}, losses {low:.3f} to {high:.3f}"
        watch.tick(work, line)

    def _losses(self, state: Any, prepared: Prepared, batches: int | None) -> np.ndarray:
        """Held-out nats per token of each run."""
        size, total = self.cell.config.batch_size, np.zeros((2, len(self.members)))
        for batch in held_out_batches(prepared, batch_size=size, max_batches=batches):
            sums = jax.device_get(self.sweep.evaluate(state.params, batch))
            total += np.stack([sums["nll"], sums["tokens"]])
        if not total[1].all():
            raise UserError(f"cell {self.cell}: its data have no held-out text to measure on")
        return total[0] / total[1]

    def _note(self, step: int, losses: np.ndarray) -> None:
        tokens = step * self.cell.config.batch_size * self.cell.config.data.context_length
        for history, loss in zip(self.histories, losses, strict=True):
            history.curve.append([tokens, float(loss)])


def run(grid: Grid, out: Path, say: Say, stop: StopRequest, shard: tuple[int, int] = (0, 1)) -> int:
    """Trains what the store in `out` lacks; how many runs that were. Raises `UserError`."""
    store = Store(out)
    store.claim(grid.identity)
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
    say(f"{count} of {total} runs to do, in {len(chunks)} programs")
    watch = GridProgress(sum(cell.work() * len(members) for cell, members in chunks), say)
    for cell, members in chunks:
        began = time.monotonic()
        Chunk(grid, cell, members, out, say).train(store, watch, stop)
        say(f"{cell}: {len(members)} runs in {time.monotonic() - began:.0f} s")
        jax.clear_caches()  # programs of a shape that does not come again
    return count


def _key(cell: Cell, member: Member) -> tuple:
    return cell.variant, cell.size, cell.steps, member.learning_rate, member.seed


def parse_shard(text: str) -> tuple[int, int]:
    """ "0/4" as (0, 4). Raises `UserError`."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--shard {text}: expected i/n with 0 <= i < n, such as 0/4")
    return int(index), int(count)


def without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """A command line without some flags, given as --name=value or as --name value."""
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
    """Starts the command `workers` times, each with its share of shard and cores, and waits."""
    if accelerator_attached():
        raise UserError("--workers is for CPUs: an accelerator trains a cell's runs together")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= workers <= len(cores):
        raise UserError(f"--workers {workers}: this machine has {len(cores)} cores")
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
        raise UserError(f"{len(failed)} of {workers} workers failed; each has said why above")


def table(grid: Grid, out: Path) -> str:
    """What there is to do, a line a cell."""
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
    grid = grid_of(cli.given_config(CONFIG, "configs/lr_study.py"))
    out, shard = Path(OUT.value or Path("runs") / grid.name), parse_shard(SHARD.value)
    if LIST.value:
        print(table(grid, out))
        return
    if WORKERS.value != 1:
        Store(out).claim(grid.identity)  # before there are several of them
        _work(WORKERS.value, shard)
        return
    cli.enable_compilation_cache()
    with preemption.listen() as stop, contextlib.redirect_stdout(sys.stderr):
        run(grid, out, functools.partial(print, flush=True), stop, shard)
    print(f"rows in {out / 'rows.jsonl'}; next: python -m mea_jax.study report --store {out}")


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file(
        "config", None, "a study, such as configs/lr_study.py; --config.seeds='(0,1)' overrides"
    )
    OUT = flags.DEFINE_string("out", None, "folder of the store; default runs/<name of the study>")
    SHARD = flags.DEFINE_string("shard", "0/1", "i/n: every n-th program, from the i-th on")
    WORKERS = flags.DEFINE_integer("workers", 1, "processes on this machine, which share its cores")
    LIST = flags.DEFINE_bool("list", False, "print the grid and what of it is done")
    flags.declare_key_flag("config")
    cli.run(main, "stopped; the same command goes on", training=False)
