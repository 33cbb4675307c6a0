"""Run the training loop: read batches, update, save checkpoints and write metrics.

Inside the loop only the metrics of the previous step leave the device, fetched while the next step
runs. The guards read these metrics, so they act one step late. The device itself leaves out an
update that must not count.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import jax

from mea_jax.checkpoint import metrics as checkpoint_metrics
from mea_jax.checkpoint.manager import Checkpoints, Position
from mea_jax.checkpoint.run_directory import RunDirectory
from mea_jax.config.schema import TrainConfig
from mea_jax.data.pipeline import batch_number, train_batches
from mea_jax.data.prepare import Prepared
from mea_jax.errors import UserError
from mea_jax.model import flops
from mea_jax.model.params import TrainState
from mea_jax.parallel import processes
from mea_jax.parallel.batches import BatchPlacer
from mea_jax.parallel.preemption import Preempted, StopRequest
from mea_jax.train import profiling
from mea_jax.train.guards import Event, Guards, Spike
from mea_jax.train.held_out import HeldOut
from mea_jax.train.saving import SaveTimes
from mea_jax.train.step import abstract_state, compile_train_step
from mea_jax.train.warm_start import Start


@dataclass
class Timing:
    """Wall-clock time of this process in a run, in seconds."""

    compile: float = 0.0
    steps: float = 0.0  # from one arrival of metrics to the next
    data_wait: float = 0.0  # the part of `steps` spent waiting for batches
    saving: float = 0.0  # in addition to `steps`, until the loop continues
    timed_steps: int = 0


class Loop:
    """A training loop with its batches, compiled step, guards, checkpoints and reports."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: jax.sharding.Mesh,
        prepared: Prepared,
        run: RunDirectory,
        checkpoints: Checkpoints,
        start: Start,
        stop: StopRequest | None = None,
    ):
        self.config, self.mesh, self.prepared = config, mesh, prepared
        self.run_directory, self.checkpoints = run, checkpoints
        self.start, self.teacher = start, start.load_teacher(prepared.tokenizer)
        self.teacher_args = () if self.teacher is None else (self.teacher.params,)
        self.place = BatchPlacer(mesh, config.batch_size, config.data.context_length)
        self.held_out = HeldOut(config, mesh, prepared, self.place)
        self.guards = Guards(config.guards)
        self.stop = stop or StopRequest()
        self.saves = SaveTimes(config.checkpoint, self.stop)
        tokens = config.batch_size * config.data.context_length
        self.step_flops = flops.step_flops(config.model, config.data.context_length, tokens)
        peak = flops.peak_flops(mesh.devices.flat[0].device_kind)
        self.peak = peak * mesh.size if peak else None
        self.timing, self.loss = Timing(), math.nan
        self.step_fn: Any = None

    # -- resuming --------------------------------------------------------------------------

    def resume(self, step: int, position: Position) -> TrainState:
        """Return the state after `step` updates, and restore the guards of that step.

        The state is a fresh start if `step` is 0, otherwise that of the checkpoint. Raises
        `UserError` if the next batch in `position` contradicts the batches that it leaves out.
        """
        self.guards = Guards(self.config.guards, position.guards)
        if (number := batch_number(step, self.guards.left_out)) != position.next_batch:
            raise UserError(
                f"the checkpoint of step {step} continues with batch {position.next_batch}, but "
                f"its left-out batches imply batch {number}: use another checkpoint"
            )
        if step == 0:
            return self.start.state()
        return self.checkpoints.restore(step, abstract_state(self.config, self.mesh))

    def position(self, step: int) -> Position:
        """Return the position of the run after `step` updates."""
        number = batch_number(step, self.guards.left_out)
        return Position(number, self.prepared.digest, self.guards.state())

    # -- the loop --------------------------------------------------------------------------

    def run(self, state, start: int, profile_steps: tuple[int, int] | None = None):
        """Train from update `start` to `config.steps` and return the last state.

        Raises:
          UserError: a limit of the guards is exceeded, data cannot be read, or a disk not written.
          Preempted: SIGTERM requested a stop, and the run is saved.
        """
        # If the run was killed during a rewind, the spike is detected and rewound again.
        redo = ("rewind",) if start else ("rewind", "held_out", "diagnostics")
        writer = self.run_directory.open_metrics(start, redo)
        try:
            if start == 0 and self.config.start.checkpoint:
                # On all held-out text, as at the end: the loss that the run has to improve on.
                everything = self.held_out.read(None)
                self._evaluate(0, state, everything, writer, self.run_directory.log)
            while True:
                try:
                    state = self._train_until_event(state, start, writer, profile_steps)
                    break
                except Spike as caught:
                    spike = caught.with_traceback(None)  # its frames keep the state alive
                del state
                state, start, event = self._rewind(spike)
                writer.close()
                writer = self.run_directory.open_metrics(start)
                self._log_event(start, event, writer, self.run_directory.log)
                profile_steps = None  # traced already, or too late
        finally:
            writer.close()
        if (
            self.stop.requested and not processes.is_distributed()
        ):  # during the last step or just after it
            self.checkpoints.wait()
            raise Preempted("stopped by SIGTERM after the last step: run the same command again")
        return state

    def _rewind(self, spike: Spike) -> tuple[TrainState, int, Event]:
        """Return the state and step of the newest checkpoint before the spike, and the event."""
        # A step's loss is that of the parameters before it: the previous update may be the cause.
        cause = max(spike.first - 1, 1)
        now = self.guards
        first, last = (batch_number(s - 1, now.left_out) for s in (cause, spike.last))
        with jax.transfer_guard("allow"):
            self.checkpoints.wait()
            log = self.run_directory.log
            step = self.checkpoints.newest_good(log, below=cause, share=False) or 0
            self.checkpoints.forget_after(step)
            digest = self.prepared.digest
            position = self.checkpoints.position(step, digest) if step else Position(0, digest)
            state = self.resume(step, position)
        self.guards.left_out, self.guards.rewinds = now.left_out, now.rewinds
        self.saves = SaveTimes(self.config.checkpoint, self.stop)  # the announced step is far ahead
        return state, step, self.guards.rewound(spike, (first, last))

    def _batches(self, start: int):
        c = self.config
        return train_batches(
            self.prepared,
            seed=c.seed,
            batch_size=c.batch_size,
            start_step=start,
            left_out=self.guards.left_out,
            threads=c.data.read_threads,
            prefetch=c.data.prefetch,
            rows=self.place.rows,
            skip_bad=c.data.bad_input == "skip",
        )

    def _compiled(self, state, batch):
        if self.step_fn is None:
            began = time.perf_counter()
            teacher = None if self.teacher is None else self.teacher.model
            step = compile_train_step(self.config, self.mesh, teacher)
            self.step_fn = step.lower(state, batch, *self.teacher_args).compile()
            self.timing.compile = time.perf_counter() - began
        return self.step_fn

    def _train_until_event(self, state, start, writer, profile_steps):
        """Train as `run` does, until the last step or a `Spike`."""
        c, place = self.config, self.place
        if start == c.steps:  # interrupted between the last checkpoint and the summary
            return state
        batches = self._batches(start)
        batch = place(next(batches))
        step_fn = self._compiled(state, batch)
        progress = checkpoint_metrics.Progress(start, c.steps, enabled=processes.is_first())
        # One trace is enough: all processes run the same program.
        traced = profile_steps if processes.is_first() else None
        directory = self.run_directory.path / "profile"
        profile = profiling.Profile(traced, directory, start, progress.log)
        pending: tuple[int, Any] | None = None
        clock = time.perf_counter()
        try:
            with jax.transfer_guard("disallow"), profile, self.stop.deferred():
                for step in range(start + 1, c.steps + 1):
                    with profile.step(step, (state, batch)):
                        state, metrics = step_fn(state, batch, *self.teacher_args)
                    clock += profile.after(step, (state, metrics))
                    waiting = time.perf_counter()
                    if step < c.steps:
                        batch = place(next(batches))
                    self.timing.data_wait += time.perf_counter() - waiting
                    # Fetch the previous step's metrics while this step runs.
                    if pending is not None:
                        clock = self.report_step(*pending, clock, writer, progress)
                    pending = (step, metrics)
                    self.checkpoints.check()
                    evaluating = c.evaluate.every and step % c.evaluate.every == 0
                    saving = self.saves.due(step)
                    if step == c.steps or evaluating or saving:
                        self.report_step(*pending, clock, writer, progress)
                        pending = None
                        if evaluating and step < c.steps:
                            self._evaluate(step, state, self.held_out.sample, writer, progress.log)
                        if step == c.steps or saving:
                            self._save(step, state, batch)
                        clock = time.perf_counter()
        finally:
            progress.close()
        return state

    def report_step(self, step, metrics, clock, writer, progress) -> float:
        """Wait for a step's metrics, check and write them, and return their arrival time.

        The time is that of `time.perf_counter`. Raises what `Guards.check` raises.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds = now - clock
        self.timing.steps += seconds
        self.timing.timed_steps += 1
        self.loss = values["loss"]
        for event in self.guards.check(step, values):
            self._log_event(step, event, writer, progress.log)
        values["tokens_per_second"] = values["tokens"] / seconds
        values["flops_per_second"] = self.step_flops / seconds
        if self.peak:
            values["mfu"] = values["flops_per_second"] / self.peak
        if step % self.config.log_every == 0 or step in (1, self.config.steps):
            writer.write(step, "train", values)
        progress.update(step, values["loss"], self.tokens_per_second())
        return now

    def _log_event(self, step: int, event: Event, writer, log) -> None:
        writer.write(step, event.kind, event.values)
        log(event.line)

    def _evaluate(self, step, state, batches, writer, log) -> None:
        values = self.held_out.report(step, state.params, batches, writer)
        if not values:
            return
        bits = (
            f" ({values['bits_per_byte']:.3f} bits per byte)" if "bits_per_byte" in values else ""
        )
        distances = values.get("mixing_distance")
        note = f", mixing distance {distances:.1%}" if distances is not None else ""
        log(f"step {step}: held-out loss {values['loss']:.4f}{bits}{note}")

    # -- saving ----------------------------------------------------------------------------

    def _save(self, step, state, batch) -> None:
        """Save the state after `step`; raise `Preempted` if a stop was requested."""
        began = time.perf_counter()
        self.run_directory.check_claim()
        self.check_state(step, state, batch)
        # The transfer guard would reject Orbax's copies to the host.
        with jax.transfer_guard("allow"):
            self.checkpoints.save(step, state, self.config, self.position(step))
        self.saves.saved()
        if self.saves.stopping and step < self.config.steps:
            self.checkpoints.wait()
            processes.raise_on_all(
                None
            )  # wait for the checksums: the first process to exit ends all
            raise Preempted(
                f"stopped by SIGTERM after step {step} of {self.config.steps}, which is saved; "
                "run the same command to continue"
            )
        self.timing.saving += time.perf_counter() - began

    def check_state(self, step: int, state, batch) -> None:
        """Raise `UserError` if the state has diverged, so that it is not saved.

        A state has diverged if its loss on `batch` is not finite. The metrics of its update cannot
        show this: they belong to the parameters before the update. The error names the step and the
        last good checkpoint.
        """
        sums = jax.device_get(self.held_out.evaluate_step(state.params, batch))
        if math.isfinite(loss := float(sums["nll"])):
            return
        with jax.transfer_guard("allow"):
            self.checkpoints.wait()
        saved = self.checkpoints.latest()
        good = "none was saved" if saved is None else f"step {saved}"
        raise UserError(
            f"the loss is {loss} after step {step}; last good checkpoint: {good} in "
            f"{self.checkpoints.directory}; lower config.optimizer.learning_rate, lengthen the "
            "warmup or tighten clip_norm, and start a new --workdir"
        )

    # -- speed -----------------------------------------------------------------------------

    def tokens_per_second(self) -> float:
        c = self.config
        tokens = self.timing.timed_steps * c.batch_size * c.data.context_length
        return tokens / max(self.timing.steps, 1e-9)

    def speed(self) -> dict[str, float]:
        """Return the measurements of this process; {} if it only finished an interrupted run."""
        t = self.timing
        if not t.timed_steps:
            return {}
        rate = self.step_flops / (t.steps / t.timed_steps)
        return {
            "timed_steps": t.timed_steps,
            "tokens_per_second": self.tokens_per_second(),
            "flops_per_second": rate,
            "data_wait_share": t.data_wait / t.steps,
            "saving_share": t.saving / (t.steps + t.saving),
            "compile_seconds": t.compile,
        } | ({"mfu": rate / self.peak} if self.peak else {})
