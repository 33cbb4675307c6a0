"""The whole training step, and a decode step, compiled for a TPU mesh that need not be there."""

import importlib.util
import json
import os
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
from mea_jax import decode, sharding, topology
from mea_jax.backends import resolve
from mea_jax.config import MeshConfig, ModelConfig, TrainConfig
from mea_jax.train_step import abstract_params, abstract_state, compile_train_step

LENGTH = 2048
devices = topology.describe("v5e:2x2")
model = ModelConfig(
    vocab_size=512, d_model=256, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=512,
    key_components=2, value_components=2, remat="dots", loss_chunk=512,
)
config = TrainConfig(batch_size=4, model=model, mesh=MeshConfig(data=1, fsdp=2, tensor=2))
config = dataclasses.replace(
    config, model=resolve(model, devices, LENGTH, tensor=2),
    data=dataclasses.replace(config.data, context_length=LENGTH),
)
mesh = sharding.make_mesh(config.mesh, devices)
sharding.check_divisible(config, mesh)
where = sharding.batch_sharding(mesh)
rows = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32, sharding=where)
batch = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), rows)
with jax.set_mesh(mesh):
    step = compile_train_step(config, mesh).lower(abstract_state(config, mesh), batch).compile()

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
    """fsdp 2 x tensor 2: its own heads and rows a device, no T x T array, HLC folded."""
    assert (compiled["kernel"], compiled["form"]) == ("splash", "folded")
    assert "splash_mha_fwd" in compiled["step"]
    assert "splash_mha_dkv" in compiled["step"]
    assert "2048,2048]" not in compiled["step"]
    assert "bf16[2,4,2048,64]" in compiled["step"], "half of 4 rows, half of 8 heads"


def test_a_decode_step_on_a_tpu_reads_its_cache_where_it_lies(compiled):
    """C = K/2 absorbed: nothing of size S x K x H, and the cache's memory is reused."""
    assert compiled["served"] == "absorbed"
    assert compiled["aliased"] > compiled["cache"]
    assert compiled["temporary"] < compiled["cache"] / 4
    assert "[4,4096,4,64]" not in compiled["decoding"]
    assert "[4,4,4096,64]" not in compiled["decoding"]
