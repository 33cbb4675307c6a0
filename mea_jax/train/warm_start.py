"""The start of a run: fresh parameters or those of a checkpoint, and a teacher.

Continued training of a compressed model ("recovery") is a run like any other whose first parameters
are another run's. It keeps that run's model and tokenizer, and nothing else of it: data, schedule
and all else are as its own config says.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mea_jax.checkpoint.load import Trained, open_trained, unresolved
from mea_jax.checkpoint.manager import find_checkpoint
from mea_jax.config.checks import validate_from_scratch
from mea_jax.config.schema import ModelConfig, TrainConfig, differences
from mea_jax.data import tokenizers
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.errors import UserError
from mea_jax.model.params import TrainState, placed_params
from mea_jax.ops.backend import resolve
from mea_jax.parallel import sharding
from mea_jax.train.step import Teacher, create_state, start_state

_CHECKPOINT, _TEACHER = "config.start.checkpoint", "config.start.teacher"


def teacher_model(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> ModelConfig:
    """A teacher's model, resolved for the run of `config`, which is: products as the run's own.

    Raises `UserError` where it cannot be split as the mesh splits.
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
    """The models that `config.start` names. Nothing is read before it is asked for.

    With several processes, each of them calls the same methods in the same order.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, say: Callable[[str], Any]):
        self.config, self.mesh, self.say = config, mesh, say

    @functools.cached_property
    def source(self) -> Trained | None:
        """Whose parameters are the first; None: fresh ones."""
        path = self.config.start.checkpoint
        return open_trained(Path(path), self.say, _CHECKPOINT) if path else None

    @functools.cached_property
    def teacher(self) -> Trained | None:
        path = self.config.start.teacher
        return open_trained(Path(path), self.say, _TEACHER) if path else None

    def check(self, workdir: Path, tokenizer: Tokenizer | None = None) -> None:
        """Raises `UserError` where a run cannot begin, in `workdir`, with what there is.

        `tokenizer`: of the run's data; None while they are not prepared yet.
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
                f"{_CHECKPOINT} {path} lies in this run's own directory: give the run a --workdir "
                "of its own"
            )
        old, new = ({"model": c.to_dict()["model"]} for c in (source.config, self.config))
        old["model"]["dtype"] = new["model"]["dtype"]  # this run's own choice, like its backend
        if lines := differences(old, new):
            raise UserError(
                f"config.model is not the model of {_CHECKPOINT} {path} ({'; '.join(lines)}): "
                f"--config configs/recover.py:{path} takes it from there"
            )

    def check_teacher(self, tokenizer: Tokenizer | None) -> None:
        """Raises `UserError` where the teacher's words are not those of the run."""
        if self.teacher is None:
            return
        words, own = self.teacher.config.model.vocab_size, self.config.model.vocab_size
        if words != own:
            raise UserError(
                f"{_TEACHER} {self.teacher.path} has a vocabulary of {words} words and the run one "
                f"of config.model.vocab_size={own}: only a model with the same tokenizer can teach "
                "this one"
            )
        if tokenizer is not None:
            _check_tokenizer(self.teacher, _TEACHER, tokenizer)

    def tokenizer(self, own: Tokenizer) -> Tokenizer:
        """The run's tokenizer, `own`; that of what it starts from, which is the same, has the files
        with it that a published model brings."""
        return own if self.source is None else self.source.tokenizer

    def state(self) -> TrainState:
        """The state at step 0."""
        if self.source is None:
            return create_state(self.config, self.mesh)
        abstract = placed_params(self.config.model, self.mesh)
        return start_state(self.config, self.mesh, self.source.params(abstract))

    def load_teacher(self, tokenizer: Tokenizer) -> Teacher | None:
        """The teacher on the run's mesh, or None where there is none. Raises `UserError`."""
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
        f"the tokenizer of config.data is not that of {option} {trained.path}, whose numbers would "
        f"then mean other words: set config.data.tokenizer={run / 'tokenizer'}"
    )
