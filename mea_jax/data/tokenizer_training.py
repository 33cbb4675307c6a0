"""Passes over the documents that write no windows: tokenizer training and compression baselines."""

import gzip
import lzma
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mea_jax.config.schema import DataConfig
from mea_jax.data import sources, tokenizers, waiting
from mea_jax.data.bad_input import LeftOut
from mea_jax.data.corpus import Corpus, Document, unit_hash
from mea_jax.data.split import Split
from mea_jax.data.tokenizers import Tokenizer

_BPE_SAMPLE = 32 << 20  # bytes of training text from which merges are learned


def left_out(config: DataConfig) -> LeftOut:
    """Return a `LeftOut` for one pass, which leaves out bad input if the config allows that."""
    return LeftOut(config.bad_input == "skip")


def _documents(
    config: DataConfig, splits: Sequence[Split]
) -> Iterator[tuple[Document, tuple[str, str]]]:
    """Yield each document with its training text and its held-out text."""
    for source, split in zip(config.sources, splits, strict=True):
        for document in sources.documents(source, left_out(config)):
            yield document, split.parts(document)


def train_tokenizer(
    config: DataConfig,
    corpora: Sequence[Corpus],
    splits: Sequence[Split],
    log: Callable[[str], Any],
    on_progress: Callable[[int], Any],
) -> Tokenizer:
    """Return a tokenizer whose merges are learned from a sample of the training text."""
    size = tokenizers.bpe_size(config.tokenizer)
    assert size is not None
    total = sum(corpus.size for corpus in corpora)
    fraction = _BPE_SAMPLE / max(total, 1)

    def pieces() -> Iterator[str]:
        for document, (text, _) in _documents(config, splits):
            advance(len(document.text.encode()))
            if fraction >= 1:
                if text:
                    yield text
                continue
            # Sample pieces, not documents, because a few documents may be most of the text.
            for start in range(0, len(text), 1 << 16):
                if unit_hash(f"{document.name}#{start}") < fraction:
                    yield text[start : start + (1 << 16)]
        bar.set_description(f"tokenizer {config.tokenizer}: learning merges")

    for_training = sum(corpus.size for corpus in corpora if not corpus.source.held_out)
    amount = min(for_training, _BPE_SAMPLE) / 1e6
    log(f"data: training the tokenizer {config.tokenizer} on {amount:,.1f} MB of text")
    with waiting.progress(f"tokenizer {config.tokenizer}", total, on_progress) as (advance, bar):
        return waiting.call(tokenizers.train_bpe, pieces(), size, bar=bar)


def baselines(
    config: DataConfig, splits: Sequence[Split], size: int, on_progress: Callable[[int], Any]
) -> dict[str, int]:
    """Return the bytes of the held-out documents, each compressed separately."""
    total = {"gzip_bytes": 0, "xz_bytes": 0}
    title = "gzip and xz of the held-out text"
    with waiting.progress(title, size, on_progress) as (advance, bar):
        for document, (_, text) in _documents(config, splits):
            if text:
                data = text.encode()
                total["gzip_bytes"] += len(waiting.call(gzip.compress, data, 9, bar=bar))
                total["xz_bytes"] += len(waiting.call(_xz, data, bar=bar))
            advance(len(document.text))
    return total


def _xz(data: bytes) -> bytes:
    """Compress like `xz -9e`, except that the dictionary is no larger than the text.

    The preset's 64 MB dictionary gives the same result but takes longer to allocate than to use.
    """
    size = min(max(len(data), 4096), 64 << 20)
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}
    return lzma.compress(data, filters=[lzma2])
