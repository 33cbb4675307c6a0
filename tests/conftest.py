"""Eight CPU devices and strict broadcasting for every test; one tiny run for those that train."""

import os
import runpy
import subprocess
import sys
import warnings

import cpu_devices

# Before jax is imported: it reads both once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {cpu_devices.flags(8)}"

import hypothesis
import jax
import numpy as np
import pytest
from absl import flags
from helpers import change, tiny_model
from launch_machine import Machine

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

# Flags of the command besides --config.
DEFINED = ["workdir", "profile_steps", "startup_timeout"]
DEFINED += ["distributed", "coordinator", "num_processes", "process_id"]

WORDS = "a quick brown fox jumps over the lazy dog while seven wizards box by moonlight"


@pytest.fixture(autouse=True, scope="session")
def _caches(tmp_path_factory):
    """Nothing is read from or written to the caches of whoever runs the tests.

    One folder of compiled programs for the whole session, commands in other processes included.
    """
    root = tmp_path_factory.mktemp("cache")
    os.environ["MEA_JAX_CACHE"] = str(root)
    jax.config.update("jax_compilation_cache_dir", str(root / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture
def devices(monkeypatch):
    """`devices(n)`: from here to the end of the test, jax has the first n devices only."""
    everything = jax.devices()

    def restrict(count):
        monkeypatch.setattr(jax, "devices", lambda *_: everything[:count])
        return everything[:count]

    return restrict


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 40 short text files."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choice(WORDS.split(), 30 + i)))
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


@pytest.fixture
def command(monkeypatch, capfd, tmp_path, devices):
    """`command(*arguments)`: `python -m mea_jax.train` in this process; (status, out, err).

    It sees one device, or `count`.
    """

    def run(*arguments, count=1):
        devices(count)
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)  # a default run directory would go here
        status = 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the module is imported already
                runpy.run_module("mea_jax.train", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            for name in list(flags.FLAGS):  # those the command defines, and one per override
                if name in DEFINED or name.split(".")[0] == "config":
                    delattr(flags.FLAGS, name)
            sys.modules.pop("config_config", None)  # ml_collections' name for a config file
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a megabyte: less than one checkpoint."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(where)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not permitted here")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.fixture
def machine(tmp_path):
    """A checkout, a home folder and fakes of every program that a launcher runs."""
    return Machine(tmp_path)
