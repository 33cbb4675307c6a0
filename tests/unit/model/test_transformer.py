"""Tests of the decoder: its baselines, separation of documents, scans, remat and the head."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.config.schema import RopeScaling, Side, layer_configs
from mea_jax.model.context import Context
from mea_jax.model.params import init_params
from mea_jax.model.transformer import Block, Decoder, rope_of, runs_of_equal_layers
from mea_jax.model.variants import make_attention
from mea_jax.ops.rms_norm import rms_norm
from mea_jax.train.step import batch_loss
from tests.helpers import assert_close, change, flat, packed, params_of, random_batch, tiny_model

# Logits of a few units, after two layers of float32 sums in a different order.
TOLERANCE = 2e-4
LENGTH = 16


@functools.cache
def forward(model):
    decoder = Decoder(model)
    return jax.jit(
        lambda params, *inputs: decoder.apply({"params": params}, *inputs, method=Decoder.logits)
    )


def logits(model, params, tokens, rows=None):
    """Return the logits (B, T, V) of `tokens` (B, T), in documents of the lengths `rows`."""
    inputs = packed(rows or [[tokens.shape[1]]] * len(tokens), tokens.shape[1])
    return np.asarray(forward(model)(params, tokens, *inputs))


def tokens_of(seed, batch=2, length=LENGTH):
    return np.random.default_rng(seed).integers(0, 264, (batch, length), dtype=np.int32)


def without_mixing(params):
    """Return the parameters without mixing and head norms."""
    if not isinstance(params, dict):
        return params
    return {
        name: without_mixing(child)
        for name, child in params.items()
        if not name.endswith("_mixing") and name != "head_norm"
    }


@functools.cache
def fresh(**changes):
    return nn.unbox(init_params(tiny_model(**changes), jax.random.key(0)))


HEADS: dict[str, str] = {}
EXTENDED = {"key_mixing": "frequency", "value_mixing": "dense"}


@pytest.mark.slow
@pytest.mark.parametrize(("components", "kinds"), [(4, HEADS), (2, HEADS), (2, EXTENDED)])
@pytest.mark.parametrize("form", ["folded", "explicit"])
def test_fresh_mea_without_head_norm_is_its_baseline(components, kinds, form):
    """With the same weights, C = K is multi-head attention, and C < K is GQA with C groups."""
    counts = {"key_components": components, "value_components": components}
    model = tiny_model(head_norm=False, hlc_form=form, **counts, **kinds)
    params = fresh(head_norm=False, **counts, **kinds)
    baseline = tiny_model(head_norm=False, hlc="none", n_kv_heads=components)
    plain = without_mixing(params)
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(baseline, jax.random.key(0))))
    assert {p: x.shape for p, x in flat(plain).items()} == {
        p: x.shape for p, x in flat(shapes).items()
    }
    tokens = tokens_of(0)
    expected = logits(baseline, plain, tokens)
    assert expected.std() > 0.01
    # Mixing with zeros and ones is exact, but the products are grouped differently.
    np.testing.assert_allclose(logits(model, params, tokens), expected, rtol=1e-4, atol=1e-5)


def test_values_need_no_scale_under_the_head_norm():
    """The head norm divides by the size of a head's output: tripled values change nothing."""
    for head_norm in (True, False):
        model = tiny_model(head_norm=head_norm, norm_eps=1e-12)
        params = params_of(model, noise=0.2)
        tripled = params_of(model, noise=0.2)
        tripled["layers_0"]["attention"]["value"] *= 3
        a, b = (logits(model, p, tokens_of(0)) for p in (params, tripled))
        assert np.allclose(a, b, atol=TOLERANCE) == head_norm


LISTS = {
    "n_layers": 4,
    "key_components": (4, 4, 2, 4),
    "value_components": (2, 2, 2, 3),
}


def test_stretches():
    def runs(**changes) -> list[tuple[int, ...]]:
        found = runs_of_equal_layers(tiny_model(**changes))
        return [
            (first, length, *(layer.components(side)[0] for side in Side))
            for first, length, layer in found
        ]

    assert runs(**LISTS) == [(0, 2, 4, 2), (2, 1, 2, 2), (3, 1, 4, 3)]
    assert runs(n_layers=5) == [(0, 5, 4, 4)]
    windows: dict[str, Any] = {"n_layers": 4, "window": (3, 3, 0, 0)}
    assert runs(**windows) == [(0, 2, 4, 4), (2, 2, 4, 4)]
    windows["layer_thetas"] = (1e4, 1e4, 1e4, 0.0)
    assert runs(**windows) == [(0, 2, 4, 4), (2, 1, 4, 4), (3, 1, 4, 4)]


def test_layers_with_a_window_have_no_scaled_positions_of_their_own():
    """With bases per layer, as in Gemma 3, the scaling is that of layers without a window."""
    scaling = RopeScaling("linear", 8.0)
    model = tiny_model(window=(3, 0), rope_scaling=scaling)
    assert [layer.rope_scaling for layer in layer_configs(model)] == [scaling, scaling]
    model = change(model, layer_thetas=(1e4, 1e6))
    assert [layer.rope_scaling for layer in layer_configs(model)] == [RopeScaling(), scaling]
    assert [layer.rope_theta for layer in layer_configs(model)] == [1e4, 1e6]


# Differential attention's lambda at the start depends on the layer.
SCANNED = {
    "stretches": LISTS,
    "unrolled": LISTS | {"scan_unroll": 4},
    "windows and rotary bases": {
        "n_layers": 4,
        "window": (3, 3, 0, 5),
        "layer_thetas": (1e4, 1e4, 0.0, 5e5),
        "rope_scaling": RopeScaling("linear", 8.0),
        "norms": "both",
        "qkv_bias": True,
        "embedding_scale": 3.0,
    },
    "layers that know their index": {
        "n_layers": 3,
        "variant": "differential_v1",
        "hlc": "none",
        "head_norm": False,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SCANNED)
def test_scanned_stretches_are_a_loop_over_layers(case):
    model = tiny_model(**SCANNED[case])
    params = params_of(model, noise=0.2)
    tokens, (positions_BT, segments_BT) = tokens_of(0), packed([[10, 6], [16]], LENGTH)
    x = model.embedding_scale * jnp.asarray(params["embedding"])[tokens]
    layer = 0
    for first, length, config in runs_of_equal_layers(model):
        key, value = (config.components(side)[0] for side in Side)
        assert config.windows()[0] == model.windows()[layer]
        context = Context(segments_BT, rope_of(config, jnp.asarray(positions_BT)))
        apply = Block(config, key, value).apply
        run = jax.jit(lambda p, x, i, f=apply, c=context: f({"params": p}, x, c, i)[0])
        for i in range(length):
            assert key == model.components(Side.KEY)[layer]
            assert value == model.components(Side.VALUE)[layer]
            own = params[f"layers_{first}"]
            x = run(jax.tree.map(lambda p, i=i: p[i], own), x, layer)
            layer += 1
    assert layer == model.n_layers
    x = rms_norm(x, jnp.asarray(params["final_norm"]["scale"]), model.norm_eps)
    expected = x @ params["embedding"].T
    found = logits(model, params, tokens, [[10, 6], [16]])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("norms", "activation"), [("pre", "silu"), ("post", "gelu"), ("both", "gelu")]
)
@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_a_block_norms_its_halves(norms, activation, backend):
    """A block is two halves, each added to the residual, with a norm before, after or on both."""
    model = tiny_model(n_layers=1, norms=norms, activation=activation, backend=backend)
    params = jax.tree.map(lambda p: jnp.asarray(p[0]), params_of(model, noise=0.3)["layers_0"])
    x = jnp.asarray(np.random.default_rng(5).standard_normal((2, 6, 32)), jnp.float32)
    positions_BT, segments_BT = (jnp.asarray(a) for a in packed([[6], [4]], 6))
    context = Context(segments_BT, rope_of(model, positions_BT))

    def normed(name, x):
        exists = norms in (("both", "post") if "out" in name else ("both", "pre"))
        assert (name in params) == exists
        return rms_norm(x, params[name]["scale"], model.norm_eps) if exists else x

    attention = make_attention(model, 4, 4)
    variables, mlp = {"params": params["attention"]}, params["mlp"]
    out: Any = attention.apply(variables, normed("attention_norm", x), context, 0)
    half = x + normed("attention_out_norm", out[0])
    read = normed("mlp_norm", half)
    gate, up = read @ mlp["gate"], read @ mlp["up"]
    if activation == "silu":
        gate = gate / (1 + jnp.exp(-gate))
    else:  # the tanh form, arXiv 1606.08415
        gate = gate / 2 * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    expected = half + normed("mlp_out_norm", (gate * up) @ mlp["down"])
    found: Any = Block(model, 4, 4).apply({"params": params}, x, context, 0)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=TOLERANCE)


def test_gradients_reach_every_parameter(tiny):
    """Every scale, bias and kernel of a model with all options has a gradient, also in C < K."""
    model = tiny_model(
        n_layers=2,
        key_components=2,
        value_components=2,
        window=(3, 0),
        layer_thetas=(1e4, 5e5),
        qkv_bias=True,
        out_bias=True,
        norms="both",
        qk_norm=True,
        activation="gelu",
        attention_scale=0.5,
        embedding_scale=3.0,
    )
    batch = random_batch(0, 2, LENGTH, 264)
    params = params_of(model, noise=0.2)
    gradient = jax.jit(jax.grad(lambda p: batch_loss(tiny(model=model), p, batch)[0]))(params)
    names = {path.split("/", 1)[-1] for path in flat(gradient)}
    added = {"attention/query_bias", "attention/key_bias", "attention/value_bias"}
    assert added | {"attention/out_bias", "attention_out_norm/scale", "mlp_out_norm/scale"} <= names
    for path, leaf in flat(gradient).items():
        layers = leaf if path.startswith("layers") else leaf[None]
        assert all(np.abs(layer).max() > 1e-7 for layer in layers), path


def test_layers_are_not_all_alike():
    """Each layer of a stretch is initialised separately."""
    params = fresh(head_norm=False, key_components=4, value_components=4)
    key = params["layers_0"]["attention"]["key"]
    assert np.abs(np.asarray(key[0]) - np.asarray(key[1])).max() > 0.05


@pytest.fixture(scope="module")
def mixed():
    """Return a model with C_k < K and C_v < K, and parameters with mixing far from the identity."""
    model = tiny_model(key_components=2, value_components=2)
    return model, params_of(model, noise=0.3)


def test_documents_do_not_see_one_another(mixed):
    """Changing the first document of a window does not change the logits of the second."""
    rows = [[9, 7], [9, 7]]
    tokens = tokens_of(0)
    other = tokens.copy()
    other[:, :9] = tokens_of(1)[:, :9]
    a, b = (logits(mixed[0], mixed[1], t, rows) for t in (tokens, other))
    np.testing.assert_array_equal(a[:, 9:], b[:, 9:])
    assert np.abs(a[:, 8] - b[:, 8]).max() > 0.1


def test_a_packed_document_is_read_as_if_alone(mixed):
    """Its positions start again at zero."""
    tokens = tokens_of(0)
    together = logits(mixed[0], mixed[1], tokens, [[9, 7], [9, 7]])
    shifted = np.concatenate([tokens[:, 9:], tokens[:, :9]], axis=1)
    alone = logits(mixed[0], mixed[1], shifted, [[7, 9], [7, 9]])
    np.testing.assert_allclose(together[:, 9:], alone[:, :7], rtol=1e-3, atol=TOLERANCE)


def test_attention_is_causal(mixed):
    tokens = tokens_of(0)
    before = logits(mixed[0], mixed[1], tokens)
    for t in (0, 7, 15):
        other = tokens.copy()
        other[:, t] = (other[:, t] + 1) % 264
        after = logits(mixed[0], mixed[1], other)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (np.abs(after[:, t:] - before[:, t:]).max(axis=(0, 2)) > 1e-3).all()


def test_padding_stays_finite(mixed):
    assert np.isfinite(logits(mixed[0], mixed[1], tokens_of(0), [[3], [16]])).all()


@functools.cache
def gradient(config):
    grad = jax.value_and_grad(lambda p, b: batch_loss(config, p, b)[0])
    return jax.jit(grad)


@pytest.mark.slow
def test_remat_policies_change_memory_and_nothing_else(tiny):
    batch = random_batch(0, 2, LENGTH, 264)
    params = params_of(tiny().model, noise=0.2)
    results, saved = {}, {}
    for policy in ("none", "dots", "full"):
        config = tiny(**{"model.remat": policy})
        results[policy] = gradient(config)(params, batch)
        _, residuals = jax.eval_shape(
            lambda p, c=config: jax.vjp(lambda q: batch_loss(c, q, batch)[0], p), params
        )
        saved[policy] = sum(x.size for x in jax.tree.leaves(residuals))
    # The recomputed program is the same, but the compiler may fuse it differently.
    for policy in ("dots", "full"):
        assert float(results[policy][0]) == pytest.approx(float(results["none"][0]), rel=1e-6)
        assert_close(results[policy][1], results["none"][1], rtol=1e-4, atol=1e-4)
    assert saved["none"] > 1.5 * saved["dots"] > 1.5 * saved["full"]


def test_tied_and_untied_heads():
    tied = tiny_model()
    untied = change(tied, tie_embeddings=False)
    params = params_of(tied)
    assert "head" not in params
    assert params_of(untied)["head"].shape == (32, 264)
    split = params | {"head": params["embedding"].T}
    tokens = tokens_of(0)
    expected = logits(tied, params, tokens)
    np.testing.assert_allclose(logits(untied, split, tokens), expected, rtol=1e-4, atol=1e-5)
    moved = split | {"head": 2 * split["head"]}
    np.testing.assert_allclose(logits(untied, moved, tokens), 2 * expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close_to_float32():
    model = tiny_model(key_components=2)
    params = params_of(model, noise=0.2)
    exact, low = (
        logits(change(model, dtype=dtype), params, tokens_of(0))
        for dtype in ("float32", "bfloat16")
    )
    assert low.dtype == np.float32
    # Eight bits of mantissa through two layers: a few percent of the spread of the logits.
    assert 0 < np.abs(exact - low).std() < 0.05 * exact.std()


def test_every_parameter_has_logical_axes():
    tree = jax.eval_shape(lambda: init_params(tiny_model(tie_embeddings=False), jax.random.key(0)))
    boxes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
        assert None not in box.names
