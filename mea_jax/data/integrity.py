"""The folder of prepared data: where it is, and that it is whole.

A preparation holds the lock of what it makes. Beside the windows, whose files carry checksums of
their own, it writes the checksums of all other files: a damaged count, tokenizer or description of
the windows is found before anything is trained on it.
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

from mea_jax.data.bad_input import OPTION, detail
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
    """Raises `UserError` if a file of `write_checksums` is not as it was.

    Data prepared before there were checksums have none, and pass.
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
            raise damaged(path, directory, "not as it was written")


@contextlib.contextmanager
def reading(path: Path, directory: Path) -> Iterator[None]:
    """Whatever is raised in reading `path`, a file of the prepared data in `directory`.

    It becomes a `UserError` that says so: such a file is ours, and only damage makes it malformed.
    """
    try:
        yield
    except UserError as error:
        raise damaged(path, directory, error) from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise damaged(path, directory, f"cannot be read ({detail(reason)})") from error


def damaged(path: Path, directory: Path, reason: object, skippable: bool = False) -> UserError:
    """The error to raise at a damaged file of the prepared data in `directory`.

    `skippable`: whether `bad_input` "skip" would let the run go on.
    """
    return UserError(
        f"{path}: {reason}; remove the folder {directory}, and the next run prepares it anew"
        + (f"; or leave such windows out with {OPTION}" if skippable else "")
    )


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@contextlib.contextmanager
def lock(path: Path, log: Callable[[str], Any]) -> Iterator[None]:
    """Holds a lock that no other process of this machine holds, by the file `path`.

    Where the file system has no locks this does nothing: then two do the same work, each apart.
    The lock goes with its holder, however that ends. `log` is told when there is one to wait for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as file:
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log(f"another process prepares these data in {path.parent}: waiting for it")
                    fcntl.flock(file, fcntl.LOCK_EX)
                mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:  # its holder before has removed it: no one else would find it
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
    """Disk full, no permission and their like become a `UserError` that names the folder."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, RuntimeError):
            # ArrayRecord reports a failed write so, with the system's words in a longer text.
            words = [os.strerror(code) for code in _WRITE_ERRORS]
            reason = next((word for word in words if word in reason), "")
            if not reason:
                raise
        raise UserError(
            f"cache folder {root}: {reason}; choose another with "
            "--config.data.cache_dir or the environment variable MEA_JAX_CACHE"
        ) from error
