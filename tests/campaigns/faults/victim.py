"""Run a training process with faults.

    python -m tests.campaigns.faults.victim NAME=VALUE .. -- FLAGS

FLAGS are those of mea_jax.train. The faults, and the options of the runs they are compared with:

  order=FILE        append the step and the checksum of each training batch to FILE
  wait=SECONDS      make each step that much longer
  nan=STEP          make the gradient of this step nan (may be given several times)
  passed_over=STEP  let the host skip the update of this step: the expected result of `nan`
  garbage=A-B       replace batches A to B by noise
  without=A-B       leave out batches A to B from the start: the expected result of a rewind
  lost=SECONDS      count other processes as lost after SECONDS without a heartbeat
  remove=GUARD      disable one guard of the program (see GUARDS)

A mark in the batch makes the compiled step set the gradient to nan. All of these runs therefore use
the same program: the results of another one might differ in their last bits.
"""

import hashlib
import json
import runpy
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mea_jax.train.loop
import mea_jax.train.step
from mea_jax.checkpoint import lock, manager
from mea_jax.checkpoint import metrics as checkpoint_metrics
from mea_jax.data.pipeline import batch_number
from mea_jax.parallel import preemption, processes
from mea_jax.train import guards

_MARK = -9  # in the first position of a batch whose gradient becomes nan


def replace(owner: Any, name: str, value: Any) -> None:
    """Replace the attribute `name` of `owner` by `value`."""
    setattr(owner, name, value)


def _intervals(values: list[str]) -> list[tuple[int, int]]:
    pairs = [value.split("-") for value in values]
    return [(int(first), int(last)) for first, last in pairs]


def watch_batches(options: dict[str, list[str]]) -> None:
    """Record, mark or replace the batches of the training loop."""
    original = mea_jax.train.loop.train_batches
    path = options.get("order", [None])[0]
    marked = {int(step) for step in options.get("nan", [])}
    garbage = _intervals(options.get("garbage", []))
    pause = float(options.get("wait", ["0"])[0])

    def train_batches(*args, start_step, left_out=(), **kwargs):
        batches = original(*args, start_step=start_step, left_out=left_out, **kwargs)
        for step, batch in enumerate(batches, start=start_step + 1):
            number = batch_number(step - 1, left_out)
            if path is not None:
                digest = hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch)))
                with open(path, "a") as order:
                    order.write(json.dumps([step, digest.hexdigest()]) + "\n")
            if any(first <= number <= last for first, last in garbage):
                noise = np.random.default_rng(number)
                shape = batch["inputs"].shape
                batch = batch | {
                    name: noise.integers(0, 256, shape, dtype=np.int32)
                    for name in ("inputs", "targets")
                }
            if step in marked:
                positions = batch["positions"].copy()
                positions[0, 0] = _MARK
                batch = batch | {"positions": positions}
            time.sleep(pause)
            yield batch

    replace(mea_jax.train.loop, "train_batches", train_batches)


def poison_gradients() -> None:
    """Make the gradient of a step nan if its batch has the mark."""
    module = mea_jax.train.step
    original = module._gradients

    def gradients(config, params, batch, teacher):
        poison = jnp.where(batch["positions"][0, 0] == _MARK, jnp.nan, 1.0)
        batch = dict(batch) | {"positions": jnp.maximum(batch["positions"], 0)}
        found, *sums = original(config, params, batch, teacher)
        return jax.tree.map(lambda g: g * poison, found), *sums

    replace(module, "_gradients", gradients)


def pass_over(steps: set[int]) -> None:
    """Let the host skip the updates of `steps`: only the step counters change."""
    compiled = mea_jax.train.loop.Loop._compiled

    def stepping(self, state, batch):
        step_fn = compiled(self, state, batch)

        def step(state, batch):
            number = int(jax.device_get(state.step)) + 1
            if number not in steps:
                return step_fn(state, batch)
            kept = jax.tree.map(np.array, jax.device_get(state))
            stepped, metrics = step_fn(state, batch)

            def leaf(path, value):
                # The step of the run, and the schedule's in (clip, (adam, decay, schedule)).
                clock = jax.tree_util.keystr(path) in (".step", ".opt_state[1][2].count")
                return value + 1 if clock else value

            kept = jax.tree_util.tree_map_with_path(leaf, kept)
            return jax.device_put(kept, jax.tree.map(lambda x: x.sharding, stepped)), metrics

        return step

    replace(mea_jax.train.loop.Loop, "_compiled", stepping)


def without(intervals: list[tuple[int, int]]) -> None:
    """Leave out the batches in `intervals` from the start."""
    original = guards.Guards.__init__

    def start(self, config, stored=None):
        original(self, config, stored)
        if not stored:
            self.left_out = intervals

    replace(guards.Guards, "__init__", start)


def _no_lock():
    class Free(lock.Lock):
        def check(self):
            pass

    def flock(*_):
        pass

    replace(lock.fcntl, "flock", flock)
    replace(lock, "Lock", Free)


def _no_position():
    original = guards.Guards.__init__

    def forgetful(self, config, stored=None):
        original(self, config)

    replace(guards.Guards, "__init__", forgetful)


def _no_cleaning():
    def prepare(self):
        self.directory.mkdir(exist_ok=True, parents=True)

    replace(manager.Checkpoints, "_prepare", prepare)


# The guards that a campaign can disable, to test that it detects this.
GUARDS = {
    "digests": lambda: replace(manager.Checkpoints, "damage", lambda *_, **__: None),
    "lock": _no_lock,
    "cleaning": _no_cleaning,
    "skipping": lambda: replace(mea_jax.train.step.jnp, "isfinite", jnp.ones_like),
    "skip_limit": lambda: replace(guards, "SKIP_WINDOW", 0),
    "spikes": lambda: replace(guards.SpikeDetector, "feed", lambda *_: None),
    "position": _no_position,
    "sigterm": lambda: replace(preemption.StopRequest, "_receive", lambda *_: None),
    "metrics": lambda: replace(checkpoint_metrics, "read_metrics", lambda path: []),
}


def main() -> None:
    split = sys.argv.index("--")
    options: dict[str, list[str]] = {}
    for word in sys.argv[1:split]:
        name, _, value = word.partition("=")
        options.setdefault(name, []).append(value)
    watch_batches(options)
    if "nan" in options or "passed_over" in options:
        poison_gradients()
    if "passed_over" in options:
        pass_over({int(step) for step in options["passed_over"]})
    if "without" in options:
        without(_intervals(options["without"]))
    if "lost" in options:
        replace(processes, "LOST_SECONDS", float(options["lost"][0]))
    for guard in options.get("remove", []):
        GUARDS[guard]()
    sys.argv = ["mea_jax.train", *sys.argv[split + 1 :]]
    runpy.run_module("mea_jax.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
