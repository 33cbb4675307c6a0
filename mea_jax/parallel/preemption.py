"""The end of a run from outside: SIGTERM, which schedulers send some time before they kill.

A run that is asked to stop saves a checkpoint at the next step, on all of its processes, and exits
with `EXIT_STATUS`; the same command goes on from there. This is best effort: what a run can rely on
is the checkpoint of every so many minutes, since a machine may also vanish without a word.
"""

import _thread
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

_AGAIN_SECONDS = 0.01  # until an ignored signal is sent again
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again


class Preempted(BaseException):
    """The run was asked to stop; its words say where it stands.

    Like KeyboardInterrupt no `Exception`: it may come anywhere, and is no failure of what it
    interrupts.

    Attributes:
      request: the request whose signal raised it, or None.
    """

    request: "StopRequest | None" = None


class StopRequest:
    """A request to stop this process.

    Attributes:
      requested: SIGTERM has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In here a request is only noted: the loop sees to it between two steps."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, *_: object) -> None:
        first, self.requested = not self.requested, True
        if first and not self._deferred:
            error = Preempted(
                "stopped by SIGTERM; the same command goes on from the last checkpoint"
            )
            error.request = self
            raise error


@functools.cache  # once a process: each call would wrap the hook once more
def resend_ignored() -> None:
    """Send SIGINT and SIGTERM again where Python had to ignore the exception of their handler.

    Python raises it wherever the main thread is. In a callback of the garbage collector, and jax
    has one, or in `__del__`, it prints the exception and goes on, and Ctrl-C would do nothing.
    """
    before = sys.unraisablehook

    def hook(args) -> None:
        error = args.exc_value
        if isinstance(error, Preempted) and error.request is not None:
            error.request.requested = False
            _thread.start_new_thread(_send_soon, (signal.SIGTERM,))
        elif isinstance(error, KeyboardInterrupt):
            _thread.start_new_thread(_send_soon, (signal.SIGINT,))
        else:
            before(args)

    sys.unraisablehook = hook


def _send_soon(number: int) -> None:
    time.sleep(_AGAIN_SECONDS)
    os.kill(os.getpid(), number)


@contextlib.contextmanager
def listen() -> Iterator[StopRequest]:
    """Notes SIGTERM until the end of the block. To be called after jax.distributed.initialize,
    which has a handler of its own; outside the main thread it never hears anything."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(signal.SIGTERM, request._receive)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
