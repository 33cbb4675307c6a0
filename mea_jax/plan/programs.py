"""Compile the real training and decode steps of a config ahead of time."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mea_jax.checkpoint.load import stored_config
from mea_jax.config.schema import MeshConfig, ModelConfig, TrainConfig
from mea_jax.errors import UserError
from mea_jax.generate import decode
from mea_jax.model.params import placed_params
from mea_jax.ops.resolve import resolve, resolve_on
from mea_jax.parallel import sharding
from mea_jax.plan.compiling import Compiled, compile_and_measure, for_cpu_stand_in, per_device_bytes
from mea_jax.plan.target import Target
from mea_jax.train.step import abstract_state, compile_train_step
from mea_jax.train.warm_start import teacher_model


def described(model: ModelConfig) -> str:
    """Return a description of the attention of a resolved model."""
    words = f"{model.attention_kernel} attention"
    return words if model.hlc == "none" else f"{words}, HLC {model.hlc_form}"


def train_program(config: TrainConfig, target: Target) -> Compiled:
    """Return the training step, compiled for the target.

    Raises `UserError` if the config cannot run on the target, `DoesNotFit` if memory is too small.
    """
    mesh = sharding.make_mesh(config.mesh, target.devices)
    length = config.data.context_length
    shape = dict(mesh.shape)
    model = for_cpu_stand_in(config.model, target)
    model = resolve(model, target.devices, length, shape["tensor"], shape["sequence"])
    config = dataclasses.replace(config, model=model)
    sharding.check_divisible(config, mesh)
    state, teacher = abstract_state(config, mesh), None
    teacher_args: tuple[Any, ...] = ()
    if config.start.teacher:
        stored = stored_config(Path(config.start.teacher), "config.start.teacher")
        teacher = teacher_model(stored.model, config, mesh)
        teacher_args = (placed_params(teacher, mesh),)
    rows = jax.ShapeDtypeStruct(
        (config.batch_size, length), jnp.int32, sharding=sharding.batch_sharding(mesh)
    )
    batch = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), rows)
    with jax.set_mesh(mesh):
        lowered = compile_train_step(config, mesh, teacher).lower(state, batch, *teacher_args)
    argument_bytes = {
        "parameters": per_device_bytes(state.params),
        "optimizer": per_device_bytes(state.opt_state),
        "batch": per_device_bytes(batch),
    } | ({"teacher": per_device_bytes(teacher_args)} if teacher_args else {})
    return compile_and_measure(
        lowered,
        target,
        config=config,
        mesh=mesh,
        argument_bytes=argument_bytes,
        params=state.params,
        describe=described(model),
    )


def decode_program(
    config: TrainConfig, target: Target, batch: int, context: int, mesh: Mesh | None = None
) -> Compiled:
    """Return a decode step of `batch` rows with `context` cached positions.

    `mesh` divides the weights, and the cache by rows and heads, as in `generate`; None stands for
    the first device. `config.mesh`, which is that of training, is not read. Raises `UserError` if
    the config cannot run on the target or on the mesh, `DoesNotFit` if memory is too small.
    """
    if mesh is None:
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1), target.devices[:1])
    if batch % sharding.batch_shards(mesh):
        raise UserError(
            f"--batch {batch}: these rows cannot be divided over the {sharding.batch_shards(mesh)} "
            "shards of a batch on --mesh (data x fsdp x expert); set it to a multiple"
        )
    sharding.check_divisible(dataclasses.replace(config, batch_size=batch, accumulate=1), mesh)
    model = resolve_on(for_cpu_stand_in(config.model, target), mesh, context)
    config = dataclasses.replace(config, model=model)
    served = decode.serving(model)
    params = decode.placed_params(served, mesh)
    cache = decode.placed_cache(served, batch, context, jnp.dtype(model.dtype), mesh)
    rows = NamedSharding(mesh, sharding.spec(("batch",)))
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows)
    same = jax.tree.map(lambda x: x.sharding, cache)  # the next step takes what this one returns
    step = jax.jit(
        functools.partial(decode.step, served), donate_argnums=1, out_shardings=(None, same)
    )
    with jax.set_mesh(mesh):
        lowered = step.lower(params, cache, tokens)
    layers = per_device_bytes(cache.layers)
    argument_bytes = {
        "weights": per_device_bytes(params),
        "cache": layers,
        "cache, recent": per_device_bytes(cache) - layers,
    }
    return compile_and_measure(
        lowered,
        target,
        config=config,
        mesh=mesh,
        argument_bytes=argument_bytes,
        params=params,
        describe=served.describe(),
    )
