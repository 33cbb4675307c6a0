"""Checkpoints, tokenizers, JSON configs and data are loaded without running code from them."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
import tensorstore

from mea_jax.checkpoint import digests
from mea_jax.checkpoint.manager import Checkpoints
from mea_jax.convert.composite import MODEL_FILES
from mea_jax.convert.vllm_export import PLUGIN
from mea_jax.errors import UserError
from tests.paths import ROOT

OLD = ROOT / "tests" / "checkpoints" / "format_1"
# Modules that can execute code from the files they read, and calls that execute text as code.
BANNED_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch",
}
HANDED_OUT = {path.name for path in (*MODEL_FILES, PLUGIN)}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_ARGUMENTS = {"allow_pickle", "trust_remote_code"}

# Loads everything twice. The first pass triggers all lazy imports; in the second, nothing may be
# compiled, executed, unpickled or started.
LOAD = """
import json, sys
from pathlib import Path
run, cache = Path(sys.argv[1]), Path(sys.argv[2])
from mea_jax.config.parse import from_dict
from mea_jax.data import pipeline, prepare
from mea_jax.checkpoint.load import load

def everything():
    load(run)
    tree = json.loads((run / "config.json").read_text())
    config = from_dict(tree)
    prepared = prepare.prepare(config.data, log=lambda line: None)
    next(pipeline.train_batches(prepared, seed=0, batch_size=2))

everything()
seen, on = set(), True
def hook(event, arguments):
    name = "/".join([event, *(str(a)[:80] for a in arguments[:1])])
    if on and event.split(".")[0] in ("pickle", "marshal", "exec", "compile", "subprocess", "os"):
        if event not in ("os.listdir", "os.scandir", "os.walk", "os.mkdir", "os.remove", "os.rmdir",
                         "os.rename", "os.putenv", "os.unsetenv", "os.chmod", "os.utime",
                         "os.add_dll_directory", "os.truncate", "os.getxattr", "os.listxattr"):
            seen.add(name)
sys.addaudithook(hook)
everything()
on = False
print(json.dumps(sorted(seen)))
"""


@pytest.fixture
def run(tmp_path):
    """Copy the committed run, with its data paths changed to those on this machine."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    tree = json.loads(path.read_text())
    tree["data"] |= {"cache_dir": str(tmp_path / "cache")}
    tree["data"]["sources"][0]["path"] = str(OLD / "text")
    path.write_text(json.dumps(tree))
    return tmp_path / "run"


def test_loading_runs_nothing(run, tmp_path):
    command = [sys.executable, "-c", LOAD, str(run), str(tmp_path / "cache")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    # Libraries generate the methods of dataclasses and namedtuples from text.
    own = ("compile/b'def __create_fn__", "compile/None", "compile/lambda _cls", "exec/<code")
    assert [event for event in seen if not event.startswith(own)] == []


def python_files():
    return sorted((ROOT / "mea_jax").rglob("*.py"))


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_format_that_is_a_program(path):
    """The package uses no pickle or similar format, and no eval or similar call.

    The files handed out with an exported model compute with torch, but load nothing with it, and
    the package does not import them.
    """
    banned = BANNED_MODULES - ({"torch"} if path.name in HANDED_OUT else set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            assert not names & banned, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            assert module[0] not in banned, f"line {node.lineno}"
            handed_out = f"{module[-1]}.py" in HANDED_OUT
            assert path.name in HANDED_OUT or not handed_out, f"line {node.lineno}"
        elif isinstance(node, ast.Attribute):
            assert (ast.unparse(node.value), node.attr) != ("torch", "load"), f"line {node.lineno}"
        elif isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            assert called not in BANNED_CALLS, f"line {node.lineno}"
            arguments = {keyword.arg for keyword in node.keywords}
            assert not arguments & BANNED_ARGUMENTS, f"line {node.lineno}"


@pytest.mark.parametrize("with_checksums", [False, True])
def test_a_checkpoint_cannot_lead_outside(run, tmp_path, with_checksums):
    """A symbolic link in a checkpoint is refused, with and without recorded checksums."""
    folder = run / "checkpoints" / "4"
    if with_checksums:
        path = folder / "data" / "metadata"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
        digests.write_checksums(folder)
    outside = tmp_path / "outside"
    (folder / "state" / "d").rename(outside)
    (folder / "state" / "d").symlink_to(outside)
    with Checkpoints(run) as checkpoints, pytest.raises(UserError, match="state/d is a link"):
        checkpoints.newest_good(lambda line: None)


@pytest.mark.parametrize("prefix", ["../outside/", "/outside/"])
def test_the_store_takes_no_path_that_leads_outside(tmp_path, prefix):
    """Tensorstore refuses a key that leads out of the checkpoint.

    Array files refer to other files by keys. Tensorstore appends a key to the checkpoint's path; it
    refuses keys with ".." and keys that begin with "/".
    """
    (tmp_path / "store").mkdir()
    spec = {
        "driver": "ocdbt",
        "base": f"file://{tmp_path}/store/",
        "value_data_prefix": prefix,
        "config": {"max_inline_value_bytes": 0},
    }
    store = tensorstore.KvStore.open(spec).result()
    with pytest.raises(ValueError, match="Invalid key"):
        store.write("a", b"x" * 5000).result()
    assert not (tmp_path / "outside").exists()


def test_config_of_a_checkpoint_is_data_only(run):
    """A stored config that names a Python file is refused as a value of the wrong type."""
    path = run / "checkpoints" / "4" / "config" / "metadata"
    path.write_text(json.dumps({"model": "configs/quickstart.py"}))
    with Checkpoints(run) as checkpoints, pytest.raises(UserError, match="must contain the keys"):
        checkpoints.config(4)
