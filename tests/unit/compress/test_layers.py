"""Tests of compressed layers in the package's attention.

A model with a compressed layer equals the original with rebuilt keys and values.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.compress import layer as layers
from mea_jax.compress.fisher import Information
from mea_jax.compress.layer import put_heads, split_heads
from mea_jax.compress.methods import METHODS, rebuilt_keys, solve, target_model
from mea_jax.compress.moments import of_weights
from mea_jax.compress.probe import assemble, plain_layer
from mea_jax.compress.repair import sharpened
from mea_jax.errors import UserError
from mea_jax.model.layer_spec import plain_specs
from tests.helpers import PLAIN, apply_logits, assert_close, params_of, tiny_model

QK = PLAIN | {"n_heads": 8, "n_kv_heads": 4, "qk_norm": True}
MODELS = {
    "MHA": PLAIN,
    "GQA": PLAIN | {"n_heads": 8},
    "MEA": {},
    "MEA of two components": {"key_components": 2, "value_components": 3},
    "head norm only": PLAIN | {"head_norm": True},
    "QK-norm": QK,
    "QK-norm, mixed by frequency": QK
    | {"hlc": "kv", "key_mixing": "frequency", "value_mixing": "dense", "key_components": 3},
    "gate": PLAIN | {"gate": "head"},
    "biases, window": {"n_heads": 8, "qkv_bias": True, "out_bias": True, "window": 5},
    "biases, QK-norm": QK | {"qkv_bias": True, "window": 5, "norms": "post"},
}


def one_layer(name):
    model = tiny_model(n_layers=1, **MODELS[name])
    return model, params_of(model, noise=0.3)


def moments_of(heads):
    """Return the moments of white inputs, with keys that have a mean."""
    found = of_weights(heads.query_DNH, heads.key_DKH, heads.value_DKH)
    mean = np.random.default_rng(1).normal(size=len(found.keys))
    return dataclasses.replace(
        found, tokens=1, keys=found.keys + np.outer(mean, mean), key_means=mean
    )


def information_of(heads):
    """Return random positive definite costs."""
    size = heads.key_DKH[0].size
    x, y = np.random.default_rng(2).normal(size=(2, size, 2 * size))
    return Information(x @ x.T, y @ y.T)


def tokens():
    x = np.random.default_rng(3).integers(0, 264, (2, 12), np.int32)
    places = np.broadcast_to(np.arange(12, dtype=np.int32), x.shape)
    return tuple(map(jnp.asarray, (x, places, np.ones_like(x))))


def logits(model, params):
    with jax.default_matmul_precision("highest"):
        return apply_logits(model, params, *tokens())


def compressed(model, params, method, keys_count, values_count):
    tree = jax.tree.map(lambda x: x[0], params["layers_0"])
    heads = split_heads(model, tree["attention"])
    solved = solve(
        method, heads, moments_of(heads), (keys_count, values_count), information_of(heads)
    )
    heads, keys, values = solved.heads, solved.keys, solved.values
    attention = assemble(heads, keys, values, tree["attention"])
    stacked = jax.tree.map(lambda x: np.asarray(x)[None], tree | {"attention": attention})
    target = target_model(model, method, [keys_count], [values_count])
    return target, params | {"layers_0": layers.as_float32(stacked)}, (heads, keys, values, tree)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_all_heads_return_the_model(name, method):
    model, params = one_layer(name)
    target, new, _ = compressed(model, params, method, 4, 4)
    assert_close(logits(target, new), logits(model, params), rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method != "bits"])
@pytest.mark.parametrize("name", ["MHA", "GQA", "MEA", "head norm only", "biases, window"])
def test_a_compressed_layer_is_the_model_with_rebuilt_keys_and_values(name, method):
    """Gauges are folded exactly, including their signs and conjugates."""
    model, params = one_layer(name)
    target, new, (heads, keys, values, tree) = compressed(model, params, method, 2, 3)
    plain = plain_layer(heads, tree)
    put_heads(plain["attention"], "key", rebuilt_keys(heads, keys).astype(np.float32))
    put_heads(plain["attention"], "value", values.rebuilt(heads.value_DKH).astype(np.float32))
    spec = plain_specs(model)[0].model
    stacked = params | {"layers_0": jax.tree.map(lambda x: x[None], plain)}
    wanted = logits(dataclasses.replace(spec, n_layers=1), stacked)
    assert_close(logits(target, new), wanted, rtol=0, atol=1e-4)
    assert np.abs(np.asarray(wanted) - logits(model, params)).max() > 1e-3


@pytest.mark.parametrize("method", ["svd", "frequency"])
@pytest.mark.parametrize("name", ["QK-norm", "biases, QK-norm"])
def test_keys_under_a_norm_are_rebuilt_before_it(name, method):
    """Methods without a gauge are exact with a key norm too, because no weights are tied."""
    model, params = one_layer(name)
    target, new, (heads, keys, _, tree) = compressed(model, params, method, 2, 4)
    plain = plain_layer(heads, tree)
    put_heads(plain["attention"], "key", rebuilt_keys(heads, keys).astype(np.float32))
    stacked = params | {"layers_0": jax.tree.map(lambda x: x[None], plain)}
    spec = dataclasses.replace(plain_specs(model)[0].model, n_layers=1)
    assert_close(logits(target, new), logits(spec, stacked), rtol=0, atol=1e-4)


def test_a_gauge_under_a_norm_is_exact_where_weights_are_alike_in_pairs():
    model, params = one_layer("QK-norm")
    attention = params["layers_0"]["attention"]
    for name in ("query_norm", "key_norm"):
        half = attention[name]["scale"][:, :4]
        attention[name] = {"scale": np.concatenate([half, half], axis=1)}
    target, new, (heads, keys, _, tree) = compressed(model, params, "aligned", 2, 4)
    assert np.abs(keys.gauge - 1).max() > 0.1
    plain = plain_layer(heads, tree)
    plain["attention"] |= {"key": rebuilt_keys(heads, keys).astype(np.float32)}
    stacked = params | {"layers_0": jax.tree.map(lambda x: x[None], plain)}
    spec = dataclasses.replace(plain_specs(model)[0].model, n_layers=1)
    assert_close(logits(target, new), logits(spec, stacked), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["svd", "frequency"])
def test_biases_are_rebuilt_with_their_heads(method):
    """With a bias, a key is affine in the input: components have biases, mixed like the heads."""
    model, params = one_layer("biases, window")
    target, new, (heads, keys, values, _) = compressed(model, params, method, 2, 3)
    attention = jax.tree.map(lambda leaf: leaf[0], new["layers_0"]["attention"])
    assert target.windows() == (5,)
    assert {name: attention[f"{name}_bias"].shape for name in ("query", "key", "value")} == {
        "query": (8, 8),
        "key": (2, 8),
        "value": (3, 8),
    }
    again = split_heads(target, attention)
    rebuilt = rebuilt_keys(heads, keys), values.rebuilt(heads.value_DKH)
    for found_DKH, wanted_DKH in zip((again.key_DKH, again.value_DKH), rebuilt, strict=True):
        assert wanted_DKH.shape == (33, 4, 8)  # the bias is one more row
        np.testing.assert_allclose(found_DKH, wanted_DKH, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["biases, window", "biases, QK-norm"])
def test_a_temperature_multiplies_logits(name):
    """It is the same as another scale of the logits, also with a bias of queries or their norm."""
    model, params = one_layer(name)
    attention = jax.tree.map(lambda x: x[0], params["layers_0"]["attention"])
    sharp = jax.tree.map(lambda x: np.asarray(x)[None], sharpened(attention, 1.3))
    new = params | {"layers_0": params["layers_0"] | {"attention": sharp}}
    scaled = dataclasses.replace(model, attention_scale=1.3 * model.head_dim**-0.5)
    assert_close(logits(model, new), logits(scaled, params), rtol=0, atol=2e-5)
    assert np.abs(np.asarray(logits(model, new)) - logits(model, params)).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": "differential_v2", "hlc": "none", "head_norm": False}, "differential_v2"),
        ({"qk_norm": True, "hlc_order": "after"}, "after their norm"),
        ({"head_dim": 7, "positions": "none"}, "is odd"),
        ({"gate": "feature"}, "--method frequency"),
        ({"qk_norm": True, "qk_norm_over": "all", "hlc": "none"}, r"qk_norm_over='all' \(OLMo 2\)"),
    ],
)
def test_attention_that_no_method_fits_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        target_model(tiny_model(**changes), "aligned", [2, 2], [2, 2])
