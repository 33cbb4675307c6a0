"""The TFDS builder that writes the windows of one source."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mea_jax.data import packing, sources, tokenizers, waiting
from mea_jax.data.bad_input import LeftOut
from mea_jax.data.windows.writing import HELD_OUT, NAME, TRAIN, VERSION, Counts, Task
from mea_jax.errors import UserError

_BATCH_BYTES = 1 << 20  # text per call of the tokenizer: enough to use every core
# Text per Beam shard: enough windows that the partly filled last one is well below 1% of them.
_SHARD_BYTES = 64 << 20


class Windows(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A dataset of windows of T positions, as `packing.rows` yields them."""

    name = NAME
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, task: Task, progress: Callable[[int], Any], use_beam: bool, **kwargs):
        self._task = task
        self._progress = progress
        self._use_beam = use_beam
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        length = self._task.context_length
        # Raw bytes, because protobuf integers take 64 bits and are parsed in a slow loop.
        feature = {"dtype": np.int32, "encoding": "bytes"}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Windows of packed documents.",
            features=tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(shape=(length + 1,), **feature),
                    "segment_ids": tfds.features.Tensor(shape=(length,), **feature),
                }
            ),
            disable_shuffling=True,  # readers shuffle by index
        )

    def _split_generators(self, dl_manager) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in _splits(self._task)}

    def _generate_examples(self, split: str):
        if not self._use_beam:
            return _shard_examples(0, self._task, split, 1, self._progress)
        import apache_beam as beam

        shards = max(1, min(len(self._task.units), self._task.size // _SHARD_BYTES))
        return (
            beam.Create(range(shards))
            | beam.Reshuffle()
            | beam.FlatMap(_shard_examples, self._task, split, shards)
        )

    # TFDS logs downloads; there are none here.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def _splits(task: Task) -> list[str]:
    """Return the splits that have text, because TFDS cannot write an empty split."""
    fraction, found = task.split.fraction, set()
    wanted = 2 if 0 < fraction < 1 else 1
    for document in sources.documents(task.source, LeftOut(task.skip_bad)):
        parts = zip((TRAIN, HELD_OUT), task.split.parts(document), strict=True)
        found |= {split for split, text in parts if text}
        if len(found) == wanted:
            break
    if TRAIN not in found and not task.source.held_out:
        raise UserError(
            f"source {sources.describe(task.source)}: every document is held out at "
            f"held_out_fraction {fraction}; lower --config.data.held_out_fraction"
        )
    return [split for split in (TRAIN, HELD_OUT) if split in found]


def _shard_examples(
    shard: int,
    task: Task,
    split: str,
    shards: int,
    progress: Callable[[int], Any] = lambda size: None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield the keyed windows of one shard of the source; then write its counts to a file."""
    tokenizer = tokenizers.from_directory(Path(task.tokenizer))
    corpus = sources.open_source(task.source, LeftOut(task.skip_bad))
    corpus.units = task.units
    corpus.left_out = LeftOut(task.skip_bad)  # without files left out while listing
    counts = Counts()

    def pieces(texts: list[str]) -> Iterator[list[int]]:
        # Packing appends the next document's start to each document. If that is also the separator,
        # the document is complete; otherwise it needs its own end.
        end = [tokenizer.separator] if tokenizer.start != tokenizer.separator else []
        yield from (ids + end for ids in waiting.call(tokenizer.encode_batch, texts))

    def encoded() -> Iterator[list[int]]:
        texts: list[str] = []
        gathered = 0
        for document in corpus.documents(shard, shards):
            progress(len(document.text.encode()))
            text = task.split.parts(document)[split == HELD_OUT]
            if not text:
                continue
            size = len(text.encode())
            counts.documents += 1
            counts.bytes += size
            texts.append(text)
            gathered += size
            if gathered >= _BATCH_BYTES:
                yield from pieces(texts)
                texts, gathered = [], 0
        yield from pieces(texts)

    windows = packing.rows(encoded(), task.context_length, tokenizer.start)
    for number, (tokens, segment_ids) in enumerate(windows):
        counts.windows += 1
        counts.tokens += int(np.count_nonzero(segment_ids))
        yield (shard << 32) + number, {"tokens": tokens, "segment_ids": segment_ids}
    counts.skipped = corpus.left_out.count
    path = Path(task.counts) / f"{split}-{shard:05d}.json"
    content = {
        "split": split,
        "counts": dataclasses.asdict(counts),
        "documents": corpus.read_documents,
        "empty": corpus.empty,
        "left_out": corpus.left_out.lines,
    }
    path.write_text(json.dumps(content))
