"""Make the mesh, map logical axes to its axes, and check that neither is silently ignored.

Parameters carry logical axis names in their Linen metadata, activations get them through
`constrain`. `RULES` maps each name to the mesh axes that split it. The model itself names no mesh
axis: code that needs its own collective calls `mesh_axes` and `shard_count`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mea_jax.config.schema import MeshConfig, Side, TrainConfig
from mea_jax.errors import UserError, nearest

# From the outermost, whose devices may be far apart, to the innermost, which communicate most.
AXES = ("data", "fsdp", "expert", "sequence", "tensor")
REQUESTED = ("data", "fsdp", "tensor", "expert")  # axes of --mesh, after training

# Logical axis -> mesh axes. None: never split.
RULES: dict[str, tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "embed": ("fsdp", "expert", "sequence"),
    "heads": ("tensor",),  # N, or K after folding
    "components": ("tensor",),  # C
    "mixing": None,  # the C axis of W_lc: its K axis is split like the composite heads
    "head_dim": None,
    "complex": None,
    "positions": None,
    "mlp": ("tensor",),
    "experts": ("expert",),  # E
    "expert_embed": ("fsdp", "sequence"),  # D of an expert's matrices
    "router": None,  # E of the router: every token needs all of it
    "vocab": ("tensor",),
    "norm": None,
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": ("sequence",),
    "activation_embed": None,
    "activation_heads": ("tensor",),
    "activation_mlp": ("tensor",),
    "activation_vocab": ("tensor",),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of a run over `devices` (default: all). Raise `UserError` if it does not fit.

    The outermost part of `data` spans the slices, so that only sums of gradients cross the network
    between them. Without TPUs a slice is a range of consecutive devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(len(devices) // fixed, 1)
    if math.prod(sizes.values()) != len(devices):
        product = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(
            f"config.mesh needs {math.prod(sizes.values())} devices ({product}), but this machine "
            f"has {len(devices)}: change config.mesh, or set one axis to -1"
        )
    if sizes["data"] % config.slices:
        raise UserError(
            f"config.mesh leaves data={sizes['data']} on these {len(devices)} devices, no multiple "
            f"of slices={config.slices}: only data spans slices, so make the other axes smaller"
        )
    found = _slices(devices)
    if found is not None and found != config.slices:
        raise UserError(
            f"these {len(devices)} devices form {found} slice{'s' if found > 1 else ''}, but "
            f"config.mesh.slices={config.slices}: set it to {found}"
        )
    # Auto axes: with jax.make_mesh's default, Explicit, Linen's partitioning metadata fails.
    kinds = (AxisType.Auto,) * len(AXES)
    shape = tuple(sizes.values())
    if found is None or found == 1:
        try:
            return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
        except NotImplementedError:  # 8 of a torus of 4x4x4 is not a product of its axes: split one
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(grid, AXES, axis_types=kinds)
    inside = (sizes["data"] // found, *shape[1:])
    across = (found,) + (1,) * (len(AXES) - 1)
    grid = mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=kinds)


def requested_mesh(text: str, option: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of "tensor=4,fsdp=2" over the first devices; other axes have one device.

    `devices` are those of jax by default. Raise `UserError`, which names `option`, for an unknown
    axis, a size that is not a positive integer, more devices than there are, or a mesh that leaves
    out devices of a run on several hosts.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": 1}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in REQUESTED:
            raise UserError(
                f"{option} {text}: there is no axis {axis!r}; {nearest(axis, REQUESTED)}"
            )
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"{option} {text}: the size of {axis} must be 1 or more")
        sizes[axis] = int(size)
    count = math.prod(sizes.values())
    if len(devices) < count:
        raise UserError(
            f"{option} {text} needs {count} devices, but this machine has {len(devices)}: use a "
            "smaller mesh"
        )
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"{option} {text} has {count} devices, but the hosts of this run have {len(devices)}: "
            "use a mesh of all of them"
        )
    devices = devices[:count]
    return make_mesh(MeshConfig(**sizes, slices=_slices(devices) or 1), devices)


def _slices(devices: Sequence[jax.Device]) -> int | None:
    """Return the number of slices that TPU devices form; None for other devices."""
    if devices[0].platform != "tpu":
        return None
    return len({getattr(device, "slice_index", 0) for device in devices})


def check_divisible(config: TrainConfig, mesh: Mesh) -> None:
    """Raise `UserError` if an axis of the mesh does not divide a size that it splits."""
    model, tensor, expert = config.model, mesh.shape["tensor"], mesh.shape["expert"]
    width = "d_expert" if model.n_experts else "d_ff"
    split = {
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        width: getattr(model, width),
        "vocab_size": model.vocab_size,
        **{f"key_components (layer {i})": c for i, c in enumerate(model.components(Side.KEY))},
        **{f"value_components (layer {i})": c for i, c in enumerate(model.components(Side.VALUE))},
    }
    if model.variant == "collaborative":  # the shared keys are not split
        split = {name: size for name, size in split.items() if "key_components" not in name}
    if model.variant == "differential_v1":
        split["n_kv_heads / 2 (pairs)"] = model.n_kv_heads // 2
    for name, size in split.items():
        if size % tensor:
            raise UserError(
                f"config.mesh.tensor={tensor} does not divide config.model.{name}={size}: set it "
                "to a divisor"
            )
    if expert > 1 and not model.n_experts:
        raise UserError(
            f"config.mesh.expert={expert} splits experts, and config.model.n_experts=0 has none: "
            "use config.mesh.data or config.mesh.fsdp instead"
        )
    if model.n_experts % expert:
        raise UserError(
            f"config.mesh.expert={expert} does not divide config.model.n_experts={model.n_experts}"
            ": set it to a divisor"
        )
    given, ways = _product(mesh, "fsdp", "expert", "sequence")
    if model.d_model % ways:
        raise UserError(
            f"config.mesh.{given} does not divide config.model.d_model={model.d_model}: change one "
            "of them"
        )
    _check_length(config, mesh.shape["sequence"])
    rows = config.batch_size // config.accumulate
    if rows % batch_shards(mesh):
        names = "data x fsdp" if expert == 1 else "data x fsdp x expert"
        raise UserError(
            f"batch_size / accumulate = {rows} windows cannot be divided evenly over {names} = "
            f"{batch_shards(mesh)} devices: change config.batch_size, config.accumulate or "
            "config.mesh"
        )


def batch_shards(mesh: Mesh) -> int:
    """Return the number of shards of a batch: devices that share a window count once."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"] or ())


def _product(mesh: Mesh, *axes: str) -> tuple[str, int]:
    """Return the product of axes as a message shows it, without axes of size 1, and its value."""
    named = [axis for axis in axes if mesh.shape[axis] > 1] or [axes[0]]
    sizes = [mesh.shape[axis] for axis in named]
    equals = "=" if len(named) == 1 else " = "
    return f"{' x '.join(named)}{equals}{' x '.join(map(str, sizes))}", math.prod(sizes)


def _check_length(config: TrainConfig, shards: int) -> None:
    """Raise `UserError` if windows cannot be cut into two chunks per shard of the sequence."""
    if shards == 1:
        return
    length, kernel = config.data.context_length, config.model.attention_kernel
    unit, why = 2 * shards, f"2 x {shards}: a shard takes an early and a late chunk of each window"
    if kernel == "splash":
        unit, why = unit * 128, f"2 x {shards} x 128: chunks of full blocks for the TPU's kernel"
    if length % unit:
        raise UserError(
            f"config.mesh.sequence={shards} does not fit config.data.context_length={length}: make "
            f"the length a multiple of {unit} ({why})"
        )


def parameter(
    module: nn.Module, name: str, init: Callable[..., Any], axes: Sequence[str], *args: Any
) -> jax.Array:
    """Return a parameter of a Linen module with logical axes; `args` go to `init` after the key."""
    spec(axes)
    return cast(
        jax.Array, module.param(name, nn.with_logical_partitioning(init, tuple(axes)), *args)
    )


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """Return the `PartitionSpec` of an array with these logical names of its axes.

    Raises:
      ValueError: if a name has no rule, or if two axes of the array claim the same mesh axis. Both
        would otherwise be dropped silently.
    """
    axes, claimed = [], set()
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(
                f"logical axis {name!r} of {tuple(names)} has no rule: add it to RULES"
            )
        mesh_axes = RULES[name] if name is not None else None
        for axis in mesh_axes or ():
            if axis in claimed:
                raise ValueError(
                    f"two axes of {tuple(names)} claim mesh axis {axis!r}: change one of them"
                )
            claimed.add(axis)
        axes.append(mesh_axes if mesh_axes is None or len(mesh_axes) > 1 else mesh_axes[0])
    return PartitionSpec(*axes)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Shard an activation inside jit by its logical axes; return it as it is if no mesh is set.

    An axis that the mesh does not divide, such as the one row of a prompt, stays unsharded: padding
    it would move data for nothing. The axes of a training step divide (`check_divisible`). Raise
    `ValueError` if `names` are not one per axis, or as `spec`.
    """
    if len(names) != x.ndim:
        raise ValueError(
            f"{names} names {len(names)} axes of an array of shape {x.shape}: name each axis once"
        )
    partition = spec(names)
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, even_spec(partition, x.shape))


def even_spec(
    partition: PartitionSpec, shape: Sequence[int], mesh: Mesh | None = None
) -> PartitionSpec:
    """Return `partition` without the axes of an array of `shape` that a mesh does not divide.

    The mesh is `mesh`, or that of `jax.set_mesh`.
    """
    sizes = (mesh or jax.sharding.get_abstract_mesh()).shape
    kept = []
    for axes, size in zip(partition, shape, strict=True):
        names = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
        kept.append(axes if size % math.prod(sizes[name] for name in names) == 0 else None)
    return PartitionSpec(*kept)


def param_shardings(abstract_boxed: Any, mesh: Mesh) -> Any:
    """Return the `NamedSharding` of every leaf of a tree with Linen's logical axis names."""

    def leaf(value):
        names = value.names if isinstance(value, nn.LogicallyPartitioned) else ()
        return NamedSharding(mesh, spec(names))

    def is_box(value):
        return isinstance(value, nn.LogicallyPartitioned)

    return jax.tree.map(leaf, abstract_boxed, is_leaf=is_box)


def mesh_axes(*names: str) -> tuple[str, ...]:
    """Return the axes of the mesh of `jax.set_mesh` that split logical axes, for a collective.

    Axes of size 1 are left out: a compiler may keep a collective over them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = (axis for name in names for axis in RULES[name] or ())
    return tuple(axis for axis in axes if not mesh.empty and mesh.shape[axis] > 1)


def shard_count(name: str) -> int:
    """Return the number of shards of a logical axis on the mesh of `jax.set_mesh`, 1 if none."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(name))


def has_mesh() -> bool:
    """Return whether `jax.set_mesh` has set a mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def require(mesh: Mesh) -> None:
    """Raise `RuntimeError` unless `mesh` is the mesh of `jax.set_mesh`, or has one device.

    Call this where a program is traced: if no mesh were set, `constrain` and all other code that
    reads the mesh would silently do nothing.
    """
    current = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and current != mesh.abstract_mesh:
        shape = dict(current.shape)
        held = "no mesh is set" if current.empty else f"the mesh that is set is {shape}"
        raise RuntimeError(
            f"a program for the mesh {dict(mesh.shape)} is traced where {held}: call it under "
            "`with jax.set_mesh(mesh):`"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of token ids (batch, length, ...): rows over data, fsdp and expert.

    The length is never split: token ids are small, and a step that splits its windows
    (`step.batch_loss`) then takes its chunks from them locally.
    """
    return NamedSharding(mesh, spec(("batch", None)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())
