"""docs/architecture.md: its steps for a new attention variant work; the files it names exist."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.paths import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
SMALL = (
    *("--config.steps=4", "--config.log_every=1", "--config.evaluate.every=0"),
    *("--config.optimizer.warmup_steps=1", "--config.evaluate.sample_tokens=4"),
    *("--config.model.n_layers=2", "--config.model.scan_unroll=2", "--config.data.tokenizer=bytes"),
    *("--config.data.context_length=64", "--config.batch_size=8"),
    "--config.data.held_out_fraction=0.2",
)


def apply(diff, folder):
    """Apply a diff to the file it names; its kept and removed lines must occur exactly once."""
    lines = [line[3:] if line.startswith("   ") else line for line in diff.splitlines()]
    path = folder / next(line for line in lines if line.startswith("+++ b/"))[len("+++ b/") :]
    changed = [line for line in lines if line and not line.startswith(("---", "+++", "@@"))]
    old = "".join(f"{line[1:]}\n" for line in changed if line[0] in " -")
    new = "".join(f"{line[1:]}\n" for line in changed if line[0] in " +")
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def found(pattern, text):
    match = re.search(pattern, text)
    assert match, pattern
    return match.group(1)


@pytest.mark.process
@pytest.mark.slow
def test_the_steps_for_a_variant(corpus, tmp_path):
    """The patches apply, the tests pass, and the documented command trains the new variant."""
    folder = tmp_path / "clone"
    for name in ("mea_jax", "configs", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "format_1")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    diffs = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    assert len(diffs) == 4
    for diff in diffs:
        apply(diff, folder)
    tests = found(r"python -m (pytest tests/\S+ tests/[\w/]+)", PAGE).split()
    out = run(folder, *tests, "-k", "head and scale", "-n0")
    assert int(found(r"(\d+) passed", out)) >= 2
    train = found(r"python -m (mea_jax.train --config \S+head_scale)", PAGE).split()
    source = f"--config.data.sources=({{'source': 'text', 'path': '{corpus}'}},)"
    assert "loss" in run(folder, *train, "--workdir", str(tmp_path / "run"), source, *SMALL)


def test_the_files_it_names_exist():
    packages = re.findall(r"^- \*\*(\w+)\*\*(.*?)(?=^- \*\*|^$)", PAGE, re.DOTALL | re.MULTILINE)
    assert len(packages) > 10
    for package, text in packages:
        for name in re.findall(r"`(\w+\.py)`", text):
            where = "mea_jax" if package == "cli" else f"mea_jax/{package}"
            assert (ROOT / where / name).is_file(), f"{where}/{name}"
