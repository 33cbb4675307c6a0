"""Cast arrays to another dtype in pieces, with an error if a number would be lost."""

from collections.abc import Iterator

import numpy as np

from mea_jax.errors import UserError

_AT_ONCE = 1 << 22  # numbers of a tensor that are in memory at the same time


def casts(name: str, array: np.ndarray, dtype: np.dtype) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield slices of the first axis of `array`, each with a contiguous copy of it as `dtype`.

    Raise `UserError`, which names the tensor, if a number is not finite before or after the cast.
    """
    rows = max(_AT_ONCE * len(array) // max(array.size, 1), 1)
    for start in range(0, len(array), rows):
        where = slice(start, start + rows)
        with np.errstate(over="ignore"):
            piece = np.ascontiguousarray(array[where], dtype=dtype)
        if not np.isfinite(piece).all():
            _refuse(name, array[where], dtype)
        yield where, piece


def _refuse(name: str, before: np.ndarray, dtype: np.dtype) -> None:
    if not np.isfinite(before).all():
        raise UserError(
            f"{name} contains numbers that are not finite: the model itself is damaged, use another"
        )
    largest = float(np.abs(before.astype(np.float64)).max())
    other = ": give --dtype float32" if dtype != np.float32 else ""
    raise UserError(
        f"{name} contains numbers up to {largest:.3g}, beyond the range of {dtype}{other}"
    )
