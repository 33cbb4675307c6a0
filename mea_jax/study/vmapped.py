"""Train runs of one shape, which differ in learning rate and seed only, in one program.

The states of the runs are stacked along a first axis, `sweep`, which the mesh shards over devices.
On an accelerator, or on several CPU devices, the training step is vmapped over this axis, so that
small models fill the device together. On one CPU device, which a single run fills, the program
computes the runs one after another.

Letters: S runs, U different seeds, B windows in a batch, T positions.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mea_jax.config.schema import TrainConfig
from mea_jax.model.params import TrainState
from mea_jax.ops.resolve import resolve
from mea_jax.parallel import sharding
from mea_jax.study.grid import Member
from mea_jax.train.step import eval_sums, init_state, state_shardings, train_step

AXIS = "sweep"


def sweep_mesh(members: int, devices: Sequence[jax.Device]) -> Mesh:
    """Return a mesh that shards `members` runs along `sweep` and their batches along `data`.

    The axis `sweep` has gcd(members, devices) devices, `data` the quotient.
    """
    ways = math.gcd(members, len(devices))
    shape = (ways, len(devices) // ways, *(1 for _ in sharding.AXES[1:]))
    kinds = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, (AXIS, *sharding.AXES), axis_types=kinds, devices=devices)


class Sweep:
    """The compiled functions of a sweep.

    Attributes:
      config: the resolved config of the runs; its learning rate and seed are not used.
      mesh: the mesh that must be set when the functions are called (`jax.set_mesh`).
      seeds: the U different seeds; a run trains on the batches of its seed.
      step: updates all runs, (states, batches (U, B, T)) to (states, metrics (S,)); donates states.
      evaluate: sums nats and tokens of one batch for all runs, (parameters, batch) to (S,) each.
    """

    def __init__(
        self, config: TrainConfig, members: Sequence[Member], devices: Sequence[jax.Device]
    ):
        self.members = tuple(members)
        self.mesh = sweep_mesh(len(members), devices)
        self.together = devices[0].platform != "cpu" or len(devices) > 1
        model = config.model
        if self.together and devices[0].platform == "cpu":  # CPU kernels take one run
            model = dataclasses.replace(model, backend="xla", attention_kernel="einsum")
        model = resolve(model, devices, config.data.context_length)
        self.config = dataclasses.replace(config, model=model)
        self.seeds = tuple(dict.fromkeys(m.seed for m in members))
        self._seed_S = np.array([self.seeds.index(m.seed) for m in members], np.int32)
        self._rate_S = np.array([m.learning_rate for m in members], np.float32)
        self.state_shardings = jax.tree.map(self._stacked, state_shardings(self.config, self.mesh))
        self.batch_sharding = NamedSharding(
            self.mesh, PartitionSpec(None, *sharding.batch_sharding(self.mesh).spec)
        )
        whole = sharding.replicated(self.mesh)
        self.step = jax.jit(
            self._step,
            in_shardings=(self.state_shardings, self.batch_sharding),
            out_shardings=(self.state_shardings, whole),
            donate_argnums=0,
        )
        self.evaluate = jax.jit(
            self._evaluate,
            in_shardings=(self.state_shardings.params, sharding.batch_sharding(self.mesh)),
            out_shardings=whole,
        )

    def _stacked(self, where: NamedSharding) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(AXIS, *where.spec))

    def _over(self, function: Any, *stacked: Any) -> Any:
        """Apply `function` to each run's slices of `stacked` and stack the results."""
        if self.together:
            return jax.vmap(function, spmd_axis_name=AXIS)(*stacked)
        return jax.lax.map(lambda one: function(*one), stacked)

    def create(self) -> TrainState:
        """Return the stacked initial states of all runs, each initialised from its run's seed."""

        def init(seed_S):
            make = functools.partial(init_state, self.config)
            return self._over(lambda seed: make(jax.random.key(seed)), seed_S)

        seeds = jnp.asarray([m.seed for m in self.members], jnp.uint32)
        with jax.set_mesh(self.mesh):
            return jax.jit(init, out_shardings=self.state_shardings)(seeds)

    def abstract_state(self) -> TrainState:
        """Return the shapes, dtypes and shardings of the states that `create` returns."""
        one = jax.eval_shape(lambda: init_state(self.config, jax.random.key(0)))
        count = len(self.members)
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=where),
            one,
            self.state_shardings,
        )

    def put(self, batches: Sequence[dict[str, np.ndarray]]) -> Any:
        """Place one batch per seed, in the order of `seeds`, on the mesh as arrays (U, B, T)."""
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        return jax.device_put(stacked, self.batch_sharding)

    def _step(self, state: TrainState, batch_UBT: Any) -> tuple[TrainState, Any]:
        """Update every run; return the new states and the metrics of `train_step`, (S,) each."""
        sharding.require(self.mesh)

        def one(state, seed, rate):
            batch = {name: x[seed] for name, x in batch_UBT.items()}
            optimizer = dataclasses.replace(self.config.optimizer, learning_rate=rate)
            config = dataclasses.replace(self.config, optimizer=optimizer)
            return train_step(config, state, batch)

        return self._over(one, state, jnp.asarray(self._seed_S), jnp.asarray(self._rate_S))

    def _evaluate(self, params: Any, batch: Any) -> Any:
        """Return the sums of nats and tokens of one batch for every run, (S,) each."""
        sharding.require(self.mesh)
        return self._over(lambda p: eval_sums(self.config, p, batch), params)
