"""Measure the cost of saving: how long it blocks and slows training, and the time to disk.

    python -m benchmarks.checkpointing [--saves 8] [--out DIR] [--json out.json]

It runs the quickstart's model and step on random batches and saves every few steps as the training
loop does: it evaluates the state's loss, then orbax, checksums and disk writes run during training.
A save's cost is the time that the loop is blocked, plus the extra time of the steps during the
write.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.harness import write_json
from configs import quickstart
from mea_jax.checkpoint.manager import Checkpoints, Position
from mea_jax.config.parse import from_config_dict
from mea_jax.config.schema import TrainConfig
from mea_jax.ops.resolve import resolve
from mea_jax.parallel import sharding
from mea_jax.parallel.host import keep_freed_memory
from mea_jax.train.step import compile_eval_step, compile_train_step, create_state

BETWEEN = 24  # steps between two saves: the write ends and some steps run undisturbed


def measure(config: TrainConfig, folder: Path, saves: int) -> dict[str, list[float]]:
    """Return the seconds of each undisturbed "step", and of the parts of each save.

    The parts are "check" (evaluation of the loss), "call", "disk" (until the data are on disk) and
    "slow" (extra time of the steps during the write).
    """
    devices = jax.devices()
    model = resolve(config.model, devices, config.data.context_length, 1, 1)
    config = dataclasses.replace(config, model=model)
    mesh = sharding.make_mesh(config.mesh, devices)
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.data.context_length)
    tokens = rng.integers(0, model.vocab_size, (2, *shape), dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    where = sharding.batch_sharding(mesh)
    batch = {
        "inputs": jax.device_put(tokens[0], where),
        "targets": jax.device_put(tokens[1], where),
        "segment_ids": jax.device_put(np.ones(shape, np.int32), where),
        "positions": jax.device_put(positions, where),
    }
    found: dict[str, list[float]] = {name: [] for name in ("step", "check", "call", "disk", "slow")}
    with jax.set_mesh(mesh), Checkpoints(folder, config.checkpoint) as checkpoints:
        state = create_state(config, mesh)
        step_fn = compile_train_step(config, mesh).lower(state, batch).compile()
        evaluate = compile_eval_step(config, mesh)

        def step(state):
            began = time.perf_counter()
            state, metrics = step_fn(state, batch)
            jax.block_until_ready(metrics)
            return state, time.perf_counter() - began

        for _ in range(5):
            state, _ = step(state)
        jax.device_get(evaluate(state.params, batch))
        for number in range(1, saves + 1):
            began = time.perf_counter()
            jax.device_get(evaluate(state.params, batch))
            checked = time.perf_counter()
            checkpoints.save(number, state, config, Position(number, "benchmark"))
            called = time.perf_counter()
            disturbed: list[float] = []
            disk = None
            for _ in range(BETWEEN):
                state, seconds = step(state)
                if disk is None:
                    disturbed.append(seconds)
                    if not checkpoints.writing():
                        disk = time.perf_counter() - checked
                else:
                    found["step"].append(seconds)
            checkpoints.wait()
            usual = statistics.median(found["step"])
            found["check"].append(checked - began)
            found["call"].append(called - checked)
            found["disk"].append(disk if disk is not None else float("nan"))
            found["slow"].append(sum(disturbed) - len(disturbed) * usual)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument(
        "--out", type=Path, help="folder for the checkpoints; default: a temporary one"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if jax.devices()[0].platform == "cpu":
        keep_freed_memory()
    config = from_config_dict(quickstart.get_config())
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(config, arguments.out or Path(temporary), arguments.saves)
    median = {name: statistics.median(values[1:]) for name, values in found.items()}
    every = config.checkpoint.every
    cost = median["check"] + median["call"] + median["slow"]
    rows = {
        "step": f"{median['step'] * 1e3:.0f} ms",
        "blocked by the check of the loss": f"{median['check'] * 1e3:.0f} ms",
        "blocked by the save's call": f"{median['call'] * 1e3:.0f} ms",
        "to disk, with checksums": f"{median['disk'] * 1e3:.0f} ms",
        "blocked, of the time to disk": f"{median['call'] / median['disk']:.1%}",
        "extra time of steps during the write": f"{median['slow'] * 1e3:.0f} ms in total",
        f"cost of a save every {every} steps": f"{cost / (every * median['step'] + cost):.2%}",
    }
    for name, value in rows.items():
        print(f"{name:<40} {value}")
    for name, values in found.items():
        low, high = np.percentile(values[1:], [10, 90])
        print(f"  {name:<6} 10th to 90th percentile {low * 1e3:.0f} to {high * 1e3:.0f} ms")
    if arguments.json:
        write_json(arguments.json, [{"part": name, "seconds": v} for name, v in found.items()])


if __name__ == "__main__":
    main()
