"""Eight CPU devices and strict broadcasting for every test; one tiny run for those that train."""

import os

# Before jax is imported: it reads both once.
os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _FLAGS:
    os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=8".strip()

import hypothesis
import jax
import numpy as np
import pytest
from helpers import change, tiny_model

from mea_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)

jax.config.update("jax_numpy_rank_promotion", "raise")

# An example may compile, so time says nothing; the same examples every time.
hypothesis.settings.register_profile(
    "mea_jax", deadline=None, max_examples=10, derandomize=True, database=None
)
hypothesis.settings.load_profile("mea_jax")

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box in pale moonlight".split()


@pytest.fixture(autouse=True, scope="session")
def _caches(tmp_path_factory):
    """Nothing is read from or written to the caches of whoever runs the tests."""
    os.environ["MEA_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 40 short text files."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choice(WORDS, 30 + i)))
    return folder


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory):
    """`tiny(**changes)`: a run of 8 steps over `corpus`; changes by dotted key."""
    config = TrainConfig(
        name="tiny",
        steps=8,
        batch_size=8,
        log_every=1,
        model=tiny_model(),
        data=DataConfig(
            sources=(SourceConfig(source="text", path=str(corpus)),),
            tokenizer="bytes",
            context_length=32,
            held_out_fraction=0.2,
            cache_dir=str(tmp_path_factory.mktemp("prepared")),
            prefetch=2,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        evaluate=EvalConfig(every=4, batches=1),
        checkpoint=CheckpointConfig(every=4, keep=2),
    )

    def make(**changes) -> TrainConfig:
        return change(config, **changes)

    return make
