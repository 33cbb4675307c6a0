"""Open trained models on disk, for the commands after training."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from mea_jax.checkpoint.manager import Checkpoints, find_checkpoint
from mea_jax.config.schema import ModelConfig, TrainConfig
from mea_jax.data.tokenizers import Tokenizer, from_directory
from mea_jax.errors import UserError
from mea_jax.model.params import abstract_params, placed_params, rounded_params
from mea_jax.ops.resolve import resolve_on
from mea_jax.parallel import sharding


@dataclass(frozen=True)
class Trained:
    """A complete checkpoint, whose arrays are not read yet."""

    path: Path  # the argument of `open_trained`
    checkpoints: Checkpoints
    step: int
    config: TrainConfig
    tokenizer: Tokenizer

    @property
    def context_limit(self) -> int:
        """The longest context that the model was made for: its window, or what its files say."""
        return max(self.config.data.context_length, self.tokenizer.published_context)

    def params(self, abstract: Any) -> Any:
        """Return the parameters alone, with the shapes, dtypes and shardings of `abstract`.

        Raise `UserError` if they cannot be read.
        """
        return self.checkpoints.params(self.step, abstract)

    def on_first_device(self, dtype: str, length: int = 0) -> tuple[ModelConfig, Any]:
        """Return the model, resolved for `length` positions (0: its window), and its parameters.

        `dtype` is the dtype of products. Raise `UserError` if the checkpoint cannot be read, or the
        device cannot run the model.
        """
        length = length or self.config.data.context_length
        model = dataclasses.replace(unresolved(self.config.model), dtype=dtype)
        model = resolve_on(model, None, length)
        where = SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), abstract_params(model)
        )
        return model, self.params(abstract)

    def on_mesh(self, mesh: Mesh, dtype: str, length: int) -> tuple[ModelConfig, Any]:
        """Return the model, resolved for `length` positions, and its parameters on a mesh.

        Each device reads only its shards. Matrices that are only ever rounded to the compute dtype
        are in it (`params.rounded_params`). Raise `UserError` if the checkpoint cannot be read, or
        the mesh does not divide the model.
        """
        rows = sharding.batch_shards(mesh)
        one = dataclasses.replace(self.config, batch_size=rows, accumulate=1)
        sharding.check_divisible(one, mesh)
        model = dataclasses.replace(unresolved(self.config.model), dtype=dtype)
        model = resolve_on(model, mesh, length)
        return model, self.rounded(model, mesh)

    def rounded(self, model: ModelConfig, mesh: Mesh) -> Any:
        """Return the parameters of a resolved model on a mesh, as `on_mesh`."""
        # Orbax casts each shard on the host, once it is read and before it is sent to its device.
        # So devices never hold it in float32. Numpy rounds to nearest even, like XLA.
        return self.params(rounded_params(model, placed_params(model, mesh)))


def open_trained(path: Path, log: Callable[[str], Any], option: str = "--checkpoint") -> Trained:
    """Return the model of a run directory's newest good checkpoint, or of one step.

    `log` receives a line for each damaged checkpoint that is skipped. In a distributed run every
    process must call this. Raise `UserError`, which names `option`, if there is no such folder or
    no checkpoint, or the step is damaged.
    """
    run, step = find_checkpoint(path, option)
    checkpoints = Checkpoints(run)
    if step is None:
        step = checkpoints.newest_good(log)
    elif problem := checkpoints.damage(step):
        raise UserError(f"{option} {path} is damaged: {problem}; use another step")
    if step is None:
        raise UserError(
            f"{option} {path}: no checkpoint there is complete; give a run that has saved one"
        )
    return Trained(
        path, checkpoints, step, checkpoints.config(step), from_directory(run / "tokenizer")
    )


def stored_config(path: Path, option: str = "--checkpoint") -> TrainConfig:
    """Return the config inside the newest checkpoint of a run directory, or inside one step of it.

    Nothing else is read: `open_trained` verifies the arrays, and may use an older step. Raise
    `UserError` if there is no checkpoint, or its config cannot be read.
    """
    run, step = find_checkpoint(path, option)
    checkpoints = Checkpoints(run)
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise UserError(
            f"{option} {path}: no checkpoint there is complete; give a run that has saved one"
        )
    return checkpoints.config(step)


def unresolved(model: ModelConfig) -> ModelConfig:
    """Return `model` with all choices that depend on the machine set back to "auto".

    The dtype stays: the model was trained to compute with it.
    """
    asked = {"backend": "auto", "attention_kernel": "auto", "hlc_form": "auto"}
    return ModelConfig(**(vars(model) | asked))


def load(
    path: Path, length: int = 0, dtype: str = "auto"
) -> tuple[ModelConfig, Any, Tokenizer, int]:
    """Return the model, parameters, tokenizer and cache length of a checkpoint.

    The parameters are on the first device. A `length` of 0 means the window that the model was
    trained on. `dtype` is the dtype of products. Raise `UserError` as `open_trained`.
    """
    trained = open_trained(path, lambda line: print(line, file=sys.stderr))
    length = length or trained.config.data.context_length
    model, params = trained.on_first_device(dtype, length)
    return model, params, trained.tokenizer, length
