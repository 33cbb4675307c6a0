"""Tests of the checks of a resumed run, of rewinds, and of failed starts."""

import shutil
from pathlib import Path

import jax
import pytest

import mea_jax.train.run
from mea_jax.checkpoint.manager import Checkpoints, Position
from mea_jax.checkpoint.metrics import read_metrics
from mea_jax.checkpoint.run_directory import stored_dtype
from mea_jax.config.schema import CheckpointConfig, SourceConfig
from mea_jax.errors import UserError
from mea_jax.model.params import abstract_params
from mea_jax.parallel import sharding
from mea_jax.train.guards import Guards, Spike
from mea_jax.train.loop import Loop
from mea_jax.train.run import train
from mea_jax.train.step import create_state
from tests.helpers import change


@pytest.fixture
def cut(tiny, corpus, devices, tmp_path, monkeypatch):
    """Return (config, workdir) of a run that stopped at its end: checkpoints, but no summary."""
    devices(1)
    folder, workdir = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(corpus, folder)
    source = SourceConfig(source="text", path=str(folder))
    config = tiny(**{"data.sources": (source,)})

    def stop(loop, state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mea_jax.train.run, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, workdir)
    return config, workdir


def test_changed_data_are_refused(cut):
    config, workdir = cut
    folder = Path(config.data.sources[0].path)
    (folder / "one_more.txt").write_text("Another document changes every window after it.\n" * 9)
    with pytest.raises(UserError, match="the data have changed since step"):
        train(config, workdir)


def test_auto_dtype_stays_what_the_run_started_with(cut, monkeypatch):
    config, workdir = cut
    assert stored_dtype(workdir) == "float32"
    monkeypatch.setattr("mea_jax.ops.resolve._cpu_multiplies_bfloat16", lambda: True)
    config = change(config, **{"model.dtype": "auto", "model.backend": "cpu"})
    assert train(config, workdir)["text"]
    assert stored_dtype(workdir) == "float32"
    assert stored_dtype(workdir / "nothing") is None


@pytest.mark.slow
def test_a_start_that_fails_does_not_claim_the_directory(tiny, devices, tmp_path):
    devices(1)
    with pytest.raises(UserError, match="does not divide"):
        train(tiny(**{"model.key_components": 3}), tmp_path / "run")
    assert train(tiny(**{"model.key_components": 2}), tmp_path / "run")["steps"]


def test_saving_is_outside_the_transfer_guard(tiny, devices, tmp_path, monkeypatch):
    """Saving runs without the guard, because orbax copies implicitly on accelerators.

    CPUs do not guard such copies, so this test inspects the setting.
    """
    devices(1)
    seen = []
    save = Checkpoints.save

    def watched(self, *args):
        seen.append(getattr(jax.config, "jax_transfer_guard"))  # noqa: B009 (mypy sees no such name)
        save(self, *args)

    monkeypatch.setattr(Checkpoints, "save", watched)
    train(tiny(), tmp_path / "run")
    assert seen
    assert "disallow" not in seen


def test_a_rewind_holds_one_state_at_a_time(tiny, devices, tmp_path, monkeypatch):
    """The state of the spike is freed before the checkpoint is read: memory is enough for one.

    A save that was announced for a later step is forgotten.
    """
    devices(1)
    check, rewind = Guards.check, Loop._rewind
    rewound: list[list[jax.Array]] = []
    already = jax.live_arrays()

    def spiking(self, step, values):
        if step == 6 and not rewound:
            raise Spike(6, 6)
        return check(self, step, values)

    def watched(self, spike):
        shape = jax.tree.leaves(abstract_params(self.config.model))[0].shape
        self.checkpoints.wait()  # as in a rewind: a write in progress may hold a leaf
        same = (x for x in jax.live_arrays() if x.shape == shape)
        rewound.append([x for x in same if not any(x is y for y in already)])
        before = self.saves
        state, step, event = rewind(self, spike)
        assert self.saves is not before
        assert step == 4
        return state, step, event

    monkeypatch.setattr(Guards, "check", spiking)
    monkeypatch.setattr(Loop, "_rewind", watched)
    train(tiny(), tmp_path / "run")
    assert rewound == [[]]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["left_out"] for row in rows if row["kind"] == "rewind"] == [[4, 5]]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 9))


def test_a_checkpoint_to_rewind_to_is_kept(tiny, tmp_path):
    """One checkpoint from before a spike is kept, for any number of saves within the spike."""
    config, options = tiny(**{"model.n_layers": 1}), CheckpointConfig(every=1, keep=2)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state = create_state(config, mesh)
    with Checkpoints(tmp_path, options, rewind_distance=6) as checkpoints:
        for step in (2, 4, 10, 11, 12, 13):
            checkpoints.save(step, state, config, Position(0, "digest"))
        checkpoints.wait()
        assert checkpoints.steps() == [4, 12, 13]
        checkpoints.save(16, state, config, Position(0, "digest"))
    assert checkpoints.steps() == [4, 13, 16]
