"""Runs of format 1, from before checkpoints had checksums: restored, continued, generated from."""

import dataclasses
import hashlib
import json
import math
import shutil

import jax
import numpy as np
import pytest

from mea_jax.checkpoint import digests
from mea_jax.checkpoint.load import load
from mea_jax.checkpoint.manager import Checkpoints, Position
from mea_jax.checkpoint.metrics import read_metrics
from mea_jax.config.parse import from_dict
from mea_jax.config.schema import MeshConfig
from mea_jax.parallel import sharding
from mea_jax.train.run import train
from mea_jax.train.step import abstract_state
from tests.helpers import flat
from tests.paths import ROOT

# A run of six steps, interrupted after the fourth.
FORMAT_1 = ROOT / "tests" / "checkpoints" / "format_1"


def fail_on_log(line):
    raise AssertionError(line)


@pytest.fixture
def old_run(tmp_path):
    """Copy the run of format 1 and its text; return (config, run directory)."""
    folder = shutil.copytree(FORMAT_1, tmp_path / "format_1")
    path = folder / "run" / "config.json"
    tree = json.loads(path.read_text())
    tree["data"]["sources"][0]["path"] = str(folder / "text")
    path.write_text(json.dumps(tree))
    return from_dict(tree), folder / "run"


def test_format_1_is_restored_to_its_very_bytes(old_run):
    config, run = old_run
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with Checkpoints(run) as checkpoints:
        assert checkpoints.newest_good(fail_on_log) == 4
        state = checkpoints.restore(4, abstract_state(config, mesh))
        stored = checkpoints.config(4)
        data = json.loads((run / "checkpoints/4/data/metadata").read_text())
        position = checkpoints.position(4, data["digest"])
    found = {p: hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for p, x in flat(state).items()}
    assert found == json.loads((FORMAT_1 / "sha256.json").read_text())
    assert position == Position(4, data["digest"], None)
    assert stored == dataclasses.replace(config, data=stored.data)


def test_a_run_of_format_1_goes_on(old_run, devices, capsys):
    """It trains to its last step on the same data and saves in the current format."""
    devices(1)
    config, run = old_run
    train(config, run)
    assert "resuming from step 4 of 6" in capsys.readouterr().err
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    old = [row for row in read_metrics(FORMAT_1 / "run/metrics.jsonl") if row["kind"] == "train"]
    assert rows[:4] == old
    assert all(math.isfinite(row["loss"]) and not row["skipped"] for row in rows[4:])
    with Checkpoints(run) as checkpoints:
        assert checkpoints.steps() == [4, 6]
        assert checkpoints.damage(6) is None
    assert (run / "checkpoints/6" / digests.FILE).exists()


def test_format_1_is_read_by_generate(old_run):
    _, run = old_run
    _, params, tokenizer, length = load(run)
    digest = hashlib.sha256(np.asarray(params["embedding"]).tobytes()).hexdigest()
    assert digest == json.loads((FORMAT_1 / "sha256.json").read_text())["params/embedding"]
    assert tokenizer.decode(tokenizer.encode_batch(["text"])[0]) == "text"
    assert length == 16
