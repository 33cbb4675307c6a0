"""The one exception a user may cause, and how a command prints it.

A `UserError` says what is wrong, where, and how to mend it. Commands print it without a
traceback and exit with status 2; anything else is a defect of ours and keeps its traceback.
"""

import difflib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

_SHOWN = 80  # characters of a value in a message


class UserError(Exception):
    """A mistake in a config, an input file, a machine's set-up: one line, no traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail "did you mean 'x'?" for a misspelt `name`, or the list of what exists."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(names)


def shown(value: Any) -> str:
    """`repr(value)` on one line, cut where it is long: what a message says that was given."""
    try:
        text = repr(value)
    except Exception:  # whatever an object in a config file raises; int beyond 4,300 digits
        return f"something of type {type(value).__name__}"
    text = " ".join(text.splitlines())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 10]}...{text[-7:]}"


def fail(error: BaseException | str) -> NoReturn:
    """Prints `error` as one line on stderr and exits with status 2."""
    line = " ".join(str(error).split())
    sys.stderr.write(f"error: {line}\n")
    sys.exit(2)
