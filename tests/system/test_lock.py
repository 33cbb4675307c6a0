"""One process per run directory: by flock, or by a record in a file where flock is missing."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from mea_jax.checkpoint import lock
from mea_jax.errors import UserError

HOLD = """
import sys
from pathlib import Path
from mea_jax.checkpoint import lock
from mea_jax.errors import UserError
try:
    with lock.hold(Path(sys.argv[1]), print):
        print("held", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""


def silent(line):
    raise AssertionError(f"expected no message, got: {line}")


@pytest.fixture
def other(tmp_path):
    """Return `other()`, which starts a process that locks `tmp_path`: (process, printed line).

    The line is "held", or the reason why the process does not have the lock.
    """
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def no_locks(monkeypatch):
    """Let flock fail, as on a file system without locks."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def test_a_second_process_is_refused_with_the_holders_words(tmp_path, other):
    """While the lock is held, others are refused and its record stays; then another may hold it."""
    with lock.hold(tmp_path, silent) as held:
        _, said = other()
        assert f"process {os.getpid()} on " in said
        assert f"is training in {tmp_path}: wait for it or stop it" in said
        assert json.loads((tmp_path / lock.FILE).read_text()) == held.words
        held.check()
    process, said = other()
    assert said == "held"
    with (
        pytest.raises(UserError, match=rf"process {process.pid} on .* \(since \d{{4}}-"),
        lock.hold(tmp_path, silent),
    ):
        pass


def test_a_second_holder_in_the_same_process_is_refused(tmp_path):
    refused = pytest.raises(UserError, match=f"process {os.getpid()} on")
    with lock.hold(tmp_path, silent), refused, lock.hold(tmp_path, silent):
        pass


def test_the_lock_goes_with_its_holder(tmp_path, other):
    """After SIGKILL the file and its record remain, but not the lock."""
    process, said = other()
    assert said == "held"
    process.send_signal(signal.SIGKILL)
    process.wait()
    words = json.loads((tmp_path / lock.FILE).read_text())
    assert words["process"] == process.pid
    with lock.hold(tmp_path, silent) as held:
        held.check()
        assert held.words["token"] != words["token"]


def test_words_that_are_cut_or_foreign(tmp_path, other):
    """A lock is held even if its record is incomplete or invalid, as while it is written."""
    with lock.hold(tmp_path, silent):
        for text in ("", "{", "null", '{"process": 3}'):
            (tmp_path / lock.FILE).write_text(text)
            _, said = other()
            assert said.startswith(f"another process is training in {tmp_path}")


def test_a_takeover_is_noticed(tmp_path, monkeypatch, other):
    """Without locks a warning is printed, and the first of two runs stops before it saves."""
    with monkeypatch.context() as patch:
        no_locks(patch)
        said: list[str] = []
        with lock.hold(tmp_path, said.append) as first:
            assert said == [
                f"{tmp_path} is on a file system without locks: do not start a second run in it"
            ]
            first.check()
            with lock.hold(tmp_path, said.append) as second:
                second.check()
                expected = (
                    f"process {os.getpid()} on .* has taken over the run directory "
                    f"{re.escape(str(tmp_path))}, .* this process stops"
                )
                with pytest.raises(UserError, match=expected):
                    first.check()
            with pytest.raises(UserError):  # also after the second has ended
                first.check()
    process, _ = other()  # as on a host whose locks are not visible here
    with pytest.raises(UserError, match=f"^process {process.pid} on "):
        first.check()


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"process": 1}'])
def test_words_that_are_gone_are_a_takeover(tmp_path, text):
    with lock.hold(tmp_path, silent) as held:
        (tmp_path / lock.FILE).unlink()
        if text is not None:
            (tmp_path / lock.FILE).write_text(text)
        with pytest.raises(UserError, match=r"^another process has taken over"):
            held.check()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(UserError, match=r"\.lock cannot be written: Not a directory")
    with refused, lock.hold(tmp_path / "file", silent):
        pass


def test_a_disk_that_is_full(small_disk):
    """A full disk is one line, and the lock is released."""
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    refused = pytest.raises(UserError, match=r"\.lock cannot be written: No space left on device")
    with refused, lock.hold(small_disk, silent):
        pass
    (small_disk / "filler").unlink()
    with lock.hold(small_disk, silent) as held:
        held.check()
