"""The two domains of text that the studies take beside Python's standard library.

    python -m studies.texts --english wikitext.txt --english plays.txt \\
        --mathematics gsm8k_train.jsonl --out texts

Writes `english.jsonl` and `mathematics.jsonl`, a document a line. Long files are cut into documents
at empty lines, so that held-out text is taken from everywhere in them.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from mea_jax import cli
from mea_jax.errors import UserError

DOCUMENT = 2000  # letters of a document, about


def cut(text: str, size: int = DOCUMENT) -> Iterator[str]:
    """`text` in pieces of at least `size` letters (but the last), each ending at an empty line."""
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
    """Each problem of a JSON-lines file with its worked answer (fields `question`, `answer`)."""
    for number, line in enumerate(_read(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            yield f"Question: {row['question']}\nAnswer: {row['answer']}\n"
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(
                f'{path}, line {number}: expected {{"question": .., "answer": ..}}'
            ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def write(path: Path, documents: Iterator[str]) -> None:
    count = 0
    try:
        with path.open("w", encoding="utf-8") as out:
            for text in documents:
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                count += 1
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    print(f"{count:,} documents in {path}")


def main() -> None:
    if not (ENGLISH.value and MATHEMATICS.value):
        raise UserError(
            "give both domains: --english FILE (may be repeated) and --mathematics FILE"
        )
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    english = (text for name in ENGLISH.value for text in cut(_read(Path(name))))
    write(out / "english.jsonl", english)
    write(out / "mathematics.jsonl", problems(Path(MATHEMATICS.value)))


if __name__ == "__main__":
    ENGLISH = flags.DEFINE_multi_string("english", [], "text file; may be repeated")
    MATHEMATICS = flags.DEFINE_string("mathematics", None, "JSON lines of problems and answers")
    OUT = flags.DEFINE_string("out", "texts", "folder for the two files")
    cli.run(main, "stopped")
