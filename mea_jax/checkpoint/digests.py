"""Write and verify the checksums of a folder.

`write_checksums` writes `digests.json` into a folder: the size and SHA-256 of every file below it.
`damage` compares. It detects a single changed bit, a truncated, missing or additional file, and
links, which could point outside the folder.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FILE = "digests.json"
_THREADS = 2  # hashing releases Python's lock; more threads would only take cores from training


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files below `folder`, and sync all of it to disk.

    Raise `OSError` if a write fails.
    """
    names = sorted(set(_names(folder)) - {FILE})
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda name: _digest(folder / name, True), names))
    files = {n: {"size": size, "sha256": d} for n, (size, d) in zip(names, found, strict=True)}
    path = folder / FILE
    body = json.dumps({"files": files}, sort_keys=True)
    with path.open("w") as file:
        # The list's own checksum comes first, so that a flipped bit in the list is detected.
        file.write(f"{hashlib.sha256(body.encode()).hexdigest()} {body}\n")
        file.flush()
        os.fsync(file.fileno())
    for directory in {folder, *(folder / above for n in names for above in Path(n).parents)}:
        sync_folder(directory)


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return a short description of what has changed in `folder` since `write_checksums`, or None.

    Read every `parts`-th file from the `part`-th on, so that several processes can share the
    reading. Each of them checks the names of all files.
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
    """Return a message about an entry below `folder` that is neither file nor folder, or None.

    Raise `OSError` if `folder` cannot be read.
    """
    try:
        for _ in _names(folder):
            pass
    except ValueError as error:
        return str(error)
    return None


def sync_folder(folder: Path) -> None:
    """Sync the names in `folder` to disk; do nothing if the file system cannot."""
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
    """Yield the relative names of the files below `folder`. Raise `ValueError` at a link."""
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
