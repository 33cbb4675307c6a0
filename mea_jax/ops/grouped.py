"""Products of rows with the matrix of their group, as in a mixture of experts.

Rows are sorted by group, groups have any size, and each group has its own matrix. Nothing is
computed for a group without rows. One function has two forms:

- on a TPU `jax.lax.ragged_dot`, which the compiler turns into a kernel that visits only the tiles
  of rows that exist;
- elsewhere a loop over blocks of rows, each with the matrix of its group. XLA's own lowering of
  `ragged_dot` for other devices multiplies every row by every matrix and masks the rest.

Letters: S rows, E groups (experts), D and F the two sides of a matrix.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mea_jax.ops.backend import Backend

Array = jax.Array
RaggedDims = jax.lax.RaggedDotDimensionNumbers
# A block is at most 1/16 of a group of mean size, which limits the FLOPs of partly filled blocks.
_SHARE = 16
_SMALLEST, _LARGEST = 16, 256  # rows of a block: with fewer, reading matrices takes most time


class Blocks(NamedTuple):
    """The group and the rows of each block; the unused blocks at the end have no rows."""

    group_N: Array
    start_N: Array  # the first row
    stop_N: Array  # one past the last row


def block_size(rows: int, groups: int) -> int:
    """Return the number of rows of a block: a power of two, or all rows if they are fewer."""
    size = _SMALLEST
    while 2 * size <= min(rows // (_SHARE * groups), _LARGEST):
        size *= 2
    return max(min(size, rows), 1)


def block_count(rows: int, groups: int, size: int) -> int:
    """Return a number of blocks of `size` rows that suffices for any division into groups."""
    return min(rows, rows // size + groups)


def blocks(sizes_E: Array, rows: int, size: int) -> Blocks:
    """Divide groups into blocks of up to `size` rows.

    `sizes_E`, int32 (E,), contains the groups' numbers of rows, which add up to `rows` or fewer.
    """
    groups = sizes_E.shape[0]
    last_row_E = jnp.cumsum(sizes_E)
    count_E = -(-sizes_E // size)
    last_block_E = jnp.cumsum(count_E)
    number_N = jnp.arange(block_count(rows, groups, size))
    group_N = jnp.sum(last_block_E[None] <= number_N[:, None], axis=1)
    group_N = jnp.minimum(group_N, groups - 1)
    within_N = number_N - (last_block_E - count_E)[group_N]
    start_N = (last_row_E - sizes_E)[group_N] + within_N * size
    stop_N = jnp.minimum(start_N + size, last_row_E[group_N])
    return Blocks(group_N, start_N, stop_N)


def _over_blocks(sizes_E: Array, rows: int, body: Callable[..., Array], out: Array) -> Array:
    """Apply `out = body(out, group, place, mask)` for every block and return `out`.

    A call handles the rows from `place` to `place` + size. The mask (size, 1) is True for the rows
    that belong to the block.
    """
    groups = sizes_E.shape[0]
    size = block_size(rows, groups)
    found = blocks(sizes_E, rows, size)

    def one(i, out):
        start, stop = found.start_N[i], found.stop_N[i]
        # Near the end a block begins earlier, and its mask excludes the rows of its neighbour.
        place = jnp.clip(start, 0, rows - size)
        row_b1 = place + jnp.arange(size)[:, None]
        return body(out, found.group_N[i], place, (start <= row_b1) & (row_b1 < stop))

    # The largest possible number of rounds: a constant, which a compiler can count.
    return jax.lax.fori_loop(0, block_count(rows, groups, size), one, out)


def _rows_at(x: Array, place: Array, mask_b1: Array) -> Array:
    x_bD = jax.lax.dynamic_slice_in_dim(x, place, mask_b1.shape[0])
    return jnp.where(mask_b1, x_bD, jnp.zeros((), x.dtype))


def _put_rows(out: Array, y_bF: Array, place: Array, mask_b1: Array) -> Array:
    old_bF = jax.lax.dynamic_slice_in_dim(out, place, mask_b1.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mask_b1, y_bF, old_bF), place, 0)


def looped(products: Backend, transposed: bool, x_SD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    """Multiply row s by the matrix of its group, or by its transpose if `transposed`; float32.

    Rows that belong to no group are zero. `x` and `w` have the products' dtype.
    """
    multiply = products.matmul_transposed if transposed else products.matmul

    def body(out_SF, group, place, mask_b1):
        y_bF = multiply(_rows_at(x_SD, place, mask_b1), w_EDF[group])
        return _put_rows(out_SF, y_bF, place, mask_b1)

    width = w_EDF.shape[1 if transposed else 2]
    start = jnp.zeros((x_SD.shape[0], width), jnp.float32)
    return _over_blocks(sizes_E, x_SD.shape[0], body, start)


def looped_weights(products: Backend, x_SD: Array, g_SF: Array, sizes_E: Array) -> Array:
    """Sum x^T g over the rows of each group: (E, D, F), float32."""

    def body(out_EDF, group, place, mask_b1):
        x_bD, g_bF = (_rows_at(y, place, mask_b1) for y in (x_SD, g_SF))
        return out_EDF.at[group].add(products.weight_gradient(x_bD, g_bF))

    start = jnp.zeros((sizes_E.shape[0], x_SD.shape[1], g_SF.shape[1]), jnp.float32)
    return _over_blocks(sizes_E, x_SD.shape[0], body, start)


def _ragged(backend: Backend, dims: RaggedDims, a: Array, b: Array, sizes_E: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if backend.dtype == jnp.float32 else None
    return jax.lax.ragged_dot_general(
        a, b, sizes_E, dims, precision=precision, preferred_element_type=jnp.float32
    )


def ragged(products: Backend, transposed: bool, x_SD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    """Compute `looped` with `jax.lax.ragged_dot_general`."""
    dims = RaggedDims((((1,), (2 if transposed else 1,)), ((), ())), [0], [0])
    y_SF = _ragged(products, dims, x_SD, w_EDF, sizes_E)
    # The kernel does not write the rows that it does not visit.
    member_S1 = jnp.arange(x_SD.shape[0])[:, None] < jnp.sum(sizes_E)
    return jnp.where(member_S1, y_SF, 0.0)


def ragged_weights(products: Backend, x_SD: Array, g_SF: Array, sizes_E: Array) -> Array:
    """Compute `looped_weights` with `jax.lax.ragged_dot_general`."""
    dims = RaggedDims((((0,), (0,)), ((), ())), [0], [])
    return _ragged(products, dims, x_SD, g_SF, sizes_E)


def _product(backend, transposed, x_SD, w_EDF, sizes_E) -> Array:
    return jax.lax.platform_dependent(
        *(x_SD.astype(backend.dtype), w_EDF.astype(backend.dtype), sizes_E),
        tpu=functools.partial(ragged, backend, transposed),
        default=functools.partial(looped, backend, transposed),
    ).astype(backend.activation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(x_SD: Array, w_EDF: Array, sizes_E: Array, backend: Backend) -> Array:
    """Multiply row s of `x` by the matrix of its group: (S, F) in the backend's activation dtype.

    `sizes_E`, int32: the first sizes_E[0] rows belong to group 0, and so on. Rows past their sum
    are zero, and so are their gradients. Inputs are rounded to the backend's dtype; sums are
    float32.
    """
    return _product(backend, False, x_SD, w_EDF, sizes_E)


def _forward(x_SD, w_EDF, sizes_E, backend):
    y_SF = _product(backend, False, x_SD, w_EDF, sizes_E)
    return y_SF, (x_SD, w_EDF, sizes_E)


def _backward(backend, saved, g_SF):
    x_SD, w_EDF, sizes_E = saved
    d_x_SD = _product(backend, True, g_SF, w_EDF, sizes_E)
    d_w_EDF = jax.lax.platform_dependent(
        *(x_SD.astype(backend.dtype), g_SF.astype(backend.dtype), sizes_E),
        tpu=functools.partial(ragged_weights, backend),
        default=functools.partial(looped_weights, backend),
    )
    return d_x_SD.astype(x_SD.dtype), d_w_EDF.astype(w_EDF.dtype), None


grouped_product.defvjp(_forward, _backward)
