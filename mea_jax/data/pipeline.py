"""Batches from prepared windows, read with grain.

Training batch i depends only on (seed, i, batch size): its row r is element i * batch_size + r of
one infinite sequence, which mixes the sources by weight and shuffles each source again every epoch.
So a run can resume at any step without reading the data before it, and on any number of processes.
Each process reads only the rows of its own devices.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mea_jax.data import packing
from mea_jax.data.prepare import Prepared
from mea_jax.data.windows import reader, writing
from mea_jax.errors import UserError

Batch = dict[str, np.ndarray]


def train_batches(
    prepared: Prepared,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    threads: int = 1,
    prefetch: int = 8,
    left_out: Sequence[tuple[int, int]] = (),
    skip_bad: bool = False,
) -> Iterator[Batch]:
    """Return an endless iterator over the training batches, starting with step `start_step`.

    Args:
      prepared: the windows.
      seed: the seed of the order of windows.
      batch_size: B, windows in the entire batch, over all processes.
      start_step: the first step, counted from 0; its batch is `batch_number(start_step)`.
      rows: the R rows to read, numbers in 0 .. B - 1; None reads all.
      threads: the number of threads that read ahead; 0 reads in the calling thread.
      prefetch: the number of batches read ahead; 0 reads in the calling thread.
      left_out: batches that are never read, as in `batch_number`.
      skip_bad: whether a window that cannot be read is padding, as in `reader.open_windows`.
        All other windows keep their places.

    Returns:
      An iterator over batches: `inputs`, `targets`, `segment_ids` and `positions` as in
      `packing.fields`, int32 (R, T).

    Raises:
      UserError: no source has a positive weight; while iterating, a window cannot be read.
    """
    numbers = range(batch_size) if rows is None else rows
    windows = _training_sequence(prepared, seed, skip_bad)

    def read(step: int) -> Batch:
        first = batch_number(step, left_out) * batch_size
        return _stack([windows[first + row] for row in numbers])

    return _iterate(read, start_step, sys.maxsize // batch_size, threads, prefetch)


def batch_number(step: int, left_out: Sequence[tuple[int, int]] = ()) -> int:
    """Return the number of the batch of a step, both counted from 0.

    Args:
      step: the step.
      left_out: closed intervals (first, last) of batch numbers, ascending and disjoint.

    Returns:
      The `step`-th of the natural numbers that are in none of the intervals.
    """
    number = step
    for first, last in left_out:
        if number < first:
            break
        number += last - first + 1
    return number


def held_out_batches(
    prepared: Prepared,
    *,
    batch_size: int,
    max_batches: int | None = None,
    rows: Sequence[int] | None = None,
    skip_bad: bool = False,
) -> Iterator[Batch]:
    """Return an iterator over the held-out batches, always the same ones in the same order.

    Args:
      prepared: the windows.
      batch_size: B, windows in the entire batch, over all processes.
      max_batches: the most batches to read, with windows spread evenly over all held-out windows;
        None reads every window.
      rows: as in `train_batches`.
      skip_bad: as in `train_batches`.

    Returns:
      An iterator over batches as in `train_batches`. The last batch is filled up with padding:
      windows whose tokens and segment ids are all 0.

    Raises:
      UserError: a window cannot be read.
    """
    import grain

    sets = [
        reader.open_windows(source.directory, writing.HELD_OUT, prepared.context_length, skip_bad)
        for source in prepared.sources
        if source.held_out_windows
    ]
    total = sum(len(windows) for windows in sets)
    taken = total if max_batches is None else min(total, max_batches * batch_size)
    padding = reader.padding(prepared.context_length)
    if not taken:
        return iter(())
    windows = grain.MapDataset.concatenate([grain.MapDataset.source(s) for s in sets])

    def read(batch: int) -> Batch:
        wanted = range(batch_size) if rows is None else rows
        numbers = [batch * batch_size + row for row in wanted]
        return _stack([windows[n * total // taken] if n < taken else padding for n in numbers])

    return _iterate(read, 0, -(-taken // batch_size), threads=1, prefetch=2)


def _training_sequence(prepared: Prepared, seed: int, skip_bad: bool) -> Any:
    """Return the infinite sequence of training windows, a `grain.MapDataset`."""
    import grain

    parts = [
        # Grain shuffles epoch e with seed + e. The hash keeps seeds s and s + 1 from sharing
        # epochs, and sources of equal length from being shuffled in the same way.
        grain.MapDataset.source(
            reader.open_windows(source.directory, writing.TRAIN, prepared.context_length, skip_bad)
        )
        .shuffle(seed=_hash32(f"{seed}/{index}"))
        .repeat()
        for index, source in enumerate(prepared.sources)
        if source.weight > 0 and source.train_windows
    ]
    weights = [s.weight for s in prepared.sources if s.weight > 0 and s.train_windows]
    if not parts:
        raise UserError("config.data.sources: no source has a positive weight; set one")
    return grain.MapDataset.mix(parts, weights)


def _iterate(
    read: Callable[[int], Batch], start: int, stop: int, threads: int, prefetch: int
) -> Iterator[Batch]:
    """Return an iterator over `read(i)` for start <= i < stop, read ahead by grain."""
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options))


def _stack(windows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Stack stored windows into one batch and compute its fields."""
    tokens = np.stack([window["tokens"] for window in windows])
    return packing.fields(tokens, np.stack([window["segment_ids"] for window in windows]))


def _hash32(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
