"""Lock a run directory, so that a second run in it stops with an error.

The lock is the system's (flock) on `<workdir>/.lock`; it is released when its process ends, in any
way. Some file systems (mounted buckets) have no locks, or have them within one host only.
So each run also writes its identity into the file, and checks before every checkpoint that it is
still there. If not, the first of the two runs stops before it mixes its checkpoints with the
other's.
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
        """Raise `UserError` if another process has taken over the directory."""
        try:
            now = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            now = None
        except OSError:
            return  # an error of the file system is not a takeover
        if now != self.words:
            raise UserError(
                f"{_holder(now)} has taken over the run directory {self.path.parent}, and resumes "
                "from its last checkpoint: this process stops; give each run its own --workdir"
            )


@contextlib.contextmanager
def hold(workdir: Path, log: Callable[[str], Any]) -> Iterator[Lock]:
    """Hold the lock of `workdir` within the block; if the file system has none, report it to `log`.

    Raise `UserError` if another process holds it, or the folder cannot be written.
    """
    path = workdir / FILE
    words = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "token": uuid.uuid4().hex,
    }
    try:
        file = path.open("ab+", buffering=0)  # not "w": the holder's identity must stay
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; make it writable, or choose another "
            "--workdir"
        ) from error
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
            log(f"{workdir} is on a file system without locks: do not start a second run in it")
        try:
            file.seek(0)
            file.truncate()
            file.write(json.dumps(words).encode())
            os.fsync(file.fileno())  # some mounted buckets show a file to other hosts only then
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}; make it writable, or choose another "
                "--workdir"
            ) from error
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
