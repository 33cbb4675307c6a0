"""A folder's digests: what was written is what will be read, and nothing outside is.

`seal` writes `digests.json` into a folder: size and SHA-256 of every file below it. `damage`
compares. A folder that was changed in a single bit, cut short, that lacks a file or has one more,
is found out; so is one whose files are links, which could lead anywhere.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FILE = "digests.json"
_THREADS = 2  # hashing leaves Python's lock; more would only take cores from training


def seal(folder: Path) -> None:
    """Writes the digests of all files below `folder`, and has the disk take everything.

    Raises `OSError` when the disk refuses.
    """
    names = sorted(set(_names(folder)) - {FILE})
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda name: _digest(folder / name, True), names))
    files = {n: {"size": size, "sha256": d} for n, (size, d) in zip(names, found, strict=True)}
    path = folder / FILE
    body = json.dumps({"files": files}, sort_keys=True)
    with path.open("w") as file:
        # Its own digest comes first: a flipped bit in the list must not pass as another list.
        file.write(f"{hashlib.sha256(body.encode()).hexdigest()} {body}\n")
        file.flush()
        os.fsync(file.fileno())
    for directory in {folder, *(folder / above for n in names for above in Path(n).parents)}:
        sync_folder(directory)


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return what has changed in `folder` since it was sealed, in a few words, or None.

    Reads every `parts`-th of its files from the `part`-th on, so that several processes may share
    the reading; what can be seen without reading, each of them sees.
    """
    try:
        text = (folder / FILE).read_text()
        digest, _, body = text.rstrip("\n").partition(" ")
        if digest != hashlib.sha256(body.encode()).hexdigest() or not text.endswith("\n"):
            return f"{FILE} is damaged"
        files = {name: (entry["size"], entry["sha256"]) for name, entry in _entries(body)}
        names = set(_names(folder)) - {FILE}
    except FileNotFoundError:
        return f"{FILE} is missing"
    except UnicodeDecodeError:
        return f"{FILE} is damaged"
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{FILE} is malformed"
    except (OSError, ValueError) as error:
        return f"{getattr(error, 'strerror', None) or error}"
    if missing := sorted(files.keys() - names):
        return f"{missing[0]} is missing"
    if surplus := sorted(names - files.keys()):
        return f"{surplus[0]} does not belong to it"
    mine = sorted(files)[part::parts]
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda name: _digest(folder / name, False), mine)
            for name, now in zip(mine, found, strict=True):
                (size, digest), wanted = now, files[name]
                if size != wanted[0]:
                    return f"{name} has {size} bytes instead of {wanted[0]}"
                if digest != wanted[1]:
                    return f"{name} is damaged"
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read: {error.strerror}"
    return None


def links(folder: Path) -> str | None:
    """The first entry below `folder` that is neither a plain file nor a folder, or None.

    Raises `OSError` where `folder` cannot be read.
    """
    try:
        for _ in _names(folder):
            pass
    except ValueError as error:
        return str(error)
    return None


def sync_folder(folder: Path) -> None:
    """Has the disk take the names in `folder`; where it has no such thing, does nothing."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some mounted buckets
        pass
    finally:
        os.close(descriptor)


def _names(folder: Path) -> Iterator[str]:
    """Relative names of the files below `folder`. Raises `ValueError` at anything else."""
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = f"{prefix}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{name}/")
                elif entry.is_file(follow_symlinks=False):
                    yield name
                else:
                    raise ValueError(f"{name} is a link or a device, not a file")


def _entries(body: str) -> Iterable[tuple[str, Any]]:
    return json.loads(body)["files"].items()


def _digest(path: Path, sync: bool) -> tuple[int, str]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
