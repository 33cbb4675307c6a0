"""launch/colab.ipynb runs from its first cell to its last on a CPU; errors of installation."""

import importlib.metadata
import json
import os
import sys
import tomllib
from pathlib import Path

import pytest

from tests.paths import ROOT

NOTEBOOK = ROOT / "launch" / "colab.ipynb"
CELLS = {cell["id"]: cell for cell in json.loads(NOTEBOOK.read_text())["cells"]}
JAX = {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42", "jax-cuda12-plugin": "0.10.2"}


def source(name: str) -> str:
    return "".join(CELLS[name]["source"])


def test_the_committed_file_holds_no_results():
    code = [cell for cell in CELLS.values() if cell["cell_type"] == "code"]
    assert len(code) > 5
    for cell in code:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def execute(folder: Path, corpus: Path) -> dict[str, tuple[str, set[str]]]:
    """Run the notebook with 20 steps of three tiny models and a study of four runs.

    Returns its outputs, {cell id: (text, MIME types)}.
    """
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    model = {"vocab_size": 264, "d_model": 32, "n_layers": 2, "d_ff": 48, "n_heads": 4}
    model |= {"n_kv_heads": 4, "head_dim": 8, "scan_unroll": 1}
    data = {"tokenizer": "bytes", "context_length": 32, "held_out_fraction": 0.2}
    overrides = [f"--config.model.{key}={value}" for key, value in model.items()]
    overrides += [f"--config.data.{key}={value}" for key, value in data.items()]
    overrides.append(f"--config.data.sources=\"({{'source':'text','path':'{corpus}'}},)\"")
    overrides += ["--config.evaluate.sample_prompt=", "--config.checkpoint.every=20"]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # One device, and the compiler flags of the other tests.
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        "MEA_STEPS": "20",
        "MEA_COMPARE": "1",
        "MEA_HALVE_CACHE": "1",
        "MEA_OVERRIDES": " ".join(overrides),
        "MEA_STUDY": "1",
        "MEA_STUDY_OVERRIDES": " ".join(
            [o.replace("--config.", "--config.base.") for o in overrides[:-2]]
            + ["--config.sizes.d128.model.d_model=32", "--config.sizes.d128.model.n_layers=1"]
            + ["--config.sizes.d128.model.d_ff=48", "--config.horizons='(12,)'"]
            + ["--config.learning_rates='(1e-3,1e-2)'", "--config.base.batch_size=2"]
            + ["--config.base.optimizer.warmup_steps=2", "--config.base.evaluate.every=4"]
        ),
        "MEA_PROMPT": "a quick brown",
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "PIP_NO_INDEX": "1",  # pip fails if it needs the network
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=env)
    results = {}
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        text = "".join(output.text for output in outputs if output.output_type == "stream")
        results[cell.id] = text, {kind for output in outputs for kind in output.get("data", {})}
    return results


def test_it_runs_from_the_first_cell_to_the_last(tmp_path, corpus):
    cells = execute(tmp_path, corpus)
    jax = f"jax {importlib.metadata.version('jax')}"

    lines = cells["versions"][0].splitlines()
    for name in ("jax", "jaxlib", "flax"):
        assert f"{name} {importlib.metadata.version(name)}" in lines
    assert f"python {sys.version.split()[0]}" in lines
    assert "cpu [CpuDevice(id=0)]" in lines

    # The test environment has mea_jax: nothing is installed, and jax is unchanged.
    text, _ = cells["install"]
    assert text.startswith("mea_jax is installed already\n")
    assert "pip" not in text
    assert jax in text.splitlines()

    for name in ("train", "compare", "halve"):
        text, _ = cells[name]
        assert "step 20/20" in text, text
        assert "bits per byte" in text
    assert "image/png" in cells["curves"][1]

    text, shown = cells["study"]
    assert "4 of 4 runs to do, in 2 programs" in text, text
    assert {"image/png", "text/markdown"} <= shown

    text, _ = cells["sample"]
    assert text.count("\na quick brown") == 3, text
    sizes = [line.split("cache ")[1] for line in text.splitlines() if " bytes per token" in line]
    mea, mha, half = (int(size.split(" bytes")[0]) for size in sizes)
    assert mea == mha == 2 * half, sizes


# -- installation, with a fake pip and fake installed packages -------------------------------


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return `install(packages, repo)`, which runs the cell in `tmp_path`: the commands it ran.

    `after` are the installed packages after pip has run.
    """
    monkeypatch.chdir(tmp_path)

    def cell(packages, repo="", after=None):
        commands, state = [], {"packages": packages}

        def run(*command):
            commands.append(command)
            if "pip" in command and after is not None:
                state["packages"] = after
            if "clone" in command:
                clone = Path(command[-1])
                clone.mkdir()
                (clone / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())

        def installed(pattern):
            assert pattern == "mea_jax"
            return {}

        names = {
            "importlib": importlib,
            "sys": sys,
            "run": run,
            "installed": installed,
            "jax_packages": lambda: state["packages"],
            "show_versions": lambda: None,
            "REPO": repo,
            "COMMIT": "v1" if repo else "",
        }
        exec(compile(source("install"), str(NOTEBOOK), "exec"), names)
        return commands

    return cell


def in_checkout(folder: Path) -> None:
    """Create the files of a checkout that the cell checks for."""
    (folder / "mea_jax" / "train").mkdir(parents=True)
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())


def test_pip_is_held_to_the_installed_jax(install, tmp_path):
    in_checkout(tmp_path)
    (command,) = install(JAX)
    assert command[1:4] == ("-m", "pip", "install")
    assert command[-2:] == ("--editable", str(tmp_path))
    assert not {"-U", "--upgrade"} & set(command)
    constraints = Path(command[command.index("--constraint") + 1]).read_text().splitlines()
    assert constraints == [f"{name}=={version}" for name, version in JAX.items()]


def test_a_clone_is_made_of_repo_at_commit(install, tmp_path):
    clone, checkout, pip = install(JAX, repo="https://example.org/mea_jax")
    folder = str(tmp_path / "mea_jax_clone")
    assert clone == ("git", "clone", "https://example.org/mea_jax", folder)
    assert checkout == ("git", "-C", folder, "checkout", "--detach", "v1")
    assert pip[-1] == folder


def test_without_a_checkout_repo_is_asked_for(install):
    with pytest.raises(SystemExit, match="set REPO"):
        install(JAX)


@pytest.mark.parametrize("version", ["0.7.2", "0.9.0.1", "0.13.0"])
def test_another_jax_is_refused_before_pip(install, tmp_path, version):
    in_checkout(tmp_path)
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (needed,) = [d for d in dependencies if d.startswith("jax>")]
    low, high = needed.removeprefix("jax").split(",")
    with pytest.raises(SystemExit, match="Change runtime") as error:
        install(JAX | {"jax": version})
    for part in (f"jax {version}", low, high):
        assert part in str(error.value)
    assert not Path("jax-as-installed.txt").exists(), "pip was called"


def test_a_changed_jax_is_reported(install, tmp_path):
    in_checkout(tmp_path)
    with pytest.raises(SystemExit, match="jax was changed"):
        install(JAX, after=JAX | {"jax": "0.12.0"})
