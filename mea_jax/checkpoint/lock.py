"""One run, one run directory: a second process that is started on it refuses.

The lock is the system's own (flock) on `<workdir>/.lock`, which goes with its holder however that
ends. Where a file system has no locks (some mounted buckets), or keeps them within one host, the
words in the file help: each run writes its own, and before every checkpoint sees whether they are
still there. Then the first of two runs stops, before it could mix its checkpoints with the other's.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mea_jax.errors import UserError

FILE = ".lock"


class Lock:
    """The lock of a run directory that this process holds."""

    def __init__(self, path: Path, words: dict[str, Any]):
        self.path, self.words = path, words

    def check(self) -> None:
        """Raises `UserError` when another process has taken the directory over."""
        try:
            now = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            now = None
        except OSError:
            return  # a file system that stumbles is no takeover
        if now != self.words:
            raise UserError(
                f"{_holder(now)} has taken over the run directory {self.path.parent}, and goes on "
                "from its last checkpoint: this process stops; give each run its own --workdir"
            )


@contextlib.contextmanager
def hold(workdir: Path, say: Callable[[str], Any]) -> Iterator[Lock]:
    """Holds the lock of `workdir`; `say` is told where the file system has none.

    Raises `UserError` when another process holds it, or the folder cannot be written.
    """
    path = workdir / FILE
    words = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "token": uuid.uuid4().hex,
    }
    try:
        file = path.open("ab+", buffering=0)  # not "w": its holder's words must stay
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{_holder(_parsed(file.read()))} is training in {workdir}: wait for it or stop "
                "it, or choose another --workdir"
            ) from error
        except OSError:
            say(f"{workdir} lies on a file system without locks: start no second run in it")
        try:
            file.seek(0)
            file.truncate()
            file.write(json.dumps(words).encode())
            os.fsync(file.fileno())  # some mounted buckets show a file to other hosts only then
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        yield Lock(path, words)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _holder(words: Any) -> str:
    try:
        return f"process {words['process']} on {words['host']} (since {words['since']})"
    except (LookupError, TypeError):
        return "another process"
