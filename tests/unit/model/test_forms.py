"""Tests that the forms of MEA (folded, explicit, absorbed) are equal, for all options.

Each test compares one attention layer with `references.mea`. Tolerances are relative to the
largest entry of the compared array, because entries near zero are sums of large terms.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mea_jax.config.checks import validate
from mea_jax.config.schema import Side, TrainConfig
from mea_jax.generate.decode import serve
from mea_jax.model.attention import Attention
from mea_jax.model.context import Context, Slots
from mea_jax.model.kv_cache import RECENT, CachedLayer, LayerCache, empty_heads
from mea_jax.model.transformer import rope_of, runs_of_equal_layers
from mea_jax.ops import attention
from tests import references
from tests.helpers import apply_logits, change, flat, packed, params_of, tiny_model

# Two or three float32 products of up to 32 terms in a row, in a different order. Gradients of the
# mixing are also sums over all positions.
VALUES, GRADIENTS = 2e-5, 1e-4
ROWS, LENGTH = [[4, 5], [7]], 10  # two documents; padding at both ends of a batch


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_near(found, expected, tolerance):
    """Compare leaf by leaf, relative to the leaf's largest entry.

    The scale is at least 1% of the tree's largest entry, because some leaves vanish (one key head
    with a key norm).
    """
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    sizes = {path: np.abs(want).max() for path, want in expected.items()}
    for path, want in expected.items():
        error = np.abs(np.asarray(found[path], np.float32) - want).max()
        size = max(sizes[path], 0.01 * max(sizes.values()))
        assert error <= tolerance * size, (path, error, size)


def layer_of(model, **options):
    return Attention(
        model, model.components(Side.KEY)[0], model.components(Side.VALUE)[0], **options
    )


def layer_params(model, seed=0):
    """Return a layer's parameters, with mixing far from the identity and norms far from one."""
    stacked = params_of(model, seed, noise=0.3)["layers_0"]["attention"]
    return jax.tree.map(lambda p: jnp.asarray(p[0]), stacked)


def inputs():
    positions_BT, segments_BT = (jnp.asarray(x) for x in packed(ROWS, LENGTH))
    return normal(5, len(ROWS), LENGTH, 32), positions_BT, segments_BT


def trained(model, form):
    """Return the layer in training as a function of parameters and input."""
    _, positions_BT, segments_BT = inputs()
    context = Context(segments_BT, rope_of(model, positions_BT))
    layer = layer_of(change(model, hlc_form=form))
    return lambda params, x: layer.apply({"params": params}, x, context, 0)[0]


def decoded(model, cached_form):
    """Return a function that gives (prefill, steps): the layer with a cache, both (B, T, D).

    Each position is a separate decode step on a copy of the cache after prefill. In the copy, the
    position's slot, all later ones and the recent part contain large numbers. So a step may read
    only earlier slots and what it writes itself.
    """
    x_BTD, positions_BT, segments_BT = inputs()
    b, t, d = x_BTD.shape
    layer = layer_of(model, cached_form=cached_form)
    key, value, scalars = layer.cache_layout()

    def cache_of(batch, length, fill=0.0):
        empty = LayerCache(
            key=empty_heads(key.form, batch, length, key.heads, key.width, model.dtype),
            value=empty_heads(value.form, batch, length, value.heads, value.width, model.dtype),
            inverse_rms_BKS=jnp.zeros((batch, scalars, length)) if scalars else None,
        )
        return jax.tree.map(lambda x: jnp.full_like(x, fill), empty)

    def run(params, x_BTD):
        context = Context(segments_BT, rope_of(model, positions_BT))
        empty = CachedLayer(cache_of(b, t), cache_of(b, RECENT))
        prefilled, stored = layer.apply({"params": params}, x_BTD, context, 0, empty)
        own_R = jnp.tile(jnp.arange(t), b)  # the slot of each of the B T rows
        distance_RS = jnp.arange(t)[None] - own_R[:, None]

        def spoilt(leaf):
            copies = jnp.repeat(leaf, t, axis=0)
            shape = [b * t, *(t if size == t else 1 for size in leaf.shape[1:])]
            return jnp.where(distance_RS.reshape(shape) < 0, copies, jnp.asarray(1e4, leaf.dtype))

        before_RS = attention.visible(segments_BT).reshape(b * t, t) & (distance_RS < 0)
        recent_RS = jnp.broadcast_to(jnp.arange(RECENT)[None], (b * t, RECENT))
        context = Context(
            segments_BT.reshape(b * t, 1),
            rope_of(model, positions_BT.reshape(b * t, 1)),
            slot=jnp.int32(0),
            main=Slots(before_RS, distance_RS),
            recent=Slots(recent_RS == 0, recent_RS),
        )
        spoilt_cache = CachedLayer(jax.tree.map(spoilt, stored.main), cache_of(b * t, RECENT, 1e4))
        rows = x_BTD.reshape(b * t, 1, d)
        steps, _ = layer.apply({"params": params}, rows, context, 0, spoilt_cache)
        return prefilled, steps.reshape(b, t, d)

    return run


@st.composite
def models(draw, key_kind, value_kind, qk_norm):
    composites = draw(st.integers(1, 4))
    hlc = draw(st.sampled_from(["kv", "k", "v"]))
    key, value = "k" in hlc, "v" in hlc
    counts = st.integers(1, composites)
    model = tiny_model(
        n_layers=1,
        n_kv_heads=composites,
        n_heads=composites * draw(st.integers(1, 2)),
        hlc=hlc,
        key_components=draw(counts) if key else None,
        value_components=draw(counts) if value else None,
        key_mixing=key_kind if key else "heads",
        value_mixing=value_kind if value else "heads",
        head_norm=draw(st.booleans()),
        qk_norm=qk_norm,
        hlc_order=draw(st.sampled_from(["before", "after"])) if key else "before",
        positions=draw(st.sampled_from(["rope", "alibi", "none"])),
    )
    validate(TrainConfig(model=model))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("value_kind", ["heads", "dense"])
@pytest.mark.parametrize("key_kind", ["heads", "frequency"])
@pytest.mark.parametrize("qk_norm", [False, True])
@settings(max_examples=2, phases=[Phase.generate])  # an example takes seconds: no shrinking
@given(data=st.data())
def test_every_form_is_the_reference(key_kind, value_kind, qk_norm, data):
    """All forms agree in values, trainable ones in gradients, for any C_k <= K and C_v <= K."""
    assert_every_form_is_the_reference(data.draw(models(key_kind, value_kind, qk_norm)))


BIASED: dict[str, Any] = {"qkv_bias": True, "out_bias": True}
LAYERS: dict[str, dict[str, Any]] = {
    "biases": BIASED | {"key_components": 3, "value_components": 2},
    "biases, complex keys, dense values": BIASED
    | {"key_components": 2, "value_components": 3}
    | {"key_mixing": "frequency", "value_mixing": "dense", "qk_norm": True},
    "biases, mixed after the norm": BIASED
    | {"key_components": 2, "hlc_order": "after", "qk_norm": True, "n_heads": 8},
    "window": {"key_components": 2, "value_components": 1, "window": 3},
    "window of two, ALiBi": {"key_components": 2, "window": 2, "positions": "alibi"},
    "window above the text": {"value_components": 2, "window": 50},
    "norm of all heads": {"qk_norm": True, "qk_norm_over": "all", "hlc": "v"}
    | {"value_components": 2, "n_kv_heads": 2},
    "scaled logits": {"key_components": 2, "attention_scale": 0.7, "window": 4, "gate": "head"},
}


FAST = ("biases, complex keys, dense values", "scaled logits")


@pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(c, marks=pytest.mark.slow) for c in LAYERS if c not in FAST)]
)
def test_options_of_a_layer_reach_every_form(case):
    model = tiny_model(n_layers=1, **LAYERS[case])
    validate(TrainConfig(model=model))
    assert_every_form_is_the_reference(model)


def assert_every_form_is_the_reference(model):
    params, (x, positions_BT, segments_BT) = layer_params(model), inputs()
    weight = normal(6, *x.shape)

    def reference(params, x):
        return references.mea(model, params, x, positions_BT, segments_BT)

    @jax.jit
    def results(params, x):
        trainable = [reference, *(trained(model, form) for form in ("folded", "explicit"))]
        pulled = [jax.vjp(function, params, x) for function in trainable]
        cached = {form: decoded(model, form)(params, x) for form in ("absorbed", "explicit")}
        return [(out, pull(weight)) for out, pull in pulled], cached

    ((expected, gradients), *others), cached = results(params, x)
    for path, gradient in flat(gradients[0]).items():
        assert np.abs(gradient).max() > 0, path
    for found, found_gradients in others:
        assert_near(found, expected, VALUES)
        assert_near(found_gradients, gradients, GRADIENTS)
    for prefilled, steps in cached.values():
        assert_near(prefilled, expected, VALUES)
        assert_near(steps, expected, VALUES)


COMPRESSED: dict[str, Any] = {"n_layers": 1, "key_components": 3, "value_components": 2}
EXTENDED: dict[str, Any] = COMPRESSED | {"key_mixing": "frequency", "value_mixing": "dense"}


@pytest.mark.parametrize("changes", [COMPRESSED, EXTENDED, EXTENDED | {"qk_norm": True}])
def test_bfloat16_products(changes):
    """Every form with bfloat16 products is within 3% of the float32 reference's largest entry.

    Inputs of products are rounded to 8 bits. There are four roundings of 2^-9 in a row (input,
    kernel, keys, weights), summed over 32 terms. The XLA backend cannot run bfloat16 on a CPU.
    """
    model = tiny_model(**changes, backend="cpu", dtype="bfloat16")
    params, (x, positions_BT, segments_BT) = layer_params(model), inputs()
    expected = references.mea(model, params, x, positions_BT, segments_BT)

    @jax.jit
    def results(params, x):
        outs = [trained(model, form)(params, x) for form in ("folded", "explicit")]
        cached = (decoded(model, form)(params, x) for form in ("absorbed", "explicit"))
        return [*outs, *itertools.chain(*cached)]

    for found in results(params, x):
        assert_near(found, expected, 0.03)
        assert np.abs(found - expected).max() > 1e-4 * np.abs(expected).max(), "nothing was rounded"


def outputs(model, params):
    return jax.jit(trained(model, "explicit"))(params, inputs()[0])


@pytest.mark.parametrize("key_mixing", ["heads", "frequency"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_order_of_mixing_and_rotation_matters_only_with_a_key_norm(key_mixing, qk_norm):
    model = tiny_model(**COMPRESSED, key_mixing=key_mixing, qk_norm=qk_norm)
    params = layer_params(model)
    before, after = (outputs(change(model, hlc_order=o), params) for o in ("before", "after"))
    difference = np.abs(before - after).max() / np.abs(before).max()
    if qk_norm:
        assert difference > 0.02
    else:
        assert difference < VALUES


@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
def test_positions_reach_the_layer(positions):
    """Without positions, the order of earlier tokens does not change the output."""
    model = tiny_model(**COMPRESSED, positions=positions)
    x = normal(5, 1, 6, 32)
    swapped = x[:, jnp.asarray([2, 0, 1, 3, 4, 5])]
    segments = jnp.ones((1, 6), jnp.int32)
    context = Context(segments, rope_of(model, jnp.arange(6)[None]))
    params = {"params": layer_params(model)}
    a, b = (layer_of(model).apply(params, y, context, 0)[0][:, -1] for y in (x, swapped))
    difference = np.abs(a - b).max() / np.abs(a).max()
    assert difference < VALUES if positions == "none" else difference > 0.02


# -- export by folding ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"head_norm": False, "key_components": (3, 2), "value_components": 2},
        {"key_components": 2, "key_mixing": "frequency", "value_mixing": "dense"},
        {"key_components": 2, "key_mixing": "frequency", "qk_norm": True},
        {"value_components": 1, "qk_norm": True, "gate": "head"},
        {"key_components": 2, "hlc_order": "after", "tie_embeddings": False},
        BIASED | {"key_components": (3, 2), "window": (4, 0), "layer_thetas": (1e4, 0.0)},
        BIASED | {"key_components": 2, "key_mixing": "frequency", "value_mixing": "dense"},
    ],
)
def test_folding_exports_a_plain_model(changes):
    """`serve(form="folded")` returns kernels of a model without mixing and with equal logits."""
    model = tiny_model(**changes)
    params = params_of(model, noise=0.3)
    served, ready = serve(model, params, "folded")
    assert served.describe() == "direct"
    plain = change(
        model,
        hlc="none",
        hlc_order="before",
        key_components=None,
        value_components=None,
        key_mixing="heads",
        value_mixing="heads",
    )
    validate(TrainConfig(model=plain))
    exported = dict(ready["top"])
    for first, length, _ in runs_of_equal_layers(plain):
        layers = ready["layers"][first : first + length]
        exported[f"layers_{first}"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert not any("mixing" in path for path in flat(exported))
    tokens = np.random.default_rng(0).integers(0, 264, (2, LENGTH), dtype=np.int32)
    expected, found = (
        jax.jit(apply_logits, static_argnums=0)(m, p, tokens, *packed(ROWS, LENGTH))
        for m, p in ((model, params), (plain, exported))
    )
    assert_near(found, expected, 5 * VALUES)  # two layers and the output projection


def test_forms_of_a_cache_are_told_apart():
    """`describe` lists the forms of layers that differ; where C = K, heads are cached directly."""
    model = tiny_model(n_layers=3, key_components=(4, 2, 2), value_components=2)
    params = params_of(model)
    told = {form: serve(model, params, form)[0].describe() for form in ("auto", "folded")}
    assert told == {
        "auto": "keys direct, values absorbed (1 layers); absorbed (2 layers)",
        "folded": "direct",
    }
