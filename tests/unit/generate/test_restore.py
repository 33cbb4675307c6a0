"""Matrices are restored in the dtype in which they are served, which changes no result."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs import qwen3_30b_a3b
from mea_jax.checkpoint.load import open_trained, unresolved
from mea_jax.config.parse import from_config_dict
from mea_jax.evaluate.token_losses import token_nll
from mea_jax.generate import decode
from mea_jax.model.params import abstract_params, placed_params, rounded_params
from mea_jax.ops.resolve import resolve_on
from mea_jax.parallel import sharding
from mea_jax.plan.compiling import per_device_bytes
from tests.helpers import ATTENTIONS, flat, params_of, random_batch, tiny_model
from tests.mesh_models import MESHES, MODELS, written_run

BACKENDS = ("cpu", "xla")
# What stays float32 of attention and the embedding, beside norms, biases, routers and steps.
KEPT = {
    "MHA": set(),
    "MEA": {"key", "value", "key_mixing", "value_mixing"},
    "differential V1": set(),
    "talking heads": {"logit_mixing", "probability_mixing"},
    "collaborative": {"query_mixing"},
    "gate per feature": {"key", "value", "key_mixing", "value_mixing"},
}


def bits(tree):
    """Return the leaves of a tree by path, with their dtypes, as exact numbers."""
    return {path: (str(x.dtype), np.asarray(x).tobytes()) for path, x in flat(tree).items()}


def logits(model, params, donate=False):
    """Return the logits of a prefill and of one decode step, and the served parameters."""
    tokens_BP = np.arange(64, dtype=np.int32).reshape(8, 8)
    positions_BP = np.broadcast_to(np.arange(8, dtype=np.int32), tokens_BP.shape)
    served, ready = decode.serve(model, params, donate=donate)
    cache = decode.empty_cache(served, 8, 16, model.dtype)
    fill, step = (jax.jit(f, static_argnums=0) for f in (decode.prefill, decode.step))
    ones_BP = np.ones_like(tokens_BP)
    first, cache = fill(served, ready, cache, tokens_BP, ones_BP, positions_BP)
    second, _ = step(served, ready, cache, tokens_BP[:, 0])
    return np.asarray(first), np.asarray(second), ready


@pytest.fixture(scope="module", params=MODELS)
def run(request, tiny, tmp_path_factory):
    """Return (the name of a model, its checkpoint)."""
    folder = written_run(request.param, tiny, tmp_path_factory.mktemp("restored"))
    return request.param, open_trained(folder, print)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_more_than_rounded_stays_float32(name, backend):
    model = tiny_model(**ATTENTIONS[name], dtype="bfloat16", backend=backend)
    found = flat(rounded_params(model, abstract_params(model)))
    for path, leaf in found.items():
        last = path.split("/")[-1]
        vector = last == "scale" or last.startswith("lambda_")
        kept = vector or last in KEPT[name] or (last == "embedding" and backend == "cpu")
        assert leaf.dtype == ("float32" if kept else "bfloat16"), path


def test_routers_biases_and_steps_stay_float32():
    model = tiny_model(**MODELS["mixture of experts"], dtype="bfloat16", qkv_bias=True)
    found = flat(rounded_params(model, abstract_params(model)))
    for path, leaf in found.items():
        kept = path.endswith(("router", "_bias", "scale"))
        assert leaf.dtype == ("float32" if kept else "bfloat16"), path
    learned = tiny_model(positions="learned", max_positions=16, dtype="bfloat16")
    found = flat(rounded_params(learned, abstract_params(learned)))
    assert {found[n].dtype.name for n in ("embedding", "position_embedding")} == {"float32"}
    whole = dataclasses.replace(model, dtype="float32")
    assert rounded_params(whole, abstract_params(whole)) == abstract_params(whole)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_those_of_parameters_restored_in_float32(run, backend):
    """Exactly: each matrix is rounded once, on the host or on the device."""
    name, trained = run
    batch = random_batch(0, 8, 16, 264)
    for text in (MESHES[name][1], *(("tensor=1",) if backend == "cpu" else ())):
        mesh = sharding.requested_mesh(text, "--mesh")
        with jax.set_mesh(mesh):
            model, params = trained.on_mesh(mesh, "bfloat16", 16)
            if backend == "xla":  # of other devices than CPUs
                model = dataclasses.replace(model, backend="xla", attention_kernel="einsum")
                params = trained.rounded(model, mesh)
            whole = trained.params(placed_params(model, mesh))
            assert {x.dtype.name for x in jax.tree.leaves(whole)} == {"float32"}
            assert sum(x.dtype == "bfloat16" for x in jax.tree.leaves(params)) >= 5
            loss = jax.jit(functools.partial(token_nll, model))
            np.testing.assert_array_equal(loss(params, batch), loss(whole, batch))
            expected, found = logits(model, whole), logits(model, params, donate=True)
        assert bits(found[2]) == bits(expected[2])
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
        if text == "tensor=1":
            one = logits(*trained.on_first_device("bfloat16", 16))
            np.testing.assert_array_equal(found[0], one[0])
            np.testing.assert_array_equal(found[1], one[1])


@pytest.mark.parametrize("name", ["MEA", "complex keys, dense values", "talking heads"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_donated_parameters_are_deleted(name, dtype):
    model = tiny_model(**ATTENTIONS[name], dtype=dtype)
    params = jax.tree.map(jax.numpy.asarray, params_of(model, noise=0.3))
    expected = decode.serve(model, params)[1]
    found = decode.serve(model, params, donate=True)[1]
    assert bits(found) == bits(expected)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
    served = {id(x) for x in jax.tree.leaves(found)}
    left = [x for x in jax.tree.leaves(params) if not x.is_deleted()]
    assert all(id(x) in served for x in left)
    assert not any(x.is_deleted() for x in jax.tree.leaves(found))
    assert len(left) <= 3  # the final norm, and in float32 the embedding and the head


def test_thirty_billion_parameters_load_within_a_v5e():
    """The figures of docs/scaling.md: bytes per chip, as eight chips would hold them."""
    config = from_config_dict(qwen3_30b_a3b.get_config())
    mesh = sharding.requested_mesh("expert=4,tensor=2", "--mesh")
    model = resolve_on(unresolved(config.model), mesh, 8192)
    model = dataclasses.replace(model, backend="xla", dtype="bfloat16")
    served = decode.serving(model)
    whole = placed_params(model, mesh)
    restored = rounded_params(model, whole)
    ready = flat(decode.placed_params(served, mesh))
    held = peak = per_device_bytes(restored)
    for part in decode._parts(restored):
        made = jax.eval_shape(functools.partial(decode._served_params, served), part)
        held += sum(per_device_bytes(ready[path]) for path in flat(made))
        peak = max(peak, held)
        held -= per_device_bytes(part)
    assert held == per_device_bytes(ready)
    found = [round(x / 1e9, 2) for x in (per_device_bytes(whole), per_device_bytes(restored), peak)]
    assert found == [15.27, 7.64, 10.06]
