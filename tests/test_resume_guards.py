"""What a resumed run checks before it goes on, and what a failed start leaves behind."""

import shutil
from pathlib import Path

import jax
import pytest
from helpers import change

import mea_jax.train
from mea_jax.checkpoint import Checkpoints
from mea_jax.config import SourceConfig
from mea_jax.errors import UserError
from mea_jax.run_directory import stored_dtype
from mea_jax.train import train


@pytest.fixture
def cut(tiny, corpus, devices, tmp_path, monkeypatch):
    """(config, workdir) of a run whose evaluation at the end fails: checkpoints, no summary."""
    devices(1)
    folder, workdir = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(corpus, folder)
    source = SourceConfig(source="text", path=str(folder))
    config = tiny(**{"data.sources": (source,)})

    def stop(loop, state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mea_jax.train, "finish", stop)
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
    monkeypatch.setattr("mea_jax.backends._cpu_multiplies_bfloat16", lambda: True)
    config = change(config, **{"model.dtype": "auto", "model.backend": "cpu"})
    assert train(config, workdir)["text"]
    assert stored_dtype(workdir) == "float32"
    assert stored_dtype(workdir / "nothing") is None


def test_a_start_that_fails_does_not_claim_the_directory(tiny, devices, tmp_path):
    devices(1)
    with pytest.raises(UserError, match="does not divide"):
        train(tiny(**{"model.key_components": 3}), tmp_path / "run")
    assert train(tiny(**{"model.key_components": 2}), tmp_path / "run")["steps"]


def test_saving_is_outside_the_transfer_guard(tiny, devices, tmp_path, monkeypatch):
    """On accelerators orbax copies implicitly; CPUs do not guard that, so look at the setting."""
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
