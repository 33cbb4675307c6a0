"""One mesh, one table of logical axes, and the checks that neither is quietly ignored.

Parameters carry logical axis names in their Linen metadata, activations get them through
`constrain`; `RULES` says which mesh axes each name is split over. Nothing else in the package
mentions a mesh axis.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mea_jax.config import MeshConfig, TrainConfig
from mea_jax.errors import UserError

# Logical axis -> mesh axes. None: never split.
RULES: dict[str, tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "embed": ("fsdp",),
    "heads": ("tensor",),  # N, or K after folding
    "components": ("tensor",),  # C
    "mixing": None,  # the C side of W_lc: its K side is split like the heads it makes
    "head_dim": None,
    "complex": None,
    "positions": None,
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": None,
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "activation_embed": None,
    "activation_heads": ("tensor",),
    "activation_mlp": ("tensor",),
    "activation_vocab": ("tensor",),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run over `devices` (default: all). Raises `UserError` if it does not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(len(devices) // fixed, 1)
    if math.prod(sizes.values()) != len(devices):
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(
            f"config.mesh needs {math.prod(sizes.values())} devices ({shape}), but this machine "
            f"has {len(devices)}: change config.mesh, or set one axis to -1"
        )
    # Auto axes: with jax.make_mesh's default, Explicit, Linen's partitioning metadata fails.
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def check_divisible(config: TrainConfig, mesh: Mesh) -> None:
    """Raises `UserError` where an axis of the mesh does not divide what it splits."""
    model, tensor = config.model, mesh.shape["tensor"]
    split = {
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "d_ff": model.d_ff,
        "vocab_size": model.vocab_size,
        **{f"key_components (layer {i})": c for i, c in enumerate(model.components("key"))},
        **{f"value_components (layer {i})": c for i, c in enumerate(model.components("value"))},
    }
    if model.variant == "collaborative":  # the shared keys are not split
        split = {name: size for name, size in split.items() if "key_components" not in name}
    if model.variant == "differential_v1":
        split["n_kv_heads / 2 (pairs)"] = model.n_kv_heads // 2
    for name, size in split.items():
        if size % tensor:
            raise UserError(
                f"config.mesh.tensor={tensor} does not divide config.model.{name}={size}"
            )
    if model.d_model % mesh.shape["fsdp"]:
        raise UserError(
            f"config.mesh.fsdp={mesh.shape['fsdp']} does not divide "
            f"config.model.d_model={model.d_model}"
        )
    rows, copies = config.batch_size // config.accumulate, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % copies:
        raise UserError(
            f"batch_size / accumulate = {rows} windows cannot be shared evenly by data x fsdp = "
            f"{copies} devices: change config.batch_size, config.accumulate or config.mesh"
        )


def parameter(
    module: nn.Module, name: str, init: Callable[..., Any], axes: Sequence[str], *args: Any
) -> jax.Array:
    """A parameter of a Linen module with its logical axes; `args` go to `init` after the key."""
    spec(axes)
    return cast(
        jax.Array, module.param(name, nn.with_logical_partitioning(init, tuple(axes)), *args)
    )


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """Logical names of an array's axes to a `PartitionSpec`.

    Raises `ValueError` for a name without a rule, and for two axes of one array that claim the
    same mesh axis: both would otherwise be dropped in silence.
    """
    axes, claimed = [], set()
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r} of {tuple(names)} has no rule")
        mesh_axes = RULES[name] if name is not None else None
        for axis in mesh_axes or ():
            if axis in claimed:
                raise ValueError(f"two axes of {tuple(names)} claim mesh axis {axis!r}")
            claimed.add(axis)
        axes.append(mesh_axes if mesh_axes is None or len(mesh_axes) > 1 else mesh_axes[0])
    return PartitionSpec(*axes)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Annotates an activation inside jit; outside any `jax.set_mesh` it is the identity."""
    if len(names) != x.ndim:
        raise ValueError(f"{names} names {len(names)} axes of an array of shape {x.shape}")
    partition = spec(names)
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition)


def param_shardings(abstract_boxed: Any, mesh: Mesh) -> Any:
    """`NamedSharding` of every leaf of a tree whose leaves carry Linen's logical axis names."""

    def leaf(value):
        names = value.names if isinstance(value, nn.LogicallyPartitioned) else ()
        return NamedSharding(mesh, spec(names))

    def is_box(value):
        return isinstance(value, nn.LogicallyPartitioned)

    return jax.tree.map(leaf, abstract_boxed, is_leaf=is_box)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of an array (batch, length, ...): rows over data and fsdp."""
    return NamedSharding(mesh, spec(("batch", "length")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of a scalar, or of anything every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
