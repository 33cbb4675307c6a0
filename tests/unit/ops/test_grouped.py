"""Products of grouped rows with a matrix for each group, against numpy; how rows are blocked."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from mea_jax.ops import grouped
from mea_jax.ops.backend import make_backend
from tests.helpers import tiny_model

XLA: Any = make_backend(tiny_model())
CPU: Any = make_backend(tiny_model(backend="cpu"))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Groups of no rows, one row, fewer and more rows than a block; rows that are in no group.
SIZES = {
    "even": (129, [33, 32, 32, 32]),
    "one has all": (129, [0, 129, 0, 0]),
    "none, one, some, many": (129, [0, 1, 27, 101]),
    "the last rows are nobody's": (129, [3, 0, 40, 21]),
    "nobody's rows only": (129, [0, 0, 0, 0]),
    "fewer rows than a block": (5, [2, 0, 2, 1]),
}


def by_hand(x_SD, w_EDF, sizes):
    y_SF = np.zeros((len(x_SD), w_EDF.shape[2]), np.float32)
    start = 0
    for group, size in enumerate(sizes):
        y_SF[start : start + size] = x_SD[start : start + size] @ w_EDF[group]
        start += size
    return y_SF


@functools.cache
def compiled_product(backend: Any):
    """Return a compiled function: (x, w, sizes, cotangent) -> (y, gradients of x and w)."""

    def run(x, w, sizes, g):
        y, pull = jax.vjp(lambda x, w: grouped.grouped_product(x, w, sizes, backend), x, w)
        return y, *pull(g)

    return jax.jit(run)


@pytest.mark.parametrize("backend", [XLA, CPU], ids=["xla", "cpu"])
@pytest.mark.parametrize("name", SIZES)
def test_rows_meet_the_matrix_of_their_group(name, backend):
    rows, sizes = SIZES[name]
    x, w, g = random(rows, 12), random(4, 12, 10, seed=1), random(rows, 10, seed=2)
    y, d_x, d_w = compiled_product(backend)(x, w, np.asarray(sizes, np.int32), g)
    # Float32 sums of 10 to 129 numbers near 1, in a different order.
    np.testing.assert_allclose(y, by_hand(x, w, sizes), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_x, by_hand(g, w.swapaxes(1, 2), sizes), rtol=1e-5, atol=1e-5)
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    expected = np.stack([x[part].T @ g[part] for part in parts])
    np.testing.assert_allclose(d_w, expected, rtol=1e-5, atol=2e-5)


def test_ragged_dot_is_the_same_function():
    """The TPU's product agrees, in its lowering for other devices (dense, for tests only)."""

    @jax.jit
    def run(x, w, sizes, g):
        y = grouped.ragged(XLA, False, x, w, sizes)
        d_x = grouped.ragged(XLA, True, g, w, sizes)
        return y, d_x, grouped.ragged_weights(XLA, x, g, sizes)

    x, w, g = random(129, 12), random(4, 12, 10, seed=1), random(129, 10, seed=2)
    for rows, sizes in SIZES.values():
        if rows == 129:
            arrays = (x, w, np.asarray(sizes, np.int32), g)
            for found, expected in zip(run(*arrays), compiled_product(XLA)(*arrays), strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("rows", "groups"), [(37, 4), (4096, 8), (65_536, 128)])
def test_blocks_are_enough_and_few(rows, groups):
    """Every row is in one block for any group sizes; padding adds at most a sixteenth.

    The limit on padding does not apply to blocks of 16 rows, the smallest size.
    """
    size = grouped.block_size(rows, groups)
    limit = grouped.block_count(rows, groups, size)
    run, rng = jax.jit(lambda sizes: grouped.blocks(sizes, rows, size)), np.random.default_rng(rows)
    for concentration in (0.01, 1.0, 100.0):
        sizes = rng.multinomial(rows, rng.dirichlet([concentration] * groups))
        found = jax.device_get(run(np.asarray(sizes, np.int32)))
        pairs = zip(found.start_N, found.stop_N, strict=True)
        assert [row for a, b in pairs for row in range(a, b)] == list(range(rows))
    assert limit * size <= rows * 17 / 16 or size == 16
