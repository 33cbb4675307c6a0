r"""Write evaluation tasks in lm-evaluation-harness's format, into a folder that needs no network.

    python -m studies.harness_suite --out suite
    python -m mea_jax.evaluate --checkpoint runs/suite --include_path suite --tasks mea_suite \
        --out profiles/suite

- mea_arithmetic: generate the result of a sum or difference after four solved ones; exact match.
  Chance is 0.
- mea_arithmetic_choice: choose the result among four close numbers. Chance is 1/4.
- mea_code: choose the next line of a function of Python's library among four. Chance is 1/4. Read
  acc_norm, which is normalised by characters, because lines differ in length.
- mea_recall: choose the word next to a name in a table of six. Chance is 1/6.
- mea_needle: choose the requested one of three hidden pass keys; one task per depth. Chance is 1/3.

A small model learns all of these but code from the documents of `mea_jax.evaluate.tasks`. The
questions here are not among those documents.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.files import make_writable
from mea_jax.errors import UserError
from mea_jax.evaluate import tasks
from studies import harness_functions as functions

DEPTHS = (0, 25, 50, 75, 100)  # percent
_PAIRS = 6  # rows of a table
_NEEDLES = 3
_LOAD = "load.py"

# The harness reads this from the folder of the task files, so the folder can be moved.
_LOADER = '''"""Load the documents of the tasks in this folder."""

import json
from pathlib import Path

import datasets


def documents(file, **_):
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
'''

_COMMON = """task: {name}
tag: mea_suite
custom_dataset: !function load.documents
dataset_kwargs:
  file: {name}.jsonl
test_split: test
num_fewshot: 0
doc_to_text: "{{{{prompt}}}}"
target_delimiter: ""
metadata:
  version: 1.0
"""

_CHOICE = """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""

_WRITE = """output_type: generate_until
doc_to_target: answer
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
  do_sample: false
filter_list:
  - name: number
    filter:
      - function: regex
        regex_pattern: "(-?[0-9]+)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""

_GROUP = """group: mea_needle
task: [{members}]
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: true
metadata:
  version: 1.0
"""


def _chosen(rng: np.random.Generator, prompt: str, right: str, wrong: list[str]) -> dict[str, Any]:
    answer = int(rng.integers(len(wrong) + 1))
    choices = wrong[:answer] + [right] + wrong[answer:]
    return {"prompt": prompt, "choices": choices, "answer": answer}


def _sums(count: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Return `count` problems of one or two digits after four solved ones, and their results."""
    found: dict[str, tuple[str, int]] = {}
    while len(found) < count:
        operation = tasks.OPERATIONS[int(rng.integers(2))]
        digits = 1 if rng.random() < 0.1 else 2  # there are few problems of one digit
        example = tasks.arithmetic(rng, operation=operation, digits=digits)
        question = example.prompt.rsplit("\n", 1)[-1]
        found.setdefault(question, (example.prompt, int(example.answer)))
    return list(found.values())


def arithmetic(count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return `count` sums or differences, whose results the model generates."""
    return [{"prompt": prompt, "answer": f"{result}"} for prompt, result in _sums(count, rng)]


def arithmetic_choice(count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return `count` problems with four choices, the wrong ones within 12 of the right result.

    The right result can have any rank among them by size.
    """
    rows = []
    for prompt, result in _sums(count, rng):
        near = [n for n in range(max(result - 12, 0), result + 13) if n != result]
        wrong = [f" {near[i]}\n" for i in rng.choice(len(near), 3, replace=False)]
        rows.append(_chosen(rng, prompt, f" {result}\n", wrong))
    return rows


def recall(count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return `count` tables, each with a name to look up, and all their words as choices."""
    rows = []
    for _ in range(count):
        example = tasks.recall(rng, pairs=_PAIRS)
        values = [f" {value}" for value in re.findall(r" (\w+)\n", example.prompt)]
        wrong = [value for value in values if value != example.answer]
        rows.append(_chosen(rng, example.prompt, example.answer, wrong))
    return rows


def needle(
    count: int, rng: np.random.Generator, depth: float, letters: int
) -> list[dict[str, Any]]:
    """Return `count` texts of `letters` characters with three pass keys, one of them requested.

    The requested one is at the fraction `depth` of the text. The choices are the three keys.
    """
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        example = tasks.passkey(rng, size=letters, depth=depth, needles=_NEEDLES)
        keys = re.findall(r"Remember the pass key: \w+ (\d+)\.", example.prompt)
        wrong = [f" {key}" for key in keys if f" {key}" != example.answer]
        if len(wrong) == _NEEDLES - 1:  # no key twice
            rows.append(_chosen(rng, example.prompt, example.answer, wrong))
    return rows


def write(folder: Path, count: int, seed: int, letters: int) -> list[str]:
    """Write all tasks with `count` documents each into `folder`; return their names.

    The depths of mea_needle share `count`. The documents depend only on the arguments, and those of
    mea_code also on this Python's library.
    """
    choices: dict[str, Callable[[np.random.Generator], list[dict[str, Any]]]] = {
        "mea_arithmetic_choice": lambda rng: arithmetic_choice(count, rng),
        "mea_code": lambda rng: functions.questions(count, rng),
        "mea_recall": lambda rng: recall(count, rng),
    }
    needles = [f"mea_needle_{depth}" for depth in DEPTHS]
    for name, depth in zip(needles, DEPTHS, strict=True):
        each = max(count // len(DEPTHS), 1)
        choices[name] = functools.partial(needle, each, depth=depth / 100, letters=letters)
    (folder / _LOAD).write_text(_LOADER)
    (folder / "mea_needle.yaml").write_text(_GROUP.format(members=", ".join(needles)))
    kinds: Mapping[str, tuple[Callable, str]] = {
        **{name: (make, _CHOICE) for name, make in choices.items()},
        "mea_arithmetic": (lambda rng: arithmetic(count, rng), _WRITE),
    }
    for number, name in enumerate(sorted(kinds)):
        make, form = kinds[name]
        rows = make(np.random.default_rng([seed, number]))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (folder / f"{name}.yaml").write_text(_COMMON.format(name=name) + form)
    return sorted(kinds)


def main() -> None:
    if not OUT.value:
        raise UserError("--out is missing: add --out suite")
    if not 1 <= DOCUMENTS.value <= 2000:
        raise UserError(f"--documents={DOCUMENTS.value} is out of range: must be in [1, 2000]")
    if not 0 <= SEED.value < 2**32:
        raise UserError(f"--seed={SEED.value} is out of range: must be in [0, 2^32)")
    shortest = tasks.shortest_passkey(_NEEDLES)
    if LETTERS.value < shortest:
        raise UserError(
            f"--letters={LETTERS.value} is too short for {_NEEDLES} pass keys: must be at least "
            f"{shortest}"
        )
    folder = Path(OUT.value)
    try:
        make_writable(folder)
        names = write(folder, DOCUMENTS.value, SEED.value, LETTERS.value)
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be written: {error.strerror}; choose a writable --out"
        ) from error
    print(f"{len(names)} tasks in {folder}: {', '.join(names)}; tag of all tasks: mea_suite")


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", None, "folder for the tasks, to use as --include_path")
    DOCUMENTS = flags.DEFINE_integer("documents", 500, "documents for each task")
    SEED = flags.DEFINE_integer("seed", 0, "seed for all random choices")
    LETTERS = flags.DEFINE_integer("letters", 450, "characters of a text with pass keys")
    cli.run(main, "stopped")
