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
import errno
import fcntl
import gzip
import hashlib
import json
import lzma
import os
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
from mea_jax.data import sources, tokenizers
from mea_jax.data.corpus import Corpus, is_held_out, unit_hash
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.data.windows import builder
from mea_jax.errors import UserError

_FORMAT = 1  # of the cache; a new number makes all old ones unused
_SUMMARY = "prepared.json"
_BPE_SAMPLE = 32 << 20  # bytes of training text that merges are learned from
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_BASELINE_LIMIT = 8 << 20  # bytes of held-out text up to which the compressors run


@dataclass(frozen=True)
class PreparedSource:
    """One source's part: counts of its two splits."""

    name: str
    weight: float  # of the config at hand: it is no part of the cache
    directory: Path  # for `builder.open_windows`
    train_windows: int
    train_tokens: int  # targets
    train_bytes: int  # of UTF-8 text
    train_documents: int
    held_out_windows: int
    held_out_tokens: int
    held_out_bytes: int
    held_out_documents: int
    waste: float  # share of positions that are padding
    skipped: int  # files that are not UTF-8 (standard library only)


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


def cache_root(config: DataConfig) -> Path:
    """The folder that prepared data, and compiled programs, are kept in."""
    root = config.cache_dir or os.environ.get("MEA_JAX_CACHE") or "~/.cache/mea_jax"
    if "://" in root:
        raise UserError(f"cache folder {root}: give a local folder; mount the bucket as a path")
    return Path(root).expanduser().resolve()


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
      log: takes the one line that sums up.
      beam_runner: as in `builder.write`. What Beam wrote serves later calls without it as well;
        the windows' edges lie elsewhere than they would without Beam.
      beam_options: as in `builder.write`.
      on_progress: called with the bytes of each document read, but not by Beam's workers.

    Raises:
      UserError: a source or tokenizer that cannot be read, a tokenizer larger than `vocab_size`,
        or a cache folder that cannot be written.
    """
    bpe_size = tokenizers.bpe_size(config.tokenizer)
    given = tokenizers.load(config.tokenizer) if bpe_size is None else None
    _check_size(config.tokenizer, given.vocab_size if given else bpe_size, vocab_size)
    corpora = [sources.open_source(source) for source in config.sources]
    root = cache_root(config)
    final = root / _fingerprint(config, corpora, given)
    if not (final / _SUMMARY).is_file():
        with _cache_errors(root), _lock(root / f"{final.name}.lock", log):
            if not (final / _SUMMARY).is_file():  # else another process made it meanwhile
                scratch = root / f"{final.name}.incomplete-{uuid.uuid4().hex[:8]}"
                scratch.mkdir(parents=True)
                try:
                    beam = (beam_runner, beam_options)
                    _make(config, corpora, given, scratch, beam, on_progress)
                    _rename(scratch, final)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    prepared = _load(config, final)
    log(summary(prepared))
    return prepared


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
        + (f"; skipped {skipped} files that are not UTF-8" if skipped else "")
    )


def _make(
    config: DataConfig,
    corpora: Sequence[Corpus],
    given: Tokenizer | None,
    directory: Path,
    beam: tuple[str | None, Sequence[str]],
    on_progress: Callable[[int], Any],
) -> None:
    """Fills `directory` with everything that `_load` reads; the summary file comes last."""
    tokenizer = given or _train_tokenizer(config, corpora, on_progress)
    tokenizer.save(directory)
    counts_directory = directory / "counts"
    tables = []
    for index, source in enumerate(config.sources):
        counts = counts_directory / str(index)
        counts.mkdir(parents=True)
        task = builder.Task(
            source=source,
            tokenizer=str(directory),
            context_length=config.context_length,
            held_out_fraction=config.held_out_fraction,
            counts=str(counts),
        )
        size = 2 * corpora[index].size  # read once for each split
        title = f"windows of {sources.describe(source)}"
        with _progress(title, size, on_progress) as advance:
            by_split = builder.write(task, _source_directory(directory, index), advance, *beam)
        tables.append({split: dataclasses.asdict(counts) for split, counts in by_split.items()})
    shutil.rmtree(counts_directory)
    held_out_bytes = sum(table[builder.HELD_OUT]["bytes"] for table in tables)
    content = {
        "sources": tables,
        "baselines": _baselines(config, on_progress)
        if 0 < held_out_bytes <= _BASELINE_LIMIT
        else None,
        "data": dataclasses.asdict(config),  # for the reader of the file; not read back
    }
    (directory / _SUMMARY).write_text(json.dumps(content, indent=1))


def _load(config: DataConfig, directory: Path) -> Prepared:
    content = json.loads((directory / _SUMMARY).read_text())
    parts = []
    for index, (source, table) in enumerate(zip(config.sources, content["sources"], strict=True)):
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
                skipped=train.skipped,
            )
        )
    tokenizer = tokenizers.from_directory(directory)
    # Not of the directory's name, which holds the files' dates.
    digest = hashlib.blake2b(tokenizer.content, digest_size=16)
    digest.update(json.dumps(content["sources"], sort_keys=True).encode())
    return Prepared(
        directory=directory,
        tokenizer=tokenizer,
        context_length=config.context_length,
        sources=tuple(parts),
        baselines=content["baselines"],
        digest=digest.hexdigest(),
    )


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
            for document in sources.documents(source):
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
        for document in sources.documents(source):
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
def _lock(path: Path, log: Callable[[str], Any]) -> Iterator[None]:
    """Holds a lock that no other process of this machine holds, by the file `path`.

    Where the file system has no locks this does nothing: then two do the same work, each apart.
    The lock goes with its holder, however that ends. `log` is told when there is one to wait for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as file:
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log(f"another process prepares these data in {path.parent}: waiting for it")
                    fcntl.flock(file, fcntl.LOCK_EX)
                mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:  # its holder before has removed it: no one else would find it
                mine = False
            except OSError:
                mine = True
            if mine:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


@contextlib.contextmanager
def _cache_errors(root: Path) -> Iterator[None]:
    """Disk full, no permission and their like become a `UserError` that names the folder."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, RuntimeError):
            # ArrayRecord reports a failed write so, with the system's words in a longer text.
            words = [os.strerror(code) for code in _WRITE_ERRORS]
            reason = next((word for word in words if word in reason), "")
            if not reason:
                raise
        raise UserError(
            f"cache folder {root}: {reason}; choose another with "
            "--config.data.cache_dir or the environment variable MEA_JAX_CACHE"
        ) from error


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
