"""The end of a run from outside: SIGTERM, which schedulers send some time before they kill.

A run that is asked to stop saves a checkpoint at the next step, on all of its processes, and exits
with `EXIT_STATUS`; the same command goes on from there. That is a bonus: what a run can rely on is
the checkpoint of every so many minutes, since a machine may also vanish without a word.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again


class Preempted(BaseException):
    """The run was asked to stop; its words say where it stands.

    Like KeyboardInterrupt no `Exception`: it may come anywhere, and is no failure of what it
    interrupts.
    """


class StopRequest:
    """Whether this process was asked to stop.

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
            raise Preempted("stopped by SIGTERM; the same command goes on from the last checkpoint")


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
