"""Make multiple-choice questions for the next line of a function of Python's standard library."""

import ast
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_BEFORE = (3, 10)  # lines of the function before the line to choose
_LINE = (16, 60)  # characters of that line, without indentation
_CHOICES = 4
_FOLDERS = ("test", "tests", "idle_test", "site-packages", "lib2to3")  # not part of the library
_DRAWS = 200  # lines drawn to find the wrong choices of a question


@functools.cache
def library_functions() -> tuple[list[str], ...]:
    """Return the lines of each function of the library, from its `def`, in a fixed order."""
    return tuple(_read_functions())


def _read_functions() -> Iterator[list[str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if any(part in _FOLDERS for part in path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            continue  # some files contain errors on purpose
        lines = text.split("\n")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield lines[node.lineno - 1 : node.end_lineno]


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def questions(count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return up to `count` questions [{"prompt", "choices", "answer"}, ...].

    The prompt is the beginning of a function. The choices are four lines, of which number `answer`
    comes next. The others come from other functions; their length differs by at most a quarter, and
    they get the same indentation.
    """
    asked: list[tuple[str, str, str]] = []  # prompt, line, the function's text
    low, high = _LINE
    for lines in library_functions():
        places = [
            i
            for i in range(_BEFORE[0], min(len(lines), _BEFORE[1] + 1))
            if low <= len(lines[i].strip()) <= high and lines[i - 1].strip()
        ]
        if places and "\t" not in "".join(lines):
            i = places[int(rng.integers(len(places)))]
            asked.append(("\n".join(lines[:i]) + "\n", lines[i], "\n".join(lines)))
    # Remove questions from functions that occur in several files.
    asked = list({question[0]: question for question in asked}.values())
    found = []
    for i in rng.permutation(len(asked)):
        prompt, right, text = asked[i]
        wrong: list[str] = []
        for other in rng.integers(len(asked), size=_DRAWS):
            line = asked[other][1].strip()
            alike = abs(len(line) - len(right.strip())) <= len(right.strip()) / 4
            if alike and line not in text and line not in wrong:
                wrong.append(line)
                if len(wrong) == _CHOICES - 1:
                    break
        else:
            continue
        answer = int(rng.integers(_CHOICES))
        before = " " * _indentation(right)
        lines = [before + line for line in wrong]
        lines.insert(answer, right.rstrip())
        choices = [f"{line}\n" for line in lines]
        found.append({"prompt": prompt, "choices": choices, "answer": answer})
        if len(found) == count:
            break
    return found
