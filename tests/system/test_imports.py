"""Commands print their help without importing slow packages."""

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.process
COMMANDS = ("train", "plan", "generate", "compress", "evaluate", "study", "convert", "data.prepare")
SLOW_TO_IMPORT = (
    "tensorflow_datasets",
    "grain",
    "matplotlib",
    "scipy.stats",
    "tensorflow",
    "torch",
)


def loaded(code):
    """Run `code` in a new process; return its stdout and the `SLOW_TO_IMPORT` that it imported."""
    show = f"import sys; print([m for m in {SLOW_TO_IMPORT} if m in sys.modules], file=sys.stderr)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_data_packages(command):
    code = f"""
import runpy, sys
sys.argv = ["mea_jax.{command}", "--help"]
try:
    runpy.run_module("mea_jax.{command}", run_name="__main__", alter_sys=True)
except SystemExit:
    pass
"""
    out, modules = loaded(code)
    assert len(out.splitlines()) > 3
    assert modules == "[]"


def test_the_package_loads_nothing():
    assert loaded("import mea_jax, sys; assert 'jax' not in sys.modules")[1] == "[]"
