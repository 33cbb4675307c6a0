"""Measure training steps on a CPU, next to a plain matrix product of the model's main shape.

    python -m benchmarks.cpu_step [--json out.json] [--repeats 9]

All variants run in one process, interleaved A B C A B C; the table shows medians. The model has
5.9M parameters (D 256, 6 layers, 8 heads, feed-forward 704, vocabulary 2048, untied). A step takes
8 windows of 256 positions and does forward, backward, clipping and AdamW. The last row is the
quickstart's own model, which has twice the vocabulary and this machine's default dtype. FLOPs
follow the convention of `mea_jax.model.flops`.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import time_interleaved, write_json
from configs import quickstart
from mea_jax.config.parse import from_config_dict
from mea_jax.config.schema import ModelConfig, OptimizerConfig, TrainConfig
from mea_jax.model import flops
from mea_jax.ops.resolve import resolve
from mea_jax.parallel import sharding
from mea_jax.parallel.host import keep_freed_memory
from mea_jax.train.step import compile_train_step, create_state

MODEL = ModelConfig(
    vocab_size=2048,
    d_model=256,
    n_layers=6,
    n_heads=8,
    n_kv_heads=8,
    head_dim=32,
    d_ff=704,
    tie_embeddings=False,
    scan_unroll=6,
    loss_chunk=0,
)
MHA = dataclasses.replace(MODEL, hlc="none", head_norm=False)
BATCH, LENGTH = 8, 256

# Name -> (model, backend, dtype of products).
STEPS = {
    "step MHA float32, plain einsums": (MHA, "xla", "float32"),
    "step MHA float32": (MHA, "cpu", "float32"),
    "step MEA float32": (MODEL, "cpu", "float32"),
    "step MHA bfloat16": (MHA, "cpu", "bfloat16"),
    "step MEA bfloat16": (MODEL, "cpu", "bfloat16"),
    "step quickstart": (from_config_dict(quickstart.get_config()).model, "auto", "auto"),
}


def training_step(model: ModelConfig) -> Callable[[], Any]:
    """Return a function that runs one training step of `model` and returns its loss."""
    config = TrainConfig(
        batch_size=BATCH, model=model, optimizer=OptimizerConfig(learning_rate=1e-3)
    )
    mesh = sharding.make_mesh(config.mesh)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (BATCH, LENGTH), np.int32)
    where = sharding.batch_sharding(mesh)
    fields = {
        "inputs": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
    }
    batch = {name: jax.device_put(x, where) for name, x in fields.items()}
    with jax.set_mesh(mesh):
        state = create_state(config, mesh)
        step = compile_train_step(config, mesh).lower(state, batch).compile()
    argument_bytes = {"state": state}

    def run() -> jax.Array:
        argument_bytes["state"], metrics = step(argument_bytes["state"], batch)
        return metrics["loss"]

    return run


def product(dtype: Any) -> Callable[[], Any]:
    """Return a function that computes the main product, (tokens, D) x (D, F), to float32."""
    x = jnp.ones((BATCH * LENGTH, MODEL.d_model), dtype)
    w = jnp.ones((MODEL.d_model, MODEL.d_ff), dtype)
    dot = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))
    return lambda: dot(x, w)


def row(name: str, seconds: list[float], flop: float, tokens: int | None) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "name": name,
        "median_ms": round(1e3 * median, 3),
        "min_ms": round(1e3 * min(seconds), 3),
        "max_ms": round(1e3 * max(seconds), 3),
        "gflop_per_s": round(flop / median / 1e9, 1),
        "tokens_per_s": None if tokens is None else round(tokens / median),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'':32}{'median ms':>11}{'min':>9}{'max':>9}{'GFLOP/s':>10}{'tokens/s':>10}")
    for r in rows:
        print(
            f"{r['name']:32}{r['median_ms']:11.2f}{r['min_ms']:9.2f}{r['max_ms']:9.2f}"
            f"{r['gflop_per_s']:10.0f}{r['tokens_per_s'] or '':>10}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", help="also write the measurements to this file")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    keep_freed_memory()

    flop = 2.0 * BATCH * LENGTH * MODEL.d_model * MODEL.d_ff
    products = {f"product {t}": product(jnp.dtype(t)) for t in ("float32", "bfloat16")}
    times = time_interleaved(products, args.repeats, inner=20)
    rows = [row(name, seconds, flop, None) for name, seconds in times.items()]

    models = {
        name: resolve(
            dataclasses.replace(model, backend=backend, dtype=dtype), jax.devices(), LENGTH
        )
        for name, (model, backend, dtype) in STEPS.items()
    }
    times = time_interleaved({n: training_step(m) for n, m in models.items()}, args.repeats)
    rows += [
        row(n, s, flops.step_flops(models[n], LENGTH, BATCH * LENGTH), BATCH * LENGTH)
        for n, s in times.items()
    ]
    print_table(rows)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
