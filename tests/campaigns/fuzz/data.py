"""Random JSON-lines files, plain and compressed: each gives documents, or one line that names it.

An `Example` is the name and the bytes of a file: random bytes, JSON of any shape, or a valid file
with changes before or after its compression.
"""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
from hypothesis import strategies as st

from mea_jax.config.schema import SourceConfig
from mea_jax.data import sources
from mea_jax.data.bad_input import OPTION, LeftOut
from mea_jax.errors import UserError

from .mutation import mutated

LONGEST_LINE = 2000  # characters of a message; its longest part is the path
_DEEP = 100_000  # nested brackets, far deeper than Python's parser supports


@dataclasses.dataclass(frozen=True)
class Example:
    """A file `data` + `suffix` that contains `content`."""

    suffix: str  # ".jsonl", ".jsonl.gz" or ".jsonl.zst"
    content: bytes


def compress(suffix: str, lines: bytes) -> bytes:
    """Compress `lines` as the suffix requires; equal lines always give equal bytes."""
    if suffix == ".jsonl.gz":
        return gzip.compress(lines, mtime=0)
    if suffix == ".jsonl.zst":
        return pyarrow.compress(lines, codec="zstd", asbytes=True)
    return lines


ODD_LINES = (
    b'{"text": "a", "text": "b"}',  # one key twice
    b'\xef\xbb\xbf{"text": "after a byte order mark"}',
    b'{"text": "ends as on Windows"}\r',
    b'{"text": "nul \\u0000 and \0"}',
    b'{"text": "half \\ud83d"}',
    b'{"text": "\\ud83d\\ude42"}',
    b'{"\\ud800": 1}',
    b'{"a\\nb": 1, "\\u001b[31m": 2}',
    b'{"text": NaN}',
    b'{"text": "x", "n": Infinity}',
    b'{"text": "x", "n": ' + b"7" * 5000 + b"}",
    b'{"text": "x", "n": 1e400}',
    b'{"text": "x", "deep": ' + b"[" * _DEEP + b"]" * _DEEP + b"}",
    b'{"a":' * _DEEP,
    b'{"text": "' + b"long " * 50_000 + b'"}',
    b"{" + b",".join(b'"%d": 1' % i for i in range(5000)) + b"}",
    b"x" * 100_000,
    b"null",
    b'"text"',
    b"",
    b"\xff\xfe{\0}\0",
)
_JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.just("text"), inner, max_size=3)
    ),
    max_leaves=6,
)
_RECORDS = st.builds(
    lambda record, text: json.dumps({**record, "text": text}).encode(),
    st.dictionaries(st.text(max_size=5), _JSON, max_size=2),
    st.text(max_size=60),
)
_LINE = st.one_of(
    _RECORDS,
    _RECORDS,
    _RECORDS.flatmap(mutated),
    st.sampled_from(ODD_LINES),
    _JSON.map(lambda value: json.dumps(value).encode()),
    _JSON.map(lambda value: json.dumps({"text": value}).encode()),
    st.binary(max_size=60),
)
_FILES = (st.lists(_RECORDS, max_size=8) | st.lists(_LINE, max_size=8)).map(b"\n".join)


@st.composite
def _examples(draw) -> Example:
    suffix = draw(st.sampled_from((".jsonl", ".jsonl.gz", ".jsonl.zst")))
    content = compress(suffix, draw(_FILES))
    damage = draw(st.sampled_from(("none",) * 3 + ("mutated", "mutated", "appended", "anything")))
    if damage == "mutated":
        content = draw(mutated(content))
    elif damage == "appended":
        content += draw(st.binary(min_size=1, max_size=20) | st.just(content))
    elif damage == "anything":
        content = draw(st.binary(max_size=200))
    return Example(suffix, content)


STRATEGY = _examples()


def check(example: Example, folder: Path) -> str:
    """Read the file with both settings for bad input, and compare the results.

    Returns:
      "documents", "refused: one line" for bad input, or "refused: no text".

    Raises:
      AssertionError: the documents or the messages are wrong.
      Exception: any other error than a `UserError`, which is a defect.
    """
    path = folder / f"data{example.suffix}"
    path.write_bytes(example.content)
    try:
        source = SourceConfig(source="jsonl", path=str(path))
        left_out = LeftOut(allowed=True)
        found, nothing = _read(source, left_out)
        strict, error = _read(source, LeftOut())
        assert found[: len(strict)] == strict, "documents before the bad input differ"
        assert nothing is None or not found
        assert nothing is None or "contains no text" in str(nothing), nothing
        for message in filter(None, (nothing, error)):
            _one_line(str(message), path)
        for line in left_out.lines:
            _one_line(line, path)
        if left_out.count:
            assert error is not None, "input was left out, but is no error with bad_input=stop"
            assert str(error) == f"{left_out.lines[0]}; or leave such input out with {OPTION}"
            return "refused: one line"
        assert (found, str(nothing)) == (strict, str(error))
        if example.suffix == ".jsonl":
            _agrees(found, example.content)
        return "documents" if found else "refused: no text"
    finally:
        path.unlink()


def _read(source: SourceConfig, left_out: LeftOut) -> tuple[list[str], UserError | None]:
    """Return the texts up to the end or the first error, and that error or None."""
    texts: list[str] = []
    try:
        for document in sources.documents(source, left_out):
            document.text.encode()
            document.name.encode()
            texts.append(document.text)
    except UserError as error:
        return texts, error
    return texts, None


def _one_line(message: str, path: Path) -> None:
    assert str(path) in message, message
    assert len(message.splitlines()) == 1, message
    assert len(message) <= LONGEST_LINE, message
    message.encode()


def _agrees(texts: list[str], content: bytes) -> None:
    """Compare with a minimal reader, for a file without errors."""
    lines = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    assert texts == [line["text"] for line in lines if line["text"]]
