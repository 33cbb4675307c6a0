"""Tests of published models given in place of a run directory, and the reverse."""

from pathlib import Path

import pytest

from mea_jax.checkpoint.manager import find_checkpoint
from mea_jax.convert.importing import locate
from mea_jax.errors import UserError


def test_a_model_of_transformers_as_checkpoint_is_sent_to_the_import(tmp_path):
    folder = tmp_path / "SmolLM2-135M"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("")
    with pytest.raises(UserError, match=rf"convert from_hf --model {folder} --out RUN"):
        find_checkpoint(folder)
    with pytest.raises(UserError, match=r"convert from_hf --model Qwen/Qwen3-0\.6B --out RUN"):
        find_checkpoint(Path("Qwen/Qwen3-0.6B"))
    with pytest.raises(UserError, match=r"runs/gone: no such folder; give a run") as caught:
        find_checkpoint(Path("runs/gone"))
    assert "from_hf" not in str(caught.value)


@pytest.mark.parametrize("given", ["model.gguf", "folder", "gone.GGUF"])
def test_gguf_is_refused_with_the_way_out(given, tmp_path):
    (tmp_path / "model.gguf").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model-Q4_K_M.gguf").write_text("")
    words = r"\(GGUF\).*convert from_gguf --model FILE.gguf --out RUN"
    with pytest.raises(UserError, match=words):
        find_checkpoint(tmp_path / given)
    with pytest.raises(UserError, match=words):
        locate(str(tmp_path / given))


def test_files_of_a_model_and_run_directories_are_recognised(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("")
    for given in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(UserError, match=rf"convert from_hf --model {folder} --out RUN"):
            find_checkpoint(given)
    with pytest.raises(UserError, match=rf"is a file: give the model's folder, {folder}"):
        locate(str(folder / "pytorch_model.bin"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is a run directory already.*--checkpoint"):
        locate(str(tmp_path / "run"))
    assert find_checkpoint(tmp_path / "run") == (tmp_path / "run", None)
