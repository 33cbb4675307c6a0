"""Start a run: load or initialise its parameters, and load its teacher.

Continued training of a compressed model ("recovery") is an ordinary run whose initial parameters
come from another run. The new run keeps the model and tokenizer of that run. Data, schedule and
everything else follow the new run's config.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mea_jax.checkpoint.load import Trained, open_trained, unresolved
from mea_jax.checkpoint.manager import find_checkpoint
from mea_jax.config.model_checks import validate_from_scratch
from mea_jax.config.schema import ModelConfig, TrainConfig, differences
from mea_jax.data import tokenizers
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.errors import UserError
from mea_jax.model.params import TrainState, placed_params
from mea_jax.ops.resolve import resolve
from mea_jax.parallel import sharding
from mea_jax.train.step import Teacher, create_state, start_state

_CHECKPOINT, _TEACHER = "config.start.checkpoint", "config.start.teacher"


def teacher_model(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> ModelConfig:
    """Return a teacher's model, resolved for the run of `config` with the run's dtype and backend.

    Raises `UserError` if the model cannot be resolved, or be sharded over the mesh.
    """
    own = config.model
    model = dataclasses.replace(unresolved(model), dtype=own.dtype, backend=own.backend)
    split = (mesh.shape["tensor"], mesh.shape["sequence"])
    try:
        model = resolve(model, list(mesh.devices.flat), config.data.context_length, *split)
        sharding.check_divisible(dataclasses.replace(config, model=model), mesh)
    except UserError as error:
        raise UserError(f"{_TEACHER} {config.start.teacher}: {error}") from error
    return model


class Start:
    """The models that `config.start` names, opened on first use.

    In a distributed run, each process calls the same methods in the same order.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, log: Callable[[str], Any]):
        self.config, self.mesh, self.log = config, mesh, log

    @functools.cached_property
    def source(self) -> Trained | None:
        """The model that provides the initial parameters; None for a fresh initialisation."""
        path = self.config.start.checkpoint
        return open_trained(Path(path), self.log, _CHECKPOINT) if path else None

    @functools.cached_property
    def teacher(self) -> Trained | None:
        path = self.config.start.teacher
        return open_trained(Path(path), self.log, _TEACHER) if path else None

    def check(self, workdir: Path, tokenizer: Tokenizer | None = None) -> None:
        """Raise `UserError` if the run cannot begin in `workdir`.

        `tokenizer` is that of the run's data, None before they are prepared.
        """
        if self.source is None:
            validate_from_scratch(self.config.model)
        else:
            self._check_source(self.source, workdir)
        spec, needed = self.config.data.tokenizer, self.source or self.teacher
        if needed and tokenizer is None and tokenizers.bpe_size(spec) is None:
            tokenizer = tokenizers.load(spec)
        if tokenizer is not None and self.source is not None:
            _check_tokenizer(self.source, _CHECKPOINT, tokenizer)
        self.check_teacher(tokenizer)

    def _check_source(self, source: Trained, workdir: Path) -> None:
        path = source.path
        if find_checkpoint(path)[0].resolve() == workdir.resolve():
            raise UserError(
                f"{_CHECKPOINT} {path} is in this run's own directory: give the run "
                "another --workdir"
            )
        old, new = ({"model": c.to_dict()["model"]} for c in (source.config, self.config))
        old["model"]["dtype"] = new["model"]["dtype"]  # this run's own choice, like its backend
        if lines := differences(old, new):
            raise UserError(
                f"config.model is not the model of {_CHECKPOINT} {path} ({'; '.join(lines)}): "
                f"use --config configs/recover.py:{path}, which takes the model from there"
            )

    def check_teacher(self, tokenizer: Tokenizer | None) -> None:
        """Raise `UserError` if the teacher's vocabulary or tokenizer differs from the run's."""
        if self.teacher is None:
            return
        words, own = self.teacher.config.model.vocab_size, self.config.model.vocab_size
        if words != own:
            raise UserError(
                f"{_TEACHER} {self.teacher.path} has a vocabulary of {words} tokens, but the run "
                f"has config.model.vocab_size={own}: choose a teacher with the same tokenizer"
            )
        if tokenizer is not None:
            _check_tokenizer(self.teacher, _TEACHER, tokenizer)

    def tokenizer(self, own: Tokenizer) -> Tokenizer:
        """Return the source's tokenizer, or `own`, that of the run's data, if there is no source.

        Both are equal, but the source's has the additional files of a published model.
        """
        return own if self.source is None else self.source.tokenizer

    def state(self) -> TrainState:
        """Return the state at step 0."""
        if self.source is None:
            return create_state(self.config, self.mesh)
        abstract = placed_params(self.config.model, self.mesh)
        return start_state(self.config, self.mesh, self.source.params(abstract))

    def load_teacher(self, tokenizer: Tokenizer) -> Teacher | None:
        """Return the teacher on the run's mesh, or None if there is none.

        Raises `UserError` if the teacher does not fit the run.
        """
        self.check_teacher(tokenizer)
        if self.teacher is None:
            return None
        model = teacher_model(self.teacher.config.model, self.config, self.mesh)
        return Teacher(model, self.teacher.params(placed_params(model, self.mesh)))


def _check_tokenizer(trained: Trained, option: str, tokenizer: Tokenizer) -> None:
    if trained.tokenizer.content == tokenizer.content:
        return
    run, _ = find_checkpoint(trained.path)
    raise UserError(
        f"the tokenizer of config.data is not that of {option} {trained.path}, whose ids would "
        f"then mean other tokens: set config.data.tokenizer={run / 'tokenizer'}"
    )
