"""Check before a run starts that the least memory it needs is available.

The check does not estimate the memory that a run takes (`python -m mea_jax.plan` does). It counts
only what the run cannot do without, so it refuses no run that would work. A wrong size gives a
one-line error instead of a process that the operating system kills.
"""

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mea_jax.config.model_checks import least_parameters
from mea_jax.config.schema import TrainConfig
from mea_jax.errors import UserError
from mea_jax.ops.backend import make_backend
from mea_jax.parallel.sharding import batch_shards
from mea_jax.train.optimizer import trainable
from mea_jax.train.step import abstract_state


def host_bytes() -> int:
    """Return the memory, in bytes, of this machine or of the container that limits it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    return min(total, int(limit)) if limit.isdecimal() else total


def device_bytes(mesh: Mesh) -> int | None:
    """Return the bytes of memory that a device of the mesh may use; None if not known.

    CPU devices share the host's memory.
    """
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return host_bytes() // len(mesh.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def least_bytes(config: TrainConfig, mesh: Mesh) -> tuple[int, int]:
    """Return the least bytes per device of a training step: (for parameters, for tokens).

    The first number counts parameters, both moments and gradients. The second counts the input of
    each layer, which every remat policy keeps, for one part of the batch. `config.model` must be
    resolved.
    """
    state = abstract_state(config, mesh)

    def held(tree) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    rows = config.batch_size // config.accumulate // batch_shards(mesh)
    tokens = rows * config.data.context_length // mesh.shape["sequence"]
    residual = config.model.d_model * jnp.dtype(make_backend(config.model).activation).itemsize
    gradients = trainable(state.params, config.start.trainable)
    return held(state) + held(gradients), tokens * config.model.n_layers * residual


def check_fits(config: TrainConfig, mesh: Mesh) -> None:
    """Raise `UserError` if a run needs more memory than its devices or this host have."""

    def gibibytes(count: int) -> str:
        return f"{count / 2**30:,.1f} GiB"

    if (room := device_bytes(mesh)) is not None:
        # First by arithmetic: tracing builds tables as large as head_dim and n_heads.
        each = (
            16 if config.start.trainable == "all" else 4
        )  # bytes per parameter; frozen ones have no gradients or moments
        parameters, tokens = each * least_parameters(config.model) // mesh.size, 0
        if parameters <= room:
            parameters, tokens = least_bytes(config, mesh)
        if parameters > room:
            raise UserError(
                f"config.model needs {gibibytes(parameters)} on each device for parameters, "
                f"moments and gradients alone, but a device has {gibibytes(room)}: make the model "
                "smaller, or shard it with config.mesh.fsdp or config.mesh.tensor"
            )
        if parameters + tokens > room:
            raise UserError(
                f"config.batch_size={config.batch_size} windows of config.data.context_length="
                f"{config.data.context_length} need {gibibytes(tokens)} on each device for the "
                f"layers' inputs alone, but a device has {gibibytes(room)}: reduce one of them or "
                "increase config.accumulate"
            )
    batch = 16 * config.batch_size * config.data.context_length // jax.process_count()
    ahead = config.data.prefetch * batch
    if ahead > host_bytes():
        raise UserError(
            f"config.data.prefetch={config.data.prefetch} batches take "
            f"{gibibytes(ahead)}, but this host has {gibibytes(host_bytes())}: reduce it"
        )
