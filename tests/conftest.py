"""Configure jax for the tests (8 CPU devices, strict broadcasting); define shared fixtures."""

import functools
import json
import os
import runpy
import subprocess
import sys
import warnings

from tests import cpu_devices

# Set before jax is imported: it reads both only once.
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
from tests import messages
from tests.helpers import change, tiny_model
from tests.paths import ROOT

jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline, because an example may compile; derandomized, so that examples do not change.
hypothesis.settings.register_profile(
    "mea_jax", deadline=None, max_examples=10, derandomize=True, database=None
)
hypothesis.settings.load_profile("mea_jax")

_raised: list[str] = []
messages.record(_raised)

WORDS = "a quick brown fox jumps over the lazy dog while seven wizards box by moonlight"


def pytest_collection_modifyitems(items):
    """Mark tests in tests/campaigns as slow and all others outside of tests/unit as process."""
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder != "unit":
            item.add_marker(getattr(pytest.mark, {"campaigns": "slow"}.get(folder, "process")))


@pytest.fixture(autouse=True, scope="session")
def _caches(tmp_path_factory):
    """Move all caches to a temporary folder, so that the user's caches are not read or changed.

    The entire session shares one folder of compiled programs, including its other processes.
    """
    root = tmp_path_factory.mktemp("cache")
    os.environ["MEA_JAX_CACHE"] = str(root)
    jax.config.update("jax_compilation_cache_dir", str(root / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True)
def _messages(request):
    """Check the form of every error message that the test provokes."""
    _raised.clear()
    yield
    flawed = [f"{text!r} {', '.join(found)}" for text in _raised if (found := messages.flaws(text))]
    assert not flawed, "see tests/messages.py: " + "; ".join(flawed)


@pytest.fixture
def devices(monkeypatch):
    """Return `devices(n)`, which hides all but the first n devices from jax until the test ends."""
    everything = jax.devices()

    def restrict(count):
        monkeypatch.setattr(jax, "devices", lambda *_: everything[:count])
        return everything[:count]

    return restrict


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Return a folder of 40 short text files."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choice(WORDS.split(), 30 + i)))
    return folder


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory):
    """Return `tiny(**changes)`: a config of 8 steps over `corpus`, changed by dotted key."""
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
    """Return `in_process(module, *arguments)`, which runs `python -m module` in this process.

    It returns (status, stdout, stderr). The command has the first `count` devices, by default one.
    """

    def run(module, *arguments, count=1):
        devices(count)
        import grain  # noqa: F401  # defines flags, which must not be deleted below

        app.define_help_flags()  # absl defines them once; the first command would delete them
        before, status = set(flags.FLAGS), 0
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.setattr(processes, "leave", sys.exit)  # do not end the tests
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the module is imported already
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            for name in set(flags.FLAGS) - before:  # the command's, and one per override
                delattr(flags.FLAGS, name)
            sys.modules.pop("config_config", None)  # ml_collections' name for a config file
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.fixture
def command(in_process, monkeypatch, tmp_path):
    """Return `command(*arguments)`, which runs `python -m mea_jax.train` as `in_process` does."""
    monkeypatch.chdir(tmp_path)  # default run directories are created here
    return functools.partial(in_process, "mea_jax.train")


@pytest.fixture
def config_file(tiny, tmp_path):
    """Return `config_file(**changes)`, which writes `tiny(**changes)` to a file: its path."""

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
    """Mount and yield a file system of half a megabyte, smaller than one checkpoint."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(where)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not permitted here")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)
