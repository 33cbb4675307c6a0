"""The text that a compression looks at: windows of the checkpoint's own data, or of other text."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mea_jax.checkpoint.layerwise import StoredModel
from mea_jax.compress.options import Options
from mea_jax.compress.stream import Stream
from mea_jax.config.schema import DataConfig, MeshConfig, SourceConfig
from mea_jax.data import split
from mea_jax.data.pipeline import held_out_batches, train_batches
from mea_jax.data.prepare import Prepared, prepare
from mea_jax.errors import UserError
from mea_jax.parallel import sharding

WINDOWS = 8  # of a batch, on each device


def held_out_share(tokens: int, batch_tokens: int, sources: int) -> int:
    """Batches of each source that `tokens` in all amount to, at least one."""
    return max(tokens // (batch_tokens * sources), 1)


class CalibrationTexts:
    """Streams of training and of held-out windows, split over all devices there are.

    Attributes:
      prepared: the checkpoint's own data, in its own tokens.
    """

    def __init__(self, source: StoredModel, options: Options, say: Callable[[str], Any]):
        self.source, self.options = source, options
        self.mesh: Mesh = sharding.make_mesh(MeshConfig(), jax.devices())
        self.batch = WINDOWS * len(jax.devices())
        data = source.config.data
        none = UserError(
            f"the data of {source.run} have no held-out text to measure the loss on "
            f"(config.data.held_out_fraction={data.held_out_fraction}): train with a larger "
            "fraction, or convert the model with more text"
        )
        if not split.has_held_out(data):  # known before anything is read
            raise none
        self.prepared = self._own(data, say)
        if not any(part.held_out_windows for part in self.prepared.sources):
            raise none

    def _prepare(self, data: DataConfig) -> Prepared:
        return prepare(data, self.source.config.model.vocab_size, log=lambda line: None)

    def _in_its_tokens(self, data: DataConfig) -> DataConfig:
        return dataclasses.replace(data, tokenizer=str(self.source.run / "tokenizer"))

    def _own(self, data: DataConfig, say: Callable[[str], Any]) -> Prepared:
        if not self.source.digest:  # a published model, which no text of ours has trained
            return self._prepare(self._in_its_tokens(data))
        found = self._prepare(data)
        if found.digest == self.source.digest:
            return found
        # A tokenizer that is trained on the spot would be another one.
        say("the data are not as they were in training: taking what is there now")
        return self._prepare(self._in_its_tokens(data))

    def _calibration(self) -> Prepared:
        words = self.options.calibration_source
        if not words:
            return self.prepared
        kind, _, path = words.partition(":")
        sources = (SourceConfig(source=kind, path=path),)
        data = dataclasses.replace(self.source.config.data, sources=sources)
        return self._prepare(self._in_its_tokens(data))

    def training(self, folder: Path, tokens: int) -> Stream:
        """A stream of so many training tokens, always the same. Raises `UserError` where the text
        has fewer."""
        prepared, length = self._calibration(), self.source.config.data.context_length
        windows = sum(source.train_windows for source in prepared.sources)
        count = max(math.ceil(tokens / (self.batch * length)), 1)
        if count * self.batch > windows:
            raise UserError(
                f"{tokens:,} tokens of training text are {count * self.batch:,} windows of "
                f"{length}, the text has {windows:,}: give more text, or at most "
                f"{windows // self.batch * self.batch * length} as --calibration_tokens and "
                "--repair_tokens"
            )
        batches = train_batches(
            prepared, seed=self.options.seed, batch_size=self.batch, threads=0, prefetch=0
        )
        found = [next(batches) for _ in range(count)]
        return Stream(found, ["text"] * count, folder, self.mesh)

    def held_out(self, folder: Path) -> Stream:
        """Held-out windows, a share of each source's, labelled by source."""
        batches, labels = [], []
        length = self.prepared.context_length
        sources = [source for source in self.prepared.sources if source.held_out_windows]
        most = held_out_share(self.options.held_out_tokens, self.batch * length, len(sources))
        for source in sources:
            one = dataclasses.replace(self.prepared, sources=(source,))
            found = list(held_out_batches(one, batch_size=self.batch, max_batches=most))
            batches += found
            labels += [source.name] * len(found)
        return Stream(batches, labels, folder, self.mesh)
