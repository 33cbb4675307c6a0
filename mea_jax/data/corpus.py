"""The base classes of all sources of text: documents, their names, and the files they come from.

A source is a list of units (a file, or a range of records), which Beam workers can read separately.
The name of a document is the relative path of its file, or the content hash of its record. Names
are the same on every machine, because they decide which documents are held out. Copies of one
record have one name, so all of them are held out or none is.
"""

import abc
import codecs
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea_jax.config.schema import SourceConfig
from mea_jax.data.bad_input import BadInputError, LeftOut, summarize_names


@dataclass(frozen=True)
class Document:
    """A text, and a name that is the same on every machine."""

    name: str
    text: str


def unit_hash(name: str) -> float:
    """Return a number in [0, 1), uniform over names and the same on every machine."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def content_name(text: str) -> str:
    """Return a name for a document that has none: a hash of its content."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Corpus(abc.ABC):
    """An opened source: its units, and the code that reads one.

    Attributes:
      units: the pieces to read, one after another or by several workers.
      size: the approximate size of all units in bytes, for progress bars.
      left_out: the pieces of input that could not be read so far.
      read_documents: the number of documents with text that were read so far.
      empty: the number of documents without text that were read so far.
      kind: the noun for `amount`, in the singular.
      amount: the number of files or records.
      passed_over: the numbers of entries in the source's folders that are not read, by kind.
    """

    units: Sequence[Any]
    size: int
    kind = "file"

    def __init__(self, source: SourceConfig, left_out: LeftOut):
        self.source = source
        self.left_out = left_out
        self.passed_over: Counter[str] = Counter()
        self.read_documents = self.empty = 0

    @property
    def amount(self) -> int:
        return len(self.units)

    def document_sizes(self) -> dict[str, int] | None:
        """Return the bytes of each document by name, or None if that needs reading them."""
        return None

    @abc.abstractmethod
    def read(self, unit: Any) -> Iterator[Document]:
        """Yield the documents of one unit.

        Malformed input goes to `left_out`, with its position.

        Raises:
          BadInputError: reading cannot continue; the rest of the unit then counts as one piece.
        """

    @abc.abstractmethod
    def identity(self) -> Any:
        """Return JSON values that change when the documents change."""

    def documents(self, shard: int = 0, shards: int = 1) -> Iterator[Document]:
        """Yield the documents with text of every `shards`-th unit, starting at unit `shard`."""
        for unit in self.units[shard::shards]:
            try:
                for document in self.read(unit):
                    if document.text:
                        self.read_documents += 1
                        yield document
                    else:
                        self.empty += 1
            except BadInputError as error:
                self.left_out.add(error)


class FileCorpus(Corpus):
    """A source of files below a root folder; the units are their paths relative to it.

    Attributes:
      ONE_DOCUMENT: whether each file is one document, whose name is the unit.
    """

    ONE_DOCUMENT = False

    def __init__(self, source: SourceConfig, left_out: LeftOut, root: Path, names: list[str]):
        super().__init__(source, left_out)
        self.root = root
        self.units = []
        self._stats = []
        for name in names:
            try:
                self._stats.append(_stat(root, name))
                self.units.append(name)
            except BadInputError as error:
                left_out.add(error)
        self.size = sum(stat.st_size for stat in self._stats)

    def identity(self) -> Any:
        stats = zip(self.units, self._stats, strict=True)
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return [self.source.source, self.source.field, files]

    def document_sizes(self) -> dict[str, int] | None:
        if not self.ONE_DOCUMENT:
            return None
        return {n: s.st_size for n, s in zip(self.units, self._stats, strict=True) if s.st_size}

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise BadInputError(
                f"{self.root / name}: cannot be read: {error.strerror}; "
                "check that it exists and is readable"
            ) from error


def _stat(root: Path, name: str) -> os.stat_result:
    try:
        name.encode()  # `unit_hash` does the same
        return os.stat(root / name)
    except UnicodeEncodeError as error:
        raise BadInputError(f"{root / name}: the file's name is not UTF-8; rename it") from error
    except OSError as error:  # removed since it was listed, for example
        raise BadInputError(
            f"{root / name}: cannot be read: {error.strerror}; check that it exists and is readable"
        ) from error


def field_path(field: str, record: Any, inside: Callable[[Any], Any]) -> list[str] | None:
    """Return the path of names from `record` to `field`, or None if there is no such field.

    Args:
      field: a name, or several joined by dots. A name that itself contains a dot takes precedence.
      record: a mapping from names.
      inside: returns the mapping inside a value of `record`, or None if it has none.
    """
    if field in record:
        return [field]
    for at in [i for i, letter in enumerate(field) if letter == "."][::-1]:
        name = field[:at]
        inner = inside(record[name]) if name in record else None
        rest = field_path(field[at + 1 :], inner, inside) if inner is not None else None
        if rest is not None:
            return [name, *rest]
    return None


def without_mark(data: bytes) -> bytes:
    """Return `data`, the beginning of a file, without the UTF-8 byte-order mark."""
    return data.removeprefix(codecs.BOM_UTF8)


def decode(data: bytes, where: str) -> str:
    """Return `data` as UTF-8 text, or raise `BadInputError`; `where` is the source of the bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{where}: byte {error.start} is not UTF-8; convert the file, for example with iconv"
        ) from error


def text_field(record: dict[str, Any], field: str, where: str) -> str:
    """Return the text in `record[field]`, a string or UTF-8 bytes.

    A field "a.b" is first looked up as one name, then as the field "b" of the record's field "a".

    Raises:
      BadInputError: there is no such field, or it is not valid text; `where` is the record's
        position.
    """
    path = field_path(field, record, lambda value: value if isinstance(value, dict) else None)
    if path is None:
        raise BadInputError(
            f"{where}: no field {field!r} (it has: {summarize_names(record)}); "
            "set the field of the data source"
        )
    value: Any = record
    for name in path:
        value = value[name]
    if isinstance(value, bytes):
        return decode(value, where)
    if not isinstance(value, str):
        raise BadInputError(
            f"{where}: field {field!r} is of type {type(value).__name__}, expected a string; "
            "set the field of the data source to one with text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise BadInputError(
            f"{where}: field {field!r} has a lone surrogate at character {error.start}, "
            "which is not valid text; remove it"
        ) from error
    return value
