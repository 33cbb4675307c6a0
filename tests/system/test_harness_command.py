"""`--tasks` of mea_jax.evaluate: results on the suite, differences, documents, bad input."""

import json
import math
import re
import sys

import numpy as np
import pytest

from mea_jax.evaluate import tasks
from mea_jax.evaluate.harness import differences
from studies import harness_functions as functions
from studies import harness_suite as suite
from tests.helpers import assert_one_error
from tests.whole_runs import train_on_one_device

TASKS = "mea_arithmetic,mea_arithmetic_choice,mea_recall,mea_needle"


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_on_one_device(tiny(**{"mesh.data": 1, "mesh.fsdp": -1}), folder)
    return folder


@pytest.fixture
def evaluate(in_process):
    """Return `evaluate(*arguments)`, which runs the command or `module` in this process."""

    def run(*arguments, module="mea_jax.evaluate"):
        return in_process(module, *arguments)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("suite")
    suite.write(where, count=10, seed=0, letters=400)
    return where


def test_the_suite_from_end_to_end(run, folder, evaluate, tmp_path):
    """A model compared with itself has differences and standard errors of exactly zero."""
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    try:
        status, out, err = evaluate(
            *("--checkpoint", run, "--baseline", run, "--include_path", moved, "--tasks", TASKS),
            *("--limit", 6, "--max_length", 512, "--out", tmp_path / "out"),
        )
    finally:
        moved.rename(folder)
    assert status == 0, err
    assert "Traceback" not in err
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(row["task"], row["metric"]): row for row in report["results"]}
    needles = [f"mea_needle_{depth}" for depth in suite.DEPTHS]
    expected = {("mea_arithmetic", "exact_match"), ("mea_needle", "acc")}
    choices = ("mea_arithmetic_choice", "mea_recall", *needles)
    expected |= {(task, metric) for task in choices for metric in ("acc", "acc_norm")}
    assert rows.keys() == expected
    for (task, _), row in rows.items():
        assert row["difference"] == 0
        assert row["difference_error"] == (None if task == "mea_needle" else 0)
        assert row["value"] == row["baseline"]
    assert rows["mea_recall", "acc"]["documents"] == 6
    assert rows["mea_needle_0", "acc"]["documents"] == 2
    model, base = report["models"]
    # 6 generated sums, 6 x 4 and 6 x 6 choices, 5 x 2 x 3 pass keys.
    assert model["requests"] == base["requests"] == 6 + 24 + 36 + 30
    assert model["truncated"] == 0
    assert model["log_likelihoods"]["real"] < model["log_likelihoods"]["requested_tokens"] / 2
    assert report["versions"]["lm-eval"]
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table in out
    assert "+0.0000 ±0.0000" in table
    assert "requests in" in err
    assert not (tmp_path / "out" / "samples").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--tasks", "hellaswg"], ["no such task", "hellaswag"]),
        (["--tasks", "hellaswag"], ["hellaswag", "cannot load its data"]),
        (["--tasks", "mea_gone"], ["mea_gone", "cannot load its data", "mea_gone.jsonl"]),
        (["--tasks", ""], ["--tasks is empty"]),
        (["--tasks", "mea_recall", "--parts", "loss"], ["--tasks", "--parts", "one or the other"]),
        (["--limit", "3"], ["--limit requires --tasks"]),
        (["--tasks", "mea_recall", "--limit", "0"], ["--limit=0 must be a whole"]),
        (["--tasks", "mea_recall", "--limit", "1.5"], ["--limit=1.5 must be a whole number"]),
        (["--tasks", "mea_recall", "--limit", "-0.1"], ["--limit=-0.1", "share"]),
        (["--tasks", "mea_recall", "--limit", "nan"], ["--limit=nan", "share"]),
        (["--log_samples"], ["--log_samples requires --tasks"]),
        (["--tasks", "mea_recall", "--num_fewshot", "-1"], ["--num_fewshot=-1 must be 0"]),
        (["--tasks", "mea_recall", "--checkpoint", "two"], ["several", "--baseline"]),
        (["--tasks", "mea_recall", "--include_path", "gone"], ["gone: no such folder"]),
        (["--tasks", "mea_arithmetic"], ["only", "12 new tokens"]),
    ],
)
def test_bad_input(run, folder, evaluate, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    if parts[0] == "only":
        arguments = [*arguments, "--max_length", "10"]
        parts = parts[1:]
    if parts[0] == "mea_gone":
        text = (folder / "mea_recall.yaml").read_text().replace("mea_recall", "mea_gone")
        (folder / "mea_gone.yaml").write_text(text)
    common = ["--checkpoint", run, "--out", tmp_path / "out", "--include_path", folder]
    if "--tasks" not in arguments:
        common = common[:4]
    status, _, err = evaluate(*common, *arguments)
    (folder / "mea_gone.yaml").unlink(missing_ok=True)
    assert status == 2
    assert_one_error(status, err, *parts)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_share_of_the_documents_and_their_samples(run, folder, evaluate, tmp_path):
    out = tmp_path / "out"
    status, printed, err = evaluate(
        *("--checkpoint", run, "--baseline", run, "--include_path", folder, "--limit", 0.25),
        *("--tasks", "mea_recall,mea_arithmetic", "--max_length", 512, "--out", out),
        "--log_samples",
    )
    assert status == 0, err
    assert str(out / "samples") in printed
    for role in ("checkpoint", "baseline"):
        for task, answers, metric in (
            ("mea_recall", 6, "acc"),
            ("mea_arithmetic", 1, "exact_match"),
        ):
            asked = rows(folder, task)
            text = (out / "samples" / role / f"{task}.jsonl").read_text()
            samples = [json.loads(line) for line in text.splitlines()]
            assert [sample["doc_id"] for sample in samples] == [
                0,
                1,
                2,
            ]  # a quarter of ten, rounded up
            for sample, document in zip(samples, asked, strict=False):
                assert sample["doc"] == document
                assert str(sample["target"]) == str(document["answer"])
                assert [request[0] for request in sample["request"]] == [
                    document["prompt"]
                ] * answers
                assert len(sample["response"]) == answers
            mean = np.mean([sample["metrics"][metric] for sample in samples])
            report = json.loads((out / "results.json").read_text())["results"]
            (row,) = (r for r in report if (r["task"], r["metric"]) == (task, metric))
            assert row["value"] == pytest.approx(mean)


def test_without_the_package(monkeypatch, run, evaluate, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, err = evaluate("--checkpoint", run, "--out", tmp_path, "--tasks", "hellaswag")
    assert_one_error(status, err, 'pip install "mea_jax[eval]"')


# -- differences ------------------------------------------------------------------------------


def fake(values, metric, reported):
    samples = [{"doc_id": i, "filter": "none", metric: value} for i, value in enumerate(values)]
    return {
        "results": {"t": {"alias": "t", f"{metric},none": reported}},
        "samples": {"t": samples[::-1]},
        "n-samples": {"t": {"effective": len(values)}},
    }


def test_a_difference_of_means_is_the_paired_one():
    rng = np.random.default_rng(0)
    old = rng.integers(0, 2, 50).astype(float)
    new = np.where(rng.random(50) < 0.2, 1 - old, old)
    (row,) = differences.differences(fake(new, "acc", new.mean()), fake(old, "acc", old.mean()))
    assert row["difference"] == pytest.approx((new - old).mean())
    assert row["difference_error"] == pytest.approx((new - old).std(ddof=1) / 50**0.5)
    assert row["error"] == pytest.approx(new.std(ddof=1) / 50**0.5)
    assert row["difference_error"] < row["error"]


@pytest.mark.parametrize("metric", ["perplexity", "word_perplexity", "bits_per_byte"])
def test_errors_of_perplexities_are_those_of_the_bootstrap(metric):
    rng = np.random.default_rng(1)
    n, draws = 400, 1500
    sizes = rng.integers(20, 60, n)
    old = -sizes * rng.gamma(20, 0.1, n)
    new = old * rng.normal(0.95, 0.05, n)

    def value(logs, sizes):
        if metric == "perplexity":
            return np.exp(-logs.mean() / 40)
        ratio = -logs.sum() / sizes.sum()
        return np.exp(ratio) if metric == "word_perplexity" else ratio / math.log(2)

    def values(logs):
        if metric == "perplexity":
            return (logs / 40).tolist()
        return list(zip(logs.tolist(), sizes.tolist(), strict=True))

    pair = (fake(values(x), metric, value(x, sizes)) for x in (new, old))
    (row,) = differences.differences(*pair)
    picks = rng.integers(0, n, (draws, n))
    drawn = [value(new[p], sizes[p]) - value(old[p], sizes[p]) for p in picks]
    # The relative error of the bootstrap itself is 1 / sqrt(2 draws), 2%.
    assert row["difference_error"] == pytest.approx(np.std(drawn), rel=0.1)
    assert row["difference"] == pytest.approx(value(new, sizes) - value(old, sizes))


def test_other_metrics_have_a_difference_without_an_error():
    values = [("a", "b"), ("c", "d")]
    (row,) = differences.differences(fake(values, "f1", 0.5), fake(values, "f1", 0.25))
    assert (row["difference"], row["difference_error"], row["documents"]) == (0.25, None, 2)
    assert "+0.2500" in differences.table([row])


# -- the suite --------------------------------------------------------------------------------


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_right_answers_stand_in_no_place_more_often(tmp_path):
    (tmp_path / "many").mkdir()
    suite.write(tmp_path / "many", count=400, seed=1, letters=400)
    for name, choices in (("mea_arithmetic_choice", 4), ("mea_recall", 6), ("mea_code", 4)):
        found = rows(tmp_path / "many", name)
        assert len(found) == 400
        assert all(len(set(row["choices"])) == choices for row in found)
        counts = np.bincount([row["answer"] for row in found], minlength=choices)
        spread = (400 / choices) ** 0.5
        assert abs(counts - 400 / choices).max() < 4 * spread
        # Choosing the longest or the last in alphabetical order gains nothing either.
        for key in (len, str):
            best = [max(row["choices"], key=key) for row in found]
            hits = [r["choices"][r["answer"]] == b for b, r in zip(best, found, strict=True)]
            right = np.mean(hits)
            assert right < 1 / choices + 4 * (1 / choices / 400) ** 0.5, (name, key)


def test_what_is_asked_is_right_and_not_in_the_training_text(folder):
    for row in rows(folder, "mea_arithmetic"):
        *_, question = row["prompt"].split("\n")
        a, operation, b, _ = question.split()
        result = int(a) + int(b) if operation == "+" else int(a) - int(b)
        assert int(row["answer"]) == result
        assert tasks.split_of_problem(int(a), operation, int(b)) == tasks.EVALUATION
    for row in rows(folder, "mea_recall"):
        table, name = row["prompt"].rsplit("\n", 1)
        (value,) = (v for n, v in re.findall(r"(\w+) (\w+)", table) if n == name)
        assert row["choices"][row["answer"]] == f" {value}"
        assert tasks.split_of_recall(name, value) == tasks.EVALUATION
    for depth in suite.DEPTHS:
        for row in rows(folder, f"mea_needle_{depth}"):
            key = row["choices"][row["answer"]].strip()
            (name,) = re.findall(r"the pass key of (\w+)\?", row["prompt"])
            place = row["prompt"].index(f"Remember the pass key: {name} {key}.")
            assert place / row["prompt"].index("\n") == pytest.approx(depth / 100, abs=0.35)
            assert tasks.split_of_key(int(key)) == tasks.EVALUATION


def test_tables_of_training_documents_hold_no_row_that_is_asked_for():
    for text in tasks.documents(20, 3, 600, ["recall"]):
        found = re.findall(r"([A-Z]\w+) (\w+)", text)
        assert found
        assert all(tasks.split_of_recall(name, v) == tasks.TRAIN for name, v in found)
        assert len(text) <= 600


def test_code_questions_are_lines_of_the_library():
    text = "\n\0".join("\n".join(lines) for lines in functions.library_functions())
    for row in functions.questions(20, np.random.default_rng(0)):
        whole = row["prompt"] + row["choices"][row["answer"]].rstrip("\n")
        assert f"\0{whole}" in f"\0{text}"
        first = [len(c) - len(c.lstrip()) for c in row["choices"]]
        assert len(set(first)) == 1


def test_the_suite_is_written_by_its_command(evaluate, tmp_path):
    module = "studies.harness_suite"
    options = ("--out", tmp_path / "suite", "--documents", 5, "--letters", 400)
    status, out, err = evaluate(*options, module=module)
    assert status == 0, err
    assert "9 tasks" in out
    for bad, part in (
        (("--documents", 0), "--documents=0"),
        (("--letters", 10), "--letters=10"),
        (("--seed", -1), "--seed=-1"),
    ):
        status, _, err = evaluate("--out", tmp_path / "bad", *bad, module=module)
        assert_one_error(status, err, part)
    assert_one_error(*evaluate(module=module)[::2], "--out is missing")
