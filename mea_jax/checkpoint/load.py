"""A trained model on disk, as the commands after training take it."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from mea_jax.checkpoint.manager import Checkpoints, find_checkpoint
from mea_jax.config.schema import ModelConfig, TrainConfig
from mea_jax.data.tokenizers import Tokenizer, from_directory
from mea_jax.errors import UserError
from mea_jax.model.params import abstract_params
from mea_jax.ops.backend import resolve


@dataclass(frozen=True)
class Trained:
    """A checkpoint that is whole; its arrays are not read yet."""

    path: Path  # as it was given
    checkpoints: Checkpoints
    step: int
    config: TrainConfig
    tokenizer: Tokenizer

    def params(self, abstract: Any) -> Any:
        """The parameters alone, laid out as `abstract` says. Raises `UserError`."""
        return self.checkpoints.params(self.step, abstract)

    def on_first_device(self, dtype: str, length: int = 0) -> tuple[ModelConfig, Any]:
        """The model, resolved for `length` positions (0: its window), and its parameters.

        `dtype` is that of products. Raises `UserError`.
        """
        device, length = jax.devices()[0], length or self.config.data.context_length
        model = dataclasses.replace(unresolved(self.config.model), dtype=dtype)
        model = resolve(model, [device], length)
        where = SingleDeviceSharding(device)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), abstract_params(model)
        )
        return model, self.params(abstract)


def open_trained(path: Path, say: Callable[[str], Any], option: str = "--checkpoint") -> Trained:
    """The model of a run directory's newest good checkpoint, or of one step; `say` is told of
    damaged ones that were passed over. With several processes, each of them calls this.

    Raises `UserError`, which names `option`: no such folder, no checkpoint, a damaged one.
    """
    run, step = find_checkpoint(path, option)
    checkpoints = Checkpoints(run)
    if step is None:
        step = checkpoints.newest_good(say)
    elif problem := checkpoints.damage(step):
        raise UserError(f"{option} {path} is damaged: {problem}; take another step")
    if step is None:
        raise UserError(f"{option} {path}: no checkpoint there is complete")
    return Trained(
        path, checkpoints, step, checkpoints.config(step), from_directory(run / "tokenizer")
    )


def stored_config(path: Path, option: str = "--checkpoint") -> TrainConfig:
    """The config inside the newest checkpoint of a run directory, or inside one step of it.

    Only that is read: whether the arrays are whole is for `open_trained`, which may take an older
    step. Raises `UserError`.
    """
    run, step = find_checkpoint(path, option)
    checkpoints = Checkpoints(run)
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise UserError(f"{option} {path}: no checkpoint there is complete")
    return checkpoints.config(step)


def unresolved(model: ModelConfig) -> ModelConfig:
    """`model` with what was resolved for the machine that trained left open for this one.

    Its dtype stays: that is what the model was trained to compute with.
    """
    asked = {"backend": "auto", "attention_kernel": "auto", "hlc_form": "auto"}
    return ModelConfig(**(vars(model) | asked))


def load(
    path: Path, length: int = 0, dtype: str = "auto"
) -> tuple[ModelConfig, Any, Tokenizer, int]:
    """Model, parameters, tokenizer and cache length of a checkpoint, on the first device.

    `length` 0: the window that the model was trained on. Raises `UserError`.
    """
    trained = open_trained(path, lambda line: print(line, file=sys.stderr))
    length = length or trained.config.data.context_length
    model, params = trained.on_first_device(dtype, length)
    return model, params, trained.tokenizer, length
