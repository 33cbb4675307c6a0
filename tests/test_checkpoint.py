"""Checkpoints: self-describing, bit-exact, and free of the mesh that wrote them."""

import dataclasses
import errno
import json

import jax
import numpy as np
import pytest
from helpers import assert_equal, flat

from mea_jax import sharding
from mea_jax.checkpoint import Checkpoints, Position
from mea_jax.config import CheckpointConfig, MeshConfig
from mea_jax.errors import UserError
from mea_jax.train_step import abstract_state, create_state

OPTIONS = CheckpointConfig(every=1, keep=2)
POSITION = Position(3, "digest", {"rewinds": 1})


@pytest.fixture(scope="module")
def config(tiny):
    return tiny(**{"model.n_layers": 1, "model.key_components": 2})


@pytest.fixture(scope="module")
def written(config, tmp_path_factory):
    """(run directory, state): step 3, written from a mesh of data 2 x fsdp 4."""
    mesh = sharding.make_mesh(MeshConfig(2, 4, 1))
    state = create_state(config, mesh)
    # Moments that are not all zero.
    state = dataclasses.replace(state, opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir, OPTIONS) as checkpoints:
        checkpoints.save(3, state, config, POSITION)
    return workdir, state


@pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 8, 1), (1, 4, 2), (1, 1, 1)])
def test_restored_onto_any_mesh(written, config, sizes):
    workdir, state = written
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    target = abstract_state(config, mesh)
    with Checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore(3, target)
    assert_equal(restored, state)
    for path, leaf in flat(restored).items():
        assert leaf.sharding == flat(target)[path].sharding, path
        assert leaf.dtype == flat(state)[path].dtype, path


def test_a_checkpoint_holds_its_config(written, config):
    with Checkpoints(written[0]) as checkpoints:
        assert checkpoints.latest() == 3
        assert checkpoints.config(3) == config


def test_a_checkpoint_holds_its_place_in_the_data(written, config):
    content = json.loads((written[0] / "checkpoints/3/data/metadata").read_text())
    assert content["next_batch"] == 3
    assert content["digest"] == "digest"


def test_the_newest_are_kept(config, tmp_path):
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    state = create_state(config, mesh)
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(
                step, dataclasses.replace(state, step=state.step + step), config, POSITION
            )
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "4"}
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(3, abstract_state(config, mesh)).step) == 3
        assert checkpoints.latest() == 4


def test_saving_returns_before_writing_but_not_before_copying(config, tmp_path):
    """The state may be overwritten, as the next step does with donated buffers."""
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    state = create_state(config, mesh)
    expected = jax.tree.map(np.array, state)
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        checkpoints.save(1, state, config, POSITION)
        spoil(state)
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(1, abstract_state(config, mesh)), expected)


def test_empty_directory_has_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        assert checkpoints.latest() is None


def test_a_damaged_checkpoint_is_one_clear_error(config, tmp_path):
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        checkpoints.save(1, create_state(config, mesh), config, POSITION)
    for path in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    unreadable = pytest.raises(UserError, match=r"checkpoints/1 could not be read")
    with Checkpoints(tmp_path) as checkpoints, unreadable:
        checkpoints.restore(1, abstract_state(config, mesh))
    (tmp_path / "checkpoints" / "1" / "config" / "metadata").write_text("{")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="holds no config"):
        checkpoints.config(1)


def test_a_disk_that_refuses(config, tmp_path, monkeypatch):
    """What the operating system says, and up to where the run is safe."""
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    state = create_state(config, mesh)
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        checkpoints.save(1, state, config, POSITION)
        checkpoints.wait()

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoints._writer, "save", full)
        with pytest.raises(UserError, match=r"step 2 .*No space left.*safe up to step 1"):
            checkpoints.save(2, state, config, POSITION)
