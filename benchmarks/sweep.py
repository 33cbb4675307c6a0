"""Compare a grid of small models in one program with the same runs one after another.

    python -m benchmarks.sweep [--runs 16] [--d_model 128] [--layers 4] [--json out.json]

Both run in turn in one process; the table shows medians. A value is one training step (forward,
backward, clipping, AdamW) of every run: either by the program of `mea_jax.study.vmapped`, or by the
compiled step of `mea_jax.train`, called for each run's own state. Neither reads data. Compile times
are printed as well.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks.harness import ratios, spread, time_interleaved, write_json
from mea_jax.config.schema import ModelConfig, OptimizerConfig, TrainConfig
from mea_jax.ops.resolve import resolve
from mea_jax.parallel import sharding
from mea_jax.parallel.host import keep_freed_memory
from mea_jax.study.grid import Member
from mea_jax.study.vmapped import Sweep
from mea_jax.train.step import compile_train_step, create_state

BATCH, LENGTH, VOCABULARY = 8, 128, 1024


def config_of(d_model: int, layers: int) -> TrainConfig:
    """Return an MEA model in the shape of `configs/lr_study.py`."""
    heads = max(d_model // 32, 1)
    model = ModelConfig(
        vocab_size=VOCABULARY,
        d_model=d_model,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=32,
        d_ff=11 * d_model // 4,
        tie_embeddings=False,
        loss_chunk=0,
    )
    return TrainConfig(batch_size=BATCH, model=model, optimizer=OptimizerConfig(learning_rate=1e-3))


def random_batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH), np.int32)
    return {
        "inputs": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
    }


def together(config: TrainConfig, runs: int) -> tuple[Any, float]:
    """Return a function that steps all runs in one program, and its compile time in seconds."""
    members = tuple(Member(0, 1e-3 * 2 ** (i / 4)) for i in range(runs))
    sweep = Sweep(config, members, jax.devices())
    with jax.set_mesh(sweep.mesh):
        state, batch = sweep.create(), sweep.put([random_batch()])
        began = time.perf_counter()
        step = sweep.step.lower(state, batch).compile()
        seconds = time.perf_counter() - began
    argument_bytes = {"state": state}

    def run() -> Any:
        argument_bytes["state"], metrics = step(argument_bytes["state"], batch)
        return metrics["loss"]

    return run, seconds


def in_turn(config: TrainConfig, runs: int) -> tuple[Any, float]:
    """Return a function that steps each run in turn, and its compile time in seconds."""
    device = jax.devices()[:1]
    model = resolve(config.model, device, LENGTH)
    config = dataclasses.replace(config, model=model)
    mesh = sharding.make_mesh(config.mesh, device)
    batch = jax.device_put(random_batch(), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        states = [create_state(dataclasses.replace(config, seed=i), mesh) for i in range(runs)]
        began = time.perf_counter()
        step = compile_train_step(config, mesh).lower(states[0], batch).compile()
        seconds = time.perf_counter() - began

    def run() -> Any:
        losses = []
        for i in range(runs):
            states[i], metrics = step(states[i], batch)
            losses.append(metrics["loss"])
        return losses

    return run, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json")
    options = parser.parse_args()
    if jax.devices()[0].platform == "cpu":
        keep_freed_memory()
    config = config_of(options.d_model, options.layers)
    whole, whole_compile = together(config, options.runs)
    each, each_compile = in_turn(config, options.runs)
    times = time_interleaved({"in turn": each, "together": whole}, options.repeats)
    share = ratios(times, "in turn")["together"]
    rows = [
        {"name": name, "runs": options.runs, "compile_seconds": round(seconds, 2)} | spread(t)
        for (name, t), seconds in zip(times.items(), (each_compile, whole_compile), strict=True)
    ]
    for row in rows:
        print(
            f"{row['name']:<10} {row['median_ms']:10.1f} ms per step of {options.runs} runs "
            f"({row['min_ms']:.1f} to {row['max_ms']:.1f}), compiled in {row['compile_seconds']} s"
        )
    print(
        f"together over in turn: {statistics.median(share):.3f} "
        f"({min(share):.3f} to {max(share):.3f}) on {jax.devices()[0].device_kind}"
    )
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
