"""`compress --method frequency` at any share: single slots, the same in all layers."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.checkpoint.load import load
from mea_jax.compress.options import Options
from mea_jax.compress.run import compress
from mea_jax.config.schema import Side
from mea_jax.convert.exporting import export_model
from mea_jax.errors import UserError
from mea_jax.generate.decode import empty_cache, serve
from mea_jax.model.kv_cache import count_bytes
from tests.helpers import apply_logits

SMALL: dict[str, Any] = {
    "method": "frequency",
    "calibration_tokens": 512,
    "held_out_tokens": 512,
    "dtype": "float32",
}


def cache_bytes(folder):
    model, params, _, _ = load(folder, dtype="float32")
    served, _ = serve(model, params)
    return count_bytes(empty_cache(served, 1, 64, jnp.bfloat16).layers) / 64


def test_any_share_is_met(run, devices, tmp_path):
    """Bytes are those asked for to one rotary pair; more slots lose less."""
    devices(1)
    losses, before = [], cache_bytes(run)
    for keep in (0.2, 0.45, 0.8):
        out = tmp_path / f"keep-{keep}"
        summary = compress(run, out, Options(keep=keep, **SMALL))
        model = load(out, dtype="float32")[0]
        scalars = 4 * model.n_kv_heads * model.n_layers if model.qk_norm else 0
        after, whole = cache_bytes(out) - scalars, before
        pair = 2 * 2 * len(Side) * model.n_layers  # bytes: two features of bfloat16
        assert abs(after - keep * whole) <= pair
        assert summary["cache_bytes_per_token"]["after"] == after + scalars
        for row in summary["layers"]:
            assert row["keys"] == row["values"] == pytest.approx(keep * model.n_kv_heads, abs=0.25)
        losses.append(summary["held_out"]["divergence"])
    assert losses[0] > losses[1] > losses[2]


def test_dropped_slots_stay_dropped(run, devices, tmp_path):
    """Repair moves what is cached; the parameters of dropped slots have no effect."""
    devices(1)
    out = tmp_path / "half"
    repaired = Options(keep=0.45, repair="layerwise", repair_steps=20, **SMALL)
    summary = compress(run, out, repaired)
    for row in summary["layers"]:
        assert row["repair"][1] < row["repair"][0]
    model, params, _, _ = load(out, dtype="float32")
    assert "0" in model.key_slots
    assert "0" in model.value_slots
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 250, (2, 20)), jnp.int32)
    read = (tokens_BT, jnp.broadcast_to(jnp.arange(20), (2, 20)), jnp.ones_like(tokens_BT))
    before = apply_logits(model, params, *read)
    for stack in (params[name] for name in params if name.startswith("layers_")):
        for side in Side:
            shape = stack["attention"][side.value].shape[-2:]
            row = model.key_slots if side == Side.KEY else model.value_slots
            dropped = np.asarray([digit == "0" for digit in row]).reshape(shape)
            changed = np.where(dropped, 7.0, stack["attention"][side.value])
            stack["attention"][side.value] = changed.astype(np.float32)
    np.testing.assert_array_equal(apply_logits(model, params, *read), before)


def test_what_is_refused(run, devices, tmp_path):
    devices(1)
    one_head = load(run, dtype="float32")[0].n_kv_heads == 1
    too_few = "or give --method frequency, which keeps single slots"
    for changes, words in (
        ({"keep": 0.001}, "leaves no rotary pair"),
        ({"keep": 1.2}, r"must be in \(0, 1\]"),
        ({"keep": 0.3, "method": "svd"}, too_few if one_head else "--method frequency with all"),
        ({"keep": 0.3, "layers": "1"}, too_few if one_head else "is not a whole number of heads"),
    ):
        with pytest.raises(UserError, match=words):
            compress(run, tmp_path / "out", Options(**(SMALL | changes)))


def test_all_layers_by_their_numbers(run, devices, tmp_path):
    devices(1)
    compress(run, tmp_path / "out", Options(keep=0.45, layers="0-1", **SMALL))
    assert load(tmp_path / "out", dtype="float32")[0].key_slots


def test_it_is_compressed_again_and_rebuilt(run, devices, tmp_path):
    """Whole heads of the compressed model are the same model, and so is the stock export."""
    devices(1)
    compress(run, tmp_path / "half", Options(keep=0.45, **SMALL))
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 250, (2, 20)), jnp.int32)
    read = (tokens_BT, jnp.broadcast_to(jnp.arange(20), (2, 20)), jnp.ones_like(tokens_BT))
    model, params, _, _ = load(tmp_path / "half", dtype="float32")
    wanted = apply_logits(model, params, *read)
    compress(tmp_path / "half", tmp_path / "again", Options(keep=1.0, **SMALL))
    again, params, _, _ = load(tmp_path / "again", dtype="float32")
    assert not again.key_slots
    np.testing.assert_allclose(apply_logits(again, params, *read), wanted, rtol=0, atol=1e-4)
    found = export_model(tmp_path / "half", tmp_path / "exported", print)
    assert found["form"] == ("stock" if model.qk_norm else "absorbed")
    with pytest.raises(UserError, match=found["form"]):
        export_model(tmp_path / "half", tmp_path / "other", print, form="mea")
