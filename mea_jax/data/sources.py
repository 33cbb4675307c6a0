"""Sources of text: their kinds by name, text files, and the Python standard library."""

import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mea_jax.config.schema import SourceConfig
from mea_jax.data.bad_input import BadInputError, LeftOut
from mea_jax.data.corpus import Corpus, Document, FileCorpus, decode, without_mark
from mea_jax.data.file_patterns import find_files
from mea_jax.data.records import JsonlCorpus, ParquetCorpus, TfdsCorpus
from mea_jax.errors import UserError, nearest

# Not every distribution ships its test directories; site-packages is not the standard library.
_STDLIB_EXCLUDES = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)


def describe(source: SourceConfig) -> str:
    """Return a short name of a source for messages and reports."""
    return f"{source.source}:{source.path}" if source.path else source.source


def named(words: str) -> SourceConfig:
    """Return the source that an option names as KIND or KIND:PATH, the inverse of `describe`."""
    kind, _, path = words.partition(":")
    return SourceConfig(source=kind, path=str(Path(path).expanduser().absolute()) if path else "")


def open_source(source: SourceConfig, left_out: LeftOut | None = None) -> Corpus:
    """Open `source`.

    Input that cannot be read goes to `left_out`; if that is None, it raises an error.

    Raises:
      UserError: the source is unknown, its path is missing or matches nothing, a package that it
        needs is not installed, or a TFDS dataset is not prepared.
    """
    left_out = LeftOut() if left_out is None else left_out
    if source.source.startswith("tfds:"):
        return TfdsCorpus(source, left_out)
    kinds: dict[str, Callable[[SourceConfig, LeftOut], Corpus]] = {
        "python_stdlib": _StdlibCorpus,
        "text": _TextCorpus,
        "jsonl": JsonlCorpus,
        "parquet": ParquetCorpus,
    }
    if source.source not in kinds:
        raise UserError(
            f"config.data.sources: unknown source {source.source!r}; "
            + nearest(source.source, [*kinds, "tfds:<name>"])
        )
    return kinds[source.source](source, left_out)


def documents(source: SourceConfig, left_out: LeftOut | None = None) -> Iterator[Document]:
    """Yield all documents of `source` that have text, in a fixed order.

    Raises:
      UserError: as `open_source`; input cannot be read as text and may not be left out (the message
        has its file and byte or line); or the entire source has no text.
    """
    left_out = LeftOut() if left_out is None else left_out
    empty = True
    for document in open_source(source, left_out).documents():
        empty = False
        yield document
    if empty:
        tail = f"; left out {left_out.count:,}, first {left_out.lines[0]}" if left_out.count else ""
        raise UserError(
            f"source {describe(source)} contains no text, only empty documents or none{tail}; "
            "choose another source"
        )


class _StdlibCorpus(FileCorpus):
    """The modules of Python's standard library, which are available offline everywhere."""

    ONE_DOCUMENT = True

    def __init__(self, source: SourceConfig, left_out: LeftOut):
        if source.path:
            raise UserError(
                f"config.data.sources: python_stdlib takes no path, got {source.path!r}; "
                "use source='text' for your own files"
            )
        root = Path(sysconfig.get_path("stdlib"))
        names = []
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in _STDLIB_EXCLUDES]
            names += [Path(folder, name) for name in files if name.endswith(".py")]
        if not names:
            raise UserError(
                f"no Python files in {root} (a Python packed into an archive?); "
                "use source='text' with your own files"
            )
        super().__init__(
            source, left_out, root, sorted(p.relative_to(root).as_posix() for p in names)
        )

    def identity(self) -> Any:
        sizes = [stat.st_size for stat in self._stats]
        return [self.source.source, platform.python_version(), self.units, sizes]

    def read(self, unit: str) -> Iterator[Document]:
        data = self._bytes(unit)
        try:
            text = decode(without_mark(data), f"{self.root / unit}")
        except BadInputError as error:  # the user cannot fix it
            self.left_out.add(error, tolerated=True)
        else:
            yield Document(unit, text)


class _TextCorpus(FileCorpus):
    """A source of text files, each of them one document."""

    ONE_DOCUMENT = True

    def __init__(self, source: SourceConfig, left_out: LeftOut):
        root, names, passed_over = find_files(source)
        super().__init__(source, left_out, root, names)
        self.passed_over = passed_over

    def read(self, unit: str) -> Iterator[Document]:
        data = without_mark(self._bytes(unit))
        yield Document(unit, decode(data, f"{self.root / unit}"))
