"""Tokenizers behind one small interface; the name of a saved file identifies its kind.

Text is never searched for special tokens: a document that spells out "<|endoftext|>" is encoded
as those characters, so the separator's id occurs only where packing inserts it.

A published model's tokenizer comes with other files (`COMPANIONS`). They are saved unchanged next
to it and name the tokens with which the model ends a text.
"""

import abc
import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import tokenizers as hf

from mea_jax.data import end_tokens, pre_tokenizers
from mea_jax.data.bad_input import first_line
from mea_jax.data.end_tokens import END_TOKENS, GENERATION, MODEL_CONFIG, TOKENIZER_CONFIG
from mea_jax.errors import UserError

SEPARATOR = "<|endoftext|>"

# Every tokenizer read from a file is tested on these texts.
_TRIAL = ["", " ", "The 1st line,\n\tthe 2nd: it's\r\n", "naïve 東京 \U0001f642\x00", SEPARATOR]
_UNUSED = 1 << 16  # most ids below the largest that may have no token

# Files of a published model that are copied with its tokenizer; only their end tokens are read.
COMPANIONS = (
    MODEL_CONFIG,
    GENERATION,
    TOKENIZER_CONFIG,
    end_tokens.SPECIAL_TOKENS,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)


NONE: Mapping[str, bytes] = MappingProxyType({})


class Tokenizer(abc.ABC):
    """A conversion between text and token ids.

    Attributes:
      FILE: the name of the saved file, which identifies the kind.
      vocab_size: one more than the largest id.
      separator: the id at the end of a document.
      start: the id at the beginning of a document: `separator`, unless the tokenizer has another.
      content: the bytes of the saved file.
      companions: the contents of files (`COMPANIONS`) that are saved with it, by name.
    """

    FILE: ClassVar[str]
    vocab_size: int
    separator: int
    start: int
    content: bytes
    companions: Mapping[str, bytes] = NONE

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, without separators."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; invalid UTF-8 and ids out of range become U+FFFD."""

    def save(self, directory: Path) -> None:
        """Write the file that `from_directory` reads, and its companions."""
        for name, content in (dict(self.companions) | {self.FILE: self.content}).items():
            (directory / name).write_bytes(content)

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end generated text: the separator and all ends that the companions name."""
        ends = end_tokens.named_ends(self.companions, self.vocabulary, self.vocab_size)
        return tuple(dict.fromkeys((self.separator, *(i for ids in ends.values() for i in ids))))

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids before a prompt: `start`, as in training here.

        A published model's tokenizer decides for itself, and many put nothing before a text.
        """
        return self.template_prefix if MODEL_CONFIG in self.companions else (self.start,)

    @property
    def template_prefix(self) -> tuple[int, ...]:
        """The ids that the tokenizer's own template puts before a text."""
        return ()

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a rendered chat, in which special tokens are written as text.

        Raises:
          UserError: the kind of tokenizer has no special tokens.
        """
        raise UserError(f"a {self.FILE} has no chats: leave out --chat")

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The ids of the tokens by their texts."""
        return {}

    @property
    def separator_is_named(self) -> bool:
        """True if the separator differs from that of the tokenizer without companions."""
        return False

    @property
    def added(self) -> frozenset[int]:
        """The ids of tokens that were added to the learned vocabulary."""
        return frozenset()

    @classmethod
    @abc.abstractmethod
    def read(cls, path: Path, companions: Mapping[str, bytes] = NONE) -> "Tokenizer":
        """Return the tokenizer in a file; its `companions` may name its separator.

        Raises:
          UserError: the file is malformed, or a package to read it is not installed.
        """


TokenizerT = TypeVar("TokenizerT", bound=Tokenizer)


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
            content = json.loads(_bytes(path))
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
            raise _no_end(where, f"it has none of {', '.join(END_TOKENS)}")
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
        marked = hf.Tokenizer.from_str(self.content.decode())
        with _library_errors(f"{self._where}: cannot encode text"):
            return marked.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with _library_errors(f"{self._where}: cannot encode text"):
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        decode = functools.partial(self._tokenizer.decode, skip_special_tokens=False)
        with _library_errors(f"{self._where}: cannot decode"):
            return _decode_known(ids, self.vocab_size, decode)

    @classmethod
    def read(cls, path: Path, companions: Mapping[str, bytes] = NONE) -> "HuggingFaceTokenizer":
        content = _bytes(path)
        with _library_errors(f"{path}: truncated, or not a Hugging Face tokenizer.json"):
            tokenizer = cls(hf.Tokenizer.from_str(content.decode()), str(path), companions)
        return _tried(tokenizer, path)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, such as those of Llama 2, Gemma and Mistral."""

    FILE = "tokenizer.model"

    def __init__(self, model: bytes, where: str, companions: Mapping[str, bytes] = NONE):
        try:
            import sentencepiece  # an optional extra
        except ImportError as error:
            raise UserError(
                f"{where}: reading it needs the package sentencepiece: "
                "pip install 'mea_jax[sentencepiece]'"
            ) from error
        self._where, self.companions = where, companions
        self.content = model
        with _library_errors(f"{where}: truncated, or not a SentencePiece model"):
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.vocab_size()
        self.separator = self._processor.eos_id()
        if self.separator < 0:
            found = end_tokens.separator_of(companions, self.vocabulary, self.vocab_size)
            if found is None:
                raise _no_end(where, "its model has no eos")
            self.separator = found
        begin = self._processor.bos_id()
        self.start = begin if begin >= 0 else self.separator

    @property
    def separator_is_named(self) -> bool:
        return self._processor.eos_id() < 0

    @functools.cached_property
    def vocabulary(self) -> Mapping[str, int]:
        return {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}

    @property
    def template_prefix(self) -> tuple[int, ...]:
        """The begin token, unless the model's tokenizer_config.json switches it off."""
        begin = self._processor.bos_id()
        return (begin,) if begin >= 0 and end_tokens.adds_start(self.companions) else ()

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a rendered chat: special tokens by their ids, text between them.

        As in transformers, only text at the beginning gets the model's dummy prefix.
        """
        special = [
            self._processor.id_to_piece(i)
            for i in range(self.vocab_size)
            if self._processor.is_control(i)
        ]
        pattern = "|".join(map(re.escape, sorted(filter(None, special), key=len, reverse=True)))
        ids: list[int] = []
        for i, part in enumerate(re.split(f"({pattern})", text)):
            if part and i % 2:
                ids.append(self._processor.piece_to_id(part))
            elif part:
                ids += self._encode_plain(part, first=not ids)
        return ids

    def _encode_plain(self, text: str, first: bool) -> list[int]:
        if first:
            return self.encode_batch([text])[0]
        # After a begin that the model knows by itself, there is no dummy prefix to remove.
        mark = "\n"
        with_mark, alone = self._processor.encode([mark + text, mark])
        return with_mark[len(alone) :]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with _library_errors(f"{self._where}: cannot encode text"):
            return self._processor.encode(texts)

    def decode(self, ids: Sequence[int]) -> str:
        with _library_errors(f"{self._where}: cannot decode"):
            return _decode_known(ids, self.vocab_size, self._processor.decode)

    @classmethod
    def read(cls, path: Path, companions: Mapping[str, bytes] = NONE) -> "SentencePieceTokenizer":
        return _tried(cls(_bytes(path), str(path), companions), path)


KINDS: tuple[type[Tokenizer], ...] = (BytesTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer)


def companions_of(directory: Path) -> dict[str, bytes]:
    """Return the contents of the `COMPANIONS` in a folder, by name.

    Raises:
      UserError: one of them cannot be read.
    """
    return {n: _bytes(directory / n) for n in COMPANIONS if (directory / n).is_file()}


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


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; make it readable") from error


def _tried(tokenizer: TokenizerT, path: Path) -> TokenizerT:
    """Return `tokenizer`, read from `path`, or raise `UserError` if it cannot encode or decode.

    The libraries accept some files that later fail or encode text as ids out of range.
    """
    for ids in tokenizer.encode_batch(_TRIAL):
        if not all(0 <= i < tokenizer.vocab_size for i in ids):
            raise UserError(
                f"{path}: encodes text as ids that are not in its vocabulary; fetch the file again"
            )
        tokenizer.decode(ids)
    tokenizer.decode(range(min(tokenizer.vocab_size, 1 << 20)))
    return tokenizer


def _no_end(where: str, why: str) -> UserError:
    return UserError(
        f"{where}: has no end token to separate documents ({why}): name it as eos_token in the "
        "model's tokenizer_config.json, and set the tokenizer to the folder with both files"
    )


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turn every exception of a tokenizer library into a `UserError`: `what` and the reason.

    Both libraries raise many types for malformed files, and Hugging Face's library panics for
    unexpected values. A panic is not an `Exception`, and its type cannot be imported.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise UserError(f"{what} ({first_line(error)}); fetch the tokenizer again") from error


def _decode_known(ids: Sequence[int], vocab_size: int, decode: Any) -> str:
    """Apply `decode` to runs of ids in [0, vocab_size) and insert U+FFFD for each other id."""
    text, known = [], []
    for i in ids:
        if 0 <= i < vocab_size:
            known.append(int(i))
        else:
            text += [decode(known), "\ufffd"]
            known = []
    return "".join([*text, decode(known)])
