"""Tests of bad input on the command line: one line on stderr, exit status 2, no data lost."""

import json
import tomllib
from importlib import metadata

import pytest

from mea_jax import cli
from mea_jax.config import shipped
from tests.helpers import assert_one_error, run_train_in_subprocess
from tests.paths import ROOT

PROCESS = ("--coordinator=localhost:8476", "--num_processes=2", "--process_id=1")


# -- as a separate process ------------------------------------------------------------------


@pytest.mark.slow
def test_process_misspelt_key(config_file, tmp_path):
    status, err = run_train_in_subprocess(
        "--config", config_file(), "--config.optimizer.learning_rte=1", cwd=tmp_path
    )
    assert_one_error(status, err, "config.optimizer.learning_rte", "config.optimizer.learning_rate")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_process_bad_json_line(config_file, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n{"txt": "two"}\n')
    config = config_file(**{"data.sources": ({"source": "jsonl", "path": str(path)},)})
    status, err = run_train_in_subprocess(
        "--config", config, "--workdir", tmp_path / "run", cwd=tmp_path
    )
    assert_one_error(status, err, "text.jsonl", "line 2", "'text'")


@pytest.mark.slow
def test_process_disk_that_fills_up(config_file, small_disk, tmp_path):
    """The threads of the writers print nothing either."""
    config = config_file(**{"model.d_ff": 2048, "mesh.data": 8})
    status, err = run_train_in_subprocess(
        "--config", config, "--workdir", small_disk / "run", cwd=tmp_path
    )
    assert_one_error(status, err)


# -- the command line -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_by_command(command, config_file, tmp_path):
    config = config_file(steps=2, **{"optimizer.warmup_steps": 1})
    status, out, _ = command("--config", config, "--workdir", tmp_path / "run")
    assert status == 0
    assert "bits per byte" in out
    assert str(tmp_path / "run") in out
    status, out, _ = command("--config", config, "--workdir", tmp_path / "run")
    assert status == 0
    assert "is finished" in out


@pytest.mark.slow
def test_default_run_directory_is_that_of_the_variant(command, config_file, tmp_path):
    config = config_file(steps=1, **{"optimizer.warmup_steps": 0})
    assert command("--config", f"{config}:mha")[0] == 0
    stored = json.loads((tmp_path / "runs" / "tiny_mha" / "config.json").read_text())
    assert stored["model"]["hlc"] == "none"


@pytest.mark.slow
def test_overrides_reach_the_run(command, config_file, tmp_path):
    config = config_file(**{"model.window": 4, "model.layer_thetas": (1e4, 0.0)})
    status, _, _ = command(
        "--config",
        config,
        "--workdir",
        tmp_path / "run",
        "--config.model.window=(0, 128)",
        "--config.steps=1",
        "--config.optimizer.warmup_steps=0",
        "--config.model.key_components=2",
        "--config.model.value_components=(4,1)",
    )
    assert status == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["steps"] == 1
    assert stored["model"]["key_components"] == 2
    assert stored["model"]["value_components"] == [4, 1]
    assert stored["model"]["window"] == [0, 128]
    assert stored["model"]["layer_thetas"] == [1e4, 0.0]


def test_help_fits_a_screen(command):
    status, out, err = command("--help")
    assert status in (0, 1)
    assert "--config" in out + err
    assert "--workdir" in out + err
    assert len((out + err).splitlines()) <= 30


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.modle.d_ff=3"], ["config.modle.d_ff", "config.model.d_ff"]),
        (["--config.model.n_head=3"], ["config.model.n_head", "config.model.n_heads"]),
        (["--config.steps=many"], ["steps", "many"]),
        (["--config.steps=1.5"], ["steps", "1.5"]),
        (["--workdri=x"], ["--workdri", "'workdir'"]),
        (["extra"], ["'extra'"]),
        (["--config.model.n_heads=6"], ["n_heads=6", "n_kv_heads=4"]),
        (["--config.model.key_components=8"], ["key_components=8", "exceeds n_kv_heads=4"]),
        (["--config.model.key_components=3"], ["key_components=3", "does not divide"]),
        (["--config.model.window=-128"], ["config.model.window=-128"]),
        (["--config.model.window=(8, 0, 8)"], ["config.model.window lists 3 layers"]),
        (["--config.model.layer_thetas=(1e4, 0.5)"], ["config.model.layer_thetas=0.5"]),
        (["--config.mesh.fsdp=3"], ["config.mesh needs", "1"]),
        (["--config.batch_size=0"], ["config.batch_size=0"]),
        (["--config.optimizer.schedule=cosin"], ["'cosine'"]),
        (["--config.optimizer.clip_norm=inf"], ["config.optimizer.clip_norm=inf", "finite"]),
        (["--profile_steps=9:3"], ["--profile_steps 9:3", "before the first"]),
        (["--profile_steps=8:9"], ["--profile_steps 8:9", "config.steps=8"]),
        (["--coordinator=localhost:80"], ["add --num_processes and --process_id"]),
        (["--num_processes=2", "--process_id=0"], ["add --coordinator"]),
        ([*PROCESS, "--coordinator=localhost"], ["localhost is no address: write HOST:PORT"]),
        ([*PROCESS, "--process_id=2"], ["--process_id 2", "0 to 1"]),
        ([*PROCESS, "--process_id=-1"], ["--process_id -1", "0 to 1"]),
        ([*PROCESS, "--num_processes=0"], ["--num_processes 0"]),
        ([*PROCESS, "--num_processes=two"], ["num_processes", "two"]),
        ([*PROCESS, "--startup_timeout=0"], ["--startup_timeout 0"]),
    ],
)
def test_bad_arguments(command, config_file, arguments, parts):
    status, _, err = command("--config", config_file(), *arguments)
    assert_one_error(status, err, *parts)


@pytest.mark.slow
def test_the_last_value_of_a_key_counts(command, config_file, tmp_path):
    """The last value also counts for tuples, which the flag library would join."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "text.txt").write_text("a quick brown fox " * 40)
    source = '({{"source": "text", "path": "{}"}},)'
    status, _, err = command(
        "--config",
        config_file(steps=1, **{"optimizer.warmup_steps": 0}),
        "--workdir",
        tmp_path / "run",
        f"--config.data.sources={source.format(one)}",
        "--config.model.key_components=(4, 4)",
        "--config.data.sources",
        source.format(two),
        "--config.model.key_components=(2, 4)",
    )
    assert status == 0, err
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [source["path"] for source in stored["data"]["sources"]] == [str(two)]
    assert stored["model"]["key_components"] == [2, 4]


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["x", "--config.a=1", "--config.b", "2", "--config.a", "3"], [0, 2, 3, 4, 5]),
        (["x", "--config.a", "1", "rest", "--config.a=2", "--other=1"], [0, 3, 4, 5]),
        (["x", "--config.a[0]=1", "--config.a=2", "--", "--config.a=3"], [0, 1, 2, 3, 4]),
    ],
)
def test_which_overrides_are_dropped(argv, kept):
    assert cli._last_overrides(argv) == [argv[i] for i in kept]


def test_an_override_without_a_config(command):
    assert_one_error(*command("--config.steps=2")[::2], "--config.steps", "add --config quickstart")


def test_mesh_that_does_not_fit_the_heads(command, config_file):
    path = config_file(**{"mesh.data": 1, "mesh.tensor": 8})
    status, _, err = command("--config", path, count=8)
    assert_one_error(status, err, "config.mesh.tensor=8", "n_heads=4")


def test_no_config(command):
    assert_one_error(*command()[::2], "--config configs/quickstart.py")


def test_missing_config_file(command, tmp_path):
    status, _, err = command("--config", tmp_path / "missing.py")
    assert_one_error(status, err, "missing.py")


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("config.model.n_haeds = 4", ["n_haeds", "'n_heads'"]),
        ("config.optimizer.learning_rte = 4.0", ["learning_rte", "'learning_rate'"]),
        ("config.steps = 'many'", ["steps", "many"]),
        ("raise ValueError('no luck')", ["no luck"]),
        ("import no_such_module", ["no_such_module"]),
        ("config.data.sources = ({'pth': 'x'},)", ["config.data.sources[0].pth", "'path'"]),
        ("config.data.sources = ()", ["config.data.sources is empty"]),
    ],
)
def test_mistakes_inside_a_config_file(command, config_file, body, parts):
    status, _, err = command("--config", config_file(body))
    assert_one_error(status, err, *parts)


def test_config_file_that_is_not_python(command, tmp_path):
    (tmp_path / "conf.py").write_text("def get_config(:\n")
    assert_one_error(*command("--config", tmp_path / "conf.py")[::2], "config file")


def test_config_file_without_a_config(command, tmp_path):
    (tmp_path / "conf.py").write_text("x = 1\n")
    assert_one_error(*command("--config", tmp_path / "conf.py")[::2], "get_config")


def test_a_shipped_config_by_its_name(command, monkeypatch, tmp_path):
    """`--config NAME` finds a shipped config, with its variant, unless a file has that name.

    For the path of a file that does not exist, the error suggests the name.
    """
    names = cli.find_shipped(["x", "--config", "quickstart:mha", "--config=recover:runs/a"])
    assert names[2] == f"{ROOT / 'configs' / 'quickstart.py'}:mha"
    assert names[3] == f"--config={ROOT / 'configs' / 'recover.py'}:runs/a"
    status, _, err = command("--config", "quikstart")
    assert_one_error(status, err, "quikstart", "ablations, ", "quickstart, ")
    status, _, err = command("--config", "configs/quickstart.py")
    assert_one_error(
        status, err, "configs/quickstart.py", "use --config quickstart for the installed"
    )
    (tmp_path / "quickstart").write_text("")
    assert cli.find_shipped(["x", "--config=quickstart"]) == ["x", "--config=quickstart"]


def test_a_wheel_holds_the_configs(monkeypatch, tmp_path):
    """Shipped configs are found by the wheel's record, next to the folder of packages."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    (tmp_path / "share" / "mea_jax" / "configs").mkdir(parents=True)
    (tmp_path / "lib" / "mea_jax").mkdir(parents=True)
    record = metadata.PackagePath("../share/mea_jax/configs/quickstart.py")
    record.dist = metadata.Distribution.at(tmp_path / "lib" / "mea_jax.dist-info")
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "lib" / "mea_jax" / "shipped.py"))
    monkeypatch.setattr(metadata, "files", lambda name: [record])
    found = shipped.shipped_configs()["quickstart"].resolve()
    assert data == {"share/mea_jax/configs": ["configs/*.py"]}
    assert found == tmp_path / "share" / "mea_jax" / "configs" / "quickstart.py"


# -- the machine ----------------------------------------------------------------------------


def test_unknown_variant(command, config_file):
    assert_one_error(*command("--config", config_file() + ":nonorm")[::2], "nonorm", "no_norm")


# -- data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "content", "parts"),
    [
        ("text", None, ["no such file or folder", "path"]),
        ("text", b"", []),
        ("text", b"caf\xe9", ["words.txt", "byte 3 is not UTF-8"]),
        ("jsonl", b'{"text": "a"}\n{"text": \n', ["words.txt", "line 2"]),
        ("jsonl", b'{"text": "a"}\n\n{"txet": "b"}\n', ["words.txt", "line 3", "no field 'text'"]),
        ("jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ["words.txt", "2", "UTF-8"]),
        ("txt", b"hello", ["'text'"]),
    ],
)
def test_bad_sources(command, config_file, tmp_path, source, content, parts):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    sources = ({"source": source, "path": str(path)},)
    config = config_file(**{"data.sources": sources})
    status, _, err = command("--config", config, "--workdir", tmp_path / "run")
    assert_one_error(status, err, *parts)


def test_empty_folder(command, config_file, tmp_path):
    (tmp_path / "empty").mkdir()
    sources = ({"source": "text", "path": str(tmp_path / "empty")},)
    status, _, err = command("--config", config_file(**{"data.sources": sources}))
    assert_one_error(status, err, "empty", "matches no files")


def test_tokenizer_larger_than_the_vocabulary(command, config_file):
    status, _, err = command("--config", config_file(), "--config.model.vocab_size=200")
    assert_one_error(status, err, "257 tokens", "200", "--config.model.vocab_size=257")


def test_missing_tokenizer(command, config_file):
    status, _, err = command("--config", config_file(), "--config.data.tokenizer=none.json")
    assert_one_error(status, err, "none.json")


# -- the run directory ----------------------------------------------------------------------


@pytest.mark.slow
def test_directory_of_another_config(command, config_file, tmp_path):
    config = config_file(steps=1, **{"optimizer.warmup_steps": 0})
    run = ["--config", config, "--workdir", tmp_path / "run"]
    assert command(*run)[0] == 0
    before = (tmp_path / "run" / "config.json").read_bytes()
    status, _, err = command(*run, "--config.seed=7", "--config.model.d_ff=64")
    assert_one_error(status, err, "seed: 0 -> 7", "model.d_ff: 48 -> 64", "--workdir")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_asked_for_more_steps(command, config_file, tmp_path):
    config = config_file(steps=1, **{"optimizer.warmup_steps": 0})
    run = ["--config", config, "--workdir", tmp_path / "run"]
    assert command(*run)[0] == 0
    status, _, err = command(*run, "--config.steps=2")
    assert_one_error(status, err, "steps: 1 -> 2", f"--config.start.checkpoint={tmp_path / 'run'}")


def test_directory_that_cannot_be_written(command, config_file, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = command("--config", config_file(), "--workdir", tmp_path / "file" / "run")
    assert_one_error(status, err, "cannot be written", "--workdir")


@pytest.mark.slow
def test_loss_that_is_not_finite(command, config_file, tmp_path):
    config = config_file(**{"checkpoint.every": 1})
    status, _, err = command(
        "--config", config, "--workdir", tmp_path / "run", "--config.optimizer.learning_rate=1e30"
    )
    assert_one_error(status, err, "loss", "after step", "last good checkpoint")
    assert not (tmp_path / "run" / "summary.json").exists()
