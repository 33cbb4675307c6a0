"""The parameters of a model: initialised, placed on a mesh, or as shapes only."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mea_jax.config.schema import ModelConfig
from mea_jax.model.transformer import Decoder
from mea_jax.parallel import sharding


@struct.dataclass
class TrainState:
    """Everything that a step changes; `step` is the number of completed updates.

    Trees of shardings or of abstract arrays have this structure too.
    """

    step: Any  # () int32
    params: Any
    opt_state: Any


def init_params(model: ModelConfig, key: jax.Array) -> Any:
    """Initialise parameters, whose leaves carry logical axes (`nn.LogicallyPartitioned`)."""
    dummy = jnp.zeros((1, 8), jnp.int32)
    # Shapes do not depend on the kernel, and a flash kernel on a mesh does not accept one row.
    model = dataclasses.replace(model, attention_kernel="einsum")
    return Decoder(model).init(key, dummy, dummy, dummy)["params"]


def abstract_params(model: ModelConfig) -> Any:
    """Return shapes and dtypes of the parameters, without logical axes."""
    return nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))


def param_shardings(model: ModelConfig, mesh: Mesh) -> Any:
    """Return a tree of `NamedSharding`s, one for each parameter."""
    # The key is created inside, so nothing runs: the mesh may exist only for compilation.
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return sharding.param_shardings(boxed, mesh)


def placed_params(model: ModelConfig, mesh: Mesh) -> Any:
    """Return shapes, dtypes and shardings of the parameters, as the target of a restore."""
    return _placed(abstract_params(model), param_shardings(model, mesh))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )
