"""Random access to the windows that `writing` wrote."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mea_jax.data import bad_input, integrity
from mea_jax.data.windows import writing

Window = dict[str, np.ndarray]


def padding(length: int) -> Window:
    """Return a window of T = `length` positions that belong to no document: zeros."""
    return {
        "tokens": np.zeros(length + 1, np.int32),
        "segment_ids": np.zeros(length, np.int32),
    }


class StoredWindows:
    """The windows of one split in ArrayRecord files; reading an element is thread-safe."""

    def __init__(self, directory: Path, split: str, length: int, skip_bad: bool):
        """Open the files; arguments and errors as in `open_windows`."""
        import tensorflow_datasets as tfds

        self._length, self._skip_bad = length, skip_bad
        self._root = directory.parent
        dataset = writing.dataset_directory(directory)
        with integrity.reading(dataset, self._root):
            stored = tfds.builder_from_directory(dataset)
            self._windows: Sequence[Window] = stored.as_data_source(split)
            info = stored.info.splits[split]
            self._ends = list(itertools.accumulate(info.shard_lengths))
            self._paths = [Path(path) for path in info.filepaths]

    def __len__(self) -> int:
        return len(self._windows)

    def __iter__(self) -> Iterator[Window]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Window:
        """Return a window; if it cannot be read, return padding or raise `UserError`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            window = self._windows[index]
            # ArrayRecord's checksums cover the window but not the description of its type.
            shapes = {name: array.shape for name, array in window.items()}
            expected = {"tokens": (self._length + 1,), "segment_ids": (self._length,)}
            if shapes != expected:
                raise ValueError(f"arrays of shapes {shapes}")
            return window
        # ArrayRecord raises RuntimeError for every fault of a file, at the first use of the file or
        # of its broken part. The decoders raise other exceptions.
        except Exception as error:
            if self._skip_bad:
                return padding(self._length)
            shard = bisect.bisect_right(self._ends, index)
            position = index - (self._ends[shard - 1] if shard else 0)
            reason = f"window {position} cannot be read ({bad_input.first_line(error)})"
            raise integrity.damaged(
                self._paths[shard], self._root, reason, skippable=True
            ) from error


def open_windows(directory: Path, split: str, length: int, skip_bad: bool = False) -> StoredWindows:
    """Open the windows of one split below `directory`.

    Args:
      directory: the output folder of `writing.write`, in the folder of the prepared data.
      split: `writing.TRAIN` or `writing.HELD_OUT`.
      length: T, positions of a window.
      skip_bad: whether a window that cannot be read is padding, all zeros, instead of an error.

    Returns:
      A sequence of dicts: `tokens` int32 (T + 1,) and `segment_ids` int32 (T,), the arguments of
      `packing.fields`.

    Raises:
      UserError: the description of the windows is damaged, regardless of `skip_bad`. Reading a
        damaged element also raises it, unless `skip_bad` is set.
    """
    return StoredWindows(directory, split, length, skip_bad)
