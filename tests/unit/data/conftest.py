"""A config of thirty short text files, for tests of preparation."""

import numpy as np
import pytest

from mea_jax.config.schema import DataConfig, SourceConfig
from tests.unit.data.preparing import FRACTION, WORDS


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"file {i}: " + " ".join(rng.choice(WORDS, 60)))
    return DataConfig(
        sources=(SourceConfig(source="text", path=str(folder)),),
        tokenizer="bytes",
        context_length=64,
        held_out_fraction=FRACTION,
        cache_dir=str(tmp_path / "cache"),
    )
