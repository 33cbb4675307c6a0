"""Compile attention, forward and backward, for TPUs, which need not be present; print JSON.

    JAX_PLATFORMS=cpu python -m tests.system.tpu_compile v5e:2x2 splash:64:64 plain:64:64

Each `<which>:<H>:<W>` becomes one object: the array shapes of the compiled program, its custom
calls with their array shapes, its collectives, and the bytes it needs on a device in addition to
arguments and results. B 4, T 2048, N 8, K 4, bfloat16, on a mesh of data 1, tensor 2 and fsdp for
the other devices.
"""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mea_jax.config.schema import MeshConfig
from mea_jax.ops import attention, flash
from mea_jax.parallel import sharding, topology

B, T, N, K = 4, 2048, 8, 4
ATTENTION: dict[str, Callable[..., jax.Array]] = {
    "splash": flash.splash_attention,
    "plain": attention.dot_product_attention,
}
SHAPE = re.compile(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]")


def compile_attention(name: str, which: str, head_dim: int, value_dim: int) -> Any:
    """Compile the forward and backward pass for the devices of topology `name`."""
    devices = topology.describe(name)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2), devices)

    def abstract(*shape, dtype=jnp.bfloat16):
        names = ("batch", "length", "activation_heads", None)[: len(shape)]
        where = NamedSharding(mesh, sharding.spec(names))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def step(q_BTNH, k_BSKH, v_BSKW, segment_ids_BT, g_BTNW):
        o_BTNW, backward = jax.vjp(
            lambda q, k, v: ATTENTION[which](q, k, v, segment_ids_BT, scale=head_dim**-0.5),
            q_BTNH,
            k_BSKH,
            v_BSKW,
        )
        return o_BTNW, backward(g_BTNW)

    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(
            abstract(B, T, N, head_dim),
            abstract(B, T, K, head_dim),
            abstract(B, T, K, value_dim),
            abstract(B, T, dtype=jnp.int32),
            abstract(B, T, N, value_dim),
        )
        return lowered.compile()


def shapes_in(text: str) -> list[list[int]]:
    """Return the distinct array shapes in HLO text."""
    return [[int(d) for d in s.split(",")] for s in sorted(set(SHAPE.findall(text)))]


def main(name: str, *wanted: str) -> None:
    found = {}
    for request in wanted:
        which, head_dim, value_dim = request.split(":")
        compiled = compile_attention(name, which, int(head_dim), int(value_dim))
        text = compiled.as_text()
        calls = [line for line in text.splitlines() if '"tpu_custom_call"' in line]
        found[request] = {
            "shapes": shapes_in(text),
            "kernels": {line.split()[0].lstrip("%"): shapes_in(line) for line in calls},
            "collectives": sorted(set(re.findall(r" (all-\w+|collective-\w+)\(", text))),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
