"""The interface of a tokenizer, the files that come with it, and what all kinds share."""

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from mea_jax.data import end_tokens
from mea_jax.data.bad_input import first_line
from mea_jax.data.end_tokens import GENERATION, MODEL_CONFIG, TOKENIZER_CONFIG
from mea_jax.errors import UserError

SEPARATOR = "<|endoftext|>"

# Every tokenizer read from a file is tested on these texts.
_TRIAL = ["", " ", "The 1st line,\n\tthe 2nd: it's\r\n", "naïve 東京 \U0001f642\x00", SEPARATOR]

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
    def published_context(self) -> int:
        """The positions that a published model was made for, or 0 if its files do not say."""
        return end_tokens.context_of(self.companions)

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


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, or raise `UserError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; make it readable") from error


def check_usable(tokenizer: TokenizerT, path: Path) -> TokenizerT:
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


def no_end_error(where: str, why: str) -> UserError:
    """Return the error about a tokenizer at `where` that names no end token."""
    return UserError(
        f"{where}: has no end token to separate documents ({why}): name it as eos_token in the "
        "model's tokenizer_config.json, and set the tokenizer to the folder with both files"
    )


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
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


def decode_known(ids: Sequence[int], vocab_size: int, decode: Any) -> str:
    """Apply `decode` to runs of ids in [0, vocab_size) and insert U+FFFD for each other id."""
    text, known = [], []
    for i in ids:
        if 0 <= i < vocab_size:
            known.append(int(i))
        else:
            text += [decode(known), "\ufffd"]
            known = []
    return "".join([*text, decode(known)])
