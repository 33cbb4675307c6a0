r"""Write the two domains of text that the studies use in addition to Python's standard library.

    python -m studies.texts --english wikitext.txt --english plays.txt \
        --mathematics gsm8k_train.jsonl --out texts

Writes `english.jsonl` and `mathematics.jsonl`, with a document per line. Long files are split into
documents at empty lines, so that held-out text comes from all parts of them.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from mea_jax import cli
from mea_jax.errors import UserError

DOCUMENT = 2000  # approximate characters of a document


def cut(text: str, size: int = DOCUMENT) -> Iterator[str]:
    """Yield pieces of `text` of at least `size` characters (the last may be shorter).

    Each ends at an empty line.
    """
    piece: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        length += len(paragraph) + 2
        if length >= size:
            yield "\n\n".join(piece)
            piece, length = [], 0
    if "".join(piece).strip():
        yield "\n\n".join(piece)


def problems(path: Path) -> Iterator[str]:
    """Yield each problem of a JSON-lines file with its answer (fields `question`, `answer`).

    Raise `UserError` if the file or a line cannot be read.
    """
    for number, line in enumerate(_read(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            yield f"Question: {row['question']}\nAnswer: {row['answer']}\n"
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(
                f'{path}, line {number} is not valid: must be {{"question": .., "answer": ..}}'
            ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; give a UTF-8 text file") from error


def write(path: Path, documents: Iterator[str]) -> None:
    count = 0
    try:
        with path.open("w", encoding="utf-8") as out:
            for text in documents:
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                count += 1
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; choose a writable --out"
        ) from error
    print(f"{count:,} documents in {path}")


def main() -> None:
    if not (ENGLISH.value and MATHEMATICS.value):
        raise UserError(
            "--english or --mathematics is missing: give --english FILE (can be repeated) and "
            "--mathematics FILE"
        )
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    english = (text for name in ENGLISH.value for text in cut(_read(Path(name))))
    write(out / "english.jsonl", english)
    write(out / "mathematics.jsonl", problems(Path(MATHEMATICS.value)))


if __name__ == "__main__":
    ENGLISH = flags.DEFINE_multi_string("english", [], "text file; can be repeated")
    MATHEMATICS = flags.DEFINE_string(
        "mathematics", None, "JSON-lines file of problems and answers"
    )
    OUT = flags.DEFINE_string("out", "texts", "folder for the two files")
    cli.run(main, "stopped")
