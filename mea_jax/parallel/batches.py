"""Place the rows of batches on the devices of a mesh, from one process or several."""

from collections.abc import Mapping

import jax
import numpy as np

from mea_jax.parallel.sharding import batch_sharding


class BatchPlacer:
    """A callable that places batches of one shape on a mesh.

    Each process supplies the rows that its devices hold.

    Attributes:
      rows: the rows of a batch that this process reads, in ascending order.
    """

    def __init__(self, mesh: jax.sharding.Mesh, batch_size: int, length: int):
        self._where, self._size = batch_sharding(mesh), batch_size
        self.rows = local_rows(self._where, (batch_size, length))

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Return global arrays (batch size, ...) of which `batch` is this process's `rows`."""
        # With several processes the guard would mistake this for an accidental transfer.
        with jax.transfer_guard("allow"):
            return {
                name: place_rows(self._where, x, self.rows, self._size) for name, x in batch.items()
            }


def local_rows(where: jax.sharding.Sharding, shape: tuple[int, int]) -> list[int]:
    """Return the rows of a batch of `shape` that this process's devices hold, ascending.

    The sharding `where` decides: with tensor parallelism across processes, for example, each
    process needs every row of its group.
    """
    indices = where.addressable_devices_indices_map(shape).values()
    return sorted({row for index in indices if index for row in range(shape[0])[index[0]]})


def place_rows(
    where: jax.sharding.Sharding, x: np.ndarray, rows: list[int], size: int
) -> jax.Array:
    """Return the global array of `size` rows; `x` contains this process's `rows`, in that order."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # called for this process's devices only
        wanted = range(size)[index[0]]
        start = rows.index(wanted[0])
        return x[(slice(start, start + len(wanted)), *index[1:])]

    return jax.make_array_from_callback((size, *x.shape[1:]), where, part)
