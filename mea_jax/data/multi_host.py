"""Preparation of a run's data when several processes share the run.

The first process prepares while the others wait; then each of them finds the result. Where the
cache folder is not one that all hosts share, each host's processes make their own (one of them,
while the others of that host wait for its lock), which must come out the same.
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

STALL_SECONDS = 1800.0  # without progress of the first process until the others give up
_REPORT_SECONDS = 10.0  # between two reports of its progress
_HOW_FAR, _DONE = "how far", "done"
_WEEK = 7 * 24 * 3600.0  # hosts that make data of their own take as long as they take


def prepare_together(
    config: DataConfig, vocab_size: int | None, log: Callable[[str], Any]
) -> Prepared:
    """As `prepare`, on every process of the run; `log` takes the first one's lines.

    Raises:
      UserError: as `prepare`; the first process has made no progress for half an hour; a process
        has other data than the first.
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
    processes.agree(
        None
        if prepared.digest == digest
        else f"{processes.name()} has made other data than process 0, in {prepared.directory}: "
        "the files of config.data.sources or the tokenizer differ between the hosts; copy them "
        "anew, or put them and --config.data.cache_dir where all hosts share them"
    )
    return prepared


@contextlib.contextmanager
def _reports(tell: Callable[[str], Any], root: Path) -> Iterator[Callable[[int], Any]]:
    """Tells, now and then, something that changes as the preparation goes on.

    That is the bytes read so far, counted by the function yielded, and the bytes written.
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
    """Until `look` finds that the first process is done.

    Raises `UserError` when what it tells has not changed for `stall` seconds. That process's
    failure, and its death, end this one from elsewhere: see `distributed`.
    """
    last, since, pause = None, time.monotonic(), 0.05
    while (now := look()) != _DONE:
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > stall:
            raise UserError(
                f"process 0 prepares the data and has neither read nor written anything for "
                f"{stall / 60:.0f} minutes: see its log and the disk; or prepare them before, "
                "with python -m mea_jax.data.prepare"
            )
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
