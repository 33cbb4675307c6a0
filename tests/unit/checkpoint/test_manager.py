"""Tests of checkpoints: self-describing, bit-exact and independent of the mesh that wrote them."""

import dataclasses
import errno
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from mea_jax.checkpoint import digests
from mea_jax.checkpoint.manager import Checkpoints, Position
from mea_jax.config.schema import CheckpointConfig, MeshConfig
from mea_jax.errors import UserError
from mea_jax.parallel import sharding
from mea_jax.parallel.preemption import Preempted
from mea_jax.train.step import abstract_state, create_state
from tests.helpers import assert_equal, flat

OPTIONS = CheckpointConfig(every=1, keep=2)
POSITION = Position(3, "digest", {"rewinds": 1})


@pytest.fixture(scope="module")
def config(tiny):
    return tiny(**{"model.n_layers": 1, "model.key_components": 2})


@pytest.fixture(scope="module")
def written(config, tmp_path_factory):
    """Save step 3 from a mesh of data 2 x fsdp 4; return (run directory, state)."""
    mesh = sharding.make_mesh(MeshConfig(2, 4, 1))
    state = create_state(config, mesh)
    # Moments that are not all zero.
    state = dataclasses.replace(state, opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir, OPTIONS) as checkpoints:
        checkpoints.save(3, state, config, POSITION)
    return workdir, state


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_checkpoint_holds_its_config(written, config):
    with Checkpoints(written[0]) as checkpoints:
        assert checkpoints.latest() == 3
        assert checkpoints.config(3) == config


def test_a_checkpoint_holds_its_place_in_the_data(written, config):
    content = json.loads((written[0] / "checkpoints/3/data/metadata").read_text())
    assert content["next_batch"] == 3
    assert content["digest"] == "digest"


@pytest.mark.slow
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
    """The state may be overwritten after `save`, as the next step does with donated buffers."""
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
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="its config cannot be restored") as caught,
    ):
        checkpoints.config(1)
    assert str(caught.value).count("checkpoints/1") == 1


def test_a_disk_that_refuses(config, tmp_path, monkeypatch):
    """The error contains the operating system's message and the newest saved step."""
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


# -- damaged, partly written, superseded ----------------------------------------------------


@pytest.fixture(scope="module")
def one_device(config):
    """Return (mesh, state) on the first device."""
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return mesh, create_state(config, mesh)


@pytest.fixture(scope="module")
def three(config, one_device, tmp_path_factory):
    """Write a run directory with checkpoints of steps 1, 2 and 3 and return it."""
    workdir = tmp_path_factory.mktemp("three")
    with Checkpoints(workdir, CheckpointConfig(keep=5)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, one_device[1], config, POSITION)
    return workdir


@pytest.fixture
def run(three, tmp_path):
    """Return a copy of `three` that a test may damage."""
    return shutil.copytree(three, tmp_path / "run")


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def spoil(run, step):
    """Flip a bit in the largest file of a checkpoint and return its path in the checkpoint."""
    folder = run / "checkpoints" / str(step)
    path = max(sorted(folder.rglob("*")), key=lambda path: path.stat().st_size * path.is_file())
    old = path.read_bytes()
    path.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
    return path.relative_to(folder)


def fail_on_log(line):
    raise AssertionError(f"unexpected log line: {line}")


def test_a_damaged_checkpoint_is_passed_over_and_kept(run):
    """Damaged checkpoints are moved aside unchanged, so that the run can write the step again."""
    for name in ("3", "3-1"):
        said: list[str] = []
        path = spoil(run, 3)
        before, good = content(run / "checkpoints/3"), content(run / "checkpoints/2")
        with Checkpoints(run, OPTIONS) as checkpoints:
            assert checkpoints.newest_good(said.append) == 2
            assert checkpoints.steps() == [1, 2]
            assert checkpoints.newest_good(fail_on_log) == 2
        aside = run / "damaged" / name
        assert said == [
            f"the checkpoint of step 3 is damaged: {path} is damaged, moved to {aside}",
            "falling back to the checkpoint of step 2",
        ]
        assert content(aside) == before
        assert content(run / "checkpoints/2") == good
        shutil.copytree(run / "checkpoints/2", run / "checkpoints/3")


def test_who_only_reads_moves_nothing(run):
    said: list[str] = []
    path, before = spoil(run, 3), content(run)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.newest_good(said.append) == 2
        assert checkpoints.damage(3) == f"{path} is damaged"
        assert checkpoints.damage(2) is None
    assert said[0] == f"the checkpoint of step 3 is damaged: {path} is damaged"
    assert content(run) == before


def test_all_checkpoints_damaged(run):
    """The error names each, and none is moved, because the user may have a good copy of a file."""
    for step in (1, 2, 3):
        spoil(run, step)
    before = content(run)
    expected = r"every checkpoint in .* is damaged \(step 3: .*; step 2: .*; step 1: .*\)"
    with Checkpoints(run, OPTIONS) as checkpoints, pytest.raises(UserError, match=expected):
        checkpoints.newest_good(fail_on_log)
    assert content(run) == before
    assert not (run / "damaged").exists()


def test_the_newest_good_one_below_a_step(run):
    with Checkpoints(run, OPTIONS) as checkpoints:
        assert checkpoints.newest_good(fail_on_log) == 3
        assert checkpoints.newest_good(fail_on_log, below=3, share=False) == 2
        assert checkpoints.newest_good(fail_on_log, below=1) is None


@pytest.mark.parametrize("unsealed", [False, True])
def test_links_are_refused(run, tmp_path, unsealed):
    """A link is damage in either format, because no checksum covers its target."""
    folder = run / "checkpoints" / "3"
    if unsealed:
        (folder / digests.FILE).unlink()
        data = json.loads((folder / "data/metadata").read_text())
        (folder / "data/metadata").write_text(json.dumps(data | {"format": 1}))
        with Checkpoints(run) as checkpoints:
            assert checkpoints.damage(3) is None
    (folder / "config/metadata").rename(tmp_path / "metadata")
    (folder / "config/metadata").symlink_to(tmp_path / "metadata")
    with Checkpoints(run) as checkpoints:
        assert checkpoints.damage(3) == "config/metadata is a link or a device, not a file"


def test_the_present_format_needs_its_digests(run):
    (run / "checkpoints/3" / digests.FILE).unlink()
    with Checkpoints(run) as checkpoints:
        assert checkpoints.damage(3) == "digests.json is missing"


def test_what_a_killed_run_leaves_is_no_checkpoint(run):
    """The next run deletes partly written checkpoints; a reader leaves them."""
    leftovers = ("4.part", "4.part.orbax-checkpoint-tmp-17", "0.old")
    for name in leftovers:
        shutil.copytree(run / "checkpoints/3", run / "checkpoints" / name)
    names = {"1", "2", "3", *leftovers}
    with Checkpoints(run) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        assert checkpoints.newest_good(fail_on_log) == 3
    assert {path.name for path in (run / "checkpoints").iterdir()} == names
    with Checkpoints(run, OPTIONS) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_the_newest_and_every_third_are_kept(config, one_device, tmp_path):
    options = CheckpointConfig(keep=2, keep_every=3)
    with Checkpoints(tmp_path, options) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, one_device[1], config, POSITION)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "6", "7", "8"}


def test_a_run_that_goes_back_forgets(run, config, one_device):
    """Checkpoints after the step are deleted, even one still being written, and are saved again."""
    with Checkpoints(run, CheckpointConfig(keep=5)) as checkpoints:
        checkpoints.save(4, one_device[1], config, POSITION)
        checkpoints.forget_after(1)
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"1"}
        checkpoints.save(2, one_device[1], config, POSITION)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.newest_good(fail_on_log) == 2


def test_an_error_of_the_writing_thread(run, config, one_device, monkeypatch):
    """The next check raises the error, once; the partly written folder is not a checkpoint."""

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(digests, "write_checksums", full)
    expected = r"step 4 .*No space left.*safe up to step 3"
    with Checkpoints(run, OPTIONS) as checkpoints:
        checkpoints.save(4, one_device[1], config, POSITION)
        assert checkpoints._thread is not None
        checkpoints._thread.join()
        with pytest.raises(UserError, match=expected):
            checkpoints.check()
        checkpoints.check()
        assert checkpoints.steps() == [1, 2, 3]
    failing = pytest.raises(UserError, match=expected)  # leaving the block checks too
    with failing, Checkpoints(run, OPTIONS) as checkpoints:
        checkpoints.save(4, one_device[1], config, POSITION)

    def with_an_error_of_its_own():
        with Checkpoints(run, OPTIONS) as checkpoints:
            checkpoints.save(4, one_device[1], config, POSITION)
            raise KeyError

    with pytest.raises(KeyError):  # an exception already raised is not replaced
        with_an_error_of_its_own()


def test_a_request_to_stop_is_no_damage(three, config, one_device, monkeypatch):
    """SIGTERM while a checkpoint is read is not reported as an unreadable checkpoint."""

    def stopped(*args, **kwargs):
        raise Preempted("stopped by SIGTERM")

    monkeypatch.setattr(ocp.Checkpointer, "restore", stopped)
    with Checkpoints(three) as checkpoints, pytest.raises(Preempted):
        checkpoints.restore(3, abstract_state(config, one_device[0]))


# -- other readers, other formats -----------------------------------------------------------


def test_plain_orbax_reads_the_state(written):
    """Other tools can read the state without this package, as a tree of dicts with equal leaves."""
    with ocp.StandardCheckpointer() as reader:
        found = reader.restore((written[0] / "checkpoints/3/state").absolute())
    expected = flat(serialization.to_state_dict(written[1]))
    found = {path: leaf for path, leaf in flat(found).items() if leaf is not None}
    assert {"step", "params/embedding"} <= found.keys()
    by_size = sorted((x.size, np.asarray(x).tobytes()) for x in expected.values())
    assert sorted((x.size, np.asarray(x).tobytes()) for x in found.values()) == by_size
    for path in ("step", "params/embedding"):
        np.testing.assert_array_equal(found[path], expected[path])
