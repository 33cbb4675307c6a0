"""Generation on a mesh of devices equals generation on one device."""

import functools
import json
import math

import jax
import numpy as np
import pytest

from mea_jax.checkpoint.load import open_trained, unresolved
from mea_jax.errors import UserError
from mea_jax.generate import decode
from mea_jax.generate.generator import Generator
from mea_jax.model.params import param_shardings
from mea_jax.ops.resolve import resolve_on
from mea_jax.parallel import sharding
from tests.helpers import assert_one_error, params_of, tiny_model
from tests.mesh_models import MESHES, MODELS, WRONG, written_run


@pytest.fixture(scope="module", params=MODELS)
def run(request, tiny, tmp_path_factory):
    """Return (the name of a model, its run directory)."""
    return request.param, written_run(request.param, tiny, tmp_path_factory.mktemp("meshes"))


@pytest.mark.slow
def test_text_and_logits_equal_those_of_one_device(run, in_process, tmp_path):
    """1e-4: float32 sums over shards in another order, of logits below 10."""
    name, workdir = run
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in ("a quick", "over the")))
    arguments = ["--checkpoint", workdir, "--temperature", 0, "--max_tokens", 8]
    arguments += ["--dtype", "float32"]
    one = in_process("mea_jax.generate", *arguments, "--prompts", prompts)
    assert one[0] == 0, one[2]
    single = in_process("mea_jax.generate", *arguments, "--prompt", "a quick")
    tokens_BP = np.arange(16, dtype=np.int32).reshape(2, 8)
    ones_BP = np.ones_like(tokens_BP)
    positions_BP = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))

    def logits(model, params):
        served, ready = decode.serve(model, params)
        cache = decode.empty_cache(served, 2, 16, np.float32)
        fill = jax.jit(decode.prefill, static_argnums=0)
        return np.asarray(fill(served, ready, cache, tokens_BP, ones_BP, positions_BP)[0])

    trained = open_trained(workdir, print)
    expected = logits(*trained.on_first_device("float32", 16))
    for text in MESHES[name]:
        more = ["--mesh", text]
        found = in_process("mea_jax.generate", *arguments, *more, "--prompts", prompts, count=8)
        assert found[:2] == one[:2], found[2]
        found = in_process("mea_jax.generate", *arguments, *more, "--prompt", "a quick", count=8)
        assert found[:2] == single[:2], found[2]
        mesh = sharding.requested_mesh(text, "--mesh")
        with jax.set_mesh(mesh):
            model, params = trained.on_mesh(mesh, "float32", 16)
            sharded = [x for x in jax.tree.leaves(params) if not x.sharding.is_fully_replicated]
            assert len(sharded) > len(jax.tree.leaves(params)) / 2
            np.testing.assert_allclose(logits(model, params), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_meshes_that_do_not_fit_are_one_line(run, in_process):
    name, workdir = run
    if name != "GQA":
        pytest.skip("one model is enough")
    for text, *words in WRONG:
        arguments = ("--checkpoint", workdir, "--prompt", "a", "--mesh", text)
        status, _, err = in_process("mea_jax.generate", *arguments, count=8)
        assert_one_error(status, err, *words)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_cache_lie_where_a_plan_puts_them(name):
    """The shardings that `plan --step decode` compiles for are those of a running generator."""
    model = tiny_model(**MODELS[name])
    mesh = sharding.requested_mesh(MESHES[name][1], "--mesh")
    resolved = resolve_on(unresolved(model), mesh, 16)
    with jax.set_mesh(mesh):
        params = jax.device_put(params_of(model), param_shardings(resolved, mesh))
        generator = Generator(resolved, params, length=16, mesh=mesh)
        served = generator.served
        empty = functools.partial(decode.empty_cache, served, 8, 16, np.float32)
        found = generator.params, jax.jit(empty)()
    planned = (
        decode.placed_params(served, mesh),
        decode.placed_cache(served, 8, 16, np.float32, mesh),
    )

    def place(x):
        index = x.sharding.devices_indices_map(x.shape)
        return x.shape, str(x.dtype), {device.id: part for device, part in index.items()}

    assert jax.tree.map(place, found) == jax.tree.map(place, planned)
    tensor, rows = mesh.shape["tensor"], sharding.batch_shards(mesh)
    for heads in jax.tree.leaves((found[1].layers, found[1].recent)):
        share = math.prod(heads.sharding.shard_shape(heads.shape))
        assert share * tensor * rows == heads.size


def test_a_mesh_takes_the_first_devices():
    assert sharding.requested_mesh("fsdp=2,tensor=2", "--mesh").devices.size == 4
    with pytest.raises(UserError, match="no axis 'sequence'"):
        sharding.requested_mesh("sequence=2", "--mesh")
