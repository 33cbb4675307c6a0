"""The parameters of a model: initialised, placed on a mesh, or as shapes only."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mea_jax.config.schema import ModelConfig, Side
from mea_jax.model.transformer import Decoder
from mea_jax.ops.backend import make_backend
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


def is_rounded(name: str, ndim: int) -> bool:
    """Return whether a served parameter of one layer, or of none, is in the compute dtype.

    These are the matrices. Routers stay float32, so that rounding does not change the choice of
    experts, and so do biases, the steps of slots and the mean of keys.
    """
    return ndim >= 2 and name != "router" and not name.endswith(("_bias", "_steps", "_mean"))


def rounded_params(model: ModelConfig, abstract: Any) -> Any:
    """Return `abstract` with the matrices in the compute dtype that every use rounds to it first.

    These are equal in serving and in a forward pass of training, whether they are restored in this
    dtype or in float32. What else serving rounds stays float32 here: mixings, and the projections
    that they may be folded into; embeddings, if their rows are added or passed on in float32.

    Args:
      model: the resolved config.
      abstract: shapes, dtypes and, if there are any, shardings of the training parameters.
    """
    backend = make_backend(model)
    kept = {side.value for side in Side if model.mixes(side)}
    if model.positions == "learned" or backend.activation != backend.dtype:
        kept |= {"embedding", "position_embedding"}

    def leaf(path, x):
        name, stacked = path[-1].key, path[0].key.startswith("layers_")
        rounded = is_rounded(name, x.ndim - stacked)
        if not rounded or name in kept or name.endswith("_mixing"):
            return x
        return jax.ShapeDtypeStruct(x.shape, backend.dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(leaf, abstract)
