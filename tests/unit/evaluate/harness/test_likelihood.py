"""Tests of the log-probabilities of packed trees against sequences that are run separately."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.checkpoint.load import unresolved
from mea_jax.config.schema import MeshConfig
from mea_jax.evaluate.harness import likelihood
from mea_jax.evaluate.harness.likelihood import Request, Scorer, ScoringCost
from mea_jax.model.params import init_params
from mea_jax.ops import attention, cpu
from mea_jax.ops.backend import CpuBackend, XlaBackend
from mea_jax.parallel import sharding
from tests.helpers import apply_logits, params_of, tiny_model

LONGEST = 68  # tokens of a request
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


def logits_of(model, params, requests):
    """Return the logits (requests, T, V) of `requests`, one per row."""
    tokens_BT = np.zeros((len(requests), LONGEST), np.int32)
    for row, request in zip(tokens_BT, requests, strict=True):
        row[: len(request.tokens)] = request.tokens
    positions_BT = np.broadcast_to(np.arange(LONGEST, dtype=np.int32), tokens_BT.shape)
    apply = jax.jit(functools.partial(apply_logits, model))
    # Padding is at the end, where causal attention does not read it.
    return np.asarray(apply(params, tokens_BT, positions_BT, np.ones_like(tokens_BT)))


def directly(logits_TV, request):
    """Return (log-probability, is greedy) of a request's targets from its logits (T, V)."""
    n, last = len(request.targets), len(request.tokens)
    logits_nV = logits_TV[last - n : last].astype(np.float64)
    logs_nV = logits_nV - np.log(np.exp(logits_nV).sum(1, keepdims=True))
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
        {"backend": "cpu", "window": (5, 0), "layer_thetas": (1e4, 0.0), "qkv_bias": True},
    ],
    ids=["MEA", "learned positions", "ALiBi", "talking heads", "QK-norm", "window"],
)
def test_packed_requests_score_like_whole_sequences(changes):
    model = tiny_model(**changes)
    params, requests = params_of(model, noise=0.3), requests_of(0)
    greedy = requests[5]  # repeated below with the model's own next token
    logits = logits_of(model, params, requests)
    top = logits[5, len(greedy.tokens) - 1].argmax()
    requests.append(Request(greedy.tokens, [int(top)]))

    work = ScoringCost()
    found = scorer_of(model, params).score(requests, work)
    assert found[-1][1]
    assert found[-1][0] < 0
    for (log_probability, is_greedy), request, row in zip(found, requests, logits, strict=False):
        expected, expected_greedy = directly(row, request)
        # Float32 sums of at most 7 logarithms around 6, in a different order.
        assert log_probability == pytest.approx(expected, abs=1e-4)
        assert is_greedy == expected_greedy
    assert work.requests == len(requests)
    assert work.requested_tokens == sum(len(r.tokens) for r in requests)
    shares = likelihood.shares_beginnings(model)
    assert (work.real < 0.6 * work.requested_tokens) == shares, "shared prefixes are computed once"


def test_shared_beginnings_change_no_score():
    model = tiny_model()
    params, requests = params_of(model, noise=0.3), requests_of(1)
    whole, alone = (scorer_of(model, params) for _ in range(2))
    alone.branches = False
    shared, expected = ([x for x, _ in s.score(requests)] for s in (whole, alone))
    np.testing.assert_allclose(shared, expected, atol=1e-4)


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
    """The compiled program has logits of one chunk at a time; chunks do not change the scores."""
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


@pytest.mark.parametrize("window", [0, 1, 2, 3, 9])
def test_attention_of_trees(window):
    """Both kernels agree with an explicit mask: two trees, the first with branches, and padding.

    A window counts the tokens of a path, not those of other branches between them.
    """
    n, k = 4, 2
    rng = np.random.default_rng(4)
    q, kk, v = (jnp.asarray(rng.standard_normal((1, 11, h, 8)), jnp.float32) for h in (n, k, k))
    paths = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [6], [6, 7], [6, 8]]
    mask = attention.TreeMask(
        jnp.asarray([[6, 6, 4, 4, 6, 6, 9, 8, 9, 0, 0]], jnp.int32),
        jnp.asarray([[0, 1, 2, 3, 2, 3, 0, 1, 1, 0, 0]], jnp.int32),
    )
    logits = 0.3 * np.einsum("tkgh,skh->kgts", np.reshape(q[0], (11, k, n // k, 8)), kk[0])
    expected = np.zeros((11, k, n // k, 8))
    for t, path in enumerate(paths):
        path = path[-window:]
        p = np.exp(logits[:, :, t, path])
        p /= p.sum(-1, keepdims=True)
        expected[t] = np.einsum("kgs,skh->kgh", p, np.asarray(v)[0, path])
    expected = expected.reshape(11, n, 8)[:9]
    options = {"scale": 0.3, "dtype": jnp.float32}
    backends = CpuBackend(jnp.dtype("float32")), XlaBackend(jnp.dtype("float32"))
    chosen = [functools.partial(b.attend, scale=0.3, window=window) for b in backends]
    for block in (3, 16):
        plain = functools.partial(attention.tree_attention, scale=0.3, block=block, window=window)
        kernel = functools.partial(cpu.causal_attention, **options, block=block)
        for function in (plain, *chosen, *([] if window else [kernel])):
            found = jax.jit(function)(q, kk, v, mask)
            np.testing.assert_allclose(found[0, :9], expected, atol=2e-6)
            assert np.isfinite(found).all()
