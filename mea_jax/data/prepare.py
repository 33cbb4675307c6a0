"""Preparation of text as windows on disk, once: later runs with the same data options reuse them.

`prepare` trains a tokenizer if the config requires one, writes the windows of every source and
split, and measures the compressed size of the held-out text under gzip and xz. The result is in
`<cache_dir>/<fingerprint>`. This folder appears by one rename when it is complete, so a killed
preparation leaves nothing that looks complete. If two processes prepare the same data, the second
waits for the first and uses its result; on a file system without locks both do the work and do not
disturb each other.

As a command: python -m mea_jax.data.prepare --config configs/quickstart.py
"""

import dataclasses
import hashlib
import itertools
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea_jax.config.paths import cache_root
from mea_jax.config.schema import DataConfig
from mea_jax.data import (
    bad_input,
    file_patterns,
    integrity,
    sources,
    split,
    tokenizer_training,
    tokenizers,
    waiting,
)
from mea_jax.data.corpus import Corpus
from mea_jax.data.split import Split
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.data.windows import writing
from mea_jax.errors import UserError

_FORMAT = 1  # version of the cache; a new number invalidates all existing caches
_SUMMARY = "prepared.json"
_SHARES = "-shares"  # suffix of folders whose data is not split by the documents' names alone
_SPLITS = (writing.HELD_OUT, writing.TRAIN)
_PASSED_OVER = "; passed over: "
_BASELINE_LIMIT = 8 << 20  # bytes of held-out text up to which the compressors run


@dataclass(frozen=True)
class PreparedSource:
    """One source of the prepared data: the counts of its two splits."""

    name: str
    weight: float  # from the current config, not from the cache
    directory: Path  # for `reader.open_windows`
    train_windows: int
    train_tokens: int  # targets
    train_bytes: int  # of UTF-8 text
    train_documents: int
    held_out_windows: int
    held_out_tokens: int
    held_out_bytes: int
    held_out_documents: int
    waste: float  # fraction of positions that are padding
    skipped: int  # pieces of input left out of both splits: lines, rows, files


@dataclass(frozen=True)
class Prepared:
    """Windows that are ready to read, and the tokenizer they were made with."""

    directory: Path
    tokenizer: Tokenizer
    context_length: int  # T
    sources: tuple[PreparedSource, ...]
    # Bytes of the held-out documents, compressed one by one: {"gzip_bytes", "xz_bytes"}. None if
    # there is no held-out text, or more than `_BASELINE_LIMIT`.
    baselines: dict[str, int] | None
    digest: str  # of the tokenizer and the counts of each source
    inputs: tuple[str, ...] = ()  # one line per source: the amounts read and passed over


def prepare(
    config: DataConfig,
    vocab_size: int | None = None,
    log: Callable[[str], Any] = print,
    beam_runner: str | None = None,
    beam_options: Sequence[str] = (),
    on_progress: Callable[[int], Any] = lambda size: None,
) -> Prepared:
    """Write the windows of `config`, or reuse those of an earlier call.

    Args:
      config: the data options.
      vocab_size: the model's vocabulary size; None skips the check that the tokenizer fits.
      log: called with each log line: the amounts of each source, the input left out, a summary.
      beam_runner: as in `writing.write`. Later calls without Beam reuse windows written with Beam,
        although their boundaries differ from those written without it.
      beam_options: as in `writing.write`.
      on_progress: called with the bytes of each document read, but not by Beam workers.

    Raises:
      UserError: a source or tokenizer cannot be read; the tokenizer is larger than `vocab_size`;
        the cache folder cannot be written; or the prepared data is damaged.
    """
    bpe_size = tokenizers.bpe_size(config.tokenizer)
    given = tokenizers.load(config.tokenizer) if bpe_size is None else None
    _check_size(config.tokenizer, given.vocab_size if given else bpe_size, vocab_size)
    corpora = [sources.open_source(s, tokenizer_training.left_out(config)) for s in config.sources]
    root = cache_root(config)
    whole = root / _fingerprint(config, corpora, given)
    # Data that is not split by names alone gets a suffix, because an older version may have split
    # the same text by names. Data with input left out gets the suffix "-skip", which `bad_input`
    # "stop" does not search. Data without gaps is the same for both settings, so a run can change
    # to "skip" when its windows are damaged.
    tails = ["", "-skip"] if config.bad_input == "skip" else [""]
    places = [root / f"{whole.name}{s}{t}" for s in ("", _SHARES) for t in tails]
    final, made = _find(places, config, corpora), False
    if final is None:
        with integrity.write_errors(root), integrity.lock(root / f"{whole.name}.lock", log):
            final = _find(places, config, corpora)
            if final is None:  # otherwise another process made it meanwhile
                scratch = root / f"{whole.name}.incomplete-{uuid.uuid4().hex[:8]}"
                scratch.mkdir(parents=True)
                made = True
                try:
                    splits = [split.decide(config, corpus, on_progress) for corpus in corpora]
                    job = _Job(config, corpora, splits, scratch, log, on_progress)
                    lines, count = _make(job, given, beam_runner, beam_options)
                    name = whole.name + ("" if all(s.by_names for s in splits) else _SHARES)
                    final = root / (name + ("-skip" if count and len(tails) > 1 else ""))
                    _rename(scratch, final)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
                for line in bad_input.report(lines, count):
                    log(line)
    prepared = _load(config, final)
    for line in prepared.inputs:
        if made or _PASSED_OVER in line:
            log(line)
    log(summary(prepared))
    if not sum(part.held_out_windows for part in prepared.sources):
        why = "there is too little text" if split.has_held_out(config) else "held_out_fraction is 0"
        log(f"data: no held-out text ({why}), so no held-out loss is measured")
    return prepared


def _find(places: Sequence[Path], config: DataConfig, corpora: Sequence[Corpus]) -> Path | None:
    """Return the first of `places` with prepared data that is split as this version would."""
    found = (place for place in places if (place / _SUMMARY).is_file())
    return next((place for place in found if _is_current(place, config, corpora)), None)


def _is_current(place: Path, config: DataConfig, corpora: Sequence[Corpus]) -> bool:
    try:
        content = json.loads((place / _SUMMARY).read_bytes())
        if "splits" in content:  # otherwise an older version wrote it
            return True
        sizes = [[table[s]["bytes"] for s in _SPLITS] for table in content["sources"]]
        pairs = zip(corpora, sizes, strict=True)
        return all(split.is_current(config, corpus, *size) for corpus, size in pairs)
    except (OSError, ValueError, LookupError, TypeError):
        return True  # damaged: `_load` raises the error


def summary(prepared: Prepared) -> str:
    """Return the log line that summarizes the prepared data."""
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


@dataclass(frozen=True)
class _Job:
    """The inputs of `_make`; `log` and `on_progress` are as in `prepare`."""

    config: DataConfig
    corpora: Sequence[Corpus]
    splits: Sequence[Split]  # of each source
    directory: Path
    log: Callable[[str], Any]
    on_progress: Callable[[int], Any]


def _make(
    job: _Job, given: Tokenizer | None, beam_runner: str | None, beam_options: Sequence[str]
) -> tuple[list[str], int]:
    """Write everything that `_load` reads into the job's directory, the summary file last.

    Returns:
      The messages of the first pieces of input that were left out, and the number of all pieces.
    """
    config, corpora, directory = job.config, job.corpora, job.directory
    tokenizer = given or tokenizer_training.train_tokenizer(
        config, corpora, job.splits, job.log, job.on_progress
    )
    tokenizer.save(directory)
    counts_directory = directory / "counts"
    tables, messages, inputs = [], [], []
    for index, (corpus, how) in enumerate(zip(corpora, job.splits, strict=True)):
        counts = counts_directory / str(index)
        counts.mkdir(parents=True)
        task = writing.Task(
            source=corpus.source,
            units=corpus.units,
            size=corpus.size,
            tokenizer=str(directory),
            context_length=config.context_length,
            split=how,
            counts=str(counts),
            skip_bad=config.bad_input == "skip",
        )
        size = 2 * corpus.size  # read once for each split
        title = f"windows of {sources.describe(corpus.source)}"
        with waiting.progress(title, size, job.on_progress) as (advance, _):
            place = _source_directory(directory, index)
            written = writing.write(task, place, advance, beam_runner, beam_options)
        for counts_of_split in written.counts.values():
            counts_of_split.skipped += corpus.left_out.count  # while the files were listed
        messages.append([*corpus.left_out.lines, *written.left_out][: bad_input.KEPT])
        tables.append({name: dataclasses.asdict(c) for name, c in written.counts.items()})
        inputs.append(_input_line(corpus, written, _skipped(tables[-1])))
    shutil.rmtree(counts_directory)
    held_out_bytes = sum(table[writing.HELD_OUT]["bytes"] for table in tables)
    content = {
        "sources": tables,
        "baselines": tokenizer_training.baselines(
            config, job.splits, sum(corpus.size for corpus in corpora), job.on_progress
        )
        if 0 < held_out_bytes <= _BASELINE_LIMIT
        else None,
        "inputs": inputs,
        "splits": [dataclasses.asdict(how) for how in job.splits],
        # For people who read the file; the code does not read it.
        "data": dataclasses.asdict(config),
        "left_out": messages,
    }
    text = json.dumps(content, indent=1)
    integrity.write_checksums(directory, (_SUMMARY, text.encode()))
    (directory / _SUMMARY).write_text(text)
    return list(itertools.chain(*messages)), sum(map(_skipped, tables))


def _input_line(corpus: Corpus, written: writing.Written, unreadable: int) -> str:
    """Return the log text about a source: its size, documents, held-out part and exclusions."""
    held_out, train = (written.counts[name].bytes for name in _SPLITS)
    size = f"{corpus.size / 1e6:,.1f} MB" if corpus.size >= 1e5 else f"{corpus.size:,} bytes"
    skipped = Counter(
        {"empty documents": written.empty, "unreadable lines, rows or files": unreadable}
    )
    tail = file_patterns.counted(+skipped + corpus.passed_over)
    return (
        f"{_some(corpus.amount, corpus.kind)}, {size}, {_some(written.documents, 'document')}, "
        f"{held_out / (held_out + train):.2%} held out" + (f"{_PASSED_OVER}{tail}" if tail else "")
    )


def _some(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _skipped(table: dict[str, dict[str, int]]) -> int:
    """Return the number of pieces left out; the pass of each split counts all of them."""
    return max(counts["skipped"] for counts in table.values())


def _load(config: DataConfig, directory: Path) -> Prepared:
    """Return the data that `_make` wrote, or raise `UserError` if it is damaged."""
    integrity.verify(directory)
    with integrity.reading(directory / _SUMMARY, directory):
        content = json.loads((directory / _SUMMARY).read_bytes())
        parts = _parts(config, directory, content["sources"])
        baselines = content["baselines"]
    with integrity.reading(directory, directory):
        tokenizer = tokenizers.from_directory(directory)
    # Without the directory's name, which depends on the files' modification times.
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
        inputs=tuple(
            f"data: {part.name}: {line}"
            for part, line in zip(parts, content.get("inputs", ()), strict=False)
        ),
    )


def _parts(
    config: DataConfig, directory: Path, tables: list[dict[str, dict[str, int]]]
) -> tuple[PreparedSource, ...]:
    parts = []
    for index, (source, table) in enumerate(zip(config.sources, tables, strict=True)):
        train, held_out = (writing.Counts(**table[s]) for s in (writing.TRAIN, writing.HELD_OUT))
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
    """Return a name that changes with everything that the windows depend on."""
    content = [
        _FORMAT,
        [corpus.identity() for corpus in corpora],
        hashlib.blake2b(given.content).hexdigest() if given else config.tokenizer,
        config.context_length,
        config.held_out_fraction,
    ]
    if any(source.held_out for source in config.sources):
        content.append(["held out", [source.held_out for source in config.sources]])
    if given and given.start != given.separator:
        content.append(["documents begin with", given.start])
    if given and given.separator_is_named:
        content.append(["documents end with", given.separator])
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _check_size(spec: str, size: int | None, vocab_size: int | None) -> None:
    if size is not None and vocab_size is not None and size > vocab_size:
        raise UserError(
            f"tokenizer {spec!r} has {size} tokens, the model's vocabulary only {vocab_size}: "
            f"set --config.model.vocab_size={size} or more, or use a smaller tokenizer"
        )


def _rename(scratch: Path, final: Path) -> None:
    try:
        scratch.rename(final)
    except OSError:
        # Another process may have been first; its result is equivalent.
        if not (final / _SUMMARY).is_file():
            raise


def main() -> None:
    """Run the command. The flags are defined here so that an import does not define `--config`."""
    from absl import flags

    from mea_jax import cli

    config = cli.define_config_flag()
    runner = flags.DEFINE_string("beam_runner", None, "Beam runner, such as DirectRunner")
    options = flags.DEFINE_multi_string("beam_option", [], "Beam option; may be repeated")

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
