"""Tests of the embedding lookup on several meshes: values, gradients and communication."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mea_jax.config.schema import MeshConfig
from mea_jax.ops.embedding import lookup
from mea_jax.parallel import sharding

MESHES = {
    "data": MeshConfig(8, 1, 1),
    "fsdp": MeshConfig(1, 8, 1),
    "tensor": MeshConfig(1, 1, 8),
    "sequence": MeshConfig(1, 1, 1, sequence=8),
    "data, fsdp and tensor": MeshConfig(2, 2, 2),
    "fsdp, sequence and tensor": MeshConfig(1, 2, 2, sequence=2),
}
WORDS, WIDTH = 4096, 16


def value_and_gradient(mesh, axes):
    """Return (compiled function, its placed arguments, the same as numpy arrays).

    The function maps (table, ids, cotangent) to (rows, gradient of the table).
    """
    rng = np.random.default_rng(0)
    arrays = (
        rng.standard_normal((WORDS, WIDTH)).astype(np.float32),
        rng.integers(0, WORDS, (8, 8), dtype=np.int32),
        rng.standard_normal((8, 8, WIDTH)).astype(np.float32),
    )

    def both(table, ids, cotangent):
        rows, backward = jax.vjp(lambda table: lookup(table, ids, table.dtype, axes), table)
        return rows, backward(cotangent)[0]

    names = axes, ("batch", "length"), ("batch", "length", None)
    where = [NamedSharding(mesh, sharding.spec(n)) for n in names]
    placed = [jax.device_put(a, w) for a, w in zip(arrays, where, strict=True)]
    return jax.jit(both, out_shardings=(where[2], where[0])), placed, arrays


@pytest.mark.parametrize("axes", [("vocab", "embed"), ("positions", "embed")])
@pytest.mark.parametrize("name", MESHES)
def test_rows_and_their_gradient(name, axes):
    mesh = sharding.make_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        both, placed, (table, ids, cotangent) = value_and_gradient(mesh, axes)
        rows, gradient = both(*placed)
    np.testing.assert_array_equal(rows, table[ids])
    expected = np.zeros_like(table)
    np.add.at(expected, ids, cotangent)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "positions"), [("fsdp", 8 * 8 // 8), ("fsdp, sequence and tensor", 8 * 8 // 4)]
)
def test_no_more_moves_than_a_device_keeps(name, positions):
    """Neither the table, its gradient nor the rows of all devices are moved."""
    mesh = sharding.make_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        both, placed, _ = value_and_gradient(mesh, ("vocab", "embed"))
        text = both.lower(*placed).compile().as_text()
    assert text is not None
    moved = [
        int(np.prod([int(d) for d in dims.split(",") if d]))
        for line in text.splitlines()
        if (call := re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line))
        for dims in re.findall(r"[fs]32\[([\d,]*)\]", line[: call.start()])
    ]
    assert moved
    assert max(moved) <= positions * WIDTH


def test_a_lone_prompt_is_left_to_the_partitioner():
    """The lookup is right for a single row, which fsdp=8 does not divide."""
    mesh = sharding.make_mesh(MESHES["fsdp"])
    table = jnp.arange(32.0, dtype=jnp.float32).reshape(4, 8)
    with jax.set_mesh(mesh):
        rows = jax.jit(lambda ids: lookup(table, ids, table.dtype, ("vocab", "embed")))(
            np.asarray([[2, 0, 3]])
        )
    np.testing.assert_array_equal(rows, table[np.asarray([[2, 0, 3]])])


def test_bfloat16_rows_in_a_loop_copy_no_table():
    """Rows of a bfloat16 table are exact, and a loop keeps neither a wide nor another copy."""
    table = jnp.asarray(np.random.default_rng(0).standard_normal((WORDS, WIDTH)), jnp.bfloat16)
    ids = jnp.asarray([[3], [WORDS - 1]])
    axes = ("vocab", "embed")
    np.testing.assert_array_equal(lookup(table, ids, jnp.float32, axes), table[ids])

    def steps(table, ids):
        def step(i, x):
            return x + lookup(table, ids + i, jnp.float32, axes)

        return jax.lax.fori_loop(0, 8, step, jnp.zeros((2, 1, WIDTH)))

    compiled: Any = jax.jit(steps).lower(table, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < table.nbytes // 4
