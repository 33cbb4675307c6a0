"""The TFDS dataset of one source's windows, in ArrayRecord files with random access.

On one machine the windows are written one after another. With a Beam runner, TFDS writes them in
parallel: each shard of the source's units is then read, tokenized and packed apart, at the cost
of one partly filled window per shard.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mea_jax.config import SourceConfig
from mea_jax.data import packing, sources, tokenizers, waiting
from mea_jax.data.bad_input import KEPT, LeftOut
from mea_jax.data.split import Split
from mea_jax.errors import UserError

TRAIN, HELD_OUT = "train", "held_out"
_BATCH_BYTES = 1 << 20  # text given to the tokenizer at once, so that it can use every core
# A Beam shard's text: many windows, so that its partly filled last one is well below 1%.
_SHARD_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Task:
    """What makes the windows of a source; Beam sends it to its workers."""

    source: SourceConfig
    units: Sequence[Any]  # of the source, as they were listed: a file removed since is missed
    size: int  # bytes of them
    tokenizer: str  # the folder it is saved in
    context_length: int  # T
    split: Split
    counts: str  # the folder that each shard's counts go to
    skip_bad: bool = False  # leave out input that cannot be read


@dataclasses.dataclass
class Counts:
    """Of one split."""

    documents: int = 0
    bytes: int = 0  # of the documents' UTF-8
    tokens: int = 0  # targets: every token of the documents and a separator after each
    windows: int = 0
    skipped: int = 0  # pieces of the source, of whatever split, that cannot be read


@dataclasses.dataclass
class Written:
    """What `write` has met and made.

    Attributes:
      counts: of each split; those of an empty one are zero, and it is not written.
      documents: the number of documents with text.
      empty: the number of documents without text.
      left_out: messages of the first pieces of input that were left out.
    """

    counts: dict[str, Counts]
    documents: int
    empty: int
    left_out: list[str]


def write(
    task: Task,
    directory: Path,
    progress: Callable[[int], Any] = lambda size: None,
    beam_runner: str | None = None,
    beam_options: Sequence[str] = (),
) -> Written:
    """Writes the windows of both splits below `directory`.

    Args:
      task: what to write.
      directory: becomes the data_dir of the TFDS dataset.
      progress: called with the bytes of each document read; not by Beam workers.
      beam_runner: name of a Beam runner, such as "DirectRunner"; None writes without Beam.
      beam_options: command-line options of Beam. Workers must share this machine's paths.

    Raises:
      UserError: unreadable documents; no text at all, or none in the training split; Beam asked
        for and not installed.
    """
    runner = None
    if beam_runner is not None:
        try:
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError as error:
            raise UserError(
                f"Beam runner {beam_runner!r} needs the package apache-beam: "
                "pip install 'mea_jax[beam]'"
            ) from error
        runner = PipelineOptions([f"--runner={beam_runner}", *beam_options])
    builder = Windows(
        task=task,
        progress=progress,
        use_beam=runner is not None,
        data_dir=directory,
        file_format="array_record",
    )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            beam_options=runner, try_download_gcs=False, compute_stats="skip"
        )
    )
    counts = {split: _sum_counts(Path(task.counts), split) for split in (TRAIN, HELD_OUT)}
    shards = [json.loads(path.read_text()) for path in sorted(Path(task.counts).iterdir())]
    # The passes for both splits meet the same pieces and documents.
    messages = dict.fromkeys(itertools.chain(*(shard["left_out"] for shard in shards)))
    first = [shard for shard in shards if shard["split"] == shards[0]["split"]]
    documents, empty = (sum(shard[key] for shard in first) for key in ("documents", "empty"))
    return Written(counts, documents, empty, list(messages)[:KEPT])


def dataset_directory(directory: Path) -> Path:
    """The folder of the TFDS dataset that `write` made below `directory`."""
    return directory / Windows.name / str(Windows.VERSION)


class Windows(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Windows of T positions, as `packing.rows` makes them."""

    name = "mea_jax_windows"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, task: Task, progress: Callable[[int], Any], use_beam: bool, **kwargs):
        self._task = task
        self._progress = progress
        self._use_beam = use_beam
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        length = self._task.context_length
        # Raw bytes, because protobuf's own integers take 64 bits and a slow loop to parse.
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

    # TFDS prints what it downloads; nothing is downloaded here.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def _splits(task: Task) -> list[str]:
    """Return the splits that have text: TFDS cannot write an empty one."""
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
    """Keyed windows of one shard of the source; its counts are written once it is exhausted."""
    tokenizer = tokenizers.from_directory(Path(task.tokenizer))
    corpus = sources.open_source(task.source, LeftOut(task.skip_bad))
    corpus.units = task.units
    corpus.left_out = LeftOut(task.skip_bad)  # without what the listing has left out this time
    counts = Counts()

    def pieces(texts: list[str]) -> Iterator[list[int]]:
        # Packing puts the next document's start behind each: that ends it, where it is the same id.
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


def _sum_counts(directory: Path, split: str) -> Counts:
    total = Counts()
    for path in directory.glob(f"{split}-*.json"):
        for key, value in json.loads(path.read_text())["counts"].items():
            setattr(total, key, getattr(total, key) + value)
    return total
