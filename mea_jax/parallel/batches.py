"""Places rows of batches on the devices of a mesh, from one process or several."""

from collections.abc import Mapping

import jax
import numpy as np

from mea_jax.parallel.sharding import batch_sharding


class BatchPlacer:
    """Places batches of one shape on a mesh; each process brings the rows its devices hold.

    Attributes:
      rows: the rows of a batch, in ascending order, that this process reads.
    """

    def __init__(self, mesh: jax.sharding.Mesh, batch_size: int, length: int):
        self._where, self._size = batch_sharding(mesh), batch_size
        self.rows = local_rows(self._where, (batch_size, length))

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays (batch size, ...) from this process's rows of them, in that order."""
        with jax.transfer_guard("allow"):  # which takes this for a slip with several processes
            return {
                name: place_rows(self._where, x, self.rows, self._size) for name, x in batch.items()
            }


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
