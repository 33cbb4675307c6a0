"""Eight CPU devices and strict broadcasting for every test; one tiny run for those that train."""

import functools
import json
import os
import runpy
import subprocess
import sys
import warnings

from tests import cpu_devices

# Before jax is imported: it reads both once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {cpu_devices.flags(8)}"

import hypothesis
import jax
import numpy as np
import pytest
from absl import app, flags

from mea_jax.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)
from mea_jax.parallel import processes
from tests.helpers import change, tiny_model
from tests.paths import ROOT

jax.config.update("jax_numpy_rank_promotion", "raise")

# An example may compile, so time says nothing; the same examples every time.
hypothesis.settings.register_profile(
    "mea_jax", deadline=None, max_examples=10, derandomize=True, database=None
)
hypothesis.settings.load_profile("mea_jax")

WORDS = "a quick brown fox jumps over the lazy dog while seven wizards box by moonlight"


def pytest_collection_modifyitems(items):
    """Tests outside of tests/unit start processes, or are slow, each of them."""
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder != "unit":
            item.add_marker(getattr(pytest.mark, {"campaigns": "slow"}.get(folder, "process")))


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
def in_process(monkeypatch, capfd, devices):
    """`in_process(module, *arguments)`: `python -m module` in this process; (status, out, err).

    It sees one device, or the first `count`.
    """

    def run(module, *arguments, count=1):
        devices(count)
        import grain  # noqa: F401  # its flags must not go with those of the command, below

        app.define_help_flags()  # which absl does once, and the first command would take away
        before, status = set(flags.FLAGS), 0
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.setattr(processes, "leave", sys.exit)  # not out of the tests as well
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the module is imported already
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            for name in set(flags.FLAGS) - before:  # of the command, and one per override
                delattr(flags.FLAGS, name)
            sys.modules.pop("config_config", None)  # ml_collections' name for a config file
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.fixture
def command(in_process, monkeypatch, tmp_path):
    """`command(*arguments)`: `python -m mea_jax.train` in this process; (status, out, err)."""
    monkeypatch.chdir(tmp_path)  # a default run directory would go here
    return functools.partial(in_process, "mea_jax.train")


@pytest.fixture
def config_file(tiny, tmp_path):
    """`config_file(**changes)`: a config file on disk that loads this config; its path."""

    def write(body="", **changes):
        tree = change(tiny(), **changes).to_dict() if changes else tiny().to_dict()
        tree["data"]["sources"] = tuple(tree["data"]["sources"])
        (tmp_path / "tree.json").write_text(json.dumps(tree))
        path = tmp_path / "conf.py"
        path.write_text(
            "import json\n"
            "from mea_jax.config.presets import apply_variant\n"
            "from mea_jax.config.schema import default_config\n\n\n"
            "def get_config(variant=''):\n"
            "    config = default_config()\n"
            f"    with open({str(tmp_path / 'tree.json')!r}) as file:\n"
            "        tree = json.load(file)\n"
            "    tree['data']['sources'] = tuple(tree['data']['sources'])\n"
            "    config.update(tree)\n"
            f"    {body or 'pass'}\n"
            "    return apply_variant(config, variant)\n"
        )
        return str(path)

    return write


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
