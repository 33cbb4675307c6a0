"""Composite heads rebuilt into full projections, and compressed models in both exported forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mea_jax.checkpoint.load import load as load_run
from mea_jax.compress import methods
from mea_jax.compress.layer import split_heads
from mea_jax.compress.moments import of_weights
from mea_jax.compress.options import Options
from mea_jax.compress.probe import assemble
from mea_jax.compress.run import compress
from mea_jax.config.schema import Side
from mea_jax.convert import composite
from mea_jax.convert.exporting import export_model
from mea_jax.errors import UserError
from mea_jax.train.run import train
from tests.helpers import GROUPED, PLAIN, apply_logits, params_of, tiny_model
from tests.system.convert.exported_mea import layers_of, load, save

FREQUENCY = {"key_mixing": "frequency", "value_mixing": "dense", "head_norm": False}
CASES: dict[str, dict[str, Any]] = {
    "plain already": PLAIN | {"qk_norm": True},
    "C per layer": GROUPED
    | {"key_components": (1, 2), "value_components": (3, 2), "head_norm": False},
    "keys alone": {"hlc": "k", "key_components": 3, "head_norm": False},
    "values alone, key norm": {"hlc": "v", "head_norm": False, "qk_norm": True},
    "key norm": {"key_components": 2, "head_norm": False, "qk_norm": True},
    "complex keys, dense values": FREQUENCY | GROUPED | {"key_components": 3},
    "complex keys, key norm": FREQUENCY | {"key_components": 2, "qk_norm": True},
    "biases": {"qkv_bias": True, "out_bias": True, "key_components": 2, "head_norm": False},
    "complex keys, key norm, biases": FREQUENCY
    | {"key_components": 2, "qk_norm": True, "qkv_bias": True},
    "mixed after rotation": {"hlc_order": "after", "key_components": 2, "head_norm": False},
}
LOGITS = jax.jit(apply_logits, static_argnums=0)


def logits_of(model, params):
    tokens = np.random.default_rng(0).integers(0, 264, (2, 12), np.int32)
    places = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    arrays = map(jnp.asarray, (tokens, places, np.ones_like(tokens)))
    return tokens, np.asarray(LOGITS(model, params, *arrays))


def stacked(params, layers):
    """Return the parameters of the model with `layers`, which have equal shapes, as its layers."""
    top = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    return top | {"layers_0": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}


def rebuilt(model, params):
    """Rebuild all layers with `composite.rebuild`; return the new config and parameters."""
    pairs = [composite.rebuild(model, layer) for layer in layers_of(model, params)]
    assert len({target for target, _ in pairs}) == 1
    return pairs[0][0], stacked(params, [layer for _, layer in pairs])


@pytest.mark.parametrize("name", CASES)
def test_rebuilt_heads_are_the_same_function(name):
    """The result is plain attention with K full key heads, no mixing, and the same logits."""
    model = tiny_model(**CASES[name])
    params = params_of(model, noise=0.3)
    target, new = rebuilt(model, params)
    assert target.hlc == "none"
    assert not any("mixing" in part for part in new["layers_0"]["attention"])
    assert new["layers_0"]["attention"]["key"].shape == (2, 32, model.n_kv_heads, 8)
    (_, before), (_, after) = logits_of(model, params), logits_of(target, new)
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "head_norm"),
        ({"head_norm": False, "gate": "head"}, "gate='head'"),
        ({"head_norm": False, "positions": "alibi"}, "'alibi'"),
        ({"head_norm": False, "qk_norm": True, "hlc_order": "after"}, "hlc_order='after'"),
    ],
)
def test_what_no_stock_class_holds_is_refused(changes, said):
    """The error names the unsupported option and the form that supports it."""
    model = tiny_model(**changes)
    with pytest.raises(UserError) as error:
        composite.rebuild(model, {})
    assert said in str(error.value)
    assert "--form mea" in str(error.value)
    assert composite.mea_config(model)["model_type"] == "mea"


def test_a_norm_that_hides_features_is_refused():
    """A key norm with a weight of zero cannot be divided out of the keys."""
    model = tiny_model(**CASES["complex keys, key norm"])
    layer = layers_of(model, params_of(model))[0]
    layer["attention"]["key_norm"]["scale"] = np.array([1, 1, 0, 1, 1, 1, 1, 1], np.float32)
    with pytest.raises(UserError, match="1 weights of a key norm are 0"):
        composite.rebuild(model, layer)


def test_baseline_variants_are_refused():
    model = tiny_model(**PLAIN, variant="talking_heads")
    for refused in (composite.mea_config, composite.check_rebuildable):
        with pytest.raises(UserError, match="'talking_heads'"):
            refused(model)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Train a model with Qwen3's attention, two layers and four heads; return its folder."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    changes = {f"model.{name}": value for name, value in (PLAIN | {"qk_norm": True}).items()}
    train(tiny(steps=8, **changes), workdir)
    return workdir


@torch.no_grad()
def test_a_compressed_model_leaves_in_both_forms(run, devices, tmp_path):
    """A model with half the cache has the same logits in modeling_mea.py and as Qwen3."""
    devices(1)
    sizes: dict[str, Any] = {
        "calibration_tokens": 512,
        "measure_tokens": 256,
        "held_out_tokens": 512,
    }
    options = Options(**sizes, dtype="float32", method="aligned", budget="measured")
    compress(run, tmp_path / "half", options)
    model, params, _, _ = load_run(tmp_path / "half", dtype="float32")
    assert sum(model.components(Side.KEY) + model.components(Side.VALUE)) < 16
    tokens, ours = logits_of(model, params)
    classes = {"mea": "MEAForCausalLM", "stock": "Qwen3ForCausalLM"}
    for form, name in classes.items():
        export_model(tmp_path / "half", tmp_path / form, print, form=form)
        exported = load(tmp_path / form)
        assert type(exported).__name__ == name
        theirs = exported(input_ids=torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)


@torch.no_grad()
def test_complex_keys_of_a_compressed_model(tmp_path):
    """With a key norm, the method "frequency" gives the same logits in torch and rebuilt."""
    model = tiny_model(**PLAIN, qk_norm=True)
    params = params_of(model, noise=0.3)
    layers = layers_of(model, params)
    for layer in layers:
        heads = split_heads(model, layer["attention"])
        moments = of_weights(heads.query_DNH, heads.key_DKH, heads.value_DKH)
        keys = methods.solve_keys("frequency", heads, moments, 2)
        values = methods.solve_values("frequency", heads, moments, 1)
        layer["attention"] = assemble(heads, keys, values, layer["attention"])
    half, params = methods.target_model(model, "frequency", [2, 2], [1, 1]), stacked(params, layers)
    tokens, ours = logits_of(half, params)
    exported = load(save(half, params, tmp_path / "model"))
    theirs = exported(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits_of(*rebuilt(half, params))[1], ours, rtol=0, atol=2e-5)
