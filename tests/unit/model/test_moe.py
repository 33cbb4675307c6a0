"""Tests of mixtures of experts: the dense sum as reference, router losses, an entire model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.config.checks import validate
from mea_jax.config.model_checks import validate_from_scratch
from mea_jax.errors import UserError
from mea_jax.generate import decode
from mea_jax.generate.generator import Decoding, Generator
from mea_jax.model import flops, moe
from mea_jax.model.experts import Experts, Routed, run_experts, run_local_experts
from mea_jax.model.params import abstract_params
from mea_jax.model.transformer import apply_routed
from mea_jax.ops.backend import make_backend
from mea_jax.parallel import sharding
from mea_jax.plan.costs import count
from mea_jax.plan.hlo import parse
from mea_jax.train.optimizer import decay_mask
from mea_jax.train.step import batch_loss, compile_train_step, create_state, reported
from tests.helpers import (
    apply_logits,
    assert_close,
    change,
    flat,
    params_of,
    random_batch,
    tiny_model,
)

EXPERTS: dict[str, Any] = {"n_experts": 4, "experts_per_token": 2, "d_expert": 24}
XLA: Any = make_backend(tiny_model())
CPU: Any = make_backend(tiny_model(backend="cpu"))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# -- the block ------------------------------------------------------------------------------


def dense(x_TD, real_T, router_DE, gate_EDF, up_EDF, down_EFD, k, normalise):
    """Compute all experts for all tokens, weighted by a matrix that is mostly zero."""
    probability_TE = jax.nn.softmax(x_TD @ router_DE)
    weights_Tk, ids_Tk = jax.lax.top_k(probability_TE, k)
    if normalise:
        weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdims=True)
    one_hot_TkE = jax.nn.one_hot(ids_Tk, router_DE.shape[1])
    weights_TE = jnp.einsum("tke,tk->te", one_hot_TkE, weights_Tk) * real_T[:, None]
    gate_TEF = jnp.einsum("td,edf->tef", x_TD, gate_EDF)
    hidden_TEF = jax.nn.silu(gate_TEF) * jnp.einsum("td,edf->tef", x_TD, up_EDF)
    return jnp.einsum("tef,efd,te->td", hidden_TEF, down_EFD, weights_TE)


def arrays_of(model, seed=0):
    """Return (router, experts) of the first layer."""
    mlp = jax.tree.map(lambda x: x[0], params_of(model, seed)["layers_0"]["mlp"])
    return mlp["router"], Experts(mlp["gate"], mlp["up"], mlp["down"])


@pytest.mark.parametrize(
    ("changes", "normalise", "backend"),
    [
        ({"experts_per_token": 3}, False, "xla"),
        ({"n_experts": 7}, True, "cpu"),
    ],
)
def test_a_mixture_is_the_dense_sum(changes, normalise, backend):
    """Values and all gradients agree, with padding, with and without normalised weights."""
    model = tiny_model(**EXPERTS | changes, normalise_router=normalise, backend=backend)
    ids: Any = np.ones((3, 20), np.int32)
    ids[1, 13:], ids[2], x = 0, 0, random(3, 20, 32)
    router, experts = arrays_of(model)
    real = ids.reshape(-1) > 0

    def ours(x, router, experts):
        return moe.mixture(model, x, ids, router, experts)[0]

    def reference(x, router, e):
        k, flat_x = model.experts_per_token, x.reshape(-1, 32)
        y_TD = dense(flat_x, real, router, e.gate_EDF, e.up_EDF, e.down_EFD, k, normalise)
        return y_TD.reshape(x.shape)

    cotangent = random(3, 20, 32, seed=1)
    found, expected = (
        jax.jit(lambda *a, f=f: (y := jax.vjp(f, *a))[0:1] + y[1](cotangent))(x, router, experts)
        for f in (ours, reference)
    )
    # Sums over 24 to 60 numbers in a different order.
    assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert np.all(np.asarray(found[0])[2] == 0), "padding must be zero"


@pytest.mark.parametrize("held", ["all", "few", "none"])
def test_a_share_of_the_experts_takes_whatever_it_is_sent(held):
    """A device with 4 of 16 experts gives their sum, for any number of rounds over its chunks."""
    model = tiny_model(**EXPERTS)
    _, experts = arrays_of(model)
    rng = np.random.default_rng(0)
    low, high = {"all": (0, 4), "few": (0, 16), "none": (4, 16)}[held]
    ids = np.stack([rng.permutation(np.arange(low, high))[:2] for _ in range(48)])
    routed = Routed(jnp.asarray(rng.random((48, 2)), jnp.float32), jnp.asarray(ids))
    x, cotangent = jnp.asarray(random(48, 32)), jnp.asarray(random(48, 32, seed=1))

    def run(function):
        def of(x, weights, experts):
            return function(x, routed._replace(weights_Tk=weights), experts)

        def whole(*arrays):
            y, pull = jax.vjp(of, *arrays)
            return y, pull(cotangent)

        return jax.jit(whole)(x, routed.weights_Tk, experts)

    expected = run(functools.partial(run_experts, XLA))
    assert_close(run(functools.partial(run_local_experts, XLA, 4)), expected, rtol=1e-5, atol=1e-5)
    assert np.any(np.asarray(expected[0])) == (held != "none")


def test_routers_are_served_in_float32():
    """Routers are float32; experts have the dtype of products, like all matrices."""
    model = tiny_model(**EXPERTS, dtype="bfloat16")
    params = jax.eval_shape(lambda p: decode.serve(model, p)[1], params_of(model))
    mlp = params["layers"][0]["mlp"]
    assert {k: str(v.dtype) for k, v in mlp.items()} == {
        "router": "float32",
        "gate": "bfloat16",
        "up": "bfloat16",
        "down": "bfloat16",
    }


def test_the_router_is_float32_below_bfloat16():
    """The router chooses the experts of exact logits; bfloat16 logits would choose others."""
    router, x = random(32, 16, seed=1), random(200, 32).astype(jnp.bfloat16)
    routed, _ = moe.route(x, jnp.ones(200, bool), router, 4, True)
    exact = np.argsort(-(np.asarray(x, np.float64) @ router), axis=1)[:, :4]
    np.testing.assert_array_equal(routed.ids_Tk, exact)
    rounded = jnp.dot(x, router.astype(jnp.bfloat16))
    assert np.any(np.asarray(jax.lax.top_k(rounded, 4)[1]) != exact), "no choice differs"


def test_router_losses_by_hand():
    """The losses are right for three real tokens of four, with two of three experts per token."""
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 5.5, -1.0], [9.0, 9.0, 9.0]])
    real = jnp.array([True, True, True, False])
    routed, sums = moe.route(jnp.asarray(logits, jnp.float32), real, jnp.eye(3), 2, True)
    np.testing.assert_array_equal(routed.ids_Tk, [[0, 1], [1, 2], [1, 0], [3, 3]])
    np.testing.assert_array_equal(sums.chosen_E, [2, 3, 1])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    share, mean = np.array([2, 3, 1]) / 6, p[:3].mean(0)
    np.testing.assert_allclose(sums.load_balance(), 3 * share @ mean, rtol=1e-6)
    z = np.log(np.exp(logits[:3]).sum(1))
    np.testing.assert_allclose(sums.z_loss(), np.mean(z**2), rtol=1e-6)
    assert sums.load_imbalance() == 1.5


# -- a model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tiny):
    optimizer = {"optimizer.load_balance": 0.1, "optimizer.router_z_loss": 0.01}
    return tiny(model=tiny_model(**EXPERTS, loss_chunk=0), **optimizer)


def test_parameters_and_which_of_them_decay(config):
    params = params_of(config.model)
    shapes = {k: v.shape for k, v in flat(params).items() if "/mlp/" in k}
    assert shapes == {
        "layers_0/mlp/router": (2, 32, 4),
        "layers_0/mlp/gate": (2, 4, 32, 24),
        "layers_0/mlp/up": (2, 4, 32, 24),
        "layers_0/mlp/down": (2, 4, 24, 32),
    }
    decays = flat(decay_mask(params, False))
    assert all(decays[name] for name in shapes)


@pytest.mark.slow
def test_objective_has_the_routers_losses(config):
    """The objective adds each router loss times the number of tokens.

    Router losses are means over layers, of the batch's real tokens; padding does not change them.
    """
    params, batch = params_of(config.model), random_batch(0, 4, 32, 264, [[32], [20, 9], [7], [1]])
    assert reported(config, False) == ("load_balance", "router_z", "busiest_expert")
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    _, router = jax.jit(functools.partial(apply_routed, config.model))(params, *inputs)
    assert router.chosen_E.shape == (2, 4)
    np.testing.assert_array_equal(router.chosen_E.sum(1), [2 * 69, 2 * 69])
    loss = jax.jit(functools.partial(batch_loss, config))
    objective, (nll, tokens, balance, z, busiest) = loss(params, batch)
    assert float(tokens) == 69
    np.testing.assert_allclose(balance / tokens, np.mean(router.load_balance()), rtol=1e-6)
    np.testing.assert_allclose(z / tokens, np.mean(router.z_loss()), rtol=1e-6)
    np.testing.assert_allclose(busiest / tokens, np.max(router.load_imbalance()), rtol=1e-6)
    np.testing.assert_allclose(objective, nll + 0.1 * balance + 0.01 * z, rtol=1e-6)
    filled = {name: x.copy() for name, x in batch.items()}
    filled["inputs"][batch["segment_ids"] == 0] = 7  # other tokens in the padding
    assert_close(
        batch_loss(config, params, filled)[1], batch_loss(config, params, batch)[1], 1e-6, 0
    )


@pytest.mark.slow
def test_training_evens_the_load(config):
    """The load-balance loss falls, and the weights of every expert change."""
    config = change(config, **{"optimizer.learning_rate": 1e-2, "optimizer.load_balance": 1.0})
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state = create_state(config, mesh)
    before = jax.device_get(state.params["layers_0"]["mlp"])
    step, seen = compile_train_step(config, mesh), []
    for i in range(8):
        state, metrics = step(state, random_batch(i, 8, 32, 264))
        seen.append({name: float(metrics[name]) for name in (*reported(config, False), "loss")})
    assert seen[-1]["load_balance"] < seen[0]["load_balance"]
    assert all(1 <= values["busiest_expert"] <= 4 for values in seen)
    after = jax.device_get(state.params["layers_0"]["mlp"])
    for name in ("gate", "up", "down"):
        moved = np.abs(after[name] - before[name]).max(axis=(2, 3))
        assert moved.min() > 1e-3, name


@pytest.mark.slow
def test_remat_and_unrolling_change_nothing(config):
    params, batch = params_of(config.model), random_batch(0, 2, 32, 264)

    def gradients(**changes):
        c = change(config, **{f"model.{k}": v for k, v in changes.items()})
        return jax.jit(jax.grad(lambda p: batch_loss(c, p, batch)[0]))(params)

    assert_close(gradients(remat="dots", scan_unroll=2), gradients(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_cached_decoding_is_the_training_forward(config):
    """Greedy tokens with a cache, for prompts of different lengths, equal those of full passes."""
    model, params = config.model, params_of(config.model, noise=0.2)
    prompts = [[5, 9, 200, 31, 7], [17], [3, 1, 4, 1, 5, 9, 2, 6]]
    found = Generator(model, params, length=32).run(prompts, Decoding(6))
    logits = jax.jit(functools.partial(apply_logits, model))
    for prompt, new in zip(prompts, found, strict=True):
        text = prompt + new
        ids = np.zeros((1, 16), np.int32)
        ids[0, : len(text)] = text
        positions = np.arange(16, dtype=np.int32)[None]
        segments = (positions < len(text)).astype(np.int32)
        said = np.asarray(logits(params, ids, positions, segments))[0]
        for i, token in enumerate(new):
            assert token == said[len(prompt) + i - 1].argmax()


# -- FLOPs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_computes_what_is_active(tiny):
    """A compiled step has 1.0 to 1.1 times the FLOPs of the project's convention.

    Loops are multiplied out. The masked half of T x T, which plain einsums compute, is added to the
    convention. A dense sum over the 16 experts would give 3.6.
    """
    shape = {"d_model": 64, "head_dim": 16, "n_layers": 2, "vocab_size": 512}
    experts = {"n_experts": 16, "experts_per_token": 2, "d_expert": 96}
    batch, length = 8, 256
    model = tiny_model(**shape | experts)
    config = tiny(model=model, **{"data.context_length": length})
    rows = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    arrays = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), rows)
    grad = jax.jit(jax.value_and_grad(lambda p, b: batch_loss(config, p, b), has_aux=True))
    text = str(grad.lower(abstract_params(model), arrays).compile().as_text())
    costs = count(parse(text))
    assert not costs.unknown_loops
    pairs = batch * length * length / 2
    masked = 3 * model.n_layers * 2 * 2 * pairs * model.n_heads * model.head_dim
    ratio = costs.flops / (flops.step_flops(model, length, batch * length) + masked)
    assert 1.0 <= ratio < 1.1


def test_active_flops_by_hand():
    """A token's FLOPs are those of the router (D E) and of its two experts (3 D F each)."""
    model = tiny_model(**EXPERTS)
    dense_model = dataclasses.replace(tiny_model(), d_ff=1)
    length = 8
    difference = flops.forward_flops_per_token(model, length) - flops.forward_flops_per_token(
        dense_model, length
    )
    assert difference == 2 * 2 * (32 * 4 + 2 * 3 * 32 * 24 - 3 * 32)


# -- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.n_experts": -1}, r"n_experts=-1 must be positive, or 0"),
        ({"model.n_experts": 4}, r"experts_per_token=0 must be positive with n_experts=4"),
        ({"model.d_expert": 8}, r"d_expert=8 needs experts, but n_experts=0"),
        (
            {"model.n_experts": 4, "model.experts_per_token": 5, "model.d_expert": 8},
            r"experts_per_token=5 exceeds n_experts=4",
        ),
        ({"optimizer.load_balance": 0.1}, r"load_balance=0.1 needs a router"),
        ({"optimizer.router_z_loss": -0.1}, r"router_z_loss=-0.1 must be 0 or more"),
    ],
)
def test_mixtures_that_cannot_be(tiny, changes, message):
    with pytest.raises(UserError, match=message):
        validate(tiny(**changes))


def test_a_router_that_would_not_learn_is_refused():
    model = tiny_model(**EXPERTS | {"experts_per_token": 1})
    with pytest.raises(UserError, match=r"normalise_router=True with experts_per_token=1"):
        validate_from_scratch(model)
    validate_from_scratch(dataclasses.replace(model, normalise_router=False))
