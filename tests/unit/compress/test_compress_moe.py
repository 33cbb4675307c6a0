"""Tests that a mixture of experts can be trained, saved, compressed and served."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.checkpoint.layerwise import StoredModel
from mea_jax.checkpoint.load import load
from mea_jax.compress import repair
from mea_jax.compress.options import Options
from mea_jax.compress.run import compress
from mea_jax.generate.generator import Decoding, Generator
from mea_jax.train.run import train
from tests.helpers import PLAIN, apply_logits, assert_close, assert_equal, flat

EXPERTS = {"n_experts": 4, "experts_per_token": 2, "d_expert": 24}
SMALL: dict[str, Any] = {"calibration_tokens": 512, "measure_tokens": 256, "held_out_tokens": 512}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Train a model of two layers; return its run directory."""
    workdir = tmp_path_factory.mktemp("runs") / "moe"
    changes = {f"model.{name}": value for name, value in (PLAIN | EXPERTS).items()}
    losses = {"optimizer.load_balance": 0.01, "optimizer.router_z_loss": 0.001}
    train(tiny(steps=2, **changes, **losses, **{"optimizer.warmup_steps": 0}), workdir)
    return workdir


@pytest.mark.slow
def test_metrics_tell_of_the_routers(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of_training = [line for line in lines if "grad_norm" in line]
    assert len(of_training) == 2
    for line in of_training:
        assert 1 <= line["load_balance"] < 4
        assert 1 <= line["busiest_expert"] <= 4
        assert line["router_z"] > 0


@pytest.mark.slow
def test_compression_keeps_the_experts_and_with_all_heads_the_model(run, devices, tmp_path):
    devices(1)

    def logits(model, params):
        tokens = np.random.default_rng(0).integers(0, 256, (2, 16), np.int32)
        places = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
        return apply_logits(
            model, params, *map(jnp.asarray, (tokens, places, np.ones_like(tokens)))
        )

    model, params, _, _ = load(run, dtype="float32")
    whole, half = tmp_path / "whole", tmp_path / "half"
    compress(run, whole, Options(keep=1.0, method="aligned", dtype="float32", **SMALL))
    kept_model, kept, _, _ = load(whole, dtype="float32")
    assert kept_model.n_experts == 4
    assert_close(logits(kept_model, kept), logits(model, params), rtol=0, atol=2e-5)

    summary = compress(run, half, Options(keep=0.5, method="aligned", dtype="float32", **SMALL))
    assert summary["cache_kept"] == 0.5
    half_model, half_params, tokenizer, length = load(half, dtype="float32")
    before, after = (
        {k: v for k, v in flat(p).items() if "/mlp/" in k} for p in (params, half_params)
    )
    assert_equal(before, after)
    found = Generator(half_model, half_params, length=length).run(
        [[tokenizer.separator, 9]], Decoding(3)
    )
    assert len(found[0]) == 3


@pytest.mark.slow
def test_blocks_with_experts_are_repaired(run, devices, tmp_path):
    """Muon updates each expert as a matrix; repair more than halves the held-out loss change."""
    devices(1)
    how: dict[str, Any] = {"keep": 0.25, "method": "svd", "dtype": "float32", **SMALL}
    plain = compress(run, tmp_path / "plain", Options(**how))
    steps: dict[str, Any] = {"repair": "blockwise", "repair_steps": repair._FEW}
    repaired = compress(run, tmp_path / "repaired", Options(**how, **steps))
    assert abs(repaired["held_out"]["increase"]) < 0.5 * abs(plain["held_out"]["increase"])
    before, after = (StoredModel(path, print).layer(0) for path in (run, tmp_path / "repaired"))
    experts = [np.abs(after["mlp"][n] - before["mlp"][n]).max((1, 2)) for n in ("gate", "down")]
    assert np.min(experts) > 0
