"""Text to windows on disk, once: later runs with the same data options find them ready.

`prepare` trains a tokenizer where the config asks for one, writes the windows of every source and
split, and measures what a general-purpose compressor makes of the held-out text. The result lies
in `<cache_dir>/<fingerprint>`, which appears by one rename when it is complete: a killed
preparation leaves nothing that could be taken for whole. Of two at once the second waits for the
first, and takes what it made; on a file system without locks both work and do not disturb each
other.

As a command: python -m mea_jax.data.prepare --config configs/quickstart.py
"""

import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
import tqdm
from absl import logging

from mea_jax.config import DataConfig
from mea_jax.data import bad_input, cache, sources, tokenizers
from mea_jax.data.bad_input import LeftOut
from mea_jax.data.cache import cache_root
from mea_jax.data.corpus import Corpus, is_held_out, unit_hash
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.data.windows import builder
from mea_jax.errors import UserError

_FORMAT = 1  # of the cache; a new number makes all old ones unused
_SUMMARY = "prepared.json"
_BPE_SAMPLE = 32 << 20  # bytes of training text that merges are learned from
_BASELINE_LIMIT = 8 << 20  # bytes of held-out text up to which the compressors run


@dataclass(frozen=True)
class PreparedSource:
    """One source's part: counts of its two splits."""

    name: str
    weight: float  # of the config at hand: it is no part of the cache
    directory: Path  # for `reader.open_windows`
    train_windows: int
    train_tokens: int  # targets
    train_bytes: int  # of UTF-8 text
    train_documents: int
    held_out_windows: int
    held_out_tokens: int
    held_out_bytes: int
    held_out_documents: int
    waste: float  # share of positions that are padding
    skipped: int  # pieces of input left out, of either split: lines, rows, files


@dataclass(frozen=True)
class Prepared:
    """Windows ready to read, and the tokenizer they were made with."""

    directory: Path
    tokenizer: Tokenizer
    context_length: int  # T
    sources: tuple[PreparedSource, ...]
    # Bytes of the held-out documents compressed one by one, {"gzip_bytes", "xz_bytes"}; None when
    # there is too much text, or none.
    baselines: dict[str, int] | None
    digest: str  # of the tokenizer and the amounts of text and tokens of each source


def prepare(
    config: DataConfig,
    vocab_size: int | None = None,
    log: Callable[[str], Any] = print,
    beam_runner: str | None = None,
    beam_options: Sequence[str] = (),
    on_progress: Callable[[int], Any] = lambda size: None,
) -> Prepared:
    """Makes the windows of `config`, or finds them where an earlier call left them.

    Args:
      config: the data options.
      vocab_size: the model's; None skips the check that the tokenizer fits.
      log: takes the lines for the user: what was left out, and the one that sums up.
      beam_runner: as in `builder.write`. What Beam wrote serves later calls without it as well;
        the windows' edges lie elsewhere than they would without Beam.
      beam_options: as in `builder.write`.
      on_progress: called with the bytes of each document read, but not by Beam's workers.

    Raises:
      UserError: a source or tokenizer that cannot be read, a tokenizer larger than `vocab_size`,
        a cache folder that cannot be written, or prepared data that are damaged.
    """
    bpe_size = tokenizers.bpe_size(config.tokenizer)
    given = tokenizers.load(config.tokenizer) if bpe_size is None else None
    _check_size(config.tokenizer, given.vocab_size if given else bpe_size, vocab_size)
    corpora = [sources.open_source(source, _left_out(config)) for source in config.sources]
    root = cache_root(config)
    whole = root / _fingerprint(config, corpora, given)
    # Data with gaps have a name of their own, which `bad_input` "stop" does not look for. What has
    # none is the same under both, so a run may go over to "skip" when its windows are damaged.
    gaps = root / f"{whole.name}-skip"
    places = [whole, gaps] if config.bad_input == "skip" else [whole]
    final = _find(places)
    if final is None:
        with cache.write_errors(root), cache.lock(root / f"{whole.name}.lock", log):
            final = _find(places)
            if final is None:  # else another process made it meanwhile
                scratch = root / f"{whole.name}.incomplete-{uuid.uuid4().hex[:8]}"
                scratch.mkdir(parents=True)
                try:
                    beam = (beam_runner, beam_options)
                    lines, count = _make(config, corpora, given, scratch, beam, on_progress)
                    final = gaps if count and config.bad_input == "skip" else whole
                    _rename(scratch, final)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
                for line in bad_input.report(lines, count):
                    log(line)
    prepared = _load(config, final)
    log(summary(prepared))
    return prepared


def _find(places: Sequence[Path]) -> Path | None:
    return next((place for place in places if (place / _SUMMARY).is_file()), None)


def _left_out(config: DataConfig) -> LeftOut:
    return LeftOut(config.bad_input == "skip")


def summary(prepared: Prepared) -> str:
    """One line on what there is."""
    parts = prepared.sources
    train = sum(part.train_windows for part in parts)
    held_out = sum(part.held_out_windows for part in parts)
    tokens = sum(part.train_tokens + part.held_out_tokens for part in parts)
    size = sum(part.train_bytes + part.held_out_bytes for part in parts)
    skipped = sum(part.skipped for part in parts)
    return (
        f"data: {train:,} training and {held_out:,} held-out windows of {prepared.context_length} "
        f"positions, {size / max(tokens, 1):.2f} bytes per token, in {prepared.directory}"
        + (f"; left out {skipped:,} lines, rows or files that cannot be read" if skipped else "")
    )


def _make(
    config: DataConfig,
    corpora: Sequence[Corpus],
    given: Tokenizer | None,
    directory: Path,
    beam: tuple[str | None, Sequence[str]],
    on_progress: Callable[[int], Any],
) -> tuple[list[str], int]:
    """Fills `directory` with everything that `_load` reads; the summary file comes last.

    Returns:
      The messages of the first pieces of input that were left out, and how many there were.
    """
    tokenizer = given or _train_tokenizer(config, corpora, on_progress)
    tokenizer.save(directory)
    counts_directory = directory / "counts"
    tables, messages = [], []
    for index, corpus in enumerate(corpora):
        counts = counts_directory / str(index)
        counts.mkdir(parents=True)
        task = builder.Task(
            source=corpus.source,
            units=corpus.units,
            size=corpus.size,
            tokenizer=str(directory),
            context_length=config.context_length,
            held_out_fraction=config.held_out_fraction,
            counts=str(counts),
            skip_bad=config.bad_input == "skip",
        )
        size = 2 * corpus.size  # read once for each split
        title = f"windows of {sources.describe(corpus.source)}"
        with _progress(title, size, on_progress) as advance:
            by_split, lines = builder.write(
                task, _source_directory(directory, index), advance, *beam
            )
        for split_counts in by_split.values():
            split_counts.skipped += corpus.left_out.count  # of the listing, so far
        messages.append([*corpus.left_out.lines, *lines][: bad_input.KEPT])
        tables.append({split: dataclasses.asdict(counts) for split, counts in by_split.items()})
    shutil.rmtree(counts_directory)
    held_out_bytes = sum(table[builder.HELD_OUT]["bytes"] for table in tables)
    content = {
        "sources": tables,
        "baselines": _baselines(config, on_progress)
        if 0 < held_out_bytes <= _BASELINE_LIMIT
        else None,
        # For the reader of the file; not read back.
        "data": dataclasses.asdict(config),
        "left_out": messages,
    }
    text = json.dumps(content, indent=1)
    cache.write_checksums(directory, (_SUMMARY, text.encode()))
    (directory / _SUMMARY).write_text(text)
    return list(itertools.chain(*messages)), sum(map(_skipped, tables))


def _skipped(table: dict[str, dict[str, int]]) -> int:
    """Pieces of a source left out: each split's pass meets them all."""
    return max(counts["skipped"] for counts in table.values())


def _load(config: DataConfig, directory: Path) -> Prepared:
    """What `_make` wrote. Raises `UserError` if it is damaged."""
    cache.verify(directory)
    with cache.reading(directory / _SUMMARY, directory):
        content = json.loads((directory / _SUMMARY).read_bytes())
        parts = _parts(config, directory, content["sources"])
        baselines = content["baselines"]
    with cache.reading(directory, directory):
        tokenizer = tokenizers.from_directory(directory)
    # Not of the directory's name, which holds the files' dates.
    digest = hashlib.blake2b(tokenizer.content, digest_size=16)
    digest.update(json.dumps(content["sources"], sort_keys=True).encode())
    if tokenizer.separator_is_named:
        digest.update(str(tokenizer.separator).encode())
    return Prepared(
        directory=directory,
        tokenizer=tokenizer,
        context_length=config.context_length,
        sources=parts,
        baselines=baselines,
        digest=digest.hexdigest(),
    )


def _parts(
    config: DataConfig, directory: Path, tables: list[dict[str, dict[str, int]]]
) -> tuple[PreparedSource, ...]:
    parts = []
    for index, (source, table) in enumerate(zip(config.sources, tables, strict=True)):
        train, held_out = (builder.Counts(**table[s]) for s in (builder.TRAIN, builder.HELD_OUT))
        positions = (train.windows + held_out.windows) * config.context_length
        parts.append(
            PreparedSource(
                name=sources.describe(source),
                weight=source.weight,
                directory=_source_directory(directory, index),
                train_windows=train.windows,
                train_tokens=train.tokens,
                train_bytes=train.bytes,
                train_documents=train.documents,
                held_out_windows=held_out.windows,
                held_out_tokens=held_out.tokens,
                held_out_bytes=held_out.bytes,
                held_out_documents=held_out.documents,
                waste=1 - (train.tokens + held_out.tokens) / positions,
                skipped=_skipped(table),
            )
        )
    return tuple(parts)


def _source_directory(directory: Path, index: int) -> Path:
    return directory / f"source-{index:02d}"


def _fingerprint(config: DataConfig, corpora: Sequence[Corpus], given: Tokenizer | None) -> str:
    """A name that changes with everything the windows depend on."""
    content = [
        _FORMAT,
        [corpus.identity() for corpus in corpora],
        hashlib.blake2b(given.content).hexdigest() if given else config.tokenizer,
        config.context_length,
        config.held_out_fraction,
    ]
    if given and given.start != given.separator:
        content.append(["documents begin with", given.start])
    if given and given.separator_is_named:
        content.append(["documents end with", given.separator])
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _train_tokenizer(
    config: DataConfig, corpora: Sequence[Corpus], on_progress: Callable[[int], Any]
) -> Tokenizer:
    """Byte-pair merges from a sample of the training side."""
    size = tokenizers.bpe_size(config.tokenizer)
    assert size is not None
    total = sum(corpus.size for corpus in corpora)
    fraction = _BPE_SAMPLE / max(total, 1)

    def pieces() -> Iterator[str]:
        for source in config.sources:
            for document in sources.documents(source, _left_out(config)):
                advance(len(document.text.encode()))
                if is_held_out(document.name, config.held_out_fraction):
                    continue
                if fraction >= 1:
                    yield document.text
                    continue
                # By pieces, because a few documents may be most of the text.
                for start in range(0, len(document.text), 1 << 16):
                    if unit_hash(f"{document.name}#{start}") < fraction:
                        yield document.text[start : start + (1 << 16)]

    with _progress(f"tokenizer {config.tokenizer}", total, on_progress) as advance:
        return tokenizers.train_bpe(pieces(), size)


def _baselines(config: DataConfig, on_progress: Callable[[int], Any]) -> dict[str, int]:
    """Bytes of the held-out documents, each compressed by itself."""
    total = {"gzip_bytes": 0, "xz_bytes": 0}
    for source in config.sources:
        for document in sources.documents(source, _left_out(config)):
            on_progress(len(document.text))
            if is_held_out(document.name, config.held_out_fraction):
                text = document.text.encode()
                total["gzip_bytes"] += len(gzip.compress(text, compresslevel=9))
                # `xz -9e`, except that the dictionary is no larger than the text: the preset's
                # 64 MB change nothing about the result and take longer to allocate than to use.
                lzma2 = {
                    "id": lzma.FILTER_LZMA2,
                    "preset": 9 | lzma.PRESET_EXTREME,
                    "dict_size": min(max(len(text), 4096), 64 << 20),
                }
                total["xz_bytes"] += len(lzma.compress(text, filters=[lzma2]))
    return total


def _check_size(spec: str, size: int | None, vocab_size: int | None) -> None:
    if size is not None and vocab_size is not None and size > vocab_size:
        raise UserError(
            f"tokenizer {spec!r} has {size} tokens, the model's vocabulary only {vocab_size}: "
            f"set --config.model.vocab_size={size} or more, or take a smaller tokenizer"
        )


def _rename(scratch: Path, final: Path) -> None:
    try:
        scratch.rename(final)
    except OSError:
        # Another process may have been first; its result is as good.
        if not (final / _SUMMARY).is_file():
            raise


@contextlib.contextmanager
def _progress(
    title: str, size: int, on_progress: Callable[[int], Any]
) -> Iterator[Callable[[int], Any]]:
    """A bar on stderr over `size` bytes, if that is a terminal; yields what advances it."""

    def advance(count: int) -> None:
        bar.update(count)
        on_progress(count)

    tfds.disable_progress_bar()  # TFDS's own show numbers of examples without an end
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)  # and its log is of no use to the reader
    try:
        with tqdm.tqdm(
            total=size, desc=title, unit="B", unit_scale=True, disable=None, leave=False
        ) as bar:
            yield advance
    finally:
        logging.set_verbosity(verbosity)


def main() -> None:
    """The command. Flags are defined here: importing this module must not define `--config`."""
    from absl import flags

    from mea_jax import cli

    config = cli.define_config_flag()
    runner = flags.DEFINE_string("beam_runner", None, "Beam runner, such as DirectRunner")
    options = flags.DEFINE_multi_string("beam_option", [], "Option of Beam; may be repeated")

    def run() -> None:
        train = cli.parse_config(config)
        prepare(
            train.data,
            train.model.vocab_size,
            beam_runner=runner.value,
            beam_options=options.value,
        )

    cli.run(run)


if __name__ == "__main__":
    main()
