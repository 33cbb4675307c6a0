"""Replace files atomically, write strict JSON, and report disk errors on one line."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mea_jax.errors import UserError


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` from writing `path` into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; free space, make it writable or "
            "choose another place, then run the command again"
        ) from error


def make_writable(folder: Path) -> None:
    """Make `folder` if it does not exist, and test writing to it. Raise `OSError` on failure."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.write_text("")
    probe.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text atomically: if this fails, the file stays as it was."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


def to_json(tree: Any, indent: int | None = None) -> str:
    """Return `tree` as strict JSON, which every parser reads: NaN and infinities become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return value

    return json.dumps(finite(tree), indent=indent, allow_nan=False)


def write_json(path: Path, tree: Any) -> None:
    """Write `tree` as JSON, atomically. Raise `UserError` if the disk refuses."""
    with disk_errors(path):
        write_atomically(path, to_json(tree, indent=1) + "\n")
