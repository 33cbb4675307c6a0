"""Draw sentences at random from the code, README and docs, to check that each reads at once.

    python -m tests.sample_prose --seed 0

Prints five sentences of docstrings, comments and error messages, two of README.md and
CONTRIBUTING.md, and three of docs/, each with its file and line. A sentence that has to be read
twice is one to rewrite.
"""

import argparse
import ast
import io
import random
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.paths import ROOT

Sentence = tuple[str, int, str]  # file, line, text
_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`\"(])|\n\s*\n")
_SECTION = re.compile(r"^\s*(Args|Returns|Raises|Attributes|Yields):\s*$", re.MULTILINE)


def split(path: str, line: int, text: str) -> Iterator[Sentence]:
    """Yield the sentences of `text`, which starts at `line` of `path`; code blocks are left out."""
    text = _SECTION.sub("\n", text)
    kept = [
        block for block in re.split(r"\n[ \t]*\n", text) if not re.match(r"\s{4,}\S|```|\|", block)
    ]
    for block in kept:
        for sentence in _END.split(block):
            words = " ".join(sentence.split())
            if len(words.split()) >= 4:
                yield path, line + text[: text.find(sentence)].count("\n"), words


def message_text(node: ast.expr) -> str:
    """Return the text of a message, with the names of its values in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(message_text, node.values))
    if isinstance(node, ast.BinOp):
        return message_text(node.left) + message_text(node.right)
    return f"{{{ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)}}}"


def of_python(path: str, source: str) -> Iterator[Sentence]:
    """Yield the sentences of docstrings, comments and the messages of `UserError`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            yield from split(path, first.lineno, ast.get_docstring(node) or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
            yield from split(path, node.lineno, " ".join(map(message_text, node.args)))
    comment: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(
            ("#!", "# noqa", "# type", "# --")
        ):
            comment.append(token.string.lstrip("# "))
        elif token.type not in (tokenize.NL, tokenize.NEWLINE) and comment:
            yield from split(path, token.start[0] - len(comment), "\n".join(comment))
            comment = []


def of_markdown(path: str, source: str) -> Iterator[Sentence]:
    """Yield the sentences of a page's paragraphs and lists, without its code and tables."""
    prose = re.sub(r"```.*?```", lambda code: "\n" * code.group().count("\n"), source, flags=re.S)
    prose = re.sub(r"(?m)^\|.*$|^    .*$|^#.*$", "", prose)
    for block in re.finditer(r"(?:^(?!\s*$).*\n?)+", prose, re.MULTILINE):
        line = prose[: block.start()].count("\n") + 1
        for item in re.split(r"\n(?=\s*(?:[-*]|\d+\.) )", block.group()):
            yield from split(path, line, item)


def sentences() -> dict[str, list[Sentence]]:
    """Return all sentences of the repository's tracked files, by kind of file."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found: dict[str, list[Sentence]] = {"code": [], "front": [], "docs": []}
    for path in listed.stdout.split():
        source = Path(ROOT, path).read_text()
        if path.endswith(".py"):
            found["code"] += of_python(path, source)
        else:
            found["docs" if path.startswith("docs/") else "front"] += of_markdown(path, source)
    return found


def main() -> None:
    """Print the drawn sentences."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    rng = random.Random(parser.parse_args().seed)
    found = sentences()
    for kind, count in (("code", 5), ("front", 2), ("docs", 3)):
        for path, line, text in rng.sample(found[kind], count):
            print(f"{path}:{line}\n    {text}\n")


if __name__ == "__main__":
    main()
