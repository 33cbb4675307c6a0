"""The pieces of text that byte-pair merges stay within.

Merging takes time that grows with the square of a piece's length, so a line of 2 MB without a
space or sign would take hours. Text with runs of letters, signs or white space longer than
`LONGEST` is therefore cut into pieces of that many characters, in training and by the tokenizer
that comes of it. Other text gives the tokenizer that it would give without this bound.
"""

import re
from collections.abc import Iterator

import tokenizers as hf

LONGEST = 128  # characters of one class in a row; Python's own sources have at most 109


def _pattern(some: str, any_number: str) -> str:
    """Return the expression of a piece; the arguments are the repeats, such as "+" and "*"."""
    # For code and English alike. In order:
    return "|".join(
        (
            r"'(?i:s|t|d|m|ll|re|ve)(?!\p{L})",  # contractions
            # A word, with one space or sign before it.
            rf"(?: |[^\s\p{{L}}\p{{N}}])?[\p{{L}}\p{{M}}]{some}",
            r"\p{N}{1,3}",  # digits by threes
            # Signs with the line's end and the next line's indentation, as in "):\n    ". The last
            # space of the indentation stays with the word that follows.
            rf" ?[^\s\p{{L}}\p{{N}}]{some}(?:[\r\n]{some}(?:[ \t]{some}(?!\S))?)?",
            rf"\s{any_number}[\r\n]{some}(?:[ \t]{some}(?!\S))?",  # line ends and indentation
            rf"\s{some}(?!\S)",  # other white space, its last character left to the next word
            rf"\s{some}",
        )
    )


_UNBOUNDED = _pattern("+", "*")
_BOUNDED = _pattern(f"{{1,{LONGEST}}}", f"{{0,{LONGEST}}}")
_SUSPECT = re.compile(rf"\S{{{LONGEST + 1},}}|\s{{{LONGEST + 1},}}")
_RUN = "|".join(
    rf"{letter}{{{LONGEST + 1},}}" for letter in (r"[\p{L}\p{M}]", r"[^\s\p{L}\p{N}]", r"\s")
)


def splitter(bounded: bool) -> hf.pre_tokenizers.PreTokenizer:
    """Return what cuts text into pieces, of at most `LONGEST` characters a class if `bounded`."""
    pattern = _BOUNDED if bounded else _UNBOUNDED
    return hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


class Watched:
    """Texts on their way to a trainer.

    Attributes:
      long_runs: whether one so far had a run of letters, signs or white space above `LONGEST`.
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
        # The first search is quick, but long runs without white space may have signs and digits.
        suspects = (match.group() for match in _SUSPECT.finditer(text))
        return any(self._remove.normalize_str(suspect) != suspect for suspect in suspects)
