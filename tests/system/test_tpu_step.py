"""A training step and a decode step, compiled for TPU meshes without a TPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed (pip install 'jax[tpu]')",
)

SCRIPT = """
import dataclasses, functools, json
import jax
import jax.numpy as jnp
from mea_jax.generate import decode
from mea_jax.parallel import sharding, topology
from mea_jax.ops.resolve import resolve
from mea_jax.config.schema import MeshConfig, ModelConfig, TrainConfig
from mea_jax.model.params import abstract_params
from mea_jax.train.step import abstract_state, compile_train_step

LENGTH = 2048
devices = topology.describe("v5e:2x2")
model = ModelConfig(
    vocab_size=512, d_model=256, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=512,
    key_components=2, value_components=2, remat="dots", loss_chunk=1,
)

def compile_step(mesh, devices):
    mesh = sharding.make_mesh(mesh, devices)
    shape = mesh.shape
    config = TrainConfig(
        batch_size=4, model=resolve(model, devices, LENGTH, shape["tensor"], shape["sequence"])
    )
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, context_length=LENGTH)
    )
    sharding.check_divisible(config, mesh)
    rows = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32, sharding=sharding.batch_sharding(mesh))
    batch = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), rows)
    with jax.set_mesh(mesh):
        step = compile_train_step(config, mesh)
        return config, step.lower(abstract_state(config, mesh), batch).compile()

config, step = compile_step(MeshConfig(data=1, fsdp=2, tensor=2), devices)
shared, sequence_step = compile_step(MeshConfig(data=1, fsdp=2, sequence=2), devices)
two = sharding.make_mesh(MeshConfig(fsdp=4, slices=2), topology.describe("2*v5e:2x2"))

one = jax.sharding.SingleDeviceSharding(devices[0])
held = {}

def shapes(params):
    held["served"], arrays = decode.serve(config.model, params)
    return arrays

params = jax.eval_shape(shapes, abstract_params(config.model))
empty = functools.partial(decode.empty_cache, held["served"], 4, 4096, jnp.bfloat16)
cache, tokens = jax.eval_shape(empty), jax.ShapeDtypeStruct((4,), jnp.int32)
abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), (params, cache, tokens)
)
served = functools.partial(decode.step, held["served"])
decoding = jax.jit(served, donate_argnums=1).lower(*abstract).compile()
print(json.dumps({
    "kernel": config.model.attention_kernel,
    "form": config.model.hlc_form,
    "served": held["served"].describe(),
    "step": step.as_text(),
    "sequence kernel": shared.model.attention_kernel,
    "sequence step": sequence_step.as_text(),
    "slices": [sorted({d.slice_index for d in part.flat}) for part in two.devices],
    "decoding": decoding.as_text(),
    "temporary": decoding.memory_analysis().temp_size_in_bytes,
    "aliased": decoding.memory_analysis().alias_size_in_bytes,
    "cache": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers)),
}))
"""


@pytest.fixture(scope="module")
def compiled():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_the_training_step_runs_splash_on_a_tpu_mesh(compiled):
    """With fsdp 2 x tensor 2, heads and rows are sharded, no array is T x T, and HLC is folded."""
    assert (compiled["kernel"], compiled["form"]) == ("splash", "folded")
    assert "splash_mha_fwd" in compiled["step"]
    assert "splash_mha_dkv" in compiled["step"]
    assert "2048,2048]" not in compiled["step"]
    assert "bf16[2,4,2048,64]" in compiled["step"], "expected half of 4 rows and half of 8 heads"


def collectives(text, *words):
    """Return the lines of a program with a collective whose op name contains all `words`."""
    call = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all)(-start)?\(")
    lines = [line for line in text.splitlines() if call.search(line)]
    return [line for line in lines if all(word in line for word in words)]


def test_the_loss_reduces_once_on_a_tpu_mesh(compiled):
    """The kernel is gathered and its gradient reduced outside of the loop over chunks.

    Inside, only two numbers per position of a chunk (1,024) are summed, over the device pairs of
    the tensor axis.
    """
    step, shared = compiled["step"], compiled["sequence step"]
    assert collectives(step, "all-gather", "jvp()/shard_map/all_gather", "bf16[256,256]")
    loop = "jvp()/shard_map/while/body"
    assert not collectives(shared, loop)
    inside = collectives(step, loop)
    assert inside, "no collective in the loop: the test sees nothing"
    for line in inside:
        assert set(re.findall(r"f32\[([\d,]*)\]", line.split(" all-reduce")[0])) == {"1024"}
        assert "{{0,1},{2,3}}" in line or "[2,2]<=[4]" in line, line


def test_a_sequence_axis_runs_splash_and_gathers_keys_and_values(compiled):
    """With fsdp 2 x sequence 2, each device attends from half of its rows' queries to all keys."""
    text = compiled["sequence step"]
    assert compiled["sequence kernel"] == "splash"
    assert "splash_mha_fwd" in text
    assert "splash_mha_dkv" in text
    assert "2048,2048]" not in text
    assert "1024,2048]" not in text
    gathers = collectives(text, "all-gather", "attention.attend")
    # Devices 0 and 1 share windows, and so do 2 and 3: sequence is the inner of the two axes.
    assert gathers
    assert all("{{0,1},{2,3}}" in line for line in gathers)
    # Only keys and values of 2 rows, 4 heads of 64; never the 8 query heads or segment ids.
    shapes = {
        re.sub(r"\b1,", "", dims)
        for line in gathers
        for dims in re.findall(r"\w+\[([\d,]+)\]", line.split(" all-gather")[0])
    }
    assert {tuple(sorted(map(int, dims.split(",")))) for dims in shapes} <= {
        (2, 4, 64, 2048),
        (2, 4, 64, 1024),
    }, shapes
    assert collectives(text, "reduce-scatter", "attention.attend"), "no gradient is reduced"


def test_slices_are_data_outermost(compiled):
    assert compiled["slices"] == [[0], [1]]


def test_a_decode_step_on_a_tpu_reads_its_cache_where_it_lies(compiled):
    """With C = K/2 absorbed, no array is S x K x H, and the cache's memory is reused."""
    assert compiled["served"] == "absorbed"
    assert compiled["aliased"] > compiled["cache"]
    assert compiled["temporary"] < compiled["cache"] / 4
    assert "[4,4096,4,64]" not in compiled["decoding"]
    assert "[4,4,4096,64]" not in compiled["decoding"]
