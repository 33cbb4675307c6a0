"""Tests of the learning-rate schedules, weight decay and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mea_jax.config.schema import OptimizerConfig
from mea_jax.train.optimizer import make_optimizer, make_schedule
from tests.helpers import flat, params_of, tiny_model


def schedule(steps=100, **options):
    made = make_schedule(OptimizerConfig(learning_rate=2.0, **options), steps)
    return lambda step: float(made(jnp.asarray(step)))


# Schedules are computed in float32.
def near(value):
    return pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
def test_warmup_rises_linearly_and_moves_at_once(name):
    rate = schedule(schedule=name, warmup_steps=10)
    for step in range(11):
        assert rate(step) == near(2.0 * (step + 1) / 11)


def test_cosine():
    rate = schedule(warmup_steps=20, final_fraction=0.1)
    assert rate(20) == near(2.0)
    assert rate(60) == near(2.0 * (0.1 + 0.9 / 2))  # halfway: the mean of both ends
    assert rate(40) == near(2.0 * (0.1 + 0.9 * (1 + 2**-0.5) / 2))  # cos(pi / 4)
    assert rate(100) == near(0.2)
    assert rate(1000) == near(0.2)


def test_constant():
    rate = schedule(schedule="constant", warmup_steps=5)
    assert rate(5) == rate(50) == rate(99) == near(2.0)


def test_warmup_stable_decay():
    rate = schedule(schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.1)
    assert rate(10) == rate(45) == rate(80) == near(2.0)
    assert rate(90) == near(2.0 * 0.55)
    assert rate(100) == near(0.2)


def test_no_warmup_starts_at_the_peak():
    assert schedule(warmup_steps=0)(0) == near(2.0)


@given(
    name=st.sampled_from(["cosine", "constant", "wsd"]),
    steps=st.integers(2, 300),
    warmup=st.integers(0, 299),
    final=st.sampled_from([0.0, 0.1, 1.0]),
    fraction=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_schedule_peaks_after_warmup_and_never_rises_again(
    name, steps, warmup, final, fraction
):
    warmup = min(warmup, steps - 1)
    config = OptimizerConfig(
        learning_rate=1.0,
        schedule=name,
        warmup_steps=warmup,
        final_fraction=final,
        decay_fraction=fraction,
    )
    every = jnp.minimum(jnp.arange(301), steps)  # one shape, for fewer compilations
    rates = np.broadcast_to(make_schedule(config, steps)(every), every.shape)
    assert (rates > 0).all() or final == 0
    assert (np.diff(rates[: warmup + 1]) > 0).all()
    assert rates[warmup] == near(1.0)
    assert (np.diff(rates[warmup:]) <= 1e-6).all()
    assert rates[-1] == near(1.0 if name == "constant" else final)


def update(config, gradient, params):
    optimizer = make_optimizer(config, 100)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    return flat(updates)


@pytest.mark.parametrize("decay_mixing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_decay_moves_matrices_only(decay_mixing, tied):
    """With gradients of zero, only weight decay changes a leaf."""
    config = OptimizerConfig(
        learning_rate=0.5, warmup_steps=0, weight_decay=0.1, decay_mixing=decay_mixing
    )
    model = tiny_model(tie_embeddings=tied, qkv_bias=True, out_bias=True, norms="both")
    params = params_of(model, noise=0.1)
    moved = update(config, jax.tree.map(np.zeros_like, params), params)
    for path, leaf in flat(params).items():
        name = path.split("/")[-1]
        decays = name != "scale" and "bias" not in name and (decay_mixing or "mixing" not in name)
        expected = -0.5 * 0.1 * leaf if decays else 0 * leaf
        np.testing.assert_allclose(moved[path], expected, rtol=1e-6, err_msg=path)
    kinds = {path.split("/")[-1] for path in moved}
    assert {"scale", "key_mixing", "embedding", "query", "down"} <= kinds
    assert {"query_bias", "key_bias", "value_bias", "out_bias"} <= kinds
    assert ("head" in kinds) != tied


def test_first_step_of_adam_is_the_sign_of_the_gradient():
    config = OptimizerConfig(
        learning_rate=0.5, warmup_steps=0, weight_decay=0.0, clip_norm=0.0, eps=1e-12
    )
    gradient = {"x": jnp.array([3.0, -0.01, 1e-4])}
    moved = update(config, gradient, {"x": jnp.ones(3)})["x"]
    np.testing.assert_allclose(moved, [-0.5, 0.5, -0.5], rtol=1e-4)


def moments(config, gradient):
    optimizer = make_optimizer(config, 100)
    params = jax.tree.map(jnp.ones_like, gradient)
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    return optax.tree_utils.tree_get(state, "mu")


@pytest.mark.parametrize(("clip", "factor"), [(1.0, 1 / 13), (26.0, 1.0), (0.0, 1.0)])
def test_clipping_is_by_the_global_norm(clip, factor):
    """The gradient below has norm 13 over both leaves; zero means no clipping."""
    gradient = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]])}
    mu = moments(OptimizerConfig(clip_norm=clip, b1=0.9), gradient)
    for name, g in gradient.items():
        np.testing.assert_allclose(mu[name], 0.1 * factor * g, rtol=1e-5)
