"""Lookup of embedding rows, which on a mesh moves the few activations and not the table.

If the table's columns are split like the batch (fsdp), the partitioner by itself would look up the
rows of the entire batch on each device, and on some meshes gather these rows in full.
"""

import jax
import jax.numpy as jnp

from mea_jax.parallel.sharding import shard_count, spec


def _rows(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Return the rows `ids_BT` of a table.

    XLA's CPU compiler has no lookup in bfloat16: it would widen the entire table to float32, which
    takes as long as several decode steps. So rows of a bfloat16 table, which is only served and has
    no gradient, are looked up as integers. The barrier keeps the reinterpretation within the
    lookup: a loop of decode steps would move it in front of the loop, where it is a copy.
    """
    if table_VD.dtype != jnp.bfloat16:
        return jnp.take(table_VD, ids_BT, axis=0)
    table_VD, ids_BT = jax.lax.optimization_barrier((table_VD, ids_BT))
    rows_BTD = jnp.take(jax.lax.bitcast_convert_type(table_VD, jnp.uint16), ids_BT, axis=0)
    return jax.lax.bitcast_convert_type(rows_BTD, jnp.bfloat16)


def lookup(
    table_VD: jax.Array, ids_BT: jax.Array, dtype: jnp.dtype, axes: tuple[str, str]
) -> jax.Array:
    """Return the rows `ids_BT` of a table with logical `axes`: (B, T, D) in `dtype`.

    Rows are looked up before the cast, because the table is far larger than the batch. On a mesh
    each device looks up its columns of the rows that its neighbours along those columns need, and
    one all-to-all exchanges them: B T D numbers, regardless of the size of the table.
    """
    split = shard_count(axes[0]) * shard_count(axes[1]) > 1
    divisible = (
        ids_BT.shape[0] % shard_count("batch") == 0 and ids_BT.shape[1] % shard_count("length") == 0
    )
    if not split or not divisible:  # a single prompt is left to the partitioner
        return _rows(table_VD, ids_BT).astype(dtype)
    rows, columns = spec(axes)  # includes mesh axes of one device, so that `shard_map` tracks them

    def shard(table_VD, ids_BT):
        wanted_BT = jax.lax.all_gather(ids_BT, columns, axis=0, tiled=True)
        if rows is not None:
            # Zeros for tokens whose rows are on other devices, so that the results can be summed.
            # `take` would count negative indices from the end.
            held = table_VD.shape[0]
            wanted_BT = wanted_BT - jax.lax.axis_index(rows) * held
            wanted_BT = jnp.where(wanted_BT < 0, held, wanted_BT)
        x_BTD = jnp.take(table_VD, wanted_BT, axis=0, mode="fill", fill_value=0).astype(dtype)
        x_BTD = jax.lax.all_to_all(x_BTD, columns, split_axis=0, concat_axis=2, tiled=True)
        return x_BTD if rows is None else jax.lax.psum(x_BTD, rows)

    run = jax.shard_map(
        shard,
        in_specs=(spec(axes), spec(("batch", "length"))),
        out_specs=spec(("batch", "length", None)),
    )
    return run(table_VD, ids_BT)
