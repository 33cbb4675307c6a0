"""Tests of the attention variants: each agrees with its definition and its paper's start."""

import math
import types
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.config.checks import validate
from mea_jax.config.model_checks import validate_from_scratch
from mea_jax.config.schema import Side, TrainConfig
from mea_jax.errors import UserError
from mea_jax.model.context import Context
from mea_jax.model.transformer import rope_of
from mea_jax.model.variants import lambda_init, make_attention
from mea_jax.ops import attention
from mea_jax.ops.resolve import resolve
from tests import references
from tests.helpers import ATTENTIONS, PLAIN, change, flat, packed, params_of, tiny_model
from tests.references import logits_of, maps_of, rotated, weighted

V1, V2 = PLAIN | {"variant": "differential_v1"}, PLAIN | {"variant": "differential_v2"}
TALKING = PLAIN | {"variant": "talking_heads"}
COLLABORATIVE = PLAIN | {"variant": "collaborative"}
LENGTH, LAYER = 10, 3


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layer_params(model, seed=0):
    stacked = params_of(model, seed, noise=0.3)["layers_0"]["attention"]
    return jax.tree.map(lambda p: jnp.asarray(p[0]), stacked)


def inputs(model):
    positions_BT, segments_BT = (jnp.asarray(x) for x in packed([[4, 5], [7]], LENGTH))
    return normal(5, 2, LENGTH, model.d_model), positions_BT, segments_BT


def layer(model, index=LAYER):
    """Return the attention layer as a function of parameters and input."""
    _, positions_BT, segments_BT = inputs(model)
    context = Context(segments_BT, rope_of(model, positions_BT))
    module = make_attention(model, model.components(Side.KEY)[0], model.components(Side.VALUE)[0])
    return lambda params, x: module.apply({"params": params}, x, context, index)[0]


# -- definitions (shared/facts/variants.md), head by head -------------------------------------


def project(x_BTD, kernel_DNH):
    return jnp.einsum("btd,dnh->btnh", x_BTD, kernel_DNH)


def residual(o_BTNW, params):
    return jnp.einsum("btnw,nwd->btd", o_BTNW, params["out"])


def differential_v1(model, params, x, positions, segments):
    """Compute N / 2 heads, each a pair of maps over values of width 2H; one lambda per layer."""
    q, k = (rotated(model, project(x, params[name]), positions) for name in ("query", "key"))
    v = project(x, params["value"])
    pairs, key_pairs = model.n_heads // 2, model.n_kv_heads // 2
    start = 0.8 - 0.6 * math.exp(-0.3 * LAYER)
    lam = jnp.exp(params["lambda_q1"] @ params["lambda_k1"])
    lam = lam - jnp.exp(params["lambda_q2"] @ params["lambda_k2"]) + start
    slopes = [2 ** (-8 * (p + 1) / pairs) for p in range(pairs)]
    heads = []
    for p in range(pairs):
        shared = p // (pairs // key_pairs)
        first, second = (
            maps_of(
                logits_of(
                    model,
                    q[:, :, 2 * p + i][:, :, None],
                    k[:, :, 2 * shared + i][:, :, None],
                    slopes[p : p + 1],
                ),
                segments,
                model.windows()[0],
            )
            for i in (0, 1)
        )
        heads.append(weighted(first - lam * second, v[:, :, shared][:, :, None]))
    o = jnp.concatenate(heads, axis=2)
    o = o / references.rms(o, 1e-5) * references.along_last(params["head_norm"]["scale"], o)
    return residual(o * (1 - start), params)


def differential_v2(model, params, x, positions, segments):
    """Compute 2N query heads with shared keys and values; a gate per token and head, no norm."""
    q, k = (rotated(model, project(x, params[name]), positions) for name in ("query", "key"))
    slopes = [2 ** (-8 * (i // 2 + 1) / model.n_heads) for i in range(2 * model.n_heads)]
    maps = maps_of(logits_of(model, q, k, slopes), segments, model.windows()[0])
    o = weighted(maps, project(x, params["value"]))
    gate = jax.nn.sigmoid(project(x, params["subtraction_gate"]))
    return residual(o[:, :, 0::2] - gate * o[:, :, 1::2], params)


def talking_heads(model, params, x, positions, segments):
    """Mix the logits of all heads before the softmax and the probabilities after it."""
    q, k = (rotated(model, project(x, params[name]), positions) for name in ("query", "key"))
    logits = jnp.einsum("bnts,nm->bmts", logits_of(model, q, k), params["logit_mixing"])
    maps = jnp.einsum("bnts,nm->bmts", maps_of(logits, segments), params["probability_mixing"])
    return residual(weighted(maps, project(x, params["value"])), params)


def collaborative(model, params, x, positions, segments):
    """Score head n by (Q diag(m_n)) K^T with shared Q and K; rotary pairs are within H features."""
    q, k = project(x, params["query"]), project(x, params["key"])
    k = rotated(model, k, positions)
    scores = []
    for n in range(model.n_heads):
        own = rotated(model, q * params["query_mixing"][n][None, None], positions)
        scores.append(jnp.einsum("btch,bsch->bts", own, k) / model.head_dim**0.5)
    maps = maps_of(jnp.stack(scores, axis=1), segments, model.windows()[0])
    return residual(weighted(maps, project(x, params["value"])), params)


DEFINITIONS = {
    "mea": references.mea,
    "differential_v1": differential_v1,
    "differential_v2": differential_v2,
    "talking_heads": talking_heads,
    "collaborative": collaborative,
}
ALIBI: dict[str, dict[str, Any]] = {
    f"{name}, ALiBi": changes | {"positions": "alibi"}
    for name, changes in ATTENTIONS.items()
    if name.startswith(("differential", "talking"))
}


# `test_attention` compares MHA, GQA, MQA and MEA with the same reference.
OTHERS = {n: c for n, c in ATTENTIONS.items() if n not in ("MHA", "GQA", "MQA") and "MEA" not in n}
WINDOWS: dict[str, dict[str, Any]] = {
    f"{name}, window": ATTENTIONS[name] | {"window": 3}
    for name in ("differential V1", "differential V2", "collaborative")
}


@pytest.mark.parametrize("name", OTHERS | ALIBI | WINDOWS)
def test_variant_is_its_definition(name):
    """Values and gradients of all parameters and of the input agree.

    The tolerance is relative to the largest entry, for float32 sums of up to 32 terms.
    """
    model = tiny_model(n_layers=1, **(ATTENTIONS | ALIBI | WINDOWS)[name])
    reference = DEFINITIONS[model.variant]
    validate(TrainConfig(model=model))
    params, (x, positions, segments) = layer_params(model), inputs(model)
    weight = normal(6, *x.shape)

    @jax.jit
    def results(params, x):
        functions = (lambda p, y: reference(model, p, y, positions, segments), layer(model))
        pulled = [jax.vjp(function, params, x) for function in functions]
        return [(out, pull(weight)) for out, pull in pulled]

    expected, found = (flat(result) for result in results(params, x))
    assert found.keys() == expected.keys()
    for path, want in expected.items():
        error = np.abs(np.asarray(found[path]) - want).max()
        assert error <= (1e-4 if path.startswith("1") else 2e-5) * np.abs(want).max(), path


@pytest.mark.slow
def test_differential_v1_is_a_case_of_talking_heads():
    """Talking heads with rows {1, -lambda} after the softmax, and a norm, give differential V1.

    The values of pair p are those of heads 2p and 2p + 1.
    """
    model = tiny_model(n_layers=1, **V1)
    params, (x, positions, segments) = layer_params(model), inputs(model)
    q, k = (rotated(model, project(x, params[name]), positions) for name in ("query", "key"))
    v_BTNH = project(x, params["value"]).reshape(2, LENGTH, 4, 8)
    start = 0.8 - 0.6 * math.exp(-0.3 * LAYER)
    lam = float(
        jnp.exp(params["lambda_q1"] @ params["lambda_k1"])
        - jnp.exp(params["lambda_q2"] @ params["lambda_k2"])
        + start
    )
    after_NN = np.kron(np.eye(2), [[1, 1], [-lam, -lam]]).astype(np.float32)
    o_BTNH = attention.talking_heads_attention(
        q, k, v_BTNH, segments, 8**-0.5, jnp.eye(4), jnp.asarray(after_NN)
    )
    o = o_BTNH.reshape(2, LENGTH, 2, 16)
    o = o / references.rms(o, 1e-5) * references.along_last(params["head_norm"]["scale"], o)
    expected = residual(o * (1 - start), params)
    found = layer(model)(params, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# -- at initialisation ------------------------------------------------------------------------


def fresh(model, index=LAYER):
    """Return a layer's parameters as it initialises them."""
    _, positions_BT, segments_BT = inputs(model)
    context = Context(segments_BT, rope_of(model, positions_BT))
    module = make_attention(model, model.components(Side.KEY)[0], model.components(Side.VALUE)[0])
    variables = module.init(jax.random.key(0), inputs(model)[0], context, index)
    return {path: leaf.value for path, leaf in flat_boxes(variables["params"]).items()}


def flat_boxes(tree):
    is_box = lambda x: hasattr(x, "names")  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


PROJECTIONS = {"query", "key", "value", "out"}
TREES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "MHA": (PLAIN, set()),
    "MEA": ({}, {"key_mixing", "value_mixing", "head_norm/scale"}),
    "key norm and gate": (
        PLAIN | {"qk_norm": True, "gate": "head"},
        {"query_norm/scale", "key_norm/scale", "output_gate"},
    ),
    "differential V1": (
        V1,
        {"lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "head_norm/scale"},
    ),
    "differential V2": (V2, {"subtraction_gate"}),
    "talking heads": (TALKING, {"logit_mixing", "probability_mixing"}),
    "collaborative": (COLLABORATIVE, {"query_mixing"}),
}


@pytest.mark.parametrize("name", TREES)
def test_a_variant_holds_nothing_of_the_others(name):
    changes, own = TREES[name]
    assert set(flat(layer_params(tiny_model(n_layers=1, **changes)))) == PROJECTIONS | own


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"head_norm": False}, TALKING, COLLABORATIVE],
    ids=["MEA", "talking", "collaborative"],
)
def test_starts_as_multi_head_attention(changes):
    """The outputs are equal with the same four projections: mixing starts as the identity."""
    model, plain = (tiny_model(n_layers=1, **c) for c in (changes, PLAIN))
    params, x = fresh(model), inputs(model)[0]
    projections = {name: params[name] for name in PROJECTIONS}
    found, expected = layer(model)(params, x), layer(plain)(projections, x)
    # Collaborative logits are sums over the features of all heads; those of other heads are zero.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.slow
def test_differential_v1_starts_at_its_layers_lambda():
    """Lambda starts as 0.8 - 0.6 exp(-0.3 layer).

    The four vectors are N(0, 0.1), and their exponentials cancel.
    """
    model = tiny_model(n_layers=1, head_dim=64, **V1)
    params = fresh(model)
    for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
        assert np.asarray(params[name]).std() == pytest.approx(0.1, rel=0.3)  # of 64 draws
    known = {0: 0.2, 1: 0.8 - 0.6 * math.exp(-0.3), 11: 0.8 - 0.6 * math.exp(-3.3)}
    assert {i: float(lambda_init(i)) for i in known} == pytest.approx(known, rel=1e-6)


def test_layers_index_reaches_differential_v1():
    """The layer's index changes its output; `test_transformer` tests the scanned stack."""
    model = tiny_model(n_layers=1, **V1)
    params, x = layer_params(model), inputs(model)[0]
    first, later = layer(model, 0)(params, x), layer(model, 5)(params, x)
    assert np.abs(first - later).max() > 0.1 * np.abs(first).max()


@pytest.mark.slow
def test_collaborative_starts_from_any_number_of_shared_keys():
    """With three shared keys for four heads, each head reads one key, and every key is read."""
    model = tiny_model(n_layers=1, key_components=3, **COLLABORATIVE)
    validate(TrainConfig(model=model))
    validate_from_scratch(model)
    params, (x, positions, segments) = fresh(model), inputs(model)
    rows_NC = params["query_mixing"].mean(axis=2)
    np.testing.assert_array_equal(rows_NC, np.eye(3)[[0, 0, 1, 2]])
    np.testing.assert_allclose(
        layer(model)(params, x),
        collaborative(model, params, x, positions, segments),
        rtol=0,
        atol=1e-5,
    )
    with pytest.raises(UserError, match=r"key_components=3 .* does not divide n_kv_heads=4"):
        validate_from_scratch(tiny_model(key_components=3))


# -- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (V1 | {"n_heads": 3, "n_kv_heads": 3}, r"n_heads=3 must be even"),
        (V1 | {"n_heads": 6, "n_kv_heads": 3}, r"n_kv_heads=3 must be even"),
        (V2 | {"hlc": "kv"}, r"hlc='kv' belongs to variant 'mea', but variant='differential_v2'"),
        (TALKING | {"head_norm": True}, r"head_norm=True belongs to .*: set head_norm to False"),
        (COLLABORATIVE | {"qk_norm": True}, r"qk_norm=True belongs to variant 'mea'"),
        (V1 | {"gate": "head"}, r"gate='head' belongs to variant 'mea'"),
        (PLAIN | {"variant": "differential"}, r"variant='differential': did you mean 'differen"),
        (TALKING | {"key_components": 2}, r"key_components=2 .* is below n_kv_heads=4"),
        (COLLABORATIVE | {"value_components": 2}, r"value_components=2 .* is below n_kv_heads=4"),
        ({"gate": "token"}, r"gate='token': "),
        ({"positions": "learned"}, r"max_positions=0 with positions='learned'"),
        ({"max_positions": 64}, r"max_positions=64 with positions='rope'"),
        ({"positions": "rotary"}, r"positions='rotary': "),
        (PLAIN | {"key_mixing": "frequency"}, r"key_mixing='frequency' needs mixing of keys"),
        ({"hlc": "k", "value_mixing": "dense"}, r"value_mixing='dense' needs mixing of values"),
        ({"key_mixing": "dense"}, r"key_mixing='dense': "),
        ({"hlc": "v", "hlc_order": "after"}, r"hlc_order='after' needs mixing of keys"),
        ({"attention_kernel": "flash"}, r"attention_kernel='flash': "),
        (TALKING | {"attention_kernel": "splash"}, r"'splash' cannot run talking_heads"),
        (TALKING | {"attention_kernel": "chunked"}, r"'chunked' cannot run talking_heads"),
    ],
)
def test_variants_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message) as error:
        validate(TrainConfig(model=tiny_model(**changes)))
    assert str(error.value).startswith("config.model.")
    assert "\n" not in str(error.value)


def test_a_table_of_positions_shorter_than_a_window():
    model = tiny_model(positions="learned", max_positions=32)
    config = change(TrainConfig(model=model), **{"data.context_length": 33})
    validate(change(config, **{"data.context_length": 32}))
    with pytest.raises(UserError, match=r"max_positions=32 is below data\.context_length=33"):
        validate(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_kernel": "cudnn"}, r"attention_kernel='cudnn' .* needs an NVIDIA GPU"),
        ({"attention_kernel": "splash"}, r"attention_kernel='splash' .* needs a TPU"),
        (
            {"attention_kernel": "cpu", "backend": "cpu", "positions": "alibi"},
            r"attention_kernel='cpu' .* takes no biases",
        ),
        (
            {"attention_kernel": "cpu", "backend": "xla"},
            r"attention_kernel='cpu' .* belongs to backend='cpu'",
        ),
        ({"backend": "xla", "dtype": "bfloat16"}, r"dtype='bfloat16' with backend='xla' fails"),
    ],
)
def test_what_this_machine_has_not_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as error:
        resolve(tiny_model(**changes), jax.devices(), 64)
    assert str(error.value).startswith("config.model.")
    assert "\n" not in str(error.value)


def test_kernels_by_length_and_positions():
    """CPU devices use the "cpu" kernel up to 8,192 positions, without biases.

    Otherwise "einsum" (T x T) up to 1,024 positions, then "chunked".
    """

    def kernel(length, **changes):
        model = tiny_model(**{"backend": "cpu"} | changes)
        return resolve(model, jax.devices(), length).attention_kernel

    assert kernel(64) == kernel(8192) == "cpu"
    assert kernel(8193) == "chunked"
    assert kernel(64, positions="alibi") == kernel(1024, backend="xla") == "einsum"
    assert kernel(1025, positions="alibi") == kernel(1025, backend="xla") == "chunked"
    assert kernel(64, attention_kernel="chunked") == "chunked"


def test_kernels_of_accelerators():
    """Accelerators use flash kernels where they apply.

    cuDNN's mask of segments is T x T, so long windows do not use it.
    """

    def kernel(platform, length, **changes):
        model = tiny_model(**{"backend": "auto", "dtype": "auto"} | changes)
        devices = cast(Any, [types.SimpleNamespace(platform=platform)])
        return resolve(model, devices, length).attention_kernel

    assert kernel("tpu", 64) == kernel("tpu", 32768) == "splash"
    assert kernel("gpu", 64) == kernel("gpu", 8192) == "cudnn"
    assert kernel("gpu", 32768) == kernel("tpu", 32768, positions="alibi") == "chunked"
    assert kernel("gpu", 64, dtype="float32") == kernel("gpu", 64, positions="alibi") == "einsum"
