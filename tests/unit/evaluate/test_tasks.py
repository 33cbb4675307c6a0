"""Tests of the tasks' texts: determinism, depth of keys, disjoint training and evaluation."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from mea_jax.evaluate import tasks
from mea_jax.evaluate.arithmetic import arithmetic_examples

KEY = re.compile(r"Remember the pass key: (\w+) (\d{5})\.")
PROBLEM = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)\n")


def _keys(text):
    """Return the pass keys in `text`, by name."""
    return {match[1]: match[2] for match in KEY.finditer(text)}


def example(seed=0, **options):
    options = {"size": 2000, "depth": 0.5} | options
    return tasks.passkey(np.random.default_rng(seed), **options)


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("size", [200, 2000])
def test_the_key_lies_at_its_depth_and_the_text_is_as_long_as_it_may_be(depth, size):
    for seed in range(20):
        found = example(seed, depth=depth, size=size)
        (match,) = KEY.finditer(found.prompt)
        name, key = match.groups()
        assert found.answer == f" {key}"
        assert found.prompt.endswith(f"Answer: {name}")
        story = found.prompt[: found.prompt.index("\nQuestion")]
        filler = len(story) - len(match[0])
        # Half a sentence (a sentence has about 60 letters) in both directions.
        assert match.start() == pytest.approx(depth * filler, abs=65)
        assert size - 90 < len(found.prompt) <= size


def test_the_same_draws_give_the_same_text():
    assert example(3) == example(3)
    assert example(3) != example(4)
    assert list(tasks.documents(10, 7, 500)) == list(tasks.documents(10, 7, 500))
    # A document does not depend on the number of documents.
    assert list(tasks.documents(10, 7, 500))[:4] == list(tasks.documents(4, 7, 500))
    assert arithmetic_examples("+", 2) == arithmetic_examples("+", 2)


def test_several_keys_of_which_one_is_asked_for():
    found = example(depth=0.0, needles=4)
    pairs = _keys(found.prompt)
    assert len(pairs) == 4
    assert len(set(pairs.values())) == 4
    (asked,) = re.findall(r"what is the pass key of (\w+)\?", found.prompt)
    assert found.answer == f" {pairs[asked]}"
    assert found.prompt.startswith(f"Remember the pass key: {asked}")


def test_a_text_too_short_for_its_question_is_refused():
    with pytest.raises(ValueError, match="size 60 is too short for a question of 93"):
        example(size=60)
    for needles in (1, 3):
        size = tasks.shortest_passkey(needles)
        assert len(example(size=size, needles=needles).prompt) <= size


def test_pieces_that_are_longer_together_still_fit():
    """The text fits even if a tokenizer needs more tokens for it than for its sentences."""

    def measure(texts):
        return [len(text) // 4 + len(text) // 50 * 3 for text in texts]

    found = tasks.passkey(np.random.default_rng(0), size=400, depth=0.5, measure=measure)
    assert 340 < measure([found.prompt])[0] <= 400


def test_what_is_asked_in_an_evaluation_is_in_no_training_document():
    taught = "".join(tasks.documents(600, 1, 600)) + "".join(tasks.documents(600, 0, 600))
    keys = {int(key) for key in re.findall(r"\b\d{5}\b", taught)}
    assert len(keys) > 500
    assert all(tasks.split_of_key(key) == tasks.TRAIN for key in keys)
    asked = {int(example(seed).answer) for seed in range(100)}
    assert all(tasks.split_of_key(key) == tasks.EVALUATION for key in asked)
    assert not keys & asked

    def canonical(a, operation, b):
        return (*(sorted((int(a), int(b))) if operation == "+" else (int(a), int(b))), operation)

    problems = {canonical(*p[:3]) for p in PROBLEM.findall(taught)}
    assert len(problems) > 5000
    for operation in tasks.OPERATIONS:
        for digits in (1, 2, 3):
            for e in arithmetic_examples(operation, digits):
                *shots, question = e.prompt.splitlines()
                assert canonical(*question.split()[:3]) not in problems, question
                assert all(tasks.split_of_problem(*_parts(s)) == tasks.TRAIN for s in shots)


def _parts(line):
    a, operation, b = line.split()[:3]
    return int(a), operation, int(b)


def test_a_fifth_of_keys_is_kept_for_evaluation():
    """A hash keeps 20% of 20,000 keys, within 1 percentage point (3.5 standard deviations)."""
    kept = np.mean([tasks.split_of_key(key) == tasks.EVALUATION for key in range(10_000, 30_000)])
    assert kept == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("operation", tasks.OPERATIONS)
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_sums_are_right(operation, digits):
    examples = arithmetic_examples(operation, digits, samples=16)
    assert len({e.prompt.rsplit("\n", 1)[-1] for e in examples}) == len(examples)
    assert len(examples) == 16 or digits == 1
    for e in examples:
        lines = PROBLEM.findall(e.prompt + e.answer)
        assert len(lines) == 5
        for a, sign, b, result in lines:
            assert sign == operation
            assert len(a) == len(b) == digits
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0


@pytest.mark.parametrize("length", [150, 600])
def test_training_documents_hold_answers_and_keep_their_length(length):
    for number, text in enumerate(tasks.documents(60, 3, length)):
        assert len(text) <= max(length, tasks.shortest_passkey(1) + 10)
        if number % 2:
            assert "".join(" ".join(p) for p in PROBLEM.findall(text))
            assert PROBLEM.sub("", text) == ""
        else:
            pairs = _keys(text)
            answers = re.findall(r"Answer: (\w+) (\d{5})\.\n?", text)
            assert dict(answers) == pairs
            assert len(answers) == len(pairs) >= 1


ROW = re.compile(r"\b([A-Z][a-z]+) ([a-z]+)\b")


def test_tables_are_recalled_whole_and_none_of_their_rows_is_asked_in_an_evaluation():
    taught = "".join(tasks.documents(200, 1, 600, ["recall"]))
    blocks = taught.split("Table:\n")[1:]
    assert len(blocks) >= 200
    for block in blocks:
        table, asked = block.split("Again:\n")
        rows = ROW.findall(table)
        assert len(rows) >= 2
        assert sorted(table.splitlines()) == sorted(asked.splitlines())  # the same lines
        assert all(tasks.split_of_recall(name, value) == tasks.TRAIN for name, value in rows)
    e = tasks.recall(np.random.default_rng(0), pairs=6)
    rows = ROW.findall(e.prompt)
    assert len(rows) == 6
    assert all(tasks.split_of_recall(name, value) == tasks.EVALUATION for name, value in rows)


def test_lists_are_said_twice_and_hold_nothing_that_is_asked():
    for text in tasks.documents(100, 2, 600, ["repeat"]):
        lines = text.splitlines()
        assert len(lines) >= 2
        for first, *again in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
            assert first.startswith("List: ")
            for line in again:
                assert line.startswith("Again: ")
                assert first.endswith(f" {line.removeprefix('Again: ')}")
                assert len(line.split()) >= 4  # three words, so that two are predictable
        assert len(text) <= 600
        assert not ROW.search(text), "no row of a table"
        assert not re.search(r"\d{4}|[-+]", text), "no pass key and no sum"


def run(*arguments):
    command = [sys.executable, "-m", "mea_jax.evaluate.tasks", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.process
def test_the_command_writes_a_jsonl_source(tmp_path):
    out = tmp_path / "new" / "t.jsonl"
    result = run("--out", out, "--documents", 5, "--seed", 2, "--length", 300, "--tasks", "passkey")
    assert result.returncode == 0, result.stderr
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert texts == list(tasks.documents(5, 2, 300, ["passkey"]))


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no file given"),
        (("--out", "x.jsonl", "--tasks", "paskey"), "did you mean 'passkey'?"),
        (("--out", "x.jsonl", "--length", "20"), "--length=20: a pass key"),
        (("--out", "x.jsonl", "--documents", "0"), "--documents=0 must be 1 or more"),
        (("--out", "/proc/x.jsonl"), "--out /proc/x.jsonl cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
