"""Files that are replaced as a whole, strict JSON, and the disk's errors as one line."""

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
    """Turns the disk's refusal to write `path` into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; free space or make it writable, "
            "then run the same command again: it resumes from the last checkpoint"
        ) from error


def make_writable(folder: Path) -> None:
    """Makes a folder, if need be, and tries to write there. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.write_text("")
    probe.unlink()


def write_whole(path: Path, text: str) -> None:
    """Replaces a file's text, or leaves it as it was."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


def to_json(tree: Any, indent: int | None = None) -> str:
    """Strict JSON, which any reader takes: it has no numbers that are not finite; they are null."""

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
    """Writes whole or not at all. Raises `UserError` when the disk refuses."""
    with disk_errors(path):
        write_whole(path, to_json(tree, indent=1) + "\n")
