"""Handle SIGTERM, which schedulers send some time before they kill a run.

A run that receives it saves a checkpoint at the next step, on all of its processes, and exits with
`EXIT_STATUS`; the same command resumes from there. This is best effort, since a machine may also
disappear without a signal: a run can rely only on the checkpoint of every so many minutes.
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
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the command again


class Preempted(BaseException):
    """The exception that stops a run; its message states from where the run can resume.

    Like KeyboardInterrupt it is not an `Exception`: it may be raised anywhere, and is not a failure
    of the code that it interrupts.

    Attributes:
      request: the request whose signal raised it, or None.
    """

    request: "StopRequest | None" = None


class StopRequest:
    """A request to stop this process.

    Attributes:
      requested: True once SIGTERM has been received.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record a request within the block: the training loop handles it between steps."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, *_: object) -> None:
        first, self.requested = not self.requested, True
        if first and not self._deferred:
            error = Preempted(
                "stopped by SIGTERM; the same command resumes from the last checkpoint"
            )
            error.request = self
            raise error


@functools.cache  # once per process: each call would wrap the hook again
def resend_ignored() -> None:
    """Send SIGINT and SIGTERM again if Python ignored the exception that their handler raised.

    Python raises the exception wherever the main thread is. In a callback of the garbage collector
    (jax has one) or in `__del__`, Python prints it and continues, so Ctrl-C would have no effect.
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
    """Yield a request that records SIGTERM until the end of the block.

    Call this after jax.distributed.initialize, which installs its own handler. Outside the main
    thread the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(signal.SIGTERM, request._receive)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
