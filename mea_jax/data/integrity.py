"""The folder of prepared data: its lock and its checksums.

A preparation holds a lock on the folder that it makes. The files of the windows contain their own
checksums. The preparation writes checksums of all other files, so that damaged counts, tokenizers
and descriptions of the windows are found before training starts.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mea_jax.data.bad_input import OPTION, first_line
from mea_jax.errors import UserError

_CHECKSUMS = "checksums.json"
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def write_checksums(directory: Path, *more: tuple[str, bytes]) -> None:
    """Write checksums of the files below `directory`, except windows, and of `more` contents."""
    contents = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and ".array_record" not in path.name
    }
    sums = {name: _checksum(content) for name, content in [*contents.items(), *more]}
    (directory / _CHECKSUMS).write_text(json.dumps(sums, indent=1))


def verify(directory: Path) -> None:
    """Raise `UserError` if a file differs from its checksum of `write_checksums`.

    Data prepared by versions without checksums pass.
    """
    path = directory / _CHECKSUMS
    if not path.exists():
        return
    with reading(path, directory):
        sums = dict(json.loads(path.read_bytes()))
    for name, expected in sums.items():
        path = directory / name
        with reading(path, directory):
            content = path.read_bytes()
        if _checksum(content) != expected:
            raise damaged(path, directory, "does not match its checksum")


@contextlib.contextmanager
def reading(path: Path, directory: Path) -> Iterator[None]:
    """Turn every exception while reading `path` into the `UserError` of `damaged`.

    The file is part of the prepared data in `directory`. We wrote it, so it is malformed only if it
    was damaged.
    """
    try:
        yield
    except UserError as error:
        raise damaged(path, directory, error) from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise damaged(path, directory, f"cannot be read ({first_line(reason)})") from error


def damaged(path: Path, directory: Path, reason: object, skippable: bool = False) -> UserError:
    """Return the error to raise for a damaged file of the prepared data in `directory`.

    `skippable` says whether the run could continue with `bad_input` "skip".
    """
    return UserError(
        f"{path}: {reason}; remove the folder {directory}, and the next run prepares it again"
        + (f"; or leave such windows out with {OPTION}" if skippable else "")
    )


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@contextlib.contextmanager
def lock(path: Path, log: Callable[[str], Any]) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` among the processes of this machine.

    If another process holds the lock, log that and wait. The lock is released when its holder ends,
    even if it is killed. On a file system without locks this does nothing: two processes then do
    the same work separately.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as file:
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log(f"another process is preparing this data in {path.parent}: waiting for it")
                    fcntl.flock(file, fcntl.LOCK_EX)
                mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:  # the last holder removed the file: others cannot see it
                mine = False
            except OSError:
                mine = True
            if mine:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


@contextlib.contextmanager
def write_errors(root: Path) -> Iterator[None]:
    """Turn errors of writing, such as a full disk, into a `UserError` that names the folder."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, RuntimeError):
            # ArrayRecord raises it for a failed write, with the system's message in a longer text.
            words = [os.strerror(code) for code in _WRITE_ERRORS]
            reason = next((word for word in words if word in reason), "")
            if not reason:
                raise
        raise UserError(
            f"cache folder {root}: {reason}; choose another with "
            "--config.data.cache_dir or the environment variable MEA_JAX_CACHE"
        ) from error
