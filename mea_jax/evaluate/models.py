"""Loads the checkpoints under evaluation and checks that they are comparable."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mea_jax.checkpoint.load import open_trained, unresolved
from mea_jax.config.schema import ModelConfig, TrainConfig
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.errors import UserError
from mea_jax.generate.generator import Generator
from mea_jax.ops.resolve import resolve_on


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model on a mesh, or on the first device if `mesh` is None.

    `model` is not resolved: see `resolved`.
    """

    name: str  # in tables and figures
    run: Path
    step: int
    config: TrainConfig
    model: ModelConfig
    params: Any  # training parameters; on a mesh, rounded as by `Trained.on_mesh`
    tokenizer: Tokenizer
    mesh: Mesh | None = None

    def resolved(self, length: int) -> ModelConfig:
        """Return the model with kernels chosen for this machine and `length` positions."""
        return resolve_on(self.model, self.mesh, length)

    def generator(self, length: int, cache_dtype: str | None = None) -> Generator:
        """Return a generator that serves the model from a cache of `length` positions."""
        model = self.resolved(length)
        return Generator(model, self.params, length=length, cache_dtype=cache_dtype, mesh=self.mesh)


def load(path: Path, name: str, dtype: str = "auto", mesh: Mesh | None = None) -> Loaded:
    """Load the newest intact checkpoint of a run directory, or the step that `path` names.

    Only parameters are read; on a `mesh`, each device reads its shards. `dtype` is that of
    products. Raise `UserError` if there is no complete checkpoint, it is damaged, or the mesh does
    not divide the model.
    """
    trained = open_trained(path, lambda line: print(line, file=sys.stderr))
    model = dataclasses.replace(unresolved(trained.config.model), dtype=dtype)
    if mesh is None:
        _, params = trained.on_first_device(dtype)
    else:
        _, params = trained.on_mesh(mesh, dtype, trained.config.data.context_length)
    run = trained.checkpoints.directory.parent
    return Loaded(name, run, trained.step, trained.config, model, params, trained.tokenizer, mesh)


def names(paths: Sequence[Path]) -> list[str]:
    """Return a short, unique name for each path: its folder's, with the step if one is given.

    Raise `UserError` if a path is given twice.
    """

    def short(path: Path) -> str:
        path = path.absolute()
        if path.name.isdigit() and path.parent.name == "checkpoints":
            return f"{path.parent.parent.name}@{path.name}"
        return path.parent.name if path.name == "checkpoints" else path.name

    found = [short(path) for path in paths]
    counts = Counter(found)
    found = [n if counts[n] == 1 else str(p) for n, p in zip(found, paths, strict=True)]
    for name, count in Counter(found).items():
        if count > 1:
            raise UserError(f"--checkpoint {name} is given {count} times: give each model once")
    return found


def check_comparable(models: Sequence[Loaded]) -> None:
    """Raise `UserError` unless all models have the same tokenizer and vocabulary size.

    Losses per token are not comparable otherwise.
    """
    first = models[0]
    for other in models[1:]:
        if other.tokenizer.content != first.tokenizer.content:
            raise UserError(
                f"--checkpoint {other.run} has a different tokenizer from {first.run}, so losses "
                "per token are not comparable: run the command on each separately"
            )
        if other.model.vocab_size != first.model.vocab_size:
            raise UserError(
                f"--checkpoint {other.run} has a vocabulary of {other.model.vocab_size} tokens, "
                f"{first.run} one of {first.model.vocab_size}: run the command on each separately"
            )
