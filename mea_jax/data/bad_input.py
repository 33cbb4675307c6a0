"""Handling of input that cannot be read as text: stop with an error, or leave it out and count it.

A reader raises `BadInputError` for a piece of its input (a line, a row, a file). If it can continue
after that piece, it passes the error to its `LeftOut`. Errors that no piece of input causes, such
as a package that is not installed, are a plain `UserError` and always stop the run.
"""

from collections.abc import Iterable

from mea_jax.errors import UserError

OPTION = "--config.data.bad_input=skip"
_NAMED = 5  # pieces reported one by one
KEPT = 100  # messages kept; further pieces are only counted
_DETAIL = 200  # characters of text from the input or from a library


class BadInputError(UserError):
    """A piece of input that cannot be read; the message names it by file and line or row."""


class LeftOut:
    """The pieces of input that one pass over a source has left out.

    Attributes:
      allowed: whether pieces may be left out.
      count: the number of pieces left out.
      lines: the messages of the first `KEPT` of them.
    """

    def __init__(self, allowed: bool = False):
        self.allowed = allowed
        self.count = 0
        self.lines: list[str] = []

    def add(self, error: BadInputError, tolerated: bool = False) -> None:
        """Count a piece as left out.

        Raises:
          UserError: pieces may not be left out, and this one is not `tolerated`; has the message
            of `error`.
        """
        line = one_line(error)
        if not (self.allowed or tolerated):
            raise UserError(f"{line}; or leave such input out with {OPTION}") from error
        self.count += 1
        if len(self.lines) < KEPT:
            self.lines.append(line)


def report(lines: list[str], count: int) -> list[str]:
    """Return the log lines about `count` pieces left out; `lines` are the first messages."""
    named = lines[:_NAMED]
    more = [f"data: and {count - len(named):,} more left out"] if count > len(named) else []
    return [f"data: left out {line}" for line in named] + more


def one_line(text: object) -> str:
    """Return `text` as one line that every stream can print, with escapes where necessary."""
    line = " ".join(str(text).split()).encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)


def first_line(text: object) -> str:
    """Return `one_line(text)`, cut to 200 characters: a library may quote an entire file."""
    line = one_line(text)
    return line if len(line) <= _DETAIL else f"{line[:_DETAIL]}..."


def summarize_names(names: Iterable[object], most: int = 10) -> str:
    """Return the first `most` of the sorted `names`, comma-separated, and the number of others."""
    ordered = sorted(str(name) for name in names)
    tail = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return first_line(", ".join(ordered[:most])) + tail
