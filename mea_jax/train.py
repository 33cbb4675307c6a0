"""Trains a model, or resumes or reports a run: the same command does all three.

python -m mea_jax.train --config configs/quickstart.py
python -m mea_jax.train --config configs/quickstart.py:mha --config.optimizer.learning_rate=1e-3

On several machines the same command on each, with --distributed where a TPU pod or Slurm says who
belongs together, else with --coordinator HOST:PORT --num_processes N --process_id I.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from mea_jax import cli, distributed, flops, profiling, report, sharding
from mea_jax.backends import resolve
from mea_jax.checkpoint import Checkpoints
from mea_jax.config import TrainConfig
from mea_jax.cpu_kernels import keep_freed_memory
from mea_jax.data.pipeline import held_out_batches, train_batches
from mea_jax.data.prepare import Prepared
from mea_jax.data.shared import prepare_together
from mea_jax.diagnostics import compile_diagnostics
from mea_jax.errors import UserError
from mea_jax.generation import Generator, continuation
from mea_jax.run_directory import RunDirectory, stored_dtype
from mea_jax.sampling import Sampling
from mea_jax.train_step import (
    abstract_state,
    compile_eval_step,
    compile_train_step,
    create_state,
)
from mea_jax.validation import validate_from_scratch


def train(
    config: TrainConfig, workdir: Path, profile_steps: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Trains, or resumes, or finds finished, the run of `config` in `workdir`; its summary.

    What a run starts from, in this order: a finished run is only reported; else the newest
    checkpoint in `workdir`; else a fresh initialisation from `config.seed`. With several processes
    each of them calls this. The first and last of `profile_steps` are traced into
    `workdir`/profile, with those between.

    Raises `UserError` for every mistake of the user's, and for a disk that refuses.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        keep_freed_memory()
    mesh = sharding.make_mesh(config.mesh, devices)
    dtype = stored_dtype(workdir) if config.model.dtype == "auto" else None
    model = dataclasses.replace(config.model, dtype=dtype) if dtype else config.model
    split = (mesh.shape["tensor"], mesh.shape["sequence"])
    model = resolve(model, devices, config.data.context_length, *split)
    config = dataclasses.replace(config, model=model)
    sharding.check_divisible(config, mesh)
    run = RunDirectory(workdir, config)
    if (summary := run.finished()) is not None:
        if run.first:
            print(f"{workdir} is finished: {config.steps} steps are done. To train anew, choose")
            print("another --workdir; to read the result again:\n")
            print(summary["text"])
        _check_profile(profile_steps, config.steps, run)
        return summary

    if not (workdir / "checkpoints").exists():  # refused before data are prepared for it
        validate_from_scratch(config.model)
    prepared = prepare_together(config.data, config.model.vocab_size, log=run.say)
    with jax.set_mesh(mesh), Checkpoints(workdir, config.checkpoint) as checkpoints:
        # Where process 0 sees the run: a shared file system may show it to others a little later.
        step = int(distributed.from_first(str(checkpoints.latest() or 0)))
        if step == 0:
            validate_from_scratch(config.model)
            state = create_state(config, mesh)
        else:
            checkpoints.check_data(step, prepared.digest)
            state = checkpoints.restore(step, abstract_state(config, mesh))
            run.say(f"resuming from step {step} of {config.steps}")
        _check_profile(profile_steps, step, run)
        run.write_config(prepared.tokenizer)
        loop = Loop(config, mesh, prepared, run, checkpoints)
        state = loop.run(state, step, profile_steps)
        return loop.finish(state)


def _check_profile(steps: tuple[int, int] | None, done: int, run: RunDirectory) -> None:
    if steps and done >= steps[1]:
        run.say(f"no profile: steps {steps[0]} to {steps[1]} lie before step {done}, already done")


class Loop:
    """The parts that a training loop calls: batches, compiled steps, evaluation, reports."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: jax.sharding.Mesh,
        prepared: Prepared,
        run: RunDirectory,
        checkpoints: Checkpoints,
    ):
        self.config, self.mesh, self.prepared = config, mesh, prepared
        self.run_directory, self.checkpoints = run, checkpoints
        shape = (config.batch_size, config.data.context_length)
        self.rows = distributed.local_rows(sharding.batch_sharding(mesh), shape)
        self.evaluate_step = compile_eval_step(config, mesh)
        self.diagnose = compile_diagnostics(config, mesh)
        self.held_out = self.read_held_out(config.evaluate.batches)
        tokens = config.batch_size * config.data.context_length
        self.step_flops = flops.step_flops(config.model, config.data.context_length, tokens)
        peak = flops.peak_flops(mesh.devices.flat[0].device_kind)
        self.peak = peak * mesh.size if peak else None
        self.timing = {"compile_seconds": 0.0, "step_seconds": 0.0, "data_wait_seconds": 0.0}
        self.timed_steps, self.loss = 0, math.nan

    # -- data ------------------------------------------------------------------------------

    def read_held_out(self, batches: int | None) -> list[dict[str, np.ndarray]]:
        size = self.config.batch_size
        return list(
            held_out_batches(self.prepared, batch_size=size, max_batches=batches, rows=self.rows)
        )

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch, as its part of the global arrays."""
        where = sharding.batch_sharding(self.mesh)
        with jax.transfer_guard("allow"):  # which takes this for a slip with several processes
            return {
                name: distributed.place_rows(where, x, self.rows, self.config.batch_size)
                for name, x in batch.items()
            }

    # -- the loop --------------------------------------------------------------------------

    def run(self, state, start: int, profile_steps: tuple[int, int] | None = None):
        """Trains from `start` updates to `config.steps`; returns the last state."""
        c = self.config
        batches = train_batches(
            self.prepared,
            seed=c.seed,
            batch_size=c.batch_size,
            start_step=start,
            threads=c.data.read_threads,
            prefetch=c.data.prefetch,
            rows=self.rows,
        )
        if start == c.steps:  # cut off after the last checkpoint, before the summary
            return state
        batch = self.put(next(batches))
        began = time.perf_counter()
        step_fn = compile_train_step(c, self.mesh).lower(state, batch).compile()
        self.timing["compile_seconds"] = time.perf_counter() - began
        writer = self.run_directory.open_metrics(start)
        progress = report.Progress(start, c.steps, enabled=distributed.first())
        # One process tells enough: all run the same program.
        traced = profile_steps if distributed.first() else None
        directory = self.run_directory.path / "profile"
        profile = profiling.Profile(traced, directory, start, progress.say)
        pending: tuple[int, Any] | None = None
        clock = time.perf_counter()
        try:
            with jax.transfer_guard("disallow"), profile:
                for step in range(start + 1, c.steps + 1):
                    with profile.step(step, (state, batch)):
                        state, metrics = step_fn(state, batch)
                    clock += profile.after(step, (state, metrics))
                    waiting = time.perf_counter()
                    if step < c.steps:
                        batch = self.put(next(batches))
                    self.timing["data_wait_seconds"] += time.perf_counter() - waiting
                    # The previous step's metrics, fetched while this step runs.
                    if pending is not None:
                        clock = self.report_step(*pending, clock, writer, progress)
                    pending = (step, metrics)
                    self.checkpoints.check()
                    evaluating = c.evaluate.every and step % c.evaluate.every == 0
                    saving = step % c.checkpoint.every == 0
                    if step == c.steps or evaluating or saving:
                        self.report_step(*pending, clock, writer, progress)
                        pending = None
                        if evaluating and step < c.steps:
                            self.report_held_out(step, state, writer, progress)
                        if step == c.steps or saving:
                            self.check_state(step, state, batch)
                            # Orbax copies to the host in ways that the guard takes for slips.
                            with jax.transfer_guard("allow"):
                                self.checkpoints.save(step, state, c, self.prepared.digest)
                        clock = time.perf_counter()
        finally:
            progress.close()
            writer.close()
        return state

    def report_step(self, step, metrics, clock, writer, progress) -> float:
        """Waits for a step's metrics, checks and writes them; returns the time now."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds = now - clock
        self.timing["step_seconds"] += seconds
        self.timed_steps += 1
        self.loss = values["loss"]
        self.check_finite(step, values["loss"], values["grad_norm"])
        values["tokens_per_second"] = values["tokens"] / seconds
        values["flops_per_second"] = self.step_flops / seconds
        if self.peak:
            values["mfu"] = values["flops_per_second"] / self.peak
        if step % self.config.log_every == 0 or step in (1, self.config.steps):
            writer.write(step, "train", values)
        progress.update(step, values["loss"], self.tokens_per_second())
        return now

    def check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        """Raises `UserError` that names the step and the last good checkpoint."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        with jax.transfer_guard("allow"):
            self.checkpoints.wait()
        saved = self.checkpoints.latest()
        good = "none was saved" if saved is None else f"step {saved}"
        raise UserError(
            f"the loss is {loss} and the gradient norm {grad_norm} at step {step}; last good "
            f"checkpoint: {good} in {self.checkpoints.directory}; lower "
            "config.optimizer.learning_rate, lengthen the warmup or tighten clip_norm, and start "
            "a new --workdir"
        )

    def check_state(self, step: int, state, batch) -> None:
        """Keeps a state that has diverged from being saved: its loss on one batch is finite.

        The metrics of an update tell of the parameters before it, not of those it leaves.
        """
        sums = jax.device_get(self.evaluate_step(state.params, batch))
        self.check_finite(step, float(sums["nll"]), 0.0)

    def tokens_per_second(self) -> float:
        c = self.config
        tokens = self.timed_steps * c.batch_size * c.data.context_length
        return tokens / max(self.timing["step_seconds"], 1e-9)

    # -- evaluation ------------------------------------------------------------------------

    def held_out_loss(self, params, batches) -> tuple[float, float]:
        """(total nats, tokens) over `batches`."""
        sums = [jax.device_get(self.evaluate_step(params, self.put(b))) for b in batches]
        return sum(float(s["nll"]) for s in sums), sum(float(s["tokens"]) for s in sums)

    def bits_per_nat(self) -> float | None:
        """Bits per held-out byte of one nat per held-out token."""
        tokens = sum(source.held_out_tokens for source in self.prepared.sources)
        size = sum(source.held_out_bytes for source in self.prepared.sources)
        return tokens / size / math.log(2) if size else None

    def report_held_out(self, step, state, writer, progress) -> None:
        if not self.held_out:
            return
        nll, tokens = self.held_out_loss(state.params, self.held_out)
        values = {"loss": nll / tokens}
        if (ratio := self.bits_per_nat()) is not None:
            values["bits_per_byte"] = nll / tokens * ratio
        writer.write(step, "held_out", values)
        statistics = jax.device_get(self.diagnose(state.params, self.put(self.held_out[0])))
        writer.write(step, "diagnostics", statistics)
        moved = [np.mean(v) for k, v in statistics.items() if k.startswith("mixing_distance")]
        note = f", W_lc moved {np.mean(moved):.1%}" if moved else ""
        bits = f" ({values['bits_per_byte']:.3f} bits per byte)" if ratio is not None else ""
        progress.say(f"step {step}: held-out loss {values['loss']:.4f}{bits}{note}")

    def finish(self, state) -> dict[str, Any]:
        """Evaluates on every held-out window, samples, draws, and writes summary.json."""
        c = self.config
        result: dict[str, Any] = {"steps": c.steps}
        if self.timed_steps:  # else only what a cut-off run had left to do is done here
            result["train_loss"] = self.loss
        rows: list[tuple[str, str]] = []
        everything = self.read_held_out(None)
        ratio, baselines = self.bits_per_nat(), {}
        writer = self.run_directory.open_metrics(c.steps, redo=("held_out", "diagnostics"))
        if everything:
            nll, tokens = self.held_out_loss(state.params, everything)
            size = sum(source.held_out_bytes for source in self.prepared.sources)
            bits = nll / math.log(2) / size
            result |= {"held_out_loss": nll / tokens, "held_out_bits_per_byte": bits}
            writer.write(c.steps, "held_out", {"loss": nll / tokens, "bits_per_byte": bits})
            statistics = jax.device_get(self.diagnose(state.params, self.put(everything[0])))
            writer.write(c.steps, "diagnostics", statistics)
            files = sum(source.held_out_documents for source in self.prepared.sources)
            rows.append(("held-out text", f"{files} documents, {report.si(size, 'B')}, never seen"))
            rows.append(("bits per byte", f"{bits:.3f}   (loss {nll / tokens:.4f} nats per token)"))
            if self.prepared.baselines:
                for name, key in (("gzip -9", "gzip_bytes"), ("xz -9e", "xz_bytes")):
                    baselines[name] = self.prepared.baselines[key] * 8 / size
                    rows.append((f"  {name}", f"{baselines[name]:.3f}   (each document by itself)"))
                result["baseline_bits_per_byte"] = baselines
        writer.close()
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        result |= {"parameters": parameters} | self.speed()
        rows.append(("parameters", report.si(parameters)))
        if self.timed_steps:
            rows.append(("speed", self.speed_line()))
        model = c.model
        form = f"HLC {model.hlc_form}" if model.hlc != "none" else "no mixing"
        form += ", keys explicit" if model.hlc_order == "after" else ""
        kernel = model.attention_kernel if model.variant != "talking_heads" else "talking-heads"
        rows.append(
            (
                "compiled",
                f"{model.backend} backend, {model.dtype} products, {kernel} attention, {form}",
            )
        )
        rows.append(("run directory", str(self.run_directory.path)))
        text = report.table(rows)
        if c.evaluate.sample_prompt:
            result["sample"] = self.continuation(state.params)
            text += f"\n\n--- prompt and sample ---\n{result['sample']}\n---"
        if self.run_directory.first:
            report.plot_loss(self.run_directory.path, c.name, ratio, baselines)
        result["text"] = text
        self.run_directory.write_summary(result)
        if self.run_directory.first:
            print("\n" + text)
        return result

    def speed(self) -> dict[str, float]:
        """What this process measured: nothing when it only finished a cut-off run."""
        if not self.timed_steps:
            return {}
        seconds = self.timing["step_seconds"] / self.timed_steps
        rate = self.step_flops / seconds
        return {
            "timed_steps": self.timed_steps,
            "tokens_per_second": self.tokens_per_second(),
            "flops_per_second": rate,
            "data_wait_share": self.timing["data_wait_seconds"] / self.timing["step_seconds"],
            "compile_seconds": self.timing["compile_seconds"],
        } | ({"mfu": rate / self.peak} if self.peak else {})

    def speed_line(self) -> str:
        speed = self.speed()
        mfu = f" (MFU {speed['mfu']:.1%})" if "mfu" in speed else ""
        return (
            f"{speed['tokens_per_second']:,.0f} tokens/s, "
            f"{report.si(speed['flops_per_second'], 'FLOP/s')}{mfu}, data waits "
            f"{speed['data_wait_share']:.2%}, compiled in {speed['compile_seconds']:.1f} s"
        )

    def continuation(self, params) -> str:
        e, tokenizer = self.config.evaluate, self.prepared.tokenizer
        prompt = [tokenizer.separator] + tokenizer.encode_batch([e.sample_prompt])[0]
        length = self.config.data.context_length
        count = min(e.sample_tokens, length - 1)
        # One row: no flash kernel of a mesh takes it.
        model = dataclasses.replace(self.config.model, attention_kernel="auto")
        generator = Generator(model, params, length=length)
        prompt = prompt[-(length - count) :]  # so that all fits the window of training
        (new,) = generator.run(
            [prompt],
            count=count,
            sampling=Sampling(e.sample_temperature),
            seed=self.config.seed,
            stop=(tokenizer.separator,),
        )
        return e.sample_prompt + continuation(tokenizer, prompt, new)


def main() -> None:
    config = cli.parse_config(CONFIG)
    if "://" in (WORKDIR.value or ""):
        raise UserError(f"--workdir {WORKDIR.value}: give a folder; mount the bucket as a path")
    text = PROFILE.value
    profile_steps = None if text is None else profiling.parse_steps(text, config.steps)
    cli.join_processes(config)
    cli.enable_compilation_cache()
    train(config, Path(WORKDIR.value or Path("runs") / config.name), profile_steps)


if __name__ == "__main__":
    CONFIG = cli.define_config_flag()
    WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; default runs/<config name>")
    PROFILE = flags.DEFINE_string(
        "profile_steps", None, "FIRST:LAST, steps to trace into <workdir>/profile for xprof"
    )
    cli.define_process_flags()
    flags.declare_key_flag("config")
    cli.run(main)
