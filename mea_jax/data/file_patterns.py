"""Selection of a source's files: which files of a folder or glob are read, and which are not."""

import functools
import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mea_jax.config.schema import SourceConfig
from mea_jax.errors import UserError

_HIDDEN, _OTHERS = "hidden files or folders", "files with other suffixes"
_AGAIN, _BROKEN = "links to folders that are read already", "broken links"
_LOOP = "paths that lead in a loop"
_UNREADABLE = "folders that cannot be read"


def find_files(
    source: SourceConfig, suffixes: tuple[str, ...] = ("",)
) -> tuple[Path, list[str], Counter[str]]:
    """Return the root folder of `source.path`, its files, and the entries passed over.

    If the path is a folder, the files are those below it whose names end in one of `suffixes`,
    including files in linked folders. If the path is a glob, they are all files that it matches.

    Returns:
      The root; the sorted file names relative to it; the number of entries that are not read, by
      kind.

    Raises:
      UserError: there are no files, or they cannot be listed.
    """
    try:
        return _find_files(source, suffixes)
    except OSError as error:
        raise UserError(
            f"{source.path}: cannot be read: {error.strerror}; make it readable"
        ) from error


def _find_files(
    source: SourceConfig, suffixes: tuple[str, ...]
) -> tuple[Path, list[str], Counter[str]]:
    if not source.path:
        raise UserError(
            f"config.data.sources: source {source.source!r} needs a path: a file, folder or glob"
        )
    pattern = os.path.expanduser(source.path)
    path, what = Path(pattern), "files"
    passed_over: Counter[str] = Counter()
    if path.is_file():
        return path.parent, [path.name], passed_over
    if path.is_dir():
        root, what = path, " or ".join(f"*{suffix} files" for suffix in suffixes if suffix) or what
        found = _walk(root, suffixes, passed_over)
    elif glob.has_magic(pattern):
        # The root of a glob is its leading part without wildcards.
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = _matches(pattern, root, passed_over)
    else:
        raise UserError(f"{source.path}: no such file or folder; correct the data source's path")
    names = sorted(p.relative_to(root).as_posix() for p in found)
    if not names:
        tail = f" (passed over: {counted(passed_over)})" if passed_over else ""
        raise UserError(f"{source.path}: matches no {what}{tail}; correct the data source's path")
    return root, names, passed_over


def counted(passed_over: Counter[str]) -> str:
    """Return the kinds and their counts, such as "broken links (2), special files (1)"."""
    return ", ".join(f"{kind} ({number:,})" for kind, number in sorted(passed_over.items()))


def _walk(root: Path, suffixes: tuple[str, ...], passed_over: Counter[str]) -> Iterator[Path]:
    """Yield the files below `root`; read each folder once, even if several links lead to it."""

    def unreadable(error: OSError) -> None:
        if error.filename == str(root):
            raise error
        passed_over[_UNREADABLE] += 1

    seen, waiting = set(), [root]
    while waiting:  # linked folders are read after all folders that are reachable without links
        start = waiting.pop(0)
        for place, folders, files in os.walk(start, onerror=unreadable, followlinks=False):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                passed_over[_AGAIN] += 1
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            hidden = [name for name in (*folders, *files) if name.startswith(".")]
            passed_over.update([_HIDDEN] * len(hidden))
            links = [n for n in folders if n not in hidden and Path(place, n).is_symlink()]
            waiting += [Path(place, name) for name in sorted(links)]
            folders[:] = sorted(set(folders) - {*hidden, *links})
            for name in sorted(set(files) - set(hidden)):
                path = Path(place, name)
                if not path.is_file():
                    passed_over[_BROKEN if path.is_symlink() else "special files"] += 1
                elif name.endswith(suffixes):
                    yield path
                else:
                    passed_over[_OTHERS] += 1


def _matches(pattern: str, root: Path, passed_over: Counter[str]) -> Iterator[Path]:
    """Yield the files that `pattern` matches, except through a link to a folder above the link."""
    real = functools.cache(os.path.realpath)
    for name in glob.iglob(pattern, recursive=True):
        path = Path(name)
        if not path.is_file():
            passed_over.update([_BROKEN] * (path.is_symlink() and not path.exists()))
            continue
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            passed_over[_HIDDEN] += 1
            continue
        within = list(itertools.takewhile(lambda p: p != root, path.parents))
        around = [real(folder) for folder in (*within, root)]
        if len(set(around)) < len(around):
            passed_over[_LOOP] += 1
        else:
            yield path
