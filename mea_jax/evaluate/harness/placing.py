"""A checkpoint's parameters on all devices there are."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from mea_jax.checkpoint.load import Trained
from mea_jax.config.schema import MeshConfig, ModelConfig
from mea_jax.errors import UserError
from mea_jax.model.params import placed_params
from mea_jax.ops.backend import resolve
from mea_jax.parallel import sharding


def mesh_for(model: ModelConfig, trained_on: MeshConfig) -> tuple[Mesh, str | None]:
    """The mesh of the training, as far as it fits the devices of this machine: rows over all of
    them, parameters split as they were.

    Where that does not fit, each device has all parameters: then a line says so.
    """
    sizes = {axis: getattr(trained_on, axis) for axis in ("data", "fsdp", "expert", "tensor")}
    if -1 not in sizes.values():
        sizes["data"] = -1
    slices = trained_on.slices
    try:
        mesh = sharding.make_mesh(MeshConfig(**sizes, sequence=1, slices=slices))
        ways = mesh.shape["fsdp"] * mesh.shape["expert"]
        if model.d_model % ways:
            raise UserError(f"fsdp x expert = {ways} does not divide d_model={model.d_model}")
    except UserError as error:
        whole = sharding.make_mesh(MeshConfig(slices=slices))
        return whole, f"all parameters on every device: {error}"
    return mesh, None


def placed(trained: Trained, model: ModelConfig, say: Callable[[str], Any]) -> tuple[Mesh, Any]:
    """(mesh, parameters on it), float32 as they were trained. `say` is told where they could not
    be split as in training. Raises `UserError`."""
    mesh, problem = mesh_for(model, trained.config.mesh)
    if problem:
        say(problem)
    length = trained.config.data.context_length
    resolved = resolve(
        dataclasses.replace(model, attention_kernel="auto"), list(mesh.devices.flat), length
    )
    return mesh, trained.params(placed_params(resolved, mesh))
