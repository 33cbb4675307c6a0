"""Tests of special characters in paths: commands read what other commands wrote there."""

import numpy as np
import pytest

from mea_jax.checkpoint import orbax_store
from mea_jax.checkpoint.layerwise import StoredModel, Writer
from mea_jax.checkpoint.load import load
from mea_jax.checkpoint.manager import Checkpoints, Position
from mea_jax.config.schema import CheckpointConfig
from mea_jax.errors import UserError
from mea_jax.model.params import TrainState
from mea_jax.train.run import train
from tests.helpers import params_of

# Wildcards, characters that URLs escape or shells quote, other scripts, a flag's dash.
NAMES = [
    "sweep[lr=1]",
    "a*b?",
    "50% #1",
    'it\'s "so" {x}:1',
    "größe 模型",
    "-rf",
    "two\nlines",
    "~x",
]


def save(workdir, config, step=1):
    """Save a checkpoint of parameters without optimizer state and wait until it is written."""
    with Checkpoints(workdir, CheckpointConfig(keep=1)) as checkpoints:
        state = TrainState(step=np.int32(step), params=params_of(config.model), opt_state={})
        checkpoints.save(step, state, config, Position(0, "of no data"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_directory_of_any_name(tiny, devices, tmp_path, name):
    """A run of any name can be trained, resumed and read, as one tree and layer by layer."""
    devices(1)
    workdir = tmp_path / name / "run"
    config = tiny(steps=2, **{"optimizer.warmup_steps": 1, "data.cache_dir": str(tmp_path / name)})
    train(config, workdir)
    (workdir / "summary.json").unlink()
    train(config, workdir)  # from its last checkpoint
    _, params, _, _ = load(workdir)
    np.testing.assert_array_equal(
        StoredModel(workdir, print).top()["embedding"], params["embedding"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_written_checkpoint_of_any_name(tiny, tmp_path, name):
    """A checkpoint written layer by layer, as imports and compressions do, can be read."""
    config = tiny()
    writer = Writer(tmp_path / name / "arrays", config.model)
    params = params_of(config.model)
    for path in writer._shapes:
        leaf = params
        for key in path:
            leaf = leaf[key]
        writer.open(path)[...] = leaf
    writer.save(tmp_path / name / "run" / "checkpoints" / "0", config, "")
    with Checkpoints(tmp_path / name / "run") as checkpoints:
        assert checkpoints.damage(0) is None
        found = checkpoints.params(0, params)
    np.testing.assert_array_equal(found["embedding"], params["embedding"])


def test_paths_that_no_link_can_avoid_are_refused_before_the_first_step(
    command, tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("MEA_JAX_CACHE", str(tmp_path / "cache[1]"))
    with pytest.raises(UserError, match=r"run\[1\].* \* \? \[.*cache\[1\].*: choose a path"):
        train(tiny(), tmp_path / "run[1]")
    assert not (tmp_path / "run[1]" / "metrics.jsonl").exists()
    with pytest.raises(UserError, match=r"choose a path"):
        Writer(tmp_path / "a[1].part", tiny().model)


def test_a_link_is_made_once(tmp_path):
    first = orbax_store.plain_path(tmp_path / "a[1]")
    assert first == orbax_store.plain_path(tmp_path / "a[1]") != tmp_path / "a[1]"
    assert first.readlink() == tmp_path / "a[1]"
    assert orbax_store.plain_path(tmp_path / "b c%") == tmp_path / "b c%"


# -- checkpoints are read back before they count ------------------------------------------------


@pytest.mark.parametrize("lost", ["manifest", "array", "shape"])
def test_a_checkpoint_that_cannot_be_read_back_is_not_sealed(tiny, tmp_path, monkeypatch, lost):
    """The previous checkpoint stays if the disk loses a file or the store loses an array."""
    config = tiny()
    save(tmp_path, config)
    waiting = Checkpoints._complete

    def complete(self, step, shapes):
        self._writer.wait_until_finished()
        if lost == "manifest":
            (self.directory / f"{step}.part" / "state" / "manifest.ocdbt").unlink()
        else:
            shapes = shapes | {"params.more" if lost == "array" else "params.embedding": (3, 4)}
        waiting(self, step, shapes)

    monkeypatch.setattr(Checkpoints, "_complete", complete)
    parts = {"manifest": "lacks", "array": "lacks the array params.more", "shape": r"\(3, 4\)"}
    with pytest.raises(
        UserError, match=f"step 2 .*cannot be read back.*{parts[lost]}.*up to step 1"
    ):
        save(tmp_path, config, step=2)
    assert Checkpoints(tmp_path).newest_good(print) == 1
