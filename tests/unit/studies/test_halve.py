"""Tests of the paper's protocol: its commands and their order, failures, and the table."""

import importlib.util
import json
from pathlib import Path

import pytest

from mea_jax.errors import UserError
from studies import halve, halve_table
from tests.paths import ROOT

BYTES = {"original": 4096, "control": 4096, "half": 3072, "half_recovered": 3072}
LOSS = {"original": 2.0, "control": 1.9, "half": 2.25, "half_recovered": 1.95}


def config(**changes):
    path = ROOT / "configs" / "studies" / "qwen3_halve.py"
    spec = importlib.util.spec_from_file_location("qwen3_halve", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().to_dict() | changes


def one_model():
    return config(compressions={"half": {"layers": "half"}}, tasks=("a", "b"))


class Commands:
    """A fake of the commands: it writes their files, and call number `fails` fails."""

    def __init__(self, out, fails=None):
        self.out, self.fails, self.called = out, fails, []

    def __call__(self, command):
        words = command[2:]
        self.called.append(words)
        if len(self.called) == self.fails:
            return 3
        folder = Path(words[words.index("--out") + 1]) if "--out" in words else self.out
        folder.mkdir(parents=True, exist_ok=True)
        if words[0] == "mea_jax.compress":
            options = {
                "method": "aligned",
                "budget": "measured",
                "repair": "none",
                "layers": "half",
            }
            (folder / "compression.json").write_text(json.dumps({"options": options}))
        if words[0] == "mea_jax.evaluate" and "--tasks" in words:
            rows = [self.score(folder.name, task) for task in ("a", "b")]
            (folder / "results.json").write_text(json.dumps({"results": rows}))
        elif words[0] == "mea_jax.evaluate":
            models = [self.profile(name) for name in ("original", folder.name)]
            (folder / "report.json").write_text(json.dumps({"models": models}))
        return 0

    @staticmethod
    def score(name, task):
        """Return a row of scores: 0.5 for the original in task a, 0.1 less in b.

        For other models it is lower by a tenth of their increase in loss.
        """
        base = 0.5 if task == "a" else 0.4
        lost = 0.1 * (LOSS["original"] - LOSS[name])
        return {
            "task": task, "metric": "acc", "value": base + lost, "error": 0.03,
            "baseline": base, "baseline_error": 0.03, "difference": lost, "difference_error": 0.004,
        }  # fmt: skip

    @staticmethod
    def profile(name):
        loss = {"loss": LOSS[name], "increase": LOSS[name] - 2.0, "increase_error": 0.01}
        speed = [{"context": 4096, "over_first": {"median": 1.5, "low": 1.4, "high": 1.6}}]
        row = {"cache": {"bytes_per_token": BYTES[name]}, "loss": {"all": loss}}
        return row | ({"speed": speed} if name in ("original", "half") else {})


def run(out, call):
    return halve.run(one_model(), "FOLDER", out, lambda line: None, call)


def test_every_model_is_made_before_it_is_read(tmp_path):
    """Compressed models, their training and the control come after the model they start from."""
    made = set()
    for stage in halve.stages(config(), "FOLDER", tmp_path):
        for flag, word in zip(stage.words, stage.words[1:], strict=False):
            if flag in ("--checkpoint", "--baseline"):
                assert word in made, stage
            if flag == "--config":
                assert word.rpartition(":")[2] in made, stage
        made |= {word for f, word in zip(stage.words, stage.words[1:], strict=False)
                 if f in ("--out", "--workdir")}  # fmt: skip
    expected = {"original", "control"}
    for name in ("half", "deep", "full", "full_svd"):
        expected |= {name, f"{name}_recovered"}
    assert {str(tmp_path / name) for name in expected} <= made


def test_a_failure_costs_its_own_stage_only(tmp_path):
    first = Commands(tmp_path, fails=3)
    with pytest.raises(UserError, match="'control' failed with status 3"):
        run(tmp_path, first)
    again = Commands(tmp_path)
    run(tmp_path, again)
    whole = Commands(tmp_path / "other")
    run(tmp_path / "other", whole)
    assert len(again.called) == len(whole.called) - 2
    last = Commands(tmp_path)
    run(tmp_path, last)
    assert last.called == []


def test_two_studies_do_not_share_a_folder(tmp_path):
    """The second one is refused while a command of the first one runs."""
    refused = []

    def second(command):
        with pytest.raises(UserError, match="in use by another study") as error:
            run(tmp_path, Commands(tmp_path))
        refused.append(error)
        return 3

    with pytest.raises(UserError, match="failed with status 3"):
        run(tmp_path, second)
    assert len(refused) == 1
    run(tmp_path, Commands(tmp_path))  # the lock is free again


def test_the_table(tmp_path):
    text = run(tmp_path, Commands(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in report["models"]}
    assert list(rows) == ["original", "half", "control", "half_recovered"]
    assert rows["half"]["kept"] == 0.75
    assert rows["half"]["layers"] == "half"
    assert rows["original"]["mean"]["value"] == pytest.approx(0.45)
    assert rows["half"]["mean"]["difference"] == pytest.approx(-0.025)
    # Two tasks with an error of 0.004: sqrt(2) 0.004 / 2.
    assert rows["half"]["mean"]["difference_error"] == pytest.approx(0.0028284, rel=1e-3)
    assert "| half | 3,072 | 75.0% | 2.2500 | +0.2500 ± 0.0100 | 1.50x |" in text
    assert "| original | 4,096 | 100.0% | 2.0000 |  |  |" in text
    assert "| control | 0.5100 (+0.0100 ± 0.0040) | 0.4100" in text


def test_without_tasks_and_without_training(tmp_path):
    bare = one_model() | {"tasks": (), "recover": {"steps": 0}, "contexts": ()}
    text = halve.run(bare, "FOLDER", tmp_path, lambda line: None, Commands(tmp_path))
    assert "## Tasks" not in text
    assert "control |" not in text


def test_the_metric_that_stands_for_a_task(tmp_path):
    rows = [Commands.score("half", "a") | {"metric": name} for name in ("acc", "acc_norm", "brier")]
    (tmp_path / "results.json").write_text(json.dumps({"results": rows}))
    assert [row["metric"] for row in halve_table._tasks(tmp_path)] == ["acc_norm"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keeps": 0.5}, "unknown config key config.keeps: did you mean 'keep'"),
        ({"keep": 0.0}, "config.keep=0.0 must be in"),
        ({"compressions": {}}, "config.compressions is empty"),
        ({"compressions": {"control": {}}}, "config.compressions.control is a reserved name"),
        ({"tasks": "mmlu"}, "config.tasks='mmlu' has the wrong type"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(tmp_path, changes, words):
    call = Commands(tmp_path)
    with pytest.raises(UserError) as refused:
        halve.run(one_model() | changes, "FOLDER", tmp_path, lambda line: None, call)
    assert words in str(refused.value)
    assert call.called == []


def test_a_folder_of_other_options_is_refused(tmp_path):
    run(tmp_path, Commands(tmp_path))
    with pytest.raises(
        UserError, match=r"contains half with other options \(--keep=0.25, --keep=0.5\)"
    ):
        halve.run(one_model() | {"keep": 0.25}, "FOLDER", tmp_path, print, Commands(tmp_path))
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(UserError, match=r"stages\.json is damaged"):
        run(tmp_path, Commands(tmp_path))
