"""Places rows of batches on the devices of a mesh, from one process or several."""

import jax
import numpy as np


def local_rows(where: jax.sharding.Sharding, shape: tuple[int, int]) -> list[int]:
    """The rows of a batch of `shape`, laid out as `where`, that this process's devices hold.

    Which these are is the mesh's affair: with tensor parallelism over processes, for one, each
    needs every row of its group.
    """
    indices = where.addressable_devices_indices_map(shape).values()
    return sorted({row for index in indices if index for row in range(shape[0])[index[0]]})


def place_rows(
    where: jax.sharding.Sharding, x: np.ndarray, rows: list[int], size: int
) -> jax.Array:
    """The global array of `size` rows, of which this process has `rows`, as `x` in that order."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # of a device of this process
        wanted = range(size)[index[0]]
        start = rows.index(wanted[0])
        return x[(slice(start, start + len(wanted)), *index[1:])]

    return jax.make_array_from_callback((size, *x.shape[1:]), where, part)
