"""Places a checkpoint's parameters on a mesh: the one that is asked for, or all devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from mea_jax.checkpoint.load import Trained
from mea_jax.config.schema import MeshConfig, ModelConfig
from mea_jax.errors import UserError
from mea_jax.ops.resolve import resolve_on
from mea_jax.parallel import sharding


def mesh_for(model: ModelConfig, trained_on: MeshConfig) -> tuple[Mesh, str | None]:
    """Return a mesh over all devices, and None or the reason why parameters are not sharded.

    The mesh shards parameters as `trained_on` does and splits rows over all devices. If that does
    not fit the devices or the model, every device gets all parameters.
    """
    sizes = {axis: getattr(trained_on, axis) for axis in ("data", "fsdp", "expert", "tensor")}
    if -1 not in sizes.values():
        sizes["data"] = -1
    slices = trained_on.slices
    try:
        mesh = sharding.make_mesh(MeshConfig(**sizes, sequence=1, slices=slices))
        ways = mesh.shape["fsdp"] * mesh.shape["expert"]
        if model.d_model % ways:
            raise UserError(
                f"fsdp x expert = {ways} does not divide d_model={model.d_model}; use fewer devices"
            )
    except UserError as error:
        whole = sharding.make_mesh(MeshConfig(slices=slices))
        return whole, f"parameters are replicated on every device: {error}"
    return mesh, None


def placed(
    trained: Trained, model: ModelConfig, log: Callable[[str], Any], requested: str | None = None
) -> tuple[Mesh, Any]:
    """Return (mesh, training parameters on it, rounded as by `Trained.on_mesh`).

    `requested` is a mesh such as "tensor=4,fsdp=2", which must divide the model. None stands for
    the mesh of training on all devices; report through `log` if that does not divide it. Raise
    `UserError` if the model cannot run on these devices or the checkpoint cannot be read.
    """
    if requested is not None:
        mesh = sharding.requested_mesh(requested, "--mesh")
        return mesh, trained.on_mesh(mesh, model.dtype, trained.config.data.context_length)[1]
    mesh, problem = mesh_for(model, trained.config.mesh)
    if problem:
        log(problem)
    length = trained.config.data.context_length
    resolved = resolve_on(dataclasses.replace(model, attention_kernel="auto"), mesh, length)
    return mesh, trained.rounded(resolved, mesh)
