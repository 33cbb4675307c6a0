"""The exception for mistakes of a user, and how a command prints it.

The message of a `UserError` names what is wrong, where, and how to fix it. Commands print it
without a traceback and exit with status 2. Any other exception is a bug in mea_jax and keeps its
traceback.
"""

import difflib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

_SHOWN = 80  # characters of a value in a message


class UserError(Exception):
    """A mistake in a config, an input file or a machine's setup: one line, no traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for a misspelt `name`, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(names)


def shown(value: Any) -> str:
    """Return `repr(value)` for a message: on one line, shortened if it is long."""
    try:
        text = repr(value)
    except Exception:  # any error of an object in a config file; an int of over 4,300 digits
        return f"something of type {type(value).__name__}"
    text = " ".join(text.splitlines())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 10]}...{text[-7:]}"


def fail(error: BaseException | str) -> NoReturn:
    """Print `error` as one line on stderr and exit with status 2."""
    line = " ".join(str(error).split())
    sys.stderr.write(f"error: {line}\n")
    sys.exit(2)


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def one_of(path: str, value: str, allowed: Iterable[str]) -> None:
    """Raise `UserError` unless the option `path` has one of the values `allowed`."""
    require(value in (names := tuple(allowed)), f"{path}={shown(value)}: {nearest(value, names)}")
