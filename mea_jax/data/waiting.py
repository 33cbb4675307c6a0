"""Long steps of a preparation: what is shown of them, and that Ctrl-C ends them.

A call into a library runs to its end before Python handles a signal. `call` makes it in a thread
of its own, so that the waiting thread can be interrupted.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import tqdm
from absl import logging

T = TypeVar("T")
_REFRESH_SECONDS = 0.5
_GRACE_SECONDS = 1.0  # for a call to notice that nobody waits for it any more


class Abandoned(Exception):
    """Nobody waits for the call that reads these items."""


def call(function: Callable[..., T], *args: Any, bar: tqdm.tqdm | None = None) -> T:
    """Return `function(*args)`, computed in another thread, or raise what it raises.

    If this thread is interrupted, by Ctrl-C or SIGTERM, the call is abandoned: it gets no more
    items from arguments made by `items`, and what it returns is lost.

    Args:
      function: what to call; it must release the interpreter, as most libraries do.
      *args: its arguments. An iterator among them is read by the other thread.
      bar: a progress bar whose elapsed time is to be shown meanwhile.
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
    """Show a bar on stderr over `size` bytes, if that is a terminal.

    Yields:
      A function that advances the bar and calls `on_progress`; the bar.
    """

    def advance(count: int) -> None:
        bar.update(count)
        on_progress(count)

    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # TFDS's own show numbers of examples without an end
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)  # and its log is of no use to the reader
    try:
        with tqdm.tqdm(
            total=size, desc=title, unit="B", unit_scale=True, disable=None, leave=False
        ) as bar:
            yield advance, bar
    finally:
        logging.set_verbosity(verbosity)
