"""Join the processes of a distributed run, let them agree, and end them together.

On a TPU pod, under Slurm and on other clusters, jax finds the processes of the run. On plain
machines each process is given its number, and process 0 waits at the coordinator's address until
all have connected (rendezvous.py). From then on, the short messages that processes exchange here
go through jax's own coordination service, which runs in process 0.

A process that fails reports its error before it exits, and all others exit with that error instead
of waiting for it in a collective. A process that is killed reports nothing. On CPUs the others may
notice at the next collective; on all platforms, process 0 misses its heartbeat after `LOST_SECONDS`
and ends the run with a message. If process 0 itself is lost, jax aborts the others, immediately or
after jax's own heartbeat timeout (a stack trace, exit status 134).
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed  # as jax's own multihost_utils and orbax do

from mea_jax.config.schema import flatten
from mea_jax.errors import UserError
from mea_jax.parallel import rendezvous

HEARTBEAT_SECONDS = 100  # jax's default, stated here because the documentation promises it
LOST_SECONDS = 60.0  # without a heartbeat until a process counts as lost; less than jax's own
_POLL_SECONDS = 2.0  # between checks for another process's last message
_FAREWELL_SECONDS = 10.0  # that a failing process waits for the others to read its message
_READ_ATTEMPTS = 5  # reads of a key, if the coordination service fails to answer
_AGREE_SECONDS = 600.0  # that the first process waits for the last at a point of agreement
_ENDED = "mea_jax/ended"
_ALIVE = "mea_jax/alive"
AGAIN = "the same command on every host resumes from the last checkpoint"
# In the errors of collectives and the coordination service when another process is gone.
_LOST = re.compile(r"[Gg]loo|coordination service|heartbeat|Connection reset|Socket closed")

_ending = threading.Lock()  # held by the thread that ends this process: no other prints a line
_points = 0  # points of agreement so far: the same number on every process


def is_distributed() -> bool:
    """Return whether this run has several processes; unlike jax.process_count, start no backend."""
    return _client() is not None and jax_distributed.global_state.num_processes > 1


def is_first() -> bool:
    """Return whether this is the process that prints and writes for all."""
    return not is_distributed() or jax_distributed.global_state.process_id == 0


def start(
    *,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    timeout: float = 300.0,
) -> None:
    """Join the other processes of the run; call this before any other use of jax.

    Args:
      coordinator: "host:port" of process 0; None: find the processes through the TPU pod, Slurm
        job or other cluster that this process is part of.
      count: the number of processes, with `coordinator`.
      index: this process's number, 0 to `count` - 1, with `coordinator`.
      timeout: the seconds within which all processes must join. If jax's own start-up takes longer,
        this process prints an error and exits with status 2.

    Raises:
      UserError: if not all processes connect to `coordinator` in time, two have the same number, or
        there is no cluster.
    """
    deadline = time.monotonic() + timeout
    known: dict[str, Any] = {}
    if coordinator is not None:
        assert count is not None
        assert index is not None
        rendezvous.meet(coordinator, count, index, timeout)
        known = {
            "coordinator_address": coordinator,
            "num_processes": count,
            "process_id": index,
            "cluster_detection_method": "deactivate",
        }
    # At its own timeout jax aborts, without a hint on how to fix the problem.
    left = max(deadline - time.monotonic(), 0) + 1
    guard = threading.Timer(left, _late, (timeout,))
    guard.daemon = True
    guard.start()
    try:
        jax.distributed.initialize(
            initialization_timeout=int(left) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            **known,
        )
    except (ValueError, RuntimeError, OSError) as error:
        if coordinator is not None:
            raise UserError(
                f"--coordinator {coordinator}: the processes cannot join there ({error}): check "
                "that every host can reach this address, or choose another port"
            ) from error
        raise UserError(
            f"--distributed found no TPU pod, Slurm job or other cluster here ({error}): give "
            "--coordinator HOST:PORT, --num_processes and --process_id instead"
        ) from error
    finally:
        guard.cancel()
    if is_distributed():
        _watcher.start()


def _late(timeout: float) -> None:
    state = jax_distributed.global_state
    sys.stderr.write(
        f"error: the processes of this job did not all start within {timeout:g} s: this is process "
        f"{state.process_id} of {state.num_processes}, process 0 is expected at "
        f"{state.coordinator_address}; check why the others do not run, or raise "
        "--startup_timeout\n"
    )
    sys.stderr.flush()
    os._exit(2)


# -- agreement ------------------------------------------------------------------------------


def _client() -> Any:
    return jax_distributed.global_state.client


def _point() -> str:
    global _points
    _points += 1
    return f"mea_jax/{_points}"


def raise_on_all(problem: str | None, timeout: float = _AGREE_SECONDS) -> None:
    """Raise the same `UserError` on every process if any process has a `problem`."""
    if (found := first_problem(problem, timeout)) is not None:
        raise UserError(found)


def first_problem(problem: str | None, timeout: float = _AGREE_SECONDS) -> str | None:
    """Return one process's `problem`, the same on every process; None if no process has one."""
    if not is_distributed():
        return problem
    where, client = _point(), _client()
    client.key_value_set(f"{where}/{jax_distributed.global_state.process_id}", problem or "")
    _wait(where, timeout)
    return next((found for _, found in sorted(client.key_value_dir_get(where)) if found), None)


def broadcast(value: str, timeout: float = _AGREE_SECONDS) -> str:
    """Return the `value` of process 0, on every process."""
    if not is_distributed():
        return value
    where, client = _point(), _client()
    if is_first():
        client.key_value_set(where, value)
    _wait(where, timeout)
    return client.blocking_key_value_get(where, 60_000)


def _wait(where: str, timeout: float) -> None:
    """Wait until every process is here. Raise `UserError` after `timeout` seconds."""
    try:
        _client().wait_at_barrier(where, int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise UserError(
            f"not all {jax_distributed.global_state.num_processes} processes reached the same "
            f"point within {timeout:g} s: check the log of each"
        ) from error


def check_same(config: dict[str, Any], timeout: float) -> None:
    """Raise `UserError` on all processes unless all have the same `config` tree and jax version."""
    mine = flatten(config | {"versions": {"jax": jax.__version__, "jaxlib": _jaxlib_version()}})
    first = json.loads(broadcast(json.dumps(mine), timeout))
    lines = [
        f"{key} is {mine.get(key)!r}, not {first.get(key)!r}"
        for key in sorted(mine.keys() | first.keys())
        if json.dumps(mine.get(key)) != json.dumps(first.get(key))
    ]
    raise_on_all(
        f"{name()} differs from process 0: {'; '.join(lines)}: start all processes with the same "
        "config and versions"
        if lines
        else None
    )


def _jaxlib_version() -> str:
    import jaxlib

    return jaxlib.__version__


def name() -> str:
    """Return this process's number and host, for messages to others."""
    return f"process {jax_distributed.global_state.process_id} on {socket.gethostname()}"


class KeyValueStore:
    """A store of strings that processes share by key, without waiting for each other."""

    def __init__(self, name: str) -> None:
        self.name = f"{_point()}/{name}"

    def set(self, key: str, words: str) -> None:
        _client().key_value_set(f"{self.name}/{key}", words, allow_overwrite=True)

    def get(self, key: str) -> str | None:
        """Return the value of `key`, or None if no process has set it.

        Return None, too, if the service does not answer within `_READ_ATTEMPTS` attempts.
        """
        for _ in range(_READ_ATTEMPTS):
            try:
                return _client().key_value_try_get(f"{self.name}/{key}")
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" in str(error):
                    return None
                time.sleep(0.2)
        return None


def _read_key(key: str) -> str | None:
    try:
        return _client().key_value_try_get(key)
    except Exception:  # not set, or the service is gone: jax's own threads report that
        return None


# -- the end --------------------------------------------------------------------------------


class Heartbeats:
    """The time of each process's last heartbeat, by this process's clock."""

    def __init__(self, count: int, now: float) -> None:
        self._heard: dict[int, tuple[str, float]] = dict.fromkeys(range(count), ("", now))

    def note(self, signs: dict[int, str], now: float) -> None:
        """Record what processes wrote; only a value that has changed counts as a heartbeat."""
        for index, sign in signs.items():
            if self._heard[index][0] != sign:
                self._heard[index] = (sign, now)

    def describe_lost(self, now: float) -> str | None:
        """Return a message about a process that was silent for `LOST_SECONDS`, or None."""
        for index, (sign, heard) in self._heard.items():
            if now - heard > LOST_SECONDS:
                where = f" on {sign.partition(' ')[2]}" if sign else ""
                return f"process {index}{where} has sent no heartbeat for {now - heard:.0f} s"
        return None


def _watch() -> None:
    """Send heartbeats, and end this process when another has ended or is lost.

    Only process 0 checks for silent processes, and its own end then ends the others. One process
    that reads all heartbeats is cheap; every process reading all of them would not be.
    """
    state = jax_distributed.global_state
    signs = Heartbeats(state.num_processes, time.monotonic())
    beat = 0
    while not _finished.is_set():
        if (words := _read_key(_ENDED)) is not None:
            said = json.loads(words)
            end(said["status"], f"error: {said['who']} ended: {said['line']}")
        beat += 1
        with contextlib.suppress(Exception):  # the service is gone: jax's own threads report that
            mine = f"{_ALIVE}/{state.process_id}"
            _client().key_value_set(mine, f"{beat} {socket.gethostname()}", allow_overwrite=True)
            if is_first():
                found = _client().key_value_dir_get(_ALIVE)
                signs.note({int(k.rpartition("/")[2]): v for k, v in found}, time.monotonic())
                if (lost := signs.describe_lost(time.monotonic())) is not None:
                    end(1, f"error: {lost}: check its log and its machine's log; {AGAIN}")
        _finished.wait(_POLL_SECONDS)


_finished = threading.Event()  # ends the watcher
_watcher = threading.Thread(target=_watch, name="watcher", daemon=True)


def end(status: int, line: str, by_signal: bool = False) -> NoReturn:
    """Print `line` on stderr and exit with `status`; in a distributed run, end all processes.

    Set `by_signal` if a signal's exception has interrupted the program. XLA may then still be
    compiling in its own thread, which crashes when Python shuts down and removes the devices. So
    the process ends without that shutdown.
    """
    if _client() is None and threading.current_thread() is threading.main_thread():
        sys.stderr.write(f"{line}\n")
        if by_signal:
            leave(status)
        sys.exit(status)
    _ending.acquire()  # never released: a second thread waits here until the process ends
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    if is_distributed():
        last = " ".join(line.strip().split("\n")[-1].split()).removeprefix("error: ")
        words = {"status": status, "who": name(), "line": last}
        with contextlib.suppress(Exception):  # another process was first, or the service is gone
            _client().key_value_set(_ENDED, json.dumps(words))
        with contextlib.suppress(Exception):  # some processes may not arrive
            _client().wait_at_barrier("mea_jax/farewell", int(_FAREWELL_SECONDS * 1000))
        if is_first():  # it hosts the service: jax aborts the processes that outlive it
            time.sleep(1.0)
    leave(status)  # not sys.exit: there jax waits for processes that wait for this one


def leave(status: int) -> NoReturn:
    """Flush stdout and stderr, and exit with `status` without Python's shutdown."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a full disk, a closed pipe
            stream.flush()
    os._exit(status)


def lost_another(error: BaseException) -> bool:
    """Return whether `error` is one that jax raises when another process is lost."""
    return is_distributed() and _LOST.search(str(error)) is not None


def finish() -> None:
    """Wait until every process is done and stop watching them; if one fails first, end them all."""
    if is_distributed():
        try:
            _client().wait_at_barrier("mea_jax/finish", int(_AGREE_SECONDS * 1000))
        except Exception:
            end(
                1,
                "error: the run is done here, but another process did not finish: check the log of "
                "each",
            )
        # Python ends threads that wait for its lock at shutdown, which aborts the process if the
        # thread is inside of jax's C++ client ("FATAL: exception not rethrown").
        _finished.set()
        _watcher.join(_FAREWELL_SECONDS)
