"""`compress --method bits`: the cache's bytes, the loss, the repair, and what it refuses."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.checkpoint.load import load
from mea_jax.compress import bits, joint, layer, repair
from mea_jax.compress.options import Options
from mea_jax.compress.run import compress
from mea_jax.config.schema import Side
from mea_jax.errors import UserError
from mea_jax.generate.decode import empty_cache, serve
from mea_jax.model.heads import Heads
from mea_jax.model.kv_cache import count_bytes
from mea_jax.ops.slots import Layout
from tests.helpers import apply_logits, flat

SMALL: dict[str, Any] = {
    "method": "bits",
    "calibration_tokens": 512,
    "held_out_tokens": 512,
    "dtype": "float32",
}


@pytest.fixture
def one(devices):
    devices(1)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.5, 0.25, 0.125])
def test_the_cache_has_the_bytes_that_were_asked_for(run, keep, one, tmp_path):
    """Count the arrays at 4,096 positions; a key norm adds 4 K bytes a layer to both models."""
    summary = compress(run, tmp_path / "packed", Options(keep=keep, **SMALL))
    config, params, _, _ = load(tmp_path / "packed", dtype="float32")
    plain_model, plain, _, _ = load(run, dtype="float32")

    def bytes_of(model, params):
        served, _ = serve(model, params)
        layers = empty_cache(served, 1, 4096, jnp.bfloat16).layers
        return count_bytes(layers) / 4096

    scalars = 4 * config.n_kv_heads * config.n_layers if config.qk_norm else 0
    before, after = bytes_of(plain_model, plain), bytes_of(config, params)
    parts = 2 * config.n_layers  # keys and values of each layer
    assert keep * before - 2 * parts < after - scalars <= keep * before
    assert summary["cache_bytes_per_token"]["after"] == pytest.approx(after, abs=0.01)


def test_fewer_bits_lose_more_and_repair_wins_some_back(run, one, tmp_path):
    """Repair lowers what it is about: the error of each layer's output, through the rounding."""

    def found(name, **changes):
        return compress(run, tmp_path / name, Options(**(SMALL | changes)))

    shares = (found(f"k{k}", keep=k) for k in (0.5, 0.25, 0.125))
    half, quarter, eighth = (one["held_out"]["divergence"] for one in shares)
    assert half < quarter < eighth
    assert half < 1e-4
    repaired = found("repaired", keep=0.125, repair="layerwise", repair_steps=40)
    for row in repaired["layers"]:
        before, after = row["repair"]
        assert after < 0.9 * before


def test_repair_that_does_not_help_is_left_out(run, one, tmp_path, monkeypatch, capsys):
    def damage(original, compressed, steps, words):
        return {
            name: leaf if isinstance(leaf, dict) else 2 * leaf
            for name, leaf in compressed[1].items()
        }

    monkeypatch.setattr(repair, "reconstruct", damage)
    monkeypatch.setattr(repair, "refit_output", lambda _, compressed: damage(_, compressed, 1, ""))
    options = SMALL | {"keep": 0.25}
    compress(run, tmp_path / "plain", Options(**options))
    found = compress(run, tmp_path / "damaged", Options(repair="layerwise", **options))
    plain, same = (load(tmp_path / name, dtype="float32")[1] for name in ("plain", "damaged"))
    for path, leaf in flat(plain).items():
        np.testing.assert_array_equal(flat(same)[path], leaf)
    assert all(before == after for before, after in (row["repair"] for row in found["layers"]))
    assert "layer 0: no fit of its attention lowers its error" in capsys.readouterr().err


def test_slots_that_are_not_rounded_are_the_original(run, one, tmp_path, monkeypatch):
    """The mean of keys, the biases that take it out, and the change of basis are exact."""
    compress(run, tmp_path / "packed", Options(keep=0.25, **SMALL))
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 250, (2, 40)), jnp.int32)
    places_BT = jnp.broadcast_to(jnp.arange(40), (2, 40))
    read = (tokens_BT, places_BT, jnp.ones_like(tokens_BT))

    def logits(folder):
        config, params, _, _ = load(folder, dtype="float32")
        return np.asarray(apply_logits(config, params, *read))

    wanted, rounded = logits(run), logits(tmp_path / "packed")
    monkeypatch.setattr(Heads, "rounded", lambda self, rows, x, positions, index: x)
    found = logits(tmp_path / "packed")
    scale = np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 2e-5 * scale
    assert np.abs(rounded - wanted).max() > 1e-4 * scale


def test_slots_are_balanced_without_changing_the_model(run, one, tmp_path, monkeypatch):
    """All columns of projections are alike, however much their slots' costs differ."""
    compress(run, tmp_path / "packed", Options(keep=0.25, **SMALL))
    monkeypatch.setattr(layer, "balanced", lambda tree, like: tree)
    compress(run, tmp_path / "unbalanced", Options(keep=0.25, **SMALL))
    (packed, params, _, _), (_, other, _, _) = (
        load(tmp_path / name, dtype="float32") for name in ("packed", "unbalanced")
    )
    for side in Side:
        size_LCH = np.sqrt(np.mean(np.square(params["layers_0"]["attention"][side.value]), axis=1))
        spread = np.sqrt(np.mean(np.square(other["layers_0"]["attention"][side.value]), axis=1))
        assert size_LCH.max() < 1.5 * np.median(size_LCH)
        assert spread.max() > 1.5 * spread.min()
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 250, (2, 40)), jnp.int32)
    read = (tokens_BT, jnp.broadcast_to(jnp.arange(40), (2, 40)), jnp.ones_like(tokens_BT))
    found, wanted = (np.asarray(apply_logits(packed, tree, *read)) for tree in (params, other))
    # A slot at the boundary of two levels may round either way.
    assert np.abs(found - wanted).mean() < 1e-5 * np.abs(wanted).max()


def test_measured_budgets_give_dear_sides_more(run, one, tmp_path):
    options = SMALL | {"keep": 0.125, "measure_tokens": 512}
    summary = compress(run, tmp_path / "measured", Options(budget="measured", **options))
    given = [row[f"{side}_bits"] for row in summary["layers"] for side in Side]
    losses = [row["losses"] for row in summary["sensitivities"]]
    assert all(np.diff(row).max() < 0 for row in losses), "more bits lose less"
    if len(set(given)) > 1:
        assert given[int(np.argmax([row[1] for row in losses]))] > min(given)


@pytest.mark.slow
def test_joint_repair_wins_some_back_and_continues(run, one, tmp_path, monkeypatch):
    """It is stopped once, and then trains on from what the trainer saved."""
    options = SMALL | {"keep": 0.125, "repair": "joint", "repair_steps": 40}
    options |= {"calibration_tokens": 2048, "repair_tokens": 131072}
    plain_train, calls = joint.train, []

    def stopped(config, workdir):
        calls.append(workdir)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return plain_train(config, workdir)

    monkeypatch.setattr(joint, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        compress(run, tmp_path / "joint", Options(**options))
    summary = compress(run, tmp_path / "joint", Options(**options))
    facts = summary["joint"]
    assert facts["tokens"] == pytest.approx(131072, rel=0.1)
    for name, before in facts["before"].items():
        assert summary["held_out"]["domains"][name]["divergence"] < before["divergence"]
    config, params, _, _ = load(tmp_path / "joint", dtype="float32")
    original = load(run, dtype="float32")[1]
    np.testing.assert_array_equal(params["embedding"], original["embedding"])
    assert config.key_bits is not None


@pytest.mark.slow
def test_joint_repair_that_does_not_help_is_left_out(run, one, tmp_path, monkeypatch, capsys):
    """At a learning rate that destroys the model it remains as it was before."""
    monkeypatch.setattr(joint, "LEARNING_RATE", 10.0)
    options = SMALL | {"keep": 0.25, "calibration_tokens": 2048}
    compress(run, tmp_path / "plain", Options(**options))
    options |= {"repair": "joint", "repair_tokens": 16384}
    summary = compress(run, tmp_path / "joint", Options(**options))
    assert not summary["joint"]["kept"]
    assert "it is left out" in capsys.readouterr().err
    plain, same = (load(tmp_path / name, dtype="float32")[1] for name in ("plain", "joint"))
    for path, leaf in flat(plain).items():
        np.testing.assert_array_equal(flat(same)[path], leaf)


def test_what_is_refused(run, one, tmp_path):
    for changes, words in (
        ({"keep": 0.6}, r"--keep=0\.6 with --method bits must be in \(0, 0\.5\]"),
        ({"keep": 0.25, "budget": "residual"}, "give --budget information alone"),
        ({"keep": 0.25, "calibration_tokens": 0}, "--method bits needs activations"),
        ({"keep": 0.001}, r"--keep=0\.001 leaves no bit of \d+ slots"),
    ):
        with pytest.raises(UserError, match=words):
            compress(run, tmp_path / "out", Options(**(SMALL | changes)))
    compress(run, tmp_path / "packed", Options(keep=0.25, **SMALL))
    with pytest.raises(UserError, match="packed by bits per slot already"):
        compress(tmp_path / "packed", tmp_path / "again", Options(keep=0.125, **SMALL))


def test_the_division_fills_its_room_and_no_more():
    variances = np.exp(np.random.default_rng(0).normal(0, 3, 192))
    for keep in (0.5, 0.3, 0.25, 0.1875, 0.125, 0.0625):
        row = bits.divide(bits.Division(variances), keep, 4096)
        layout = Layout(tuple(int(digit) for digit in row))
        stored = layout.bytes + (4 * 192 + 2 * 4 * 192) / 4096
        assert keep * 384 * 0.99 - 1 < stored <= keep * 384
        order = np.argsort(variances)
        sorted_bits = np.asarray(layout.bits)[order]
        assert (np.diff(sorted_bits) >= 0).all()  # more variance, at least as many bits


def test_bits_of_a_config_are_checked(tiny):
    from mea_jax.config.checks import validate

    config = tiny(**{"model.hlc": "kv"})
    width = config.model.n_kv_heads * config.model.head_dim
    good = ("4" * width,) * config.model.n_layers

    def check(**changes):
        validate(dataclasses.replace(config, model=dataclasses.replace(config.model, **changes)))

    check(key_bits=good, value_bits=good)
    for changes, words in (
        ({"key_bits": good[1:]}, "key_bits lists 1 layers, but n_layers=2"),
        ({"value_bits": ("4" * width, "9" * width)}, "value_bits of layer 1 must be"),
        ({"key_bits": ("4",) * len(good)}, f"key_bits of layer 0 must be {width} digits"),
        ({"key_bits": good, "hlc": "v"}, "key_bits needs component heads of keys"),
    ):
        with pytest.raises(UserError, match=words):
            check(**changes)
    assert config.model.bits(Side.KEY) is None
