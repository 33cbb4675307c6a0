"""Tests of a training step: accumulation, metrics, padding and learning."""

import functools

import jax
import numpy as np
import pytest

from mea_jax.model.params import TrainState
from mea_jax.parallel import sharding
from mea_jax.train.step import abstract_state, compile_eval_step, compile_train_step, create_state
from tests.helpers import assert_close, random_batch

# Very uneven padding. The four microbatches of UNEVEN_BY_PART have 64, 33, 10 and 2 tokens.
UNEVEN = [[32], [20, 9], [7], [1], [32], [4], [3], [1]]
UNEVEN_BY_PART = [[32], [32], [32], [1], [1, 6], [1, 2], [1], [1]]


@functools.cache
def one_device(config):
    """Return (fresh state as numpy, compiled step, mesh), on the first device."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = jax.tree.map(np.asarray, create_state(config, mesh))
    return state, compile_train_step(config, mesh), mesh


def after_one_step(config, batch):
    state, step, mesh = one_device(config)
    with jax.set_mesh(mesh):
        return step(state, batch)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, UNEVEN, UNEVEN_BY_PART])
def test_accumulating_four_parts_equals_one(tiny, rows):
    batch = random_batch(0, batch=8, length=32, vocab=264, rows=rows)
    # Like SGD: with a large eps, Adam's first update is the gradient times a constant. So the
    # parameters depend on the values of the gradients, not only on their signs.
    options = {
        "optimizer.eps": 1e3,
        "optimizer.learning_rate": 1e3,
        "optimizer.clip_norm": 0.0,
        "optimizer.z_loss": 0.1,
        "model.n_layers": 1,
    }
    whole, metrics = after_one_step(tiny(**options), batch)
    parts, metrics4 = after_one_step(tiny(**options, accumulate=4), batch)
    assert float(metrics["tokens"]) == (batch["segment_ids"] > 0).sum()
    # Sums of a few hundred float32 terms in a different order.
    assert_close(metrics, metrics4, rtol=1e-5, atol=0)
    start = one_device(tiny(**options))[0]
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, whole.params, start.params)
    moved4 = jax.tree.map(lambda a, b: np.asarray(a) - b, parts.params, start.params)
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved)) > 1e-2
    assert_close(moved, moved4, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_memorisable_batch_is_memorised(tiny):
    config = tiny(steps=60, **{"optimizer.learning_rate": 1e-2, "optimizer.z_loss": 1e-3})
    batch = random_batch(0, batch=2, length=16, vocab=264)
    state, step, mesh = one_device(config)
    losses = []
    with jax.set_mesh(mesh):
        for _ in range(60):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    # A fresh model is near log(264) = 5.6 nats, but above: with tied embeddings its logits favour
    # the token that it just read.
    assert np.log(264) < losses[0] < np.log(264) + 1.5
    assert losses[-1] < 0.3
    assert int(state.step) == 60


@pytest.mark.slow
def test_z_loss_is_not_in_the_reported_loss(tiny):
    batch = random_batch(0, batch=8, length=32, vocab=264)
    results = [
        after_one_step(tiny(**{"optimizer.z_loss": z, "model.n_layers": 1}), batch)
        for z in (0.0, 0.5)
    ]
    (_, plain), (_, with_z) = results
    assert float(plain["loss"]) == pytest.approx(float(with_z["loss"]), rel=1e-6)
    assert float(plain["grad_norm"]) != pytest.approx(float(with_z["grad_norm"]), rel=1e-2)


def test_metrics_of_a_step(tiny):
    """The metrics agree with the same quantities computed separately."""
    config = tiny(**{"model.n_layers": 1})
    batch = random_batch(0, batch=8, length=32, vocab=264, rows=UNEVEN)
    state, _, mesh = one_device(config)
    with jax.set_mesh(mesh):
        held = compile_eval_step(config, mesh)(state.params, batch)
    squares = sum(float((p**2).sum()) for p in jax.tree.leaves(state.params))
    new, metrics = after_one_step(config, batch)
    assert float(held["tokens"]) == (batch["segment_ids"] > 0).sum() == float(metrics["tokens"])
    assert float(metrics["loss"]) == pytest.approx(float(held["nll"] / held["tokens"]), rel=1e-5)
    assert float(metrics["param_norm"]) == pytest.approx(squares**0.5, rel=1e-5)
    assert float(metrics["learning_rate"]) == pytest.approx(3e-3 / 3)  # 2 steps of warmup
    assert int(new.step) == 1


def test_padding_takes_no_part(tiny):
    """Tokens in padded positions change nothing."""
    config = tiny(**{"model.n_layers": 1})
    batch = random_batch(0, batch=8, length=32, vocab=264, rows=UNEVEN)
    padding = batch["segment_ids"] == 0
    loud = batch | {
        "inputs": np.where(padding, 77, batch["inputs"]).astype(np.int32),
        "targets": np.where(padding, 99, batch["targets"]).astype(np.int32),
    }
    quiet_state, quiet = after_one_step(config, batch)
    loud_state, noisy = after_one_step(config, loud)
    assert_close(quiet, noisy, rtol=1e-6, atol=0)
    assert_close(quiet_state.params, loud_state.params, rtol=1e-5, atol=1e-6)


def test_seed_decides_the_parameters(tiny):
    small = {"model.n_layers": 1}
    mesh = sharding.make_mesh(tiny().mesh, jax.devices()[:1])
    first = one_device(tiny(**small))[0].params["embedding"]
    again = create_state(tiny(**small), mesh).params["embedding"]
    other = create_state(tiny(seed=1, **small), mesh).params["embedding"]
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - np.asarray(other)).max() > 0.01


def test_abstract_state_is_what_create_state_makes(tiny):
    config = tiny(**{"model.n_layers": 1})
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    real, abstract = create_state(config, mesh), abstract_state(config, mesh)
    assert isinstance(abstract, TrainState)

    def describe(x):
        return x.shape, x.dtype, x.sharding

    assert jax.tree.map(describe, real) == jax.tree.map(describe, abstract)
