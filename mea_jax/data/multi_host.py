"""Preparation of the data of a distributed run.

The first process prepares the data while the others wait; then each of them finds the result. If
the hosts do not share the cache folder, each host prepares its own copy: one of its processes does
so while its other processes wait for the lock. All copies must be the same.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mea_jax.config.paths import cache_root
from mea_jax.config.schema import DataConfig
from mea_jax.data.prepare import Prepared, prepare
from mea_jax.errors import UserError
from mea_jax.parallel import processes

STALL_SECONDS = 1800.0  # without progress of the first process before the others give up
_REPORT_SECONDS = 10.0  # between two reports of its progress
_HOW_FAR, _DONE = "how far", "done"
_WEEK = 7 * 24 * 3600.0  # in effect no timeout, for hosts that prepare their own copy


def prepare_together(
    config: DataConfig, vocab_size: int | None, log: Callable[[str], Any]
) -> Prepared:
    """Run `prepare` on every process of the run; the first process prepares before the others.

    Raises:
      UserError: as `prepare`; the first process has made no progress for half an hour; a process
        has different data from the first.
    """
    if not processes.is_distributed():
        return prepare(config, vocab_size, log)
    board = processes.KeyValueStore("preparation")
    if processes.is_first():
        with _reports(functools.partial(board.set, _HOW_FAR), cache_root(config)) as on_progress:
            prepared = prepare(config, vocab_size, log, on_progress=on_progress)
        board.set(_HOW_FAR, _DONE)
    else:
        wait(functools.partial(board.get, _HOW_FAR))
        prepared = prepare(config, vocab_size, log)
    digest = processes.broadcast(prepared.digest, _WEEK)
    processes.raise_on_all(
        None
        if prepared.digest == digest
        else f"{processes.name()} has different data from process 0, in {prepared.directory}: "
        "the files of config.data.sources or the tokenizer differ between the hosts; copy them "
        "again, or put them and --config.data.cache_dir in storage that all hosts share"
    )
    return prepared


@contextlib.contextmanager
def _reports(tell: Callable[[str], Any], root: Path) -> Iterator[Callable[[int], Any]]:
    """Call `tell` every 10 s with a text that changes while the preparation makes progress.

    The text contains the bytes read and the bytes written so far. Yields the function that counts
    the bytes read.
    """
    read, stop = [0], threading.Event()

    def report() -> None:
        while not stop.wait(_REPORT_SECONDS):
            written = 0
            for path in root.glob("*.incomplete-*/**/*"):
                with contextlib.suppress(OSError):  # renamed or removed meanwhile
                    written += path.stat().st_size
            tell(f"{read[0]} {written}")

    def count(size: int) -> None:
        read[0] += size

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


def wait(look: Callable[[], str | None], stall: float = STALL_SECONDS) -> None:
    """Wait until `look` returns that the first process is done.

    If the first process fails or is killed, `parallel.processes` ends this process.

    Raises:
      UserError: the result of `look` has not changed for `stall` seconds.
    """
    last, since, pause = None, time.monotonic(), 0.05
    while (now := look()) != _DONE:
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > stall:
            raise UserError(
                f"process 0 prepares the data and has neither read nor written anything for "
                f"{stall / 60:.0f} minutes: check its log and the disk, or prepare the data before "
                "the run with python -m mea_jax.data.prepare"
            )
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
