"""Exported models in vLLM: the same text as ours, and twice the tokens in the same cache.

They need an environment with vLLM, which this project does not install. Name its Python:

    MEA_JAX_VLLM=VENV/bin/python python -m pytest -m "" tests/system/test_vllm.py
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mea_jax.checkpoint.load import load as load_run
from mea_jax.compress.options import Options
from mea_jax.compress.run import compress
from mea_jax.convert.exporting import export_model
from mea_jax.generate.generator import Decoding, Generator
from mea_jax.train.run import train
from tests.helpers import PLAIN

PYTHON = os.environ.get("MEA_JAX_VLLM", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="MEA_JAX_VLLM names no Python that has vLLM")
SCRIPT = Path(__file__).with_name("vllm_texts.py")
NEW, LENGTH, CACHE = 16, 64, 64 << 20
# The attention of SmolLM2: three key/value heads of 64, each read by three query heads.
SHAPE = PLAIN | {"d_model": 144, "n_heads": 9, "n_kv_heads": 3, "head_dim": 64}


def serve(folder: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Return what vLLM generates from an exported model."""
    asked = {"folder": str(folder), "prompts": prompts, "new": NEW, "length": LENGTH}
    words = [PYTHON, str(SCRIPT), json.dumps(asked | {"cache_bytes": CACHE})]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    for name in ("PYTHONPATH", "XLA_FLAGS", "JAX_PLATFORMS"):
        environment.pop(name, None)
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def ours(run: Path, prompts: list[list[int]]) -> list[list[int]]:
    model, params, _, _ = load_run(run, dtype="float32")
    generator = Generator(model, params, length=LENGTH, cache_dtype="float32")
    return generator.run(prompts, Decoding(NEW))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    changes = {f"model.{name}": value for name, value in SHAPE.items()}
    train(tiny(steps=30, **changes, **{"data.context_length": LENGTH}), workdir)
    return workdir


def test_text_and_capacity(run, devices, tmp_path):
    """20 prompts in both; slots of half the width, in stock Llama classes without code of ours."""
    devices(1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 250, size).tolist() for size in rng.integers(3, 40, 20)]
    options = Options(
        keep=0.5, method="frequency", calibration_tokens=2048, held_out_tokens=512, dtype="float32"
    )
    compress(run, tmp_path / "half", options)
    export_model(run, tmp_path / "whole_hf", print)
    export_model(tmp_path / "half", tmp_path / "half_hf", print, form="absorbed")
    found = {}
    for name, folder in (("whole", run), ("half", tmp_path / "half")):
        found[name] = serve(tmp_path / f"{name}_hf", prompts)
        assert found[name]["tokens"] == ours(folder, prompts), name
    assert found["half"]["capacity"] / found["whole"]["capacity"] == pytest.approx(2, rel=0.025)
