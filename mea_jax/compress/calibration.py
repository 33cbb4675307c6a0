"""The text that a compression reads: windows of the checkpoint's own data, or of other text."""

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
from mea_jax.config.schema import DataConfig, MeshConfig
from mea_jax.data import sources, split
from mea_jax.data.pipeline import held_out_batches, train_batches
from mea_jax.data.prepare import Prepared, prepare
from mea_jax.errors import UserError
from mea_jax.parallel import sharding

WINDOWS = 8  # per device, in a batch


def held_out_share(tokens: int, batch_tokens: int, sources: int) -> int:
    """Return the number of batches per source that make up `tokens` in total, at least one."""
    return max(tokens // (batch_tokens * sources), 1)


def _is_code(data: DataConfig) -> bool:
    return all(source.source == "python_stdlib" for source in data.sources)


class CalibrationTexts:
    """The streams of training and of held-out windows, split over all devices.

    Creating one raises `UserError` if the checkpoint's data have no held-out text.

    Attributes:
      prepared: the checkpoint's own data, tokenized with its own tokenizer.
    """

    def __init__(self, source: StoredModel, options: Options, log: Callable[[str], Any]):
        self.source, self.options = source, options
        self.mesh: Mesh = sharding.make_mesh(MeshConfig(), jax.devices())
        self.batch = WINDOWS * len(jax.devices())
        data = self._with_held_out(source.config.data)
        if not options.held_out_source and not source.digest and _is_code(data):
            log(
                "warning: the loss is measured on Python's standard library, because the import "
                "was given no text: for other uses of the model, give --held_out_source and "
                "--calibration_source, such as text:FOLDER or jsonl:FILE"
            )
        none = UserError(
            f"{source.run}: its data have no held-out text to measure the loss on "
            f"(config.data.held_out_fraction={data.held_out_fraction}): train with a larger "
            "fraction, or convert the model with more text"
        )
        if not split.has_held_out(data):  # fails before any data are read
            raise none
        self.prepared = self._own(data, log)
        if not any(part.held_out_windows for part in self.prepared.sources):
            raise none

    def _with_held_out(self, data: DataConfig) -> DataConfig:
        """Return the data with the sources of --held_out_source, if any, in place of its own."""
        if not self.options.held_out_source:
            return data
        kept = [source for source in data.sources if not source.held_out]
        named = map(sources.named, self.options.held_out_source.split(","))
        given = [dataclasses.replace(source, held_out=True) for source in named]
        return dataclasses.replace(data, sources=(*kept, *given))

    def _prepare(self, data: DataConfig) -> Prepared:
        return prepare(data, self.source.config.model.vocab_size, log=lambda line: None)

    def _in_its_tokens(self, data: DataConfig) -> DataConfig:
        return dataclasses.replace(data, tokenizer=str(self.source.run / "tokenizer"))

    def _own(self, data: DataConfig, log: Callable[[str], Any]) -> Prepared:
        if not self.source.digest:  # a published model, trained on other data
            return self._prepare(self._in_its_tokens(data))
        if self.options.held_out_source:
            return self._prepare(self._in_its_tokens(data))
        found = self._prepare(data)
        if found.digest == self.source.digest:
            return found
        # A tokenizer trained on the changed data would differ from the model's.
        log("the data have changed since training: using the current data")
        return self._prepare(self._in_its_tokens(data))

    @property
    def data(self) -> DataConfig:
        """The data of calibration and repair, in the model's own tokens."""
        own = self._in_its_tokens(self.source.config.data)
        words = self.options.calibration_source
        if not words:
            return own
        return dataclasses.replace(own, sources=tuple(map(sources.named, words.split(","))))

    def _calibration(self) -> Prepared:
        return self._prepare(self.data) if self.options.calibration_source else self.prepared

    def training(self, folder: Path, tokens: int) -> Stream:
        """Return a stream of at least `tokens` training tokens, the same for the same seed.

        Raise `UserError` if the text has fewer.
        """
        prepared, length = self._calibration(), self.source.config.data.context_length
        windows = sum(source.train_windows for source in prepared.sources)
        count = max(math.ceil(tokens / (self.batch * length)), 1)
        if count * self.batch > windows:
            raise UserError(
                f"{tokens:,} tokens of training text are {count * self.batch:,} windows of "
                f"{length}, but the text has {windows:,}: give more text, or set "
                "--calibration_tokens and --repair_tokens to at most "
                f"{windows // self.batch * self.batch * length}"
            )
        batches = train_batches(
            prepared, seed=self.options.seed, batch_size=self.batch, threads=0, prefetch=0
        )
        found = [next(batches) for _ in range(count)]
        return Stream(found, ["text"] * count, folder, self.mesh)

    def held_out(self, folder: Path) -> Stream:
        """Return a stream of held-out batches labelled by source, with one limit per source."""
        batches, labels = [], []
        length = self.prepared.context_length
        chosen = [source for source in self.prepared.sources if source.held_out_windows]
        most = held_out_share(self.options.held_out_tokens, self.batch * length, len(chosen))
        for source in chosen:
            one = dataclasses.replace(self.prepared, sources=(source,))
            found = list(held_out_batches(one, batch_size=self.batch, max_batches=most))
            batches += found
            labels += [source.name] * len(found)
        return Stream(batches, labels, folder, self.mesh)
