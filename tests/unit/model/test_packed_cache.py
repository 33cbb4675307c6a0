"""Decoding from packed slots equals attention to the values that they stand for."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.checkpoint.load import unresolved
from mea_jax.config.schema import Side
from mea_jax.errors import UserError
from mea_jax.generate import decode
from mea_jax.model import kv_cache
from mea_jax.model.heads import SINKS, Heads
from mea_jax.model.kv_cache import RECENT
from mea_jax.model.params import param_shardings
from mea_jax.ops.resolve import resolve_on
from mea_jax.parallel import sharding
from tests.helpers import apply_logits, params_of, tiny_model

LENGTH = 640  # of the cache
WIDE = {"key_mixing": "frequency", "value_mixing": "dense"}
CASES: dict[str, dict[str, Any]] = {
    "heads": {},
    "wide": WIDE,
    "qk_norm": WIDE | {"qk_norm": True},
    "biases": WIDE | {"qkv_bias": True},
    "mean": WIDE | {"key_mean": True},
    "mean of normed keys": WIDE | {"key_mean": True, "qk_norm": True, "qkv_bias": True},
    "mean without positions": WIDE | {"key_mean": True, "rope_theta": 1e4, "layer_thetas": (0.0,)},
    "half": {"key_components": 2, "value_components": 2},
    "keys only": {"hlc": "k", "value_bits": None},
}


def packed_model(seed=0, **changes):
    """Return a model of one layer with random bits, and parameters with steps that fit."""
    model = tiny_model(n_layers=1, hlc_init="normal", **changes)
    rng = np.random.default_rng(seed)
    width = model.components(Side.KEY)[0] * model.head_dim
    rows = [("".join(map(str, rng.integers(0, 9, width))),) for _ in range(2)]
    given = {"key_bits": rows[0], "value_bits": rows[1]} | {
        k: v for k, v in changes.items() if k.endswith("_bits")
    }
    model = dataclasses.replace(model, **given)
    params = params_of(model, noise=0.3)
    attention = params["layers_0"]["attention"]
    for name in [name for name in attention if name.endswith("_steps")]:
        attention[name] = 0.05 * jnp.exp(jnp.asarray(rng.normal(size=attention[name].shape)))
        attention[name] = attention[name].astype(jnp.float32)
    return model, params


def reference(monkeypatch, model, params, tokens_BT, exact):
    """Return logits of all positions; keys and values at positions `exact` are not rounded."""
    plain = Heads.rounded

    def rounded(self, rows, x_BTCH, positions_BT, index):
        found = plain(self, rows, x_BTCH, positions_BT, index)
        return jnp.where(exact[None, :, None, None], x_BTCH, found)

    with monkeypatch.context() as patched:
        patched.setattr(Heads, "rounded", rounded)
        places_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return apply_logits(model, params, tokens_BT, places_BT, jnp.ones_like(tokens_BT))


def decoded(model, params, tokens_BT, prompt):
    """Return the logits after a prompt and after each further token."""
    served, ready = decode.serve(model, params)
    cache = decode.empty_cache(served, len(tokens_BT), LENGTH, jnp.float32)
    shape = (len(tokens_BT), prompt)
    places_BP = jnp.broadcast_to(jnp.arange(prompt), shape)
    step = jax.jit(decode.step, static_argnums=0)
    one, cache = decode.prefill(
        served, ready, cache, tokens_BT[:, :prompt], jnp.ones(shape, jnp.int32), places_BP
    )
    found = [one]
    for t in range(prompt, tokens_BT.shape[1]):
        if t > prompt and (t - prompt) % RECENT == 0:
            cache = kv_cache.flush(cache)
        one, cache = step(served, ready, cache, tokens_BT[:, t])
        found.append(one)
    return np.stack(found, axis=1), cache


FAST = ("heads", "mean of normed keys")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
@pytest.mark.parametrize("prompt", [2, 30])
def test_decoding_from_packed_slots(case, prompt, devices, monkeypatch):
    """Over a flush, after which what was recent is packed as well."""
    devices(1)
    model, params = packed_model(**CASES[case])
    total = prompt + RECENT + 3
    rng = np.random.default_rng(1)
    tokens_BT = jnp.asarray(rng.integers(0, model.vocab_size, (2, total)), jnp.int32)
    found_BTV, cache = decoded(model, params, tokens_BT, prompt)
    places = np.arange(total)
    before = reference(monkeypatch, model, params, tokens_BT, jnp.asarray(places >= prompt))
    after = reference(monkeypatch, model, params, tokens_BT, jnp.asarray(places >= prompt + RECENT))
    first = slice(prompt, prompt + RECENT)
    np.testing.assert_allclose(found_BTV[:, 1 : 1 + RECENT], before[:, first], atol=2e-5)
    last = slice(prompt + RECENT, None)
    np.testing.assert_allclose(found_BTV[:, 1 + RECENT :], after[:, last], atol=2e-5)
    assert np.abs(before[:, last] - after[:, last]).max() > 1e-3  # rounding shows
    packed = cache.layers[0].key
    assert packed.data.dtype == jnp.uint8
    assert packed.data.shape == (2, packed.layout.bytes, LENGTH)
    assert packed.first_BSX.shape[1] == SINKS


def test_long_prompts(devices, monkeypatch):
    devices(1)
    model, params = packed_model(**WIDE, key_mean=True)
    tokens_BT = jnp.asarray(
        np.random.default_rng(2).integers(0, model.vocab_size, (1, 602)), jnp.int32
    )
    found_BTV, _ = decoded(model, params, tokens_BT, 600)
    wanted = reference(monkeypatch, model, params, tokens_BT, jnp.asarray(np.arange(602) >= 600))
    np.testing.assert_allclose(found_BTV[:, 1:], wanted[:, 600:], atol=2e-5)


def test_packed_slots_are_no_int8(devices):
    devices(1)
    model, params = packed_model(**WIDE)
    served, _ = decode.serve(model, params)
    with pytest.raises(UserError, match=r"--cache_dtype int8: .* packed by bits per slot; leave"):
        decode.empty_cache(served, 1, 16, jnp.int8)


def test_only_the_absorbed_form_reads_packed_slots(devices):
    devices(1)
    model, params = packed_model(**WIDE)
    for form in ("auto", "absorbed"):
        served, _ = decode.serve(model, params, form)
        assert served.layers[0].forms() == ("absorbed", "absorbed")
    for form in ("folded", "explicit"):
        with pytest.raises(UserError, match=f"--cache_form {form}: .* packed by bits per slot"):
            decode.serve(model, params, form)


@pytest.mark.slow
def test_packed_slots_on_a_mesh():
    """1e-4 as in test_mesh: rows are sharded, bytes are not, since they hold slots of all heads."""
    model, params = packed_model(**WIDE)
    tokens_BT = jnp.asarray(np.arange(80).reshape(2, 40) % model.vocab_size, jnp.int32)
    expected, _ = decoded(model, params, tokens_BT, 30)
    mesh = sharding.requested_mesh("fsdp=2,tensor=2", "--mesh")
    resolved = resolve_on(unresolved(model), mesh, LENGTH)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(resolved, mesh))
        found, cache = decoded(resolved, placed, tokens_BT, 30)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    data = cache.layers[0].key.data
    assert data.sharding.shard_shape(data.shape) == (1, *data.shape[1:])
