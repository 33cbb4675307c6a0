"""Log-probabilities of packed trees against whole sequences computed one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import params_of, tiny_model

from mea_jax import attention, cpu_kernels, sharding
from mea_jax.config import MeshConfig
from mea_jax.evaluate.harness import likelihood
from mea_jax.evaluate.harness.likelihood import Request, Scorer, Work
from mea_jax.train_step import init_params
from mea_jax.trained import unresolved
from mea_jax.transformer import apply_logits

PLAIN = {"hlc": "none", "head_norm": False}


def requests_of(seed, questions=8, choices=3):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(questions):
        question = rng.integers(0, 264, rng.integers(2, 60)).tolist()
        for _ in range(choices):
            new = rng.integers(0, 264, rng.integers(1, 8)).tolist()
            found.append(Request((question + new)[:-1], new))
    return found


def directly(model, params, request):
    """The same from all logits of the one sequence."""
    tokens = np.array([request.tokens], np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    logits_TV = apply_logits(model, params, tokens, positions, np.ones_like(tokens))[0]
    n = len(request.targets)
    logs_nV = np.asarray(jax.nn.log_softmax(logits_TV, axis=-1))[-n:]
    right_n = logs_nV[np.arange(n), list(request.targets)]
    return right_n.sum(), (logs_nV.argmax(1) == request.targets).all()


def scorer_of(model, params, mesh=None):
    mesh = mesh or sharding.make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    return Scorer(unresolved(model), params, mesh, budget=512)


@pytest.mark.parametrize(
    "changes",
    [
        {"key_components": 2, "value_components": 2, "n_kv_heads": 4},
        {"positions": "learned", "max_positions": 70, **PLAIN},
        {"positions": "alibi", **PLAIN},
        {"variant": "talking_heads", **PLAIN},
        {"backend": "xla", "qk_norm": True, "n_kv_heads": 2, **PLAIN},
    ],
    ids=["MEA", "learned positions", "ALiBi", "talking heads", "QK-norm"],
)
def test_packed_requests_score_like_whole_sequences(changes):
    model = tiny_model(**changes)
    params, requests = params_of(model, noise=0.3), requests_of(0)
    greedy = requests[5]  # what the model itself would write next
    tokens = np.array([greedy.tokens], np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    top = apply_logits(model, params, tokens, positions, np.ones_like(tokens))[0, -1].argmax()
    requests.append(Request(greedy.tokens, [int(top)]))

    work = Work()
    found = scorer_of(model, params).score(requests, work)
    assert found[-1][1]
    assert found[-1][0] < 0
    for (log_probability, is_greedy), request in list(zip(found, requests, strict=True))[::4]:
        expected, expected_greedy = directly(model, params, request)
        # Float32 sums in another order, of at most 7 logarithms around 6.
        assert log_probability == pytest.approx(expected, abs=1e-4)
        assert is_greedy == expected_greedy
    assert work.requests == len(requests)
    assert work.asked == sum(len(r.tokens) for r in requests)
    shares = likelihood.shares_beginnings(model)
    assert (work.real < 0.6 * work.asked) == shares, "beginnings that are shared are read once"


def test_shared_beginnings_change_no_score():
    model = tiny_model()
    params, requests = params_of(model, noise=0.3), requests_of(1)
    whole, alone = (scorer_of(model, params) for _ in range(2))
    alone.branches = False
    found = (np.array([x for x, _ in s.score(requests)]) for s in (whole, alone))
    np.testing.assert_allclose(*found, atol=1e-4)


@pytest.mark.parametrize("sizes", [(4, 1), (1, 2, 2)], ids=["data 4", "fsdp 2, tensor 2"])
def test_a_mesh_scores_like_one_device(sizes):
    model = tiny_model()
    params, requests = params_of(model, noise=0.3), requests_of(2)
    expected = scorer_of(model, params).score(requests)
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[:4])
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    placed = jax.device_put(params, sharding.param_shardings(boxed, mesh))
    found = scorer_of(model, placed, mesh).score(requests)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-4)
    assert [g for _, g in found] == [g for _, g in expected]


def test_logits_of_all_positions_never_exist_at_once(monkeypatch):
    """The compiled program's largest array of words is a chunk's, and chunks change no score."""
    model = tiny_model()
    params, requests = params_of(model, noise=0.3), requests_of(3)
    expected = scorer_of(model, params).score(requests)
    monkeypatch.setattr(likelihood, "_CHUNK", 8)
    monkeypatch.setattr(likelihood, "positions_within", lambda mebibytes, words: 8)
    small = scorer_of(model, params)
    found = small.score(requests)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-5)
    ((size, length, pairs, chunk), program) = next(iter(small._compiled.items()))
    assert (pairs % 8, chunk) == (0, 8)
    batch = jax.ShapeDtypeStruct((size, length), jnp.int32)
    arrays = (batch, batch, batch, jax.ShapeDtypeStruct((1, pairs, 2), jnp.int32))
    text = program.lower(params, *arrays, np.int32(1)).as_text()
    assert "tensor<1x8x264xf32>" in text
    assert f"{length}x264xf32" not in text
    assert f"{pairs}x264xf32" not in text


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_of_trees(heads):
    """Both kernels against a mask made by hand: two trees, the first with two branches, padding."""
    n, k = heads
    rng = np.random.default_rng(4)
    q, kk, v = (jnp.asarray(rng.standard_normal((1, 11, h, 8)), jnp.float32) for h in (n, k, k))
    paths = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [6], [6, 7], [6, 8]]
    reach = np.array([[6, 6, 4, 4, 6, 6, 9, 8, 9, 0, 0]], np.int32)
    logits = np.einsum("tngh,snh->ngts", q[0].reshape(11, k, n // k, 8), kk[0]) * 0.3
    expected = np.zeros((11, k, n // k, 8))
    for t, path in enumerate(paths):
        p = jax.nn.softmax(logits[:, :, t, path], axis=-1)
        expected[t] = np.einsum("kgs,skh->kgh", p, v[0, jnp.array(path)])
    expected = expected.reshape(11, n, 8)[:9]
    for block in (3, 16):
        found = attention.tree_attention(q, kk, v, reach, 0.3, block=block)
        np.testing.assert_allclose(found[0, :9], expected, atol=2e-6)
        assert np.isfinite(found).all()
        found = cpu_kernels.causal_attention(
            q, kk, v, reach, scale=0.3, dtype=jnp.float32, block=block, tree=True
        )
        np.testing.assert_allclose(found[0, :9], expected, atol=2e-6)
