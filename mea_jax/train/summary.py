"""Finish a run: evaluate it on all held-out windows, sample, plot and summarise."""

import dataclasses
from typing import Any

import jax

from mea_jax import cli
from mea_jax.checkpoint import metrics
from mea_jax.config.schema import TrainConfig
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.generate.generator import Decoding, Generator, continuation
from mea_jax.ops.sampling import Sampling
from mea_jax.train.loop import Loop
from mea_jax.train.optimizer import trainable


def finish(loop: Loop, state) -> dict[str, Any]:
    """Evaluate `state`, write summary.json and loss.png, print the summary and return it."""
    c, prepared, run = loop.config, loop.prepared, loop.run_directory
    result: dict[str, Any] = {"steps": c.steps}
    if loop.timing.timed_steps:  # otherwise this process only finishes an interrupted run
        result["train_loss"] = loop.loss
    rows: list[tuple[str, str]] = []
    baselines: dict[str, float] = {}
    writer = run.open_metrics(c.steps, redo=("held_out", "diagnostics"))
    values = loop.held_out.report(c.steps, state.params, loop.held_out.read(None), writer)
    writer.close()
    if values:
        size = sum(source.held_out_bytes for source in prepared.sources)
        loss, bits = values["loss"], values["bits_per_byte"]
        result |= {"held_out_loss": loss, "held_out_bits_per_byte": bits}
        files = sum(source.held_out_documents for source in prepared.sources)
        rows.append(("held-out text", f"{files} documents, {cli.si(size, 'B')}, never seen"))
        rows.append(("bits per byte", f"{bits:.3f}   (loss {loss:.4f} nats per token)"))
        if before := _before(loop):
            result["held_out_loss_at_start"] = before["loss"]
            told = f"{before['bits_per_byte']:.3f}   (loss {before['loss']:.4f})"
            rows.append(("  at the start", told))
        if prepared.baselines:
            for name, key in (("gzip -9", "gzip_bytes"), ("xz -9e", "xz_bytes")):
                baselines[name] = prepared.baselines[key] * 8 / size
                rows.append((f"  {name}", f"{baselines[name]:.3f}   (each document by itself)"))
            result["baseline_bits_per_byte"] = baselines
    trees = (state.params, trainable(state.params, c.start.trainable))
    parameters, trained = (sum(x.size for x in jax.tree.leaves(tree)) for tree in trees)
    speed, events = loop.speed(), _events(loop)
    result |= {"parameters": parameters} | speed | events
    note = f", of which {cli.si(trained)} trained" if trained < parameters else ""
    rows.append(("parameters", f"{cli.si(parameters)}{note}"))
    if speed:
        rows.append(("speed", _speed_line(speed)))
    rows += [(name.replace("_", " "), str(count)) for name, count in events.items() if count]
    rows.append(("compiled", _compiled_line(c)))
    rows.append(("run directory", str(run.path)))
    text = cli.table(rows)
    if c.evaluate.sample_prompt:
        result["sample"] = _sample(c, prepared.tokenizer, state.params)
        text += f"\n\n--- prompt and sample ---\n{result['sample']}\n---"
    if run.first:
        ratio = loop.held_out.bits_per_nat()
        metrics.plot_loss(run.path, c.name, ratio, baselines)
    result["text"] = text
    run.write_summary(result)
    if run.first:
        print("\n" + text)
    return result


def _events(loop: Loop) -> dict[str, int]:
    """Return how often the guards acted over the entire run; {} except on the first process."""
    if not loop.run_directory.first:
        return {}
    rows = metrics.read_metrics(loop.run_directory.path / "metrics.jsonl")
    counts = {"skipped_updates": 0, "spikes": 0, "rewinds": 0, "windows_left_out": 0}
    names = {"skipped_update": "skipped_updates", "spike": "spikes", "rewind": "rewinds"}
    for row in rows:
        if row["kind"] in names:
            counts[names[row["kind"]]] += 1
        elif row["kind"] == "empty_windows":
            counts["windows_left_out"] += row["count"]
    return counts


def _before(loop: Loop) -> dict[str, float] | None:
    """Return the held-out row of step 0 if the run started from a checkpoint, otherwise None."""
    if not (loop.run_directory.first and loop.config.start.checkpoint):
        return None
    rows = metrics.read_metrics(loop.run_directory.path / "metrics.jsonl")
    held_out = (row for row in rows if row["kind"] == "held_out" and row["step"] == 0)
    return next((row for row in held_out if row["loss"] is not None), None)


def _speed_line(speed: dict[str, float]) -> str:
    mfu = f" (MFU {speed['mfu']:.1%})" if "mfu" in speed else ""
    return (
        f"{speed['tokens_per_second']:,.0f} tokens/s, "
        f"{cli.si(speed['flops_per_second'], 'FLOP/s')}{mfu}, data waits "
        f"{speed['data_wait_share']:.2%}, saving {speed['saving_share']:.2%}, compiled in "
        f"{speed['compile_seconds']:.1f} s"
    )


def _compiled_line(c: TrainConfig) -> str:
    model = c.model
    form = f"HLC {model.hlc_form}" if model.hlc != "none" else "no mixing"
    form += ", keys explicit" if model.hlc_order == "after" else ""
    kernel = model.attention_kernel if model.variant != "talking_heads" else "talking-heads"
    return f"{model.backend} backend, {model.dtype} products, {kernel} attention, {form}"


def _sample(c: TrainConfig, tokenizer: Tokenizer, params) -> str:
    e = c.evaluate
    prompt = [tokenizer.start] + tokenizer.encode_batch([e.sample_prompt])[0]
    length = c.data.context_length
    count = min(e.sample_tokens, length - 1)
    # A mesh's flash kernels cannot take the single row of a prompt.
    model = dataclasses.replace(c.model, attention_kernel="auto")
    generator = Generator(model, params, length=length)
    prompt = prompt[-(length - count) :]  # so that prompt and sample fit the training window
    decoding = Decoding(count, Sampling(e.sample_temperature), c.seed, stop=tokenizer.stops)
    (new,) = generator.run([prompt], decoding)
    return e.sample_prompt + continuation(tokenizer, prompt, new)
