"""What every source of text shares: documents, their names, and the files that hold them.

A source is a list of units (a file, or a range of records), the pieces that Beam workers can read
apart. Names of documents are the same on every machine, because they decide the side of the
held-out split: the relative path of a file, the content hash of a record (so copies of one record
always fall on one side).
"""

import abc
import glob
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea_jax.config import SourceConfig
from mea_jax.data.bad_input import BadInputError, LeftOut, some
from mea_jax.errors import UserError


@dataclass(frozen=True)
class Document:
    """One text, and a name that is the same on every machine."""

    name: str
    text: str


def unit_hash(name: str) -> float:
    """A number in [0, 1), uniform over names and the same on every machine."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document called `name` is in the held-out `fraction` of documents.

    Depends on the name alone, so the split does not move when documents are added.
    """
    return unit_hash(name) < fraction


def content_name(text: str) -> str:
    """The name of a document that has none of its own: a hash of its content."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Corpus(abc.ABC):
    """An opened source: its units and how to read one.

    Attributes:
      units: the pieces that are read one after another, or by several workers.
      size: bytes of all units, about; progress bars count with it.
      left_out: the pieces of input that could not be read so far.
    """

    units: Sequence[Any]
    size: int

    def __init__(self, source: SourceConfig, left_out: LeftOut):
        self.source = source
        self.left_out = left_out

    @abc.abstractmethod
    def read(self, unit: Any) -> Iterator[Document]:
        """Documents of one unit.

        Malformed input goes to `left_out`, by its place. Raises `BadInputError` where the reading
        cannot go on behind it: the rest of the unit is then one piece.
        """

    @abc.abstractmethod
    def identity(self) -> Any:
        """JSON values that change when the documents do."""

    def documents(self, shard: int = 0, shards: int = 1) -> Iterator[Document]:
        """Documents with text of every `shards`-th unit from unit `shard` on."""
        for unit in self.units[shard::shards]:
            try:
                for document in self.read(unit):
                    if document.text:
                        yield document
            except BadInputError as error:
                self.left_out.add(error)


class FileCorpus(Corpus):
    """Files below a root; the units are their paths relative to it."""

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

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise BadInputError(f"{self.root / name}: cannot be read: {error.strerror}") from error


def _stat(root: Path, name: str) -> os.stat_result:
    try:
        name.encode()  # as the names of documents are, for their hashes
        return os.stat(root / name)
    except UnicodeEncodeError as error:
        raise BadInputError(f"{root / name}: the file's name is not UTF-8; rename it") from error
    except OSError as error:  # removed since it was listed, for example
        raise BadInputError(f"{root / name}: cannot be read: {error.strerror}") from error


def find_files(source: SourceConfig, suffixes: tuple[str, ...] = ("",)) -> tuple[Path, list[str]]:
    """The root folder of `source.path` and the sorted relative names of its files.

    Of a folder those whose names end in one of `suffixes`; of a glob all.

    Raises:
      UserError: there are none, or they cannot be listed.
    """
    try:
        return _find_files(source, suffixes)
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read: {error.strerror}") from error


def _find_files(source: SourceConfig, suffixes: tuple[str, ...]) -> tuple[Path, list[str]]:
    if not source.path:
        raise UserError(
            f"config.data.sources: source {source.source!r} needs a path: a file, folder or glob"
        )
    pattern = os.path.expanduser(source.path)
    path, what = Path(pattern), "files"
    if path.is_file():
        return path.parent, [path.name]
    if path.is_dir():
        root, what = path, " or ".join(f"*{suffix} files" for suffix in suffixes if suffix) or what
        found = [p for p in path.rglob("*") if p.name.endswith(suffixes) and p.is_file()]
    elif glob.has_magic(pattern):
        # The root of a glob is its leading part without wildcards.
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
    else:
        raise UserError(f"{source.path}: no such file or folder; mend the path of the data source")
    names = [p.relative_to(root) for p in found]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise UserError(f"{source.path}: matches no {what}; mend the path of the data source")
    return root, sorted(name.as_posix() for name in names)


def decode(data: bytes, where: str) -> str:
    """UTF-8 text. Raises `BadInputError` that says `where` the bytes come from."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{where}: byte {error.start} is not UTF-8; convert the file, for example with iconv"
        ) from error


def text_field(record: dict[str, Any], field: str, where: str) -> str:
    """The text in `record[field]`, a string or UTF-8 bytes. Raises `BadInputError`."""
    if field not in record:
        raise BadInputError(
            f"{where}: no field {field!r} (it has: {some(record)}); "
            "set the field of the data source"
        )
    value = record[field]
    if isinstance(value, bytes):
        return decode(value, where)
    if not isinstance(value, str):
        raise BadInputError(
            f"{where}: field {field!r} is of type {type(value).__name__}, expected a string"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise BadInputError(
            f"{where}: field {field!r} has a lone surrogate at character {error.start}, "
            "which is not valid text"
        ) from error
    return value
