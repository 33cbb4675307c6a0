"""Generation on a mesh of devices equals generation on one device."""

import json

import jax
import numpy as np
import pytest

from mea_jax.checkpoint.load import open_trained
from mea_jax.errors import UserError
from mea_jax.generate import decode
from mea_jax.parallel import sharding
from tests.helpers import GROUPED, PLAIN, assert_one_error
from tests.whole_runs import train_on_one_device

EXPERTS = {"n_experts": 8, "experts_per_token": 2, "d_expert": 16}
HALF = {"key_components": 2, "value_components": 2}
MODELS = {
    "MHA": PLAIN,
    "GQA": PLAIN | GROUPED,
    "MEA, half of the heads cached": HALF,
    "mixture of experts": PLAIN | EXPERTS,
}
MESHES = {
    "MHA": ("tensor=4", "data=2,fsdp=2,tensor=2"),
    "GQA": ("tensor=4", "fsdp=4"),
    "MEA, half of the heads cached": ("tensor=2", "fsdp=2,tensor=2"),
    "mixture of experts": ("tensor=2", "expert=4,tensor=2"),
}


@pytest.fixture(scope="module", params=MODELS)
def run(request, tiny, tmp_path_factory):
    """Return (the name of a model, the run directory of a short training of it)."""
    changes = {f"model.{name}": value for name, value in MODELS[request.param].items()}
    workdir = tmp_path_factory.mktemp("meshes") / "run"
    train_on_one_device(tiny(**changes), workdir)
    return request.param, workdir


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
    for text, *words in (
        ("tensor=8", "config.mesh.tensor=8 does not divide config.model.n_kv_heads=4"),
        ("expert=2", "config.mesh.expert=2 splits experts"),
        ("tensor=16", "needs 16 devices, but this machine has 8"),
        ("tensr=2", "did you mean 'tensor'?"),
        ("tensor=0", "the size of tensor must be 1 or more"),
        ("tensor", "the size of tensor must be 1 or more"),
    ):
        arguments = ("--checkpoint", workdir, "--prompt", "a", "--mesh", text)
        status, _, err = in_process("mea_jax.generate", *arguments, count=8)
        assert_one_error(status, err, *words)


def test_a_mesh_takes_the_first_devices():
    assert sharding.requested_mesh("fsdp=2,tensor=2", "--mesh").devices.size == 4
    with pytest.raises(UserError, match="no axis 'sequence'"):
        sharding.requested_mesh("sequence=2", "--mesh")
