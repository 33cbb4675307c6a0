"""Documents of text, from files, JSON lines, TFDS datasets, or Python's own standard library.

A source is a list of units (a file, or a range of records), the pieces that Beam workers can read
apart. Names of documents are the same on every machine, because they decide the side of the
held-out split: the relative path of a file, the content hash of a record (so copies of one record
always fall on one side).
"""

import abc
import glob
import hashlib
import itertools
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea_jax.config import SourceConfig
from mea_jax.errors import UserError, nearest

# Not every distribution ships its test directories; site-packages is not the standard library.
_STDLIB_EXCLUDES = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)
_TFDS_UNIT = 4096  # records per unit of a TFDS source


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
      skipped: files passed over so far because they are not UTF-8 (standard library only).
    """

    units: Sequence[Any]
    size: int
    skipped: int = 0

    def __init__(self, source: SourceConfig):
        self.source = source

    @abc.abstractmethod
    def read(self, unit: Any) -> Iterator[Document]:
        """Documents of one unit. Raises `UserError` naming the place of malformed input."""

    @abc.abstractmethod
    def identity(self) -> Any:
        """JSON values that change when the documents do."""

    def documents(self, shard: int = 0, shards: int = 1) -> Iterator[Document]:
        """Documents with text of every `shards`-th unit from unit `shard` on."""
        for unit in self.units[shard::shards]:
            for document in self.read(unit):
                if document.text:
                    yield document


def describe(source: SourceConfig) -> str:
    """A source's short name for messages and reports."""
    return f"{source.source}:{source.path}" if source.path else source.source


def open_source(source: SourceConfig) -> Corpus:
    """Opens `source`.

    Raises:
      UserError: the source is unknown, its path is missing or matches nothing, or a TFDS dataset
        is not prepared.
    """
    if source.source.startswith("tfds:"):
        return _TfdsCorpus(source)
    kinds: dict[str, Callable[[SourceConfig], Corpus]] = {
        "python_stdlib": _StdlibCorpus,
        "text": _TextCorpus,
        "jsonl": _JsonlCorpus,
    }
    if source.source not in kinds:
        raise UserError(
            f"config.data.sources: unknown source {source.source!r}; "
            + nearest(source.source, [*kinds, "tfds:<name>"])
        )
    return kinds[source.source](source)


def documents(source: SourceConfig) -> Iterator[Document]:
    """All documents of `source` that have text, in a fixed order.

    Raises:
      UserError: as `open_source`; input that cannot be read as text, named by file and byte or
        line; no text in the whole source.
    """
    empty = True
    for document in open_source(source).documents():
        empty = False
        yield document
    if empty:
        raise UserError(f"source {describe(source)} holds no text: no document, or only empty ones")


class _FileCorpus(Corpus):
    """Files below a root; the units are their paths relative to it."""

    def __init__(self, source: SourceConfig, root: Path, names: list[str]):
        super().__init__(source)
        self.root = root
        self.units = names
        self._stats = [os.stat(root / name) for name in names]
        self.size = sum(stat.st_size for stat in self._stats)

    def identity(self) -> Any:
        stats = zip(self.units, self._stats, strict=True)
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return [self.source.source, self.source.field, files]

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise UserError(f"{self.root / name}: cannot be read: {error.strerror}") from error


class _StdlibCorpus(_FileCorpus):
    """The modules of the running Python, available offline everywhere."""

    def __init__(self, source: SourceConfig):
        if source.path:
            raise UserError(
                f"config.data.sources: python_stdlib takes no path, got {source.path!r}; "
                "use source='text' for files of your own"
            )
        root = Path(sysconfig.get_path("stdlib"))
        names = []
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in _STDLIB_EXCLUDES]
            names += [Path(folder, name) for name in files if name.endswith(".py")]
        if not names:
            raise UserError(
                f"no Python files in {root} (a Python packed into an archive?); "
                "use source='text' with files of your own"
            )
        super().__init__(source, root, sorted(p.relative_to(root).as_posix() for p in names))

    def identity(self) -> Any:
        sizes = [stat.st_size for stat in self._stats]
        return [self.source.source, platform.python_version(), self.units, sizes]

    def read(self, unit: str) -> Iterator[Document]:
        try:
            yield Document(unit, self._bytes(unit).decode())
        except UnicodeDecodeError:
            self.skipped += 1


class _TextCorpus(_FileCorpus):
    """Each file is a document."""

    def __init__(self, source: SourceConfig):
        super().__init__(source, *_find_files(source, suffix=""))

    def read(self, unit: str) -> Iterator[Document]:
        yield Document(unit, _decode(self._bytes(unit), f"{self.root / unit}"))


class _JsonlCorpus(_FileCorpus):
    """Each line is a JSON object, one of its fields the text of a document."""

    def __init__(self, source: SourceConfig):
        super().__init__(source, *_find_files(source, suffix=".jsonl"))

    def read(self, unit: str) -> Iterator[Document]:
        path = self.root / unit
        try:
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        text = self._text(line, f"{path}, line {number}")
                        yield Document(content_name(text), text)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error

    def _text(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(_decode(line, where))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); "
                "each line must be one JSON object"
            ) from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON {type(record).__name__}, expected an object")
        return _field(record, self.source.field, where)


class _TfdsCorpus(Corpus):
    """Records of a dataset that TFDS has prepared in a format with random access."""

    def __init__(self, source: SourceConfig):
        super().__init__(source)
        # Imported here: it takes a second, and the other sources do without.
        import tensorflow_datasets as tfds

        name = source.source.removeprefix("tfds:")
        data_dir = source.path or None
        where = f" data_dir={data_dir!r}," if data_dir else ""
        remedy = (
            f"run tfds.builder({name!r},{where} file_format='array_record')"
            ".download_and_prepare() in Python first"
        )
        try:
            self._builder = tfds.builder(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError as error:
            raise UserError(
                f"TFDS knows no dataset {name!r}"
                + (f" in {data_dir}" if data_dir else "")
                + f"; for a dataset of your own, import its builder and {remedy}"
            ) from error
        except ValueError as error:  # not a name that TFDS can read
            raise UserError(
                f"{source.source!r} names no TFDS dataset: write tfds:<name>, tfds:<name>/<config> "
                "or tfds:<name>/<config>:<version>"
            ) from error
        if not self._builder.is_prepared():
            raise UserError(f"TFDS dataset {name!r} is not prepared here; {remedy}")
        splits = self._builder.info.splits
        split = source.split.partition("[")[0]  # "train" of "train[:10%]"
        if split not in splits:
            raise UserError(
                f"TFDS dataset {name!r} has no split {source.split!r}; "
                + nearest(source.split, splits)
            )
        try:
            self._records = self._builder.as_data_source(split=source.split)
        except NotImplementedError as error:
            raise UserError(
                f"TFDS dataset {name!r} is prepared without random access; remove it from "
                f"{self._builder.data_path} and {remedy}"
            ) from error
        total = len(self._records)
        self.units = [
            range(start, min(start + _TFDS_UNIT, total)) for start in range(0, total, _TFDS_UNIT)
        ]
        self.size = splits[split].num_bytes * total // splits[split].num_examples

    def identity(self) -> Any:
        info = self._builder.info
        return [info.full_name, self.source.split, self.source.field, len(self._records), self.size]

    def read(self, unit: range) -> Iterator[Document]:
        for index in unit:
            where = f"{self._builder.info.full_name}, {self.source.split} record {index}"
            text = _field(self._records[index], self.source.field, where)
            yield Document(content_name(text), text)


def _find_files(source: SourceConfig, suffix: str) -> tuple[Path, list[str]]:
    """The root folder of `source.path` and the sorted relative names of its files."""
    if not source.path:
        raise UserError(
            f"config.data.sources: source {source.source!r} needs a path: a file, folder or glob"
        )
    pattern = os.path.expanduser(source.path)
    path = Path(pattern)
    if path.is_file():
        return path.parent, [path.name]
    if path.is_dir():
        root, found = path, [p for p in path.rglob("*" + suffix) if p.is_file()]
    elif glob.has_magic(pattern):
        # The root of a glob is its leading part without wildcards.
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
    else:
        raise UserError(f"{source.path}: no such file or folder; mend the path of the data source")
    names = [p.relative_to(root) for p in found]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        what = f"*{suffix} files" if suffix else "files"
        raise UserError(f"{source.path}: matches no {what}; mend the path of the data source")
    return root, sorted(name.as_posix() for name in names)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start} is not UTF-8; convert the file, for example with iconv"
        ) from error


def _field(record: dict[str, Any], field: str, where: str) -> str:
    """The text in `record[field]`, a string or UTF-8 bytes."""
    if field not in record:
        raise UserError(
            f"{where}: no field {field!r} (it has: {', '.join(sorted(record))}); "
            "set the field of the data source"
        )
    value = record[field]
    if isinstance(value, bytes):
        return _decode(value, where)
    if not isinstance(value, str):
        raise UserError(
            f"{where}: field {field!r} is of type {type(value).__name__}, expected a string"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise UserError(
            f"{where}: field {field!r} has a lone surrogate at character {error.start}, "
            "which is not valid text"
        ) from error
    return value
