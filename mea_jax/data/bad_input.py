"""Input that cannot be read as text: the end of the reading, or left out and counted.

A reader raises `BadInputError` for a piece of its input (a line, a row, a file) and hands it to its
`LeftOut` where it could go on behind that piece. Mistakes that no piece of input is to blame for,
such as a package that is not installed, are a plain `UserError` and always the end.
"""

from collections.abc import Iterable

from mea_jax.errors import UserError

OPTION = "--config.data.bad_input=skip"
_NAMED = 5  # pieces told to the user one by one
KEPT = 100  # messages kept, however many pieces there are
_DETAIL = 200  # characters of what comes from the input or from a library


class BadInputError(UserError):
    """A piece of input that cannot be read; the message names it by file and line or row."""


class LeftOut:
    """The pieces that one reading of a source has left out.

    Attributes:
      allowed: whether pieces may be left out.
      count: how many were.
      lines: the messages of the first of them.
    """

    def __init__(self, allowed: bool = False):
        self.allowed = allowed
        self.count = 0
        self.lines: list[str] = []

    def add(self, error: BadInputError, tolerated: bool = False) -> None:
        """Counts a piece, if that is allowed or it is one that is `tolerated` anyway.

        Raises:
          UserError: else, with the message of `error`.
        """
        line = one_line(error)
        if not (self.allowed or tolerated):
            raise UserError(f"{line}; or leave such input out with {OPTION}") from error
        self.count += 1
        if len(self.lines) < KEPT:
            self.lines.append(line)


def report(lines: list[str], count: int) -> list[str]:
    """Return the message about `count` pieces that were left out, with the `lines` of the first."""
    named = lines[:_NAMED]
    more = [f"data: and {count - len(named):,} more left out"] if count > len(named) else []
    return [f"data: left out {line}" for line in named] + more


def one_line(text: object) -> str:
    """`text` on one line that any stream can print, whatever a file has brought into it."""
    line = " ".join(str(text).split()).encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)


def detail(text: object) -> str:
    """As `one_line`, and cut short: for the words of a library, which may quote a whole file."""
    line = one_line(text)
    return line if len(line) <= _DETAIL else f"{line[:_DETAIL]}..."


def some(names: Iterable[object], most: int = 10) -> str:
    """The first of `names`, sorted and joined by commas, and how many more there are."""
    ordered = sorted(str(name) for name in names)
    tail = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return detail(", ".join(ordered[:most])) + tail
