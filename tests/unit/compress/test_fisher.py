"""The Fisher information of keys and values: against gradients through the whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.compress import fisher
from mea_jax.compress.stream import Stream, compared_sums, context_of, head_of
from mea_jax.config.schema import MeshConfig, Side
from mea_jax.model.heads import SINKS
from mea_jax.model.layer_spec import plain_specs
from mea_jax.model.transformer import Block
from mea_jax.parallel import sharding
from tests.helpers import PLAIN, params_of, random_batch, tiny_model


def example(qk_norm, rows=2, length=24):
    """Return a plain model with large weights, its layers, top, and batches of segments."""
    model = tiny_model(**PLAIN, n_kv_heads=2, qk_norm=qk_norm)
    params = params_of(model, noise=0.2)
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers_0"]) for i in range(model.n_layers)]
    top = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    batches = [random_batch(seed, rows, length, model.vocab_size) for seed in range(2)]
    return model, layers, top, batches


def through_all(model, layers, top, batch, errors):
    """Return the hidden states and kernel of the model with `errors` in keys and values."""
    x_BTD = top["embedding"][batch["inputs"]]
    for index, (spec, tree) in enumerate(zip(plain_specs(model), layers, strict=True)):
        block = Block(spec.alone, *spec.components)
        variables = {"params": tree, "errors": {"attention": errors[index]}}
        x_BTD = block.apply(variables, x_BTD, context_of(model, batch), index)[0]
    hidden, kernel_DV = head_of(model, top)
    return x_BTD, hidden(x_BTD), kernel_DV


def no_errors(model, batch):
    shape = (*batch["inputs"].shape, model.n_kv_heads, model.head_dim)
    return [{side.value: jnp.zeros(shape) for side in Side} for _ in range(model.n_layers)]


def measured(model, layers, top, batches, folder):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices())
    stream = Stream(batches, ["text"] * len(batches), folder / "stream", mesh)
    specs = plain_specs(model)
    fisher.measure(model, specs, layers.__getitem__, top, stream, 0, folder)
    assert not (folder / "stream").exists()
    return [fisher.read(folder, index) for index in range(model.n_layers)]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_it_is_the_gradient_through_all_layers(qk_norm, devices, tmp_path, monkeypatch):
    """With the most probable label in the place of a drawn one, both are deterministic."""
    devices(1)
    monkeypatch.setattr(jax.random, "categorical", lambda key, x: jnp.argmax(x, axis=-1))
    jax.clear_caches()
    model, layers, top, batches = example(qk_norm)
    found = measured(model, layers, top, batches, tmp_path)
    jax.clear_caches()
    totals = [dict.fromkeys(Side, 0.0) for _ in layers]
    tokens = 0.0
    for batch in batches:

        def loss(errors, batch=batch):
            _, h_BTD, kernel_DV = through_all(model, layers, top, batch, errors)
            log_p = jax.nn.log_softmax(h_BTD @ kernel_DV)
            return -jnp.sum(jnp.max(log_p, axis=-1) * (batch["segment_ids"] > 0))

        slopes = jax.grad(loss)(no_errors(model, batch))
        real = (batch["segment_ids"] > 0) & (batch["positions"] >= SINKS)
        tokens += real.sum()
        for index, slope in enumerate(slopes):
            for side in Side:
                g = (np.asarray(slope[side.value]) * real[..., None, None]).reshape(real.size, -1)
                totals[index][side] += g.T @ g
    for index, one in enumerate(found):
        for side, matrix in ((Side.KEY, one.keys), (Side.VALUE, one.values)):
            wanted = np.asarray(totals[index][side]) / tokens
            if side == Side.KEY and qk_norm:
                # 1/rms of each key is part of what is cached; it changes scale, not support.
                assert np.abs(matrix).max() != pytest.approx(np.abs(wanted).max(), rel=1e-3)
                continue
            np.testing.assert_allclose(matrix, wanted, rtol=2e-4, atol=2e-5 * np.abs(wanted).max())


def test_it_predicts_the_divergence_of_small_errors(devices, tmp_path):
    """It is 1/2 E (g . e)^2, for independent errors in the keys and values of both layers."""
    devices(1)
    model, layers, top, _ = example(False)
    model = dataclasses.replace(model, dtype="float32")
    batches = [random_batch(seed, 8, 64, model.vocab_size) for seed in range(6)]
    found = measured(model, layers, top, batches, tmp_path)
    moved, tokens, later = 0.0, 0.0, 0.0
    size = {Side.KEY: 0.05, Side.VALUE: 0.02}
    for seed, batch in enumerate(batches):
        real = (batch["segment_ids"] > 0) & (batch["positions"] >= SINKS)
        keys = iter(jax.random.split(jax.random.key(seed), 8))
        errors = [
            {
                name: size[Side(name)]
                * jax.random.normal(next(keys), zero.shape)
                * real[..., None, None]
                for name, zero in layer.items()
            }
            for layer in no_errors(model, batch)
        ]
        original = through_all(model, layers, top, batch, no_errors(model, batch))[0]
        changed = through_all(model, layers, top, batch, errors)[0]
        sums = compared_sums(model, top, changed, original, batch)
        moved, tokens, later = moved + float(sums[2]), tokens + float(sums[1]), later + real.sum()
    per_token = sum(
        size[side] ** 2 * np.trace(matrix) / 2
        for one in found
        for side, matrix in ((Side.KEY, one.keys), (Side.VALUE, one.values))
    )
    assert moved / tokens == pytest.approx(per_token * later / tokens, rel=0.2)
    assert moved / tokens > 1e-6
