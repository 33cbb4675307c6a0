"""Long calls that show their progress and that Ctrl-C can interrupt.

Python handles a signal only after a call into a library has returned. `call` runs the library in a
separate thread, so that the waiting thread can be interrupted.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import tqdm
from absl import logging

T = TypeVar("T")
_REFRESH_SECONDS = 0.5
_GRACE_SECONDS = 1.0  # for an abandoned call to end


class Abandoned(Exception):
    """The error in a call that reads more items after it was abandoned."""


def call(function: Callable[..., T], *args: Any, bar: tqdm.tqdm | None = None) -> T:
    """Return `function(*args)`, computed in another thread, or raise what it raises.

    If this thread is interrupted by Ctrl-C or SIGTERM, the call is abandoned: its iterator
    arguments raise `Abandoned` at their next item, and its result is lost.

    Args:
      function: the function to call; it must release the GIL, as most libraries do.
      *args: its arguments. Iterators among them are read in the other thread.
      bar: a progress bar whose elapsed time is refreshed during the call.
    """
    outcome: list[Any] = []
    abandoned = threading.Event()
    given = [_until(abandoned, a) if isinstance(a, Iterator) else a for a in args]

    def work() -> None:
        try:
            outcome.extend((function(*given), None))
        except BaseException as error:
            outcome.extend((None, error))

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(_REFRESH_SECONDS)
            if bar is not None:
                bar.refresh()
    except BaseException:
        abandoned.set()
        if thread.is_alive():
            thread.join(_GRACE_SECONDS)
        raise
    result, error = outcome
    if error is not None:
        raise error
    return result


def _until(abandoned: threading.Event, items: Iterable[T]) -> Iterator[T]:
    for item in items:
        if abandoned.is_set():
            raise Abandoned
        yield item


@contextlib.contextmanager
def progress(
    title: str, size: int, on_progress: Callable[[int], Any]
) -> Iterator[tuple[Callable[[int], Any], tqdm.tqdm]]:
    """Show a progress bar over `size` bytes on stderr, if stderr is a terminal.

    Yields:
      A function that advances the bar by a number of bytes and calls `on_progress` with it; the
      bar.
    """

    def advance(count: int) -> None:
        bar.update(count)
        on_progress(count)

    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # TFDS's own bars count examples without a total
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)  # its log does not help the user
    try:
        with tqdm.tqdm(
            total=size, desc=title, unit="B", unit_scale=True, disable=None, leave=False
        ) as bar:
            yield advance, bar
    finally:
        logging.set_verbosity(verbosity)
