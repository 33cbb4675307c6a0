"""Steps of slots are fitted to text, and trained through the rounding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.compress import repair, step_sizes
from mea_jax.compress.stream import Stream
from mea_jax.config.schema import MeshConfig
from mea_jax.model.layer_spec import layer_specs
from mea_jax.ops import slots
from mea_jax.parallel import sharding
from tests.helpers import PLAIN, params_of, random_batch, tiny_model

WIDTH = 32  # K H
PLAIN_MODEL = tiny_model(n_layers=1, **PLAIN)
CHANGED: dict[str, Any] = {
    "hlc": "kv",
    "key_mean": True,
    "key_mixing": "frequency",
    "value_mixing": "dense",
}
PACKED = dataclasses.replace(
    PLAIN_MODEL, **CHANGED, key_bits=("3" * WIDTH,), value_bits=("3" * WIDTH,)
)


def layer_of(tmp_path, factor):
    """Return an original layer, and a packed one with steps that are wrong by `factor`."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    batches = [random_batch(i, 4, 64, 264) for i in range(2)]
    stream = Stream(batches, ["", ""], tmp_path, mesh)
    params = params_of(PLAIN_MODEL, noise=0.3)
    stream.embed(PLAIN_MODEL, params)
    layer = jax.tree.map(lambda x: x[0], params["layers_0"])
    scale = layer["attention_norm"]["scale"]
    original = repair.OriginalLayer(layer_specs(PLAIN_MODEL)[0], layer["attention"], scale, stream)
    packed = jax.tree.map(lambda x: x[0], params_of(PACKED, noise=0.3)["layers_0"]["attention"])
    packed |= {f"{side}_steps": np.full((4, 8), factor, np.float32) for side in ("key", "value")}
    return original, (layer_specs(PACKED)[0], jax.device_get(packed))


def test_each_slot_gets_the_factor_that_loses_least(devices, tmp_path):
    devices(1)
    original, (spec, attention) = layer_of(tmp_path, 0.1)
    found = step_sizes.fitted(original, (spec, attention))
    factors = np.asarray(step_sizes._FACTORS)

    def lost(steps):
        rounded = attention | steps
        with jax.set_mesh(original.stream.mesh):
            batch, normed, _ = original.batch(0)
            sums = step_sizes._errors(spec, rounded, normed, batch, 0)
            second = original.batch(1)
            other = step_sizes._errors(spec, rounded, second[1], second[0], 0)
        return {side: np.asarray(sums[side] + other[side]) for side in sums}

    at_old = lost({})
    for side in ("key", "value"):
        chosen = (found[f"{side}_steps"] / attention[f"{side}_steps"]).ravel()
        best = factors[np.argmin(at_old[side], axis=0)]
        np.testing.assert_allclose(chosen, best, rtol=1e-5)
    assert len(np.unique(found["key_steps"])) > 1


def test_the_gradient_of_a_step_is_that_of_its_error():
    """Against differences: of the rounded value where it is clipped, of the rest its error."""
    x, levels = jnp.asarray([0.26, -3.0, 5.0]), jnp.full(3, 4.0)
    gradient = jax.grad(lambda step: slots.rounded(x, step, levels).sum())
    one = jax.grad(lambda step, i: slots.rounded(x, step, levels)[i])
    step = jnp.float32(0.5)
    code = 0.5 - 0.26 / 0.5  # rounded to half a step, less x in units of a step
    np.testing.assert_allclose([one(step, i) for i in range(3)], [code, -1.5, 1.5], rtol=1e-5)
    np.testing.assert_allclose(gradient(step), code, rtol=1e-5)
    slope = jax.grad(lambda x: slots.rounded(x, step, levels).sum())(x)
    np.testing.assert_array_equal(slope, [1.0, 0.0, 0.0])


def test_repair_moves_steps_and_leaves_the_mean(devices, tmp_path):
    devices(1)
    original, (spec, attention) = layer_of(tmp_path, 0.3)
    found = repair.reconstruct(original, (spec, attention), steps=3)
    np.testing.assert_array_equal(found["key_mean"], attention["key_mean"])
    np.testing.assert_array_equal(found["key_bias"], attention["key_bias"])
    for side in ("key", "value"):
        moved = np.abs(found[f"{side}_steps"] / attention[f"{side}_steps"] - 1)
        assert 1e-4 < moved.max() < 0.05
