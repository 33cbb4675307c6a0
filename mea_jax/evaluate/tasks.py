"""Draw tasks with right and wrong answers as text: pass keys, sums, tables to recall.

    python -m mea_jax.evaluate.tasks --out passkeys.jsonl --documents 20000 --seed 1 --length 600

writes training documents, one {"text": ...} per line. Added to the data as a `jsonl` source, they
teach a model the formats of these tasks, which a small model cannot solve otherwise. A document
should be much shorter than the window; otherwise a key is often separated from its question. At 3
letters per token, 600 letters suit a window of 256.

Evaluation questions never occur in these documents, for any seed. `split_of` assigns a fifth of all
pass keys, problems (a + b and b + a are one) and table rows to the evaluation split by a hash, and
the rest to the training split. Each split draws only from its own.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags

from mea_jax import cli
from mea_jax.data.corpus import unit_hash
from mea_jax.errors import UserError, nearest

TRAIN, EVALUATION = "train", "evaluation"
KINDS = ("passkey", "arithmetic", "recall", "repeat")
USUAL_KINDS = KINDS[:2]  # those that `mea_jax.evaluate` itself measures
OPERATIONS = ("+", "-")
_EVALUATION_SHARE = 0.2
_KEYS = (10_000, 100_000)  # all five-digit numbers
_BLOCK = 64  # sentences drawn and measured together
_MOST_NEEDLES = 3  # pass keys of a training document
_NUMBERS = 0.25  # share of a list's items that are numbers

Measure = Callable[[Sequence[str]], Sequence[int]]  # sizes of texts, in letters or tokens


def _words(text: str) -> list[str]:
    return text.split()


_NAMES = _words(
    "Ada Boris Clara David Elena Felix Greta Hugo Irene Jonas Karla Louis Maria Nadia Oscar Paula "
    "Robin Sonja Thomas Ulla Victor Wanda Yusuf Zora"
)
_ADJECTIVES = _words(
    "old quiet bright small heavy green distant careful narrow golden broken patient early wooden "
    "silent wide gentle cold"
)
_NOUNS = _words(
    "river farmer garden window teacher mountain letter engine baker village forest captain bridge "
    "market painter road harbour student clock field doctor tower horse boat"
)
_VERBS = _words(
    "watched found crossed painted followed carried remembered visited left repaired described "
    "reached"
)
_ENDINGS = (
    *("", " in the morning", " after the rain", " near the sea"),
    *(" without a word", " for many years", " before winter", " once again"),
)


_VALUES = (*_ADJECTIVES, *_NOUNS, *_VERBS)  # of tables


@dataclass(frozen=True)
class Example:
    """A question: the text before the answer, and the answer with its leading space."""

    prompt: str
    answer: str


def letters(texts: Sequence[str]) -> list[int]:
    """Return the sizes of texts in letters."""
    return [len(text) for text in texts]


def split_of(name: str) -> str:
    """Return the split, `TRAIN` or `EVALUATION`, of the question with this name."""
    share = unit_hash(f"mea_jax task: {name}")
    return EVALUATION if share < _EVALUATION_SHARE else TRAIN


def split_of_key(key: int) -> str:
    """Return the split of a pass key."""
    return split_of(f"pass key {key}")


def split_of_problem(a: int, operation: str, b: int) -> str:
    """Return the split of a problem, which is the same for a + b and b + a."""
    a, b = (min(a, b), max(a, b)) if operation == "+" else (a, b)
    return split_of(f"{a} {operation} {b}")


# -- pass keys ----------------------------------------------------------------------------------


def _sentence(rng: np.random.Generator) -> str:
    def pick(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    return (
        f"The {pick(_ADJECTIVES)} {pick(_NOUNS)} {pick(_VERBS)} the {pick(_NOUNS)}{pick(_ENDINGS)}."
    )


def _draw_key(rng: np.random.Generator, split: str) -> int:
    while True:
        key = int(rng.integers(*_KEYS))
        if split_of_key(key) == split:
            return key


def _needle(name: str, key: int) -> str:
    return f"Remember the pass key: {name} {key}."


def _question(name: str) -> str:
    """Return the question, which ends with the name so that the key follows as in the needle.

    See `_table_text` for the reason.
    """
    return f"\nQuestion: what is the pass key of {name}?\nAnswer: {name}"


def _hide(
    rng: np.random.Generator,
    needles: Sequence[tuple[float, str]],
    end: str,
    size: int,
    measure: Measure,
) -> str:
    """Return the longest text within `size`: filler with `needles` (depth, text) in it, then `end`.

    Raise `ValueError` if needles and end alone do not fit.
    """

    def text(count: int) -> str:
        pieces = list(filler[:count])
        # Insert the deepest first, so that earlier ones do not shift it.
        for depth, needle in sorted(needles, reverse=True):
            pieces.insert(round(depth * count), needle)
        return " ".join(pieces) + end

    filler: list[str] = []
    (least,) = measure([text(0)])
    if least > size:
        raise ValueError(f"size {size} is too short for a question of {least}")
    sizes: list[int] = []
    while sum(sizes) <= size - least:
        filler += [_sentence(rng) for _ in range(_BLOCK)]
        sizes += measure([f" {sentence}" for sentence in filler[-_BLOCK:]])
    count = int(np.searchsorted(np.cumsum(sizes), size - least, side="right"))
    while (excess := measure([text(count)])[0] - size) > 0:  # joined pieces may be longer
        count = max(0, count - -(-excess // max(max(sizes), 1)))
    return text(count)


def passkey(
    rng: np.random.Generator,
    *,
    size: int,
    depth: float,
    needles: int = 1,
    split: str = EVALUATION,
    measure: Measure = letters,
) -> Example:
    """Hide a pass key in filler and ask for it at the end.

    Args:
      rng: source of all random draws.
      size: maximum size of the prompt by `measure`, which it reaches within one sentence.
      depth: position of the key in the filler: 0 at its beginning, 1 at its end.
      needles: total number of keys; the other ones have other names and random depths.
      split: the split that keys are drawn from.
      measure: returns the sizes of texts.

    Raises:
      ValueError: `size` is too short for the question, or `needles` is not between 1 and the number
        of names.
    """
    if not 1 <= needles <= len(_NAMES):
        raise ValueError(f"needles={needles} must be in [1, {len(_NAMES)}]")
    names = [_NAMES[i] for i in rng.choice(len(_NAMES), needles, replace=False)]
    keys = [_draw_key(rng, split) for _ in names]
    depths = [depth, *rng.random(needles - 1).tolist()]
    hidden = [(d, _needle(n, k)) for d, n, k in zip(depths, names, keys, strict=True)]
    return Example(_hide(rng, hidden, _question(names[0]), size, measure), f" {keys[0]}")


def shortest_passkey(needles: int) -> int:
    """Return the letters of the longest prompt of `passkey` without any filler."""
    name = max(_NAMES, key=len)
    return needles * len(f"{_needle(name, _KEYS[0])} ") + len(_question(name))


def _passkey_document(rng: np.random.Generator, size: int) -> str:
    """Return a document with one to three keys and a question for each."""
    names = [_NAMES[i] for i in rng.permutation(len(_NAMES))]
    for count in range(int(rng.integers(1, _MOST_NEEDLES + 1)), 0, -1):
        keys = [_draw_key(rng, TRAIN) for _ in range(count)]
        pairs = list(zip(names, keys, strict=False))
        hidden = [(float(rng.random()), _needle(name, key)) for name, key in pairs]
        order = rng.permutation(count)
        end = "".join(f"{_question(pairs[i][0])} {pairs[i][1]}." for i in order) + "\n"
        try:
            return _hide(rng, hidden, end, size, letters)
        except ValueError:  # fewer keys may fit
            continue
    return f"{_needle(names[0], keys[0])}{_question(names[0])} {keys[0]}.\n"


# -- sums ---------------------------------------------------------------------------------------


def _draw_problem(
    rng: np.random.Generator, operation: str, digits: int, split: str
) -> tuple[str, str]:
    r"""Return ("23 + 58 =", " 81\n") for two numbers of `digits` digits; no result is negative."""
    low, high = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits
    while True:
        a, b = (int(x) for x in rng.integers(low, high, 2))
        if operation == "-":
            a, b = max(a, b), min(a, b)
        if split_of_problem(a, operation, b) == split:
            result = a + b if operation == "+" else a - b
            return f"{a} {operation} {b} =", f" {result}\n"


def arithmetic(
    rng: np.random.Generator,
    *,
    operation: str,
    digits: int,
    shots: int = 4,
    split: str = EVALUATION,
) -> Example:
    """Draw a problem after `shots` solved ones of its kind, which are from the training split."""
    solved = ["".join(_draw_problem(rng, operation, digits, TRAIN)) for _ in range(shots)]
    question, answer = _draw_problem(rng, operation, digits, split)
    return Example("".join(solved) + question, answer)


def _arithmetic_document(rng: np.random.Generator, size: int) -> str:
    lines: list[str] = []
    while True:
        operation = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
        line = "".join(_draw_problem(rng, operation, int(rng.integers(1, 4)), TRAIN))
        if lines and sum(map(len, lines)) + len(line) > size:
            return "".join(lines)
        lines.append(line)


# -- tables -------------------------------------------------------------------------------------


def recall(rng: np.random.Generator, *, pairs: int, split: str = EVALUATION) -> Example:
    """Draw a table of `pairs` names with a word each, and repeat one name as the question.

    Raise `ValueError` unless `pairs` is between 1 and the number of names.
    """
    table = _draw_table(rng, pairs, split)
    name, value = table[int(rng.integers(pairs))]
    return Example(f"{_table_text(table)}{name}", f" {value}")


def split_of_recall(name: str, value: str) -> str:
    """Return the split of a row of a table."""
    return split_of(f"{name} has {value}")


def _draw_table(rng: np.random.Generator, pairs: int, split: str) -> list[tuple[str, str]]:
    """Draw rows with different names and different words."""
    if not 1 <= pairs <= len(_NAMES):
        raise ValueError(f"pairs={pairs} must be in [1, {len(_NAMES)}]")
    table: dict[str, str] = {}
    for i in rng.choice(len(_NAMES), pairs, replace=False):
        while True:
            value = _VALUES[int(rng.integers(len(_VALUES)))]
            if value not in table and split_of_recall(_NAMES[i], value) == split:
                break
        table[value] = _NAMES[i]
    return [(name, value) for value, name in table.items()]


def _table_text(table: Sequence[tuple[str, str]]) -> str:
    """Format a table with one row per line, so that a name has the same tokens in the question.

    With " Ada" in the table and "Ada" in the question, a small model finds nothing. The same is
    true if a token separates name and value, such as that of the space before a number.
    """
    return "Table:\n" + "".join(f"{name} {value}\n" for name, value in table) + "Again:\n"


def _recall_document(rng: np.random.Generator, size: int) -> str:
    """Return tables, each followed by all of its rows in another order."""
    text = ""
    while True:
        table = _draw_table(rng, int(rng.integers(2, 9)), TRAIN)
        order = rng.permutation(len(table))
        asked = "".join(f"{table[i][0]} {table[i][1]}\n" for i in order)
        if text and len(text) + len(asked) + len(_table_text(table)) > size:
            return text
        text += _table_text(table) + asked


# -- repeated lists -----------------------------------------------------------------------------


def _repeat_document(rng: np.random.Generator, size: int) -> str:
    """Return lists of words and a few numbers, each followed by two of its tails.

    The tails begin at random items. Half of the tokens can be predicted only from what followed the
    same word before: positions do not help, and no comma separates the items. Pass keys and tables
    need the same skill, but teach it slowly with their few such tokens per document. The lists
    contain no row of a table, no pass key and no sum.
    """
    text = ""
    while True:
        count = int(rng.integers(4, 13))
        items = [_VALUES[i] for i in rng.choice(len(_VALUES), count, replace=False)]
        for i in np.flatnonzero(rng.random(count) < _NUMBERS):
            items[i] = str(rng.integers(100, 1000))
        part = f"List: {' '.join(items)}.\n"
        for start in rng.integers(count - 2, size=2):
            part += f"Again: {' '.join(items[start:])}.\n"
        if text and len(text) + len(part) > size:
            return text
        text += part


# -- training documents -------------------------------------------------------------------------


def documents(
    count: int, seed: int, length: int, kinds: Sequence[str] = USUAL_KINDS
) -> Iterator[str]:
    """Yield `count` training documents of at most `length` letters, the kinds in turn.

    Document i depends only on (seed, i), `length` and `kinds`. Target lengths are uniform between a
    quarter of `length` and `length`.
    """
    makers = {
        "passkey": _passkey_document,
        "arithmetic": _arithmetic_document,
        "recall": _recall_document,
        "repeat": _repeat_document,
    }
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        size = int(rng.integers(max(length // 4, 1), length + 1))
        yield makers[kinds[i % len(kinds)]](rng, size)


def main() -> None:
    """Write the training documents to --out. Raise `UserError` for an option out of range."""
    kinds = [kind for kind in KINDS_FLAG.value if kind]
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--tasks {kind}: {nearest(kind, KINDS)}")
    if not kinds:
        raise UserError(f"--tasks is empty: choose from {', '.join(KINDS)}")
    if OUT.value is None:
        raise UserError("no file given: add --out passkeys.jsonl")
    if DOCUMENTS.value < 1:
        raise UserError(f"--documents={DOCUMENTS.value} must be 1 or more")
    shortest = shortest_passkey(1) + len(" 10000.\n")
    if LENGTH.value < shortest:
        raise UserError(f"--length={LENGTH.value}: a pass key takes {shortest} letters; raise it")
    if not 0 <= SEED.value < 2**32:
        raise UserError(f"--seed={SEED.value} must be in [0, 2^32)")
    path, size = Path(OUT.value), 0
    texts = documents(DOCUMENTS.value, SEED.value, LENGTH.value, kinds)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as out:
            for text in cli.progress(texts, "documents", DOCUMENTS.value):
                size += len(text)
                out.write(json.dumps({"text": text}) + "\n")
    except OSError as error:
        raise UserError(
            f"--out {path} cannot be written: {error.strerror}; choose another one"
        ) from error
    print(f"{DOCUMENTS.value:,} documents, {size:,} letters in {path}")


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", None, "the .jsonl file to write")
    DOCUMENTS = flags.DEFINE_integer("documents", 20_000, "number of documents")
    LENGTH = flags.DEFINE_integer("length", 600, "maximum letters of a document")
    SEED = flags.DEFINE_integer("seed", 1, "of all random draws")
    KINDS_FLAG = flags.DEFINE_list(
        "tasks", list(USUAL_KINDS), f"kinds of documents, in turn: {', '.join(KINDS)}"
    )
    cli.run(main, "stopped")
