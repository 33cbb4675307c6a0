"""Tests of the repair's steps, whose size does not depend on the gradient's size or shape."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mea_jax.compress import repair
from mea_jax.compress.stream import Stream
from mea_jax.config.schema import MeshConfig
from mea_jax.model.layer_spec import layer_specs
from mea_jax.parallel import sharding
from tests.helpers import PLAIN, params_of, random_batch, tiny_model

MODEL = tiny_model(n_layers=1, qkv_bias=True, out_bias=True, window=5, **PLAIN)
D, HEADS, H, F, EXPERTS = 48, 6, 8, 64, 4
BLOCK = {
    "attention": {
        "query": (D, HEADS, H),
        "key": (D, 2, H),
        "value": (D, 2, H),
        "out": (HEADS, H, D),
        "key_mixing": (2, HEADS, H // 2, 2),
        "value_mixing": (2, HEADS),
        "head_norm": {"scale": (H,)},
        "query_bias": (HEADS, H),
        "key_bias": (2, H),
        "out_bias": (D,),
    },
    "mlp": {"router": (D, EXPERTS), "gate": (EXPERTS, D, F), "down": (EXPERTS, F, D)},
}
STEPS = repair.STEPS


def gradients(seed=0):
    """Return random gradients of a block, whose leaves differ much in size."""
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(BLOCK, is_leaf=lambda x: isinstance(x, tuple))
    sizes = 10.0 ** rng.integers(-6, 3, len(leaves))
    made = [size * rng.normal(size=shape) for size, shape in zip(sizes, leaves, strict=True)]
    return jax.tree.unflatten(tree, [jnp.asarray(leaf, jnp.float32) for leaf in made])


@jax.jit
def update(*each):
    """Return the update after the last of these gradients, divided by its learning rate."""
    optimizer = repair._optimizer(STEPS)
    params = jax.tree.map(jnp.ones_like, each[0])
    state = optimizer.init(params)
    for gradient in each:
        found, state = optimizer.update(gradient, state, params)
    rates = np.linspace(0, 1, repair.WARMUP, endpoint=False)
    return optax.tree.scale(1 / rates[len(each) - 1], found)


def test_the_refitted_output_leaves_its_bias_out(tmp_path):
    """A layer with the original's heads and bias, but another W_O, gets the original W_O again."""
    params, (spec,) = params_of(MODEL, noise=0.3), layer_specs(MODEL)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    stream = Stream([random_batch(i, 4, 24, 264) for i in range(2)], ["", ""], tmp_path, mesh)
    stream.embed(MODEL, params)
    layer = jax.tree.map(lambda x: x[0], params["layers_0"])
    attention = layer["attention"] | {"out_bias": np.full(32, 3.0, np.float32)}
    original = repair.OriginalLayer(spec, attention, layer["attention_norm"]["scale"], stream)
    other = attention | {"out": 0.7 * attention["out"]}
    found = repair.refit_output(original, (spec, other))
    # 192 tokens determine 32 rows of W_O; the ridge, 1e-4 of the mean square, holds back the rest.
    np.testing.assert_allclose(found["out"], attention["out"], atol=0.02)
    np.testing.assert_array_equal(found["out_bias"], attention["out_bias"])
    assert original.error((spec, found)) < 1e-5


def rms(leaf):
    return float(jnp.sqrt(jnp.mean(jnp.square(leaf))))


@pytest.mark.slow
def test_steps_are_shares_of_a_parameter_whatever_its_gradient():
    first, second = gradients(), gradients()
    sizes = jax.tree.map(rms, update(first, second))
    for path, size in jax.tree_util.tree_leaves_with_path(sizes):
        assert 0.6 < size < 1.3, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("where", "name", "one"),
    [
        ("attention", "query", np.s_[:, 1]),
        ("attention", "out", np.s_[1]),
        ("mlp", "gate", np.s_[1]),
    ],
)
def test_each_head_and_each_expert_is_a_matrix(where, name, one):
    """A large gradient in one of them changes neither its own step nor those of the others."""
    plain = gradients()
    large = jax.tree.map(lambda x: x, plain)
    large[where][name] = large[where][name].at[one].multiply(1e4)
    a, b = (update(each, each)[where][name] for each in (plain, large))
    np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02)


def test_biases_are_no_matrices():
    """A bias (heads, H) has two axes, but its rows are not those of a product: Adam moves it."""
    kinds = jax.tree_util.tree_map_with_path(
        lambda path, leaf: repair._matrix(path, leaf) is not None, gradients()
    )
    matrices = {"query", "key", "value", "out"}
    assert {name for name, kind in kinds["attention"].items() if kind is True} == matrices
    assert all(kinds["mlp"].values())


def test_all_directions_of_a_matrix_move_alike():
    """A step's singular values differ by a factor below 3 if the gradient's are 1 to 1/100.

    Adam would mainly move along the largest.
    """
    both = gradients()
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.normal(size=(rows, H)))[0] for rows in (D, H))
    gradient_DH = (left * np.geomspace(1, 0.01, H)) @ right.T
    both["attention"]["query"] = jnp.tile(jnp.float32(gradient_DH[:, None]), (1, HEADS, 1))
    moved = np.linalg.svd(update(both, both)["attention"]["query"][:, 0], compute_uv=False)
    assert moved.max() / moved.min() < 3


@pytest.mark.parametrize("steps", [40, repair._FEW])
def test_steps_end_at_nothing(steps):
    """The learning rate decays to 0, so that the last steps hardly change the result."""
    optimizer = repair._optimizer(steps)
    gradient = gradients()
    state = optimizer.init(gradient)
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        moved, state = update(gradient, state, gradient)
    assert max(map(rms, jax.tree.leaves(moved))) < 0.01
