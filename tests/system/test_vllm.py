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


MEA = SHAPE | {"hlc": "kv", "head_norm": True, "gate": "feature", "qkv_bias": True}
MEA |= {"key_components": (1, 3), "value_components": (1, 1), "layer_thetas": (1e4, 5e5)}


def serve(folder: Path, prompts: list[list[int]], packages: str = "") -> dict[str, Any]:
    """Return what vLLM generates from an exported model; `packages` is a folder of plug-ins."""
    asked = {"folder": str(folder), "prompts": prompts, "new": NEW, "length": LENGTH}
    words = [PYTHON, str(SCRIPT), json.dumps(asked | {"cache_bytes": CACHE})]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    for name in ("PYTHONPATH", "XLA_FLAGS", "JAX_PLATFORMS"):
        environment.pop(name, None)
    if packages:
        environment["PYTHONPATH"] = packages
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def ours(run: Path, prompts: list[list[int]]) -> list[list[int]]:
    model, params, _, _ = load_run(run, dtype="float32")
    generator = Generator(model, params, length=LENGTH, cache_dtype="float32")
    return generator.run(prompts, Decoding(NEW))


def trained(tiny, model, workdir):
    changes = {f"model.{name}": value for name, value in model.items()}
    train(tiny(steps=30, **changes, **{"data.context_length": LENGTH}), workdir)
    return workdir


def some_prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 250, size).tolist() for size in rng.integers(3, 40, 20)]


def test_text_and_capacity(tiny, devices, tmp_path):
    """20 prompts in both; slots of half the width, in stock Llama classes without code of ours."""
    devices(1)
    run, prompts = trained(tiny, SHAPE, tmp_path / "run"), some_prompts()
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


def test_the_plug_in(tiny, devices, tmp_path):
    """MEA as the paper trains it, with layers of unequal widths, a gate, biases and two bases."""
    devices(1)
    run, prompts = trained(tiny, MEA, tmp_path / "run"), some_prompts()
    found = export_model(run, tmp_path / "out", print, form="vllm")
    assert found["cached"] / found["uncompressed"] == pytest.approx((1 + 3) / (3 + 3))
    served = serve(tmp_path / "out", prompts, str(tmp_path / "out"))
    assert served["tokens"] == ours(run, prompts)
