"""Tests of the attention layer against a reference, and of its norms, masks and statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mea_jax.config.schema import RopeScaling, Side
from mea_jax.model.attention import Attention
from mea_jax.model.context import Context
from mea_jax.model.transformer import rope_of
from mea_jax.ops import attention
from mea_jax.ops.rms_norm import rms_norm
from tests import references
from tests.helpers import assert_close, change, flat, packed, params_of, tiny_model


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# -- the module against a reference ---------------------------------------------------------


CASES: dict[str, dict[str, Any]] = {
    "mea": {},
    "keys and values differ": {"key_components": 4, "value_components": 1},
    "grouped queries, C not dividing K": {
        "n_heads": 8,
        "key_components": 3,
        "value_components": 2,
    },
    "keys only, scaled positions": {
        "hlc": "k",
        "key_components": 2,
        "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
    },
    "keys only, scaled positions and logits": {
        "hlc": "k",
        "key_components": 2,
        "rope_scaling": RopeScaling("yarn", 8.0, original_context=64),
    },
    "values only": {"hlc": "v", "value_components": 2},
    "no head norm": {"head_norm": False, "key_components": 2},
    "plain grouped queries": {"hlc": "none", "head_norm": False, "n_kv_heads": 2},
    "plain multi-query": {"hlc": "none", "head_norm": False, "n_kv_heads": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_layer_is_the_reference_in_values_and_gradients(case):
    model = tiny_model(n_layers=1, **CASES[case])
    positions_BT, segments_BT = (jnp.asarray(x) for x in packed([[5, 7], [12]], 12))
    context = Context(segments_BT, rope_of(model, positions_BT))
    stacked = params_of(model, noise=0.3)["layers_0"]["attention"]
    params = jax.tree.map(lambda p: jnp.asarray(p[0]), stacked)
    x, weight = normal(5, 2, 12, model.d_model), normal(6, 2, 12, model.d_model)

    def differentiated(function):
        def run(params, x):
            out = function(params, x)
            return jnp.vdot(weight, out), out

        return jax.jit(jax.grad(run, (0, 1), has_aux=True))(params, x)

    def reference(params, x):
        return references.mea(model, params, x, positions_BT, segments_BT)

    expected_gradients, expected = differentiated(reference)
    for form in ("folded", "explicit") if model.hlc != "none" else ("folded",):
        module = Attention(
            change(model, hlc_form=form),
            model.components(Side.KEY)[0],
            model.components(Side.VALUE)[0],
        )

        def function(params, x, module=module):
            return module.apply({"params": params}, x, context, 0)[0]

        gradients, out = differentiated(function)
        # Values reach some tens; sums of 32 to 400 terms lose one or two of float32's seven digits.
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
        assert_close(gradients, expected_gradients, rtol=1e-3, atol=2e-3)


def test_plain_attention_has_nothing_of_hlc():
    model = tiny_model(hlc="none", head_norm=False, n_kv_heads=2)
    tree = flat(params_of(model)["layers_0"]["attention"])
    assert {name: p.shape for name, p in tree.items()} == {
        "query": (2, 32, 4, 8),
        "key": (2, 32, 2, 8),
        "value": (2, 32, 2, 8),
        "out": (2, 4, 8, 32),
    }


def test_mea_tree():
    model = tiny_model(key_components=2, value_components=1)
    tree = flat(params_of(model)["layers_0"]["attention"])
    assert {name: p.shape for name, p in tree.items()} == {
        "query": (2, 32, 4, 8),
        "key": (2, 32, 2, 8),
        "key_mixing": (2, 2, 4),
        "value": (2, 32, 1, 8),
        "value_mixing": (2, 1, 4),
        "head_norm/scale": (2, 8),  # one weight over H, shared by all heads
        "out": (2, 4, 8, 32),
    }
    assert set(flat(params_of(change(model, hlc="k", value_components=4)))) == {
        name for name in flat(params_of(model)) if not name.endswith("value_mixing")
    }


# -- parts ----------------------------------------------------------------------------------


@given(
    heads=st.integers(1, 3),
    scale=st.floats(0.01, 100.0),
    seed=st.integers(0, 9),
)
def test_head_norm_is_rmsnorm_over_each_head(heads, scale, seed):
    x, weight = scale * normal(seed, 2, 3, heads, 8), normal(seed + 1, 8)
    x64 = np.asarray(x, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weight)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5), expected, rtol=1e-5, atol=1e-6)


def test_norms_are_in_float32():
    x = normal(0, 2, 3, 8).astype(jnp.bfloat16)
    y = rms_norm(x, jnp.ones(8), 1e-5)
    assert y.dtype == jnp.bfloat16
    exact = rms_norm(x.astype(jnp.float32), jnp.ones(8), 1e-5)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))  # one rounding, at the end


def test_visible_positions():
    _, segments = packed([[2, 3]], 6)  # one position of padding
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(attention.visible(jnp.asarray(segments))[0], np.array(expected))


@given(length=st.integers(1, 12), window=st.integers(0, 14), seed=st.integers(0, 9))
def test_visible_positions_of_a_window(length, window, seed):
    segments = np.sort(np.random.default_rng(seed).integers(0, 3, (2, length)))
    found = attention.visible(jnp.asarray(segments), window)
    for (b, t, s), seen in np.ndenumerate(found):
        near = s <= t and (window == 0 or t - s < window)
        assert seen == (near and segments[b, t] == segments[b, s])


@pytest.mark.parametrize("window", [1, 3, 9, 40])
@pytest.mark.parametrize("alibi", [False, True])
def test_plain_attention_with_a_window_is_the_reference(window, alibi):
    """The reference repeats keys and values for each query head and masks with -inf."""
    ids = jnp.asarray(packed([[4, 6], [9]], 11)[1])
    arrays = [normal(i, 2, 11, *shape) for i, shape in enumerate([(4, 6), (2, 6), (2, 5), (4, 5)])]
    slopes_N = jnp.asarray([0.5, 0.25, 0.125, 0.0625]) if alibi else None

    def reference(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = 0.3 * jnp.einsum("btnh,bsnh->bnts", q, k)
        if slopes_N is not None:
            t = jnp.arange(11)
            scores += slopes_N[None, :, None, None] * (t[None] - t[:, None])[None, None]
        seen_BTS = references.visible(ids, window)
        p = jax.nn.softmax(jnp.where(seen_BTS[:, None], scores, -jnp.inf))
        return jnp.einsum("bnts,bsnw->btnw", p, v)

    def plain(q, k, v):
        return attention.dot_product_attention(q, k, v, ids, 0.3, slopes_N, window)

    found, expected = (
        jax.jit(lambda *a, f=f: (f(*a[:3]), *jax.vjp(f, *a[:3])[1](a[3])))(*arrays)
        for f in (plain, reference)
    )
    for a, b in zip(found, expected, strict=True):  # float32 sums of up to 11 terms of size 1
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)


def test_bfloat16_softmax_is_in_float32():
    """Logits that would be equal in bfloat16 still rank the positions."""
    q = jnp.full((1, 2, 1, 8), 4.0, jnp.bfloat16)
    k = jnp.stack([jnp.full((1, 1, 8), 8.0), jnp.full((1, 1, 8), 8.0).at[..., 0].set(8.0625)], 1)
    logits = attention.attention_logits(
        q, k.astype(jnp.bfloat16), jnp.ones((1, 2, 2), bool), scale=1.0
    )
    assert logits.dtype == jnp.float32
    assert float(logits[0, 0, 0, 1, 1] - logits[0, 0, 0, 1, 0]) == 0.25  # of 256: 9 bits


def test_statistics_of_uniform_attention():
    """Zero queries attend uniformly: position t has entropy log(t + 1)."""
    positions_BT, segments = packed([[4, 3], [6]], 8)
    statistics = attention.attention_statistics(
        jnp.zeros((2, 8, 4, 2)), normal(0, 2, 8, 2, 2), jnp.asarray(segments), 1.0
    )
    real = segments > 0
    expected = np.log(positions_BT[real] + 1.0).mean()
    np.testing.assert_allclose(statistics["entropy"], np.full(4, expected), rtol=1e-5)
    np.testing.assert_array_equal(statistics["logit"], np.zeros(4))


def test_statistics_by_hand():
    """Statistics agree with numpy, head by head; padding is in neither mean nor maximum."""
    _, segments = packed([[4, 3], [6]], 8)
    q, k = np.array(normal(0, 2, 8, 4, 6)), np.array(normal(1, 2, 8, 2, 6))
    q[0, 7], k[0, 7] = 100.0, 100.0  # large numbers in the padding
    found = attention.attention_statistics(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(segments), 0.5
    )
    for n in range(4):
        entropies, largest = [], -np.inf
        for b, t in np.argwhere(segments > 0):
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            logits = np.array([0.5 * q[b, t, n] @ k[b, s, n // 2] for s in seen])
            p = np.exp(logits - logits.max())
            p /= p.sum()
            entropies.append(-(p * np.log(np.maximum(p, 1e-30))).sum())
            largest = max(largest, logits.max())
        np.testing.assert_allclose(found["entropy"][n], np.mean(entropies), rtol=1e-4)
        np.testing.assert_allclose(found["logit"][n], largest, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 3, 5, 40])
def test_statistics_by_blocks_of_queries(monkeypatch, window):
    """Statistics over four blocks, the last one not full, equal those of all logits together."""
    monkeypatch.setattr(attention, "_WATCHED", 3)
    segments_BT = jnp.asarray(packed([[4, 6], [7]], 11)[1])
    q, k = normal(0, 2, 11, 4, 6), normal(1, 2, 11, 2, 6)
    slopes_N = jnp.asarray([0.5, 0.25, 0.125, 0.0625])
    found = attention.attention_statistics(q, k, segments_BT, 0.5, slopes_N, window)

    mask_BTT = references.visible(segments_BT, window)
    logits_BKGTS = attention.attention_logits(q, k, mask_BTT, 0.5, slopes_N)
    p_BKGTS = jax.nn.softmax(logits_BKGTS)
    entropy_BKGT = jax.scipy.special.entr(p_BKGTS).sum(-1)
    real_BT = np.asarray(segments_BT > 0)
    for n in range(4):
        entropy_BT, logits_BTS = entropy_BKGT[:, n // 2, n % 2], logits_BKGTS[:, n // 2, n % 2]
        np.testing.assert_allclose(found["entropy"][n], entropy_BT[real_BT].mean(), rtol=1e-5)
        np.testing.assert_allclose(found["logit"][n], logits_BTS[real_BT].max(), rtol=1e-5)
