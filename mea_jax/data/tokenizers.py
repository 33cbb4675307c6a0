"""Tokenizers behind one small interface; the name of a saved file identifies its kind.

Text is never searched for special tokens: a document that spells out "<|endoftext|>" is encoded
as those characters, so the separator's id occurs only where packing inserts it.

A published model's tokenizer comes with other files (`COMPANIONS`). They are saved unchanged next
to it and name the tokens with which the model ends a text.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tokenizers as hf

from mea_jax.data import end_tokens, pre_tokenizers
from mea_jax.data.bad_input import first_line
from mea_jax.data.end_tokens import END_TOKENS
from mea_jax.data.sentencepiece import SentencePieceTokenizer
from mea_jax.data.tokenizer import (
    COMPANIONS,
    NONE,
    SEPARATOR,
    Tokenizer,
    check_usable,
    decode_known,
    library_errors,
    no_end_error,
    read_bytes,
)
from mea_jax.errors import UserError

_UNUSED = 1 << 16  # most ids below the largest that may have no token


class BytesTokenizer(Tokenizer):
    """A tokenizer whose tokens are the 256 bytes and the separator."""

    FILE = "tokenizer.bytes.json"
    vocab_size = 257
    separator = start = 256
    content = json.dumps({"kind": "bytes", "vocab_size": 257, "separator": 256}).encode()

    def __init__(self, companions: Mapping[str, bytes] = NONE):
        self.companions = companions

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        special = {self.separator: SEPARATOR.encode()}
        unknown = "\ufffd".encode()
        pieces = (bytes((i,)) if 0 <= i < 256 else special.get(int(i), unknown) for i in ids)
        return b"".join(pieces).decode(errors="replace")

    @classmethod
    def read(cls, path: Path, companions: Mapping[str, bytes] = NONE) -> "BytesTokenizer":
        try:
            content = json.loads(read_bytes(path))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: truncated, or not a tokenizer file ({first_line(error)}); copy it again"
            ) from error
        if content != json.loads(cls.content):
            raise UserError(
                f"{path}: not a bytes tokenizer; its content must be {cls.content.decode()}"
            )
        return cls(companions)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face `tokenizers` library, published or trained by `train_bpe`."""

    FILE = "tokenizer.json"

    def __init__(self, tokenizer: hf.Tokenizer, where: str, companions: Mapping[str, bytes] = NONE):
        """Wrap `tokenizer`, or raise `UserError` that starts with `where` if it is unusable."""
        self._where, self.companions = where, companions
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > len(vocabulary) + _UNUSED:
            # No real model has such gaps, and the library would list all unused ids in `to_str`.
            raise UserError(
                f"{where}: has ids up to {self.vocab_size - 1} for {len(vocabulary)} tokens; "
                "change its ids"
            )
        self.content = tokenizer.to_str().encode()  # before the changes below
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # encode them as text; see the module's docstring
        self._tokenizer = tokenizer
        end = end_tokens.separator_of(companions, vocabulary, self.vocab_size)
        if end is None:
            raise no_end_error(where, f"it has none of {', '.join(END_TOKENS)}")
        self.separator = end
        if list(vocabulary.values()).count(end) > 1:
            text = next((token for token in END_TOKENS if vocabulary.get(token) == end), end)
            raise UserError(
                f"{where}: another token has the id of the end token {text!r}; give it its own id"
            )
        # The token that its template puts before a text, such as Llama 3's <|begin_of_text|>.
        before = tokenizer.encode("", add_special_tokens=True).ids
        self.start = before[0] if before else self.separator

    @functools.cached_property
    def vocabulary(self) -> Mapping[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def separator_is_named(self) -> bool:
        return self.separator != end_tokens.known_separator(self.vocabulary)

    @property
    def added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @property
    def template_prefix(self) -> tuple[int, ...]:
        text = self._tokenizer.encode("a", add_special_tokens=False).ids
        ids = self._tokenizer.encode("a", add_special_tokens=True).ids
        places = range(len(ids) - len(text) + 1)
        return tuple(ids[: next(i for i in places if ids[i : i + len(text)] == text)])

    def encode_marked(self, text: str) -> list[int]:
        with library_errors(f"{self._where}: cannot encode text"):
            return self._marked.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _marked(self) -> hf.Tokenizer:
        """The same tokenizer, which finds special tokens in a text."""
        return hf.Tokenizer.from_str(self.content.decode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with library_errors(f"{self._where}: cannot encode text"):
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        decode = functools.partial(self._tokenizer.decode, skip_special_tokens=False)
        with library_errors(f"{self._where}: cannot decode"):
            return decode_known(ids, self.vocab_size, decode)

    @classmethod
    def read(cls, path: Path, companions: Mapping[str, bytes] = NONE) -> "HuggingFaceTokenizer":
        content = read_bytes(path)
        with library_errors(f"{path}: truncated, or not a Hugging Face tokenizer.json"):
            tokenizer = cls(hf.Tokenizer.from_str(content.decode()), str(path), companions)
        return check_usable(tokenizer, path)


KINDS: tuple[type[Tokenizer], ...] = (BytesTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer)


def companions_of(directory: Path) -> dict[str, bytes]:
    """Return the contents of the `COMPANIONS` in a folder, by name.

    Raises:
      UserError: one of them cannot be read.
    """
    return {n: read_bytes(directory / n) for n in COMPANIONS if (directory / n).is_file()}


def from_directory(directory: Path, more: Mapping[str, bytes] = NONE) -> Tokenizer:
    """Return the tokenizer in a folder that `save` or transformers wrote.

    Args:
      directory: the folder.
      more: companions in addition to those in the folder, which they replace.

    Raises:
      UserError: there is no tokenizer, or it is malformed.
    """
    for kind in KINDS:
        if (directory / kind.FILE).is_file():
            return kind.read(directory / kind.FILE, companions_of(directory) | dict(more))
    raise UserError(
        f"{directory}: contains no tokenizer; add {' or '.join(kind.FILE for kind in KINDS)}"
    )


def load(spec: str) -> Tokenizer:
    """Return the tokenizer of `DataConfig.tokenizer`, unless it must be trained.

    Args:
      spec: "bytes", the path of a *.json or *.model file, or a folder that contains one.

    Raises:
      UserError: the file does not exist or is malformed, or the spec is of no known kind.
    """
    if spec == "bytes":
        return BytesTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        return from_directory(path)
    kinds = {kind.FILE: kind for kind in KINDS}
    suffixes: dict[str, type[Tokenizer]] = {
        ".json": HuggingFaceTokenizer,
        ".model": SentencePieceTokenizer,
    }
    kind = kinds.get(path.name) or suffixes.get(path.suffix)
    if kind is None:
        raise UserError(
            f"config.data.tokenizer: {spec!r} is not a tokenizer: set it to 'bytes', 'bpe:<size>', "
            "a path ending in .json or .model, or a folder with such a file"
        )
    if not path.is_file():
        raise UserError(f"config.data.tokenizer: {spec}: no such file; correct the path")
    return kind.read(path)


def bpe_size(spec: str) -> int | None:
    """Return the vocabulary size of a "bpe:<size>" spec, or None for any other spec.

    Raises:
      UserError: the size is not an integer of at least 257 (256 bytes and the separator).
    """
    if not spec.startswith("bpe"):
        return None
    size = spec.removeprefix("bpe").removeprefix(":")
    if not size.isdecimal() or int(size) < 257:
        raise UserError(
            f"config.data.tokenizer: {spec!r} is not 'bpe:<size>': the size must be at least 257 "
            "(256 bytes and the separator)"
        )
    return int(size)


def train_bpe(texts: Iterator[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Train a byte-level byte-pair encoding, which is lossless for every text.

    The same texts give the same merges.

    Args:
      texts: the training texts.
      vocab_size: the number of tokens, including the 256 bytes and the separator; the result has
        fewer if the texts are too small for this number of merges.
    """
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.splitter(bounded=True)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[SEPARATOR],
        show_progress=False,
    )
    watched = pre_tokenizers.LongRunDetector(texts)
    tokenizer.train_from_iterator(iter(watched), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.splitter(bounded=watched.long_runs)
    return HuggingFaceTokenizer(tokenizer, "the trained tokenizer")
