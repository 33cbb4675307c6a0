"""Writing of a source's windows with TFDS, in ArrayRecord files with random access.

On one machine the windows are written one after another. With a Beam runner, TFDS writes them in
parallel: each shard of the source's units is read, tokenized and packed separately, which costs one
partly filled window per shard. The first call of `write` imports TFDS.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mea_jax.config.schema import SourceConfig
from mea_jax.data.bad_input import KEPT
from mea_jax.data.split import Split
from mea_jax.errors import UserError

TRAIN, HELD_OUT = "train", "held_out"
NAME, VERSION = "mea_jax_windows", "1.0.0"  # of the TFDS dataset


@dataclasses.dataclass(frozen=True)
class Task:
    """The description of one source's windows; Beam sends it to its workers."""

    source: SourceConfig
    units: Sequence[Any]  # of the source, as listed: a file removed since then is bad input
    size: int  # of the units, in bytes
    tokenizer: str  # its folder
    context_length: int  # T
    split: Split
    counts: str  # the folder for the counts of each shard
    skip_bad: bool = False  # leave out input that cannot be read


@dataclasses.dataclass
class Counts:
    """The counts of one split."""

    documents: int = 0
    bytes: int = 0  # of the documents' text in UTF-8
    tokens: int = 0  # targets: every token of the documents and a separator after each
    windows: int = 0
    skipped: int = 0  # unreadable pieces of the source, of both splits


@dataclasses.dataclass
class Written:
    """The result of `write`.

    Attributes:
      counts: the counts by split; an empty split has zero counts and no files.
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
    """Write the windows of both splits below `directory`.

    Args:
      task: the windows to write.
      directory: the data_dir of the TFDS dataset.
      progress: called with the bytes of each document read; not by Beam workers.
      beam_runner: the name of a Beam runner, such as "DirectRunner"; None writes without Beam.
      beam_options: command-line options of Beam. Workers must share this machine's paths.

    Raises:
      UserError: a document cannot be read; there is no text, or none in the training split; or a
        Beam runner is given and Beam is not installed.
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
    import tensorflow_datasets as tfds

    from mea_jax.data.windows.builder import Windows

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
    # The passes of both splits count the same pieces and documents.
    messages = dict.fromkeys(itertools.chain(*(shard["left_out"] for shard in shards)))
    first = [shard for shard in shards if shard["split"] == shards[0]["split"]]
    documents, empty = (sum(shard[key] for shard in first) for key in ("documents", "empty"))
    return Written(counts, documents, empty, list(messages)[:KEPT])


def dataset_directory(directory: Path) -> Path:
    """Return the folder of the TFDS dataset that `write` made below `directory`."""
    return directory / NAME / VERSION


def _sum_counts(directory: Path, split: str) -> Counts:
    total = Counts()
    for path in directory.glob(f"{split}-*.json"):
        for key, value in json.loads(path.read_text())["counts"].items():
            setattr(total, key, getattr(total, key) + value)
    return total
