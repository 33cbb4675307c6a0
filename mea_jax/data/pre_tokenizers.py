"""Splitting of text into the pieces that byte-pair merges stay within.

The time to merge grows with the square of a piece's length, so a line of 2 MB without a space or
sign would take hours. If the training text has runs of letters, signs or white space longer than
`LONGEST`, such runs are cut into pieces of that many characters, in training and by the trained
tokenizer. Without such runs, the trained tokenizer is the same as without this limit.
"""

import re
from collections.abc import Iterator

import tokenizers as hf

LONGEST = 128  # characters of one class in a row; the Python standard library has at most 109


def _pattern(plus: str, any_number: str) -> str:
    """Return the regular expression of a piece; arguments are quantifiers such as "+" and "*"."""
    # For code and English. In order:
    return "|".join(
        (
            r"'(?i:s|t|d|m|ll|re|ve)(?!\p{L})",  # contractions
            # A word, with one space or sign before it.
            rf"(?: |[^\s\p{{L}}\p{{N}}])?[\p{{L}}\p{{M}}]{plus}",
            r"\p{N}{1,3}",  # digits by threes
            # Signs with the line's end and the next line's indentation, as in "):\n    ". The last
            # space of the indentation belongs to the next word.
            rf" ?[^\s\p{{L}}\p{{N}}]{plus}(?:[\r\n]{plus}(?:[ \t]{plus}(?!\S))?)?",
            rf"\s{any_number}[\r\n]{plus}(?:[ \t]{plus}(?!\S))?",  # line ends and indentation
            rf"\s{plus}(?!\S)",  # other white space; its last character belongs to the next word
            rf"\s{plus}",
        )
    )


_UNBOUNDED = _pattern("+", "*")
_BOUNDED = _pattern(f"{{1,{LONGEST}}}", f"{{0,{LONGEST}}}")
_SUSPECT = re.compile(rf"\S{{{LONGEST + 1},}}|\s{{{LONGEST + 1},}}")
_RUN = "|".join(
    rf"{letter}{{{LONGEST + 1},}}" for letter in (r"[\p{L}\p{M}]", r"[^\s\p{L}\p{N}]", r"\s")
)


def splitter(bounded: bool) -> hf.pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer; `bounded` limits pieces to `LONGEST` characters of one class."""
    pattern = _BOUNDED if bounded else _UNBOUNDED
    return hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


class LongRunDetector:
    """An iterable of training texts that detects long runs.

    Attributes:
      long_runs: whether a text so far had a run of letters, signs or white space longer than
        `LONGEST`.
    """

    def __init__(self, texts: Iterator[str]):
        self._texts = texts
        self._remove = hf.normalizers.Replace(hf.Regex(_RUN), "")
        self.long_runs = False

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.long_runs = self.long_runs or self._has_long_run(text)
            yield text

    def _has_long_run(self, text: str) -> bool:
        # The first search is fast, but its long runs may mix letters, signs and digits.
        suspects = (match.group() for match in _SUSPECT.finditer(text))
        return any(self._remove.normalize_str(suspect) != suspect for suspect in suspects)
