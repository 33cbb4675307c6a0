"""Tests that an update with a gradient that is not finite is skipped without other changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mea_jax.model.params import TrainState
from mea_jax.parallel import sharding
from mea_jax.train import step as train_step
from mea_jax.train.optimizer import make_optimizer
from mea_jax.train.step import create_state
from tests.helpers import assert_equal, change, flat, random_batch

BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "overflow": 3e38}
GOOD = random_batch(0, batch=4, length=16, vocab=264)
OTHER = random_batch(1, batch=4, length=16, vocab=264)
PADDING = random_batch(2, batch=4, length=16, vocab=264, rows=[[]] * 4)


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["no clipping", "clipping"])
def config(tiny, request):
    return tiny(**{"model.n_layers": 1, "optimizer.clip_norm": request.param})


@functools.cache
def compiled(config):
    """Return (state after two steps as numpy, compiled step), on the first device.

    The gradient of a marked batch has one of `BAD` in one place.
    """
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    original, values = train_step._gradients, jnp.array([0.0, *BAD.values()])

    def gradients(config, params, batch, teacher):
        mark = jnp.maximum(-batch["positions"][0, 0], 0)
        batch = dict(batch) | {"positions": jnp.maximum(batch["positions"], 0)}
        found, nll, tokens = original(config, params, batch, teacher)
        bad = found["embedding"].at[3, 0].set(values[mark])
        return found | {"embedding": jnp.where(mark > 0, bad, found["embedding"])}, nll, tokens

    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(train_step, "_gradients", gradients)
        state = create_state(config, mesh)
        step = train_step.compile_train_step(config, mesh).lower(state, GOOD).compile()
        for _ in range(2):  # so that moments and counts are not zero
            state, _ = step(state, GOOD)
        return jax.tree.map(np.asarray, state), step


def after(config, state, batch):
    state, metrics = compiled(config)[1](state, batch)
    return jax.tree.map(np.asarray, state), {k: float(v) for k, v in metrics.items()}


def marked(batch, kind):
    positions = batch["positions"].copy()
    positions[0, 0] = -1 - list(BAD).index(kind)
    return batch | {"positions": positions}


def taken_over(state):
    """Return `state` one step later without an update."""

    def is_schedule(node):
        return isinstance(node, optax.ScaleByScheduleState)

    def node(node):
        return optax.ScaleByScheduleState(node.count + 1) if is_schedule(node) else node

    opt_state = jax.tree.map(node, state.opt_state, is_leaf=is_schedule)
    return TrainState(step=state.step + 1, params=state.params, opt_state=opt_state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_an_update_is_left_out(config, kind):
    """Parameters, moments and Adam's count stay the same, bit for bit; the run's counters advance.

    "overflow" is a gradient with finite values and an infinite norm.
    """
    state, _ = compiled(config)
    new, metrics = after(config, state, marked(GOOD, kind))
    assert metrics["skipped"] == 1
    assert not np.isfinite(metrics["grad_norm"])
    assert np.isfinite(metrics["loss"])
    old, now = flat(state), flat(new)
    changed = {path for path in old if not np.array_equal(old[path], now[path])}
    (schedule,) = changed - {"step"}
    assert (int(new.step), int(now[schedule])) == (3, 3)
    counts = [path for path in old if path.endswith("count")]
    assert len(counts) == 2
    assert [int(now[path]) for path in counts if path != schedule] == [2]
    assert_equal(new, taken_over(state))


@pytest.mark.slow
def test_the_next_step_is_that_of_a_state_taken_over(config):
    """The bad gradient has no later effect; the learning rate is that of the run's step."""
    state, _ = compiled(config)
    new, _ = after(config, state, marked(GOOD, "nan"))
    found, metrics = after(config, new, OTHER)
    expected, expected_metrics = after(config, taken_over(state), OTHER)
    assert_equal(found, expected)
    assert metrics == expected_metrics
    assert metrics["skipped"] == 0
    unskipped, others = after(config, state, OTHER)
    assert others["learning_rate"] != metrics["learning_rate"]
    assert not np.array_equal(unskipped.params["embedding"], found.params["embedding"])


def test_parameters_that_are_not_finite(config):
    """With nan in a parameter all gradients are nan: every update is skipped."""
    state, _ = compiled(config)
    params = jax.tree.map(np.array, state.params)
    params["embedding"][7] = np.nan
    bad = TrainState(step=state.step, params=params, opt_state=state.opt_state)
    new, metrics = after(config, bad, GOOD)
    assert metrics["skipped"] == 1
    assert np.isnan(metrics["loss"])
    assert_equal(new, taken_over(bad))


def test_a_batch_of_padding(config):
    """A batch without tokens has no gradient: its update is skipped, and the state has no nan."""
    state, _ = compiled(config)
    new, metrics = after(config, state, PADDING)
    assert (metrics["skipped"], metrics["tokens"], metrics["empty_windows"]) == (1, 0, 4)
    assert_equal(new, taken_over(state))


def test_windows_without_a_token_are_counted(config):
    rows = [[16], [], [3], []]
    batch = random_batch(3, batch=4, length=16, vocab=264, rows=rows)
    state, _ = compiled(config)
    _, metrics = after(config, state, batch)
    assert (metrics["empty_windows"], metrics["skipped"], metrics["tokens"]) == (2, 0, 19)
    _, metrics = after(config, state, GOOD)
    assert metrics["empty_windows"] == 0


def test_a_finite_gradient_is_a_plain_update(config):
    """The update equals that of optax for the same gradient, bit for bit, including counts."""
    state, _ = compiled(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.steps)

    def plain(state, batch):
        gradients, _, tokens = train_step._gradients(config, state.params, batch)
        gradients = jax.tree.map(lambda g: g / tokens, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )

    with jax.set_mesh(mesh):
        expected = jax.jit(plain)(state, OTHER)
    new, metrics = after(config, state, OTHER)
    assert metrics["skipped"] == 0
    assert_equal(new, expected)


@pytest.mark.slow
def test_in_parts_and_on_a_mesh(tiny):
    """A bad row on one of eight devices, in one of two microbatches, skips the update on all."""
    config = tiny(accumulate=2, **{"model.n_layers": 1, "mesh.data": 2, "mesh.fsdp": 4})
    batch = random_batch(0, batch=16, length=16, vocab=263)
    batch["inputs"][5, 2] = 263  # a token that no other row has
    mesh = sharding.make_mesh(config.mesh)
    old, _ = compiled(tiny(**{"model.n_layers": 1, "optimizer.clip_norm": 1.0}))
    params = jax.tree.map(np.array, old.params)
    params["embedding"][263] = np.inf
    bad = change(old, params=params)
    with jax.set_mesh(mesh):
        state = jax.device_put(bad, train_step.state_shardings(config, mesh))
        new, metrics = train_step.compile_train_step(config, mesh)(state, batch)
    assert float(metrics["skipped"]) == 1
    assert_equal(new, taken_over(bad))
