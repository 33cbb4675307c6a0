"""Check before a run starts that the least it must hold fits in the devices' memory.

Far from an estimate of what it will take (that is `python -m mea_jax.plan`): only what it cannot do
without. So nothing that would run is refused, and a slip in a size is one line, not the operating
system's end to the process.
"""

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mea_jax.config.checks import least_parameters
from mea_jax.config.schema import TrainConfig
from mea_jax.errors import UserError
from mea_jax.ops.backend import make_backend
from mea_jax.parallel.sharding import copies
from mea_jax.train.optimizer import trainable
from mea_jax.train.step import abstract_state


def host_bytes() -> int:
    """Memory of this machine, or of the container that it is asked for in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    return min(total, int(limit)) if limit.isdecimal() else total


def device_bytes(mesh: Mesh) -> int | None:
    """Memory that a device of the mesh may use, or None where nobody says.

    Devices that are the host's CPU share its memory.
    """
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return host_bytes() // len(mesh.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def least_bytes(config: TrainConfig, mesh: Mesh) -> tuple[int, int]:
    """(bytes by the parameters, bytes by the tokens) that a training step holds on each device.

    Parameters, both moments and gradients; each layer's input, which every remat policy keeps, of
    one part of the batch. `config.model` is resolved.
    """
    state = abstract_state(config, mesh)

    def held(tree) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    rows = config.batch_size // config.accumulate // copies(mesh)
    tokens = rows * config.data.context_length // mesh.shape["sequence"]
    residual = config.model.d_model * jnp.dtype(make_backend(config.model).activation).itemsize
    gradients = trainable(state.params, config.start.trainable)
    return held(state) + held(gradients), tokens * config.model.n_layers * residual


def check_fits(config: TrainConfig, mesh: Mesh) -> None:
    """Raises `UserError` where the least that a run must hold is more than there is."""

    def gibibytes(count: int) -> str:
        return f"{count / 2**30:,.1f} GiB"

    if (room := device_bytes(mesh)) is not None:
        # By arithmetic first: tracing a model has tables to make, of its head_dim and heads.
        each = (
            16 if config.start.trainable == "all" else 4
        )  # bytes; frozen parameters have no gradients or moments
        parameters, tokens = each * least_parameters(config.model) // mesh.size, 0
        if parameters <= room:
            parameters, tokens = least_bytes(config, mesh)
        if parameters > room:
            raise UserError(
                f"config.model needs {gibibytes(parameters)} on each device for parameters, "
                f"moments and gradients alone, and a device has {gibibytes(room)}: make the model "
                "smaller, or split it with config.mesh.fsdp or config.mesh.tensor"
            )
        if parameters + tokens > room:
            raise UserError(
                f"config.batch_size={config.batch_size} windows of config.data.context_length="
                f"{config.data.context_length} need {gibibytes(tokens)} on each device for the "
                f"inputs of the layers alone, and a device has {gibibytes(room)}: make either "
                "smaller, or config.accumulate larger"
            )
    batch = 16 * config.batch_size * config.data.context_length // jax.process_count()
    ahead = config.data.prefetch * batch
    if ahead > host_bytes():
        raise UserError(
            f"config.data.prefetch={config.data.prefetch} batches read ahead take "
            f"{gibibytes(ahead)}, and this host has {gibibytes(host_bytes())}: make it smaller"
        )
