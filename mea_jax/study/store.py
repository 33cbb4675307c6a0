"""Store the rows of a study: one JSON line per run, appended by many processes, safe against kills.

A row is written by a single `write` to a file opened for appending, under a lock, and is synced to
disk. A kill can leave a truncated last line. Readers skip it, and the next writer terminates it, so
that only the row that was being written is lost.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from mea_jax.checkpoint.files import disk_errors, write_json
from mea_jax.config.parse import from_dict
from mea_jax.config.schema import EXECUTION_KEYS, flatten
from mea_jax.errors import UserError
from mea_jax.study.laws.results import Result

Row = dict[str, Any]
Key = tuple[str, str, int, float, int]  # variant, size, steps, learning rate, seed
KEYS = ("variant", "size", "steps", "learning_rate", "seed")


def key_of(row: Row) -> Key:
    """Return the key of a row, which identifies its run."""
    variant, size, steps, rate, seed = (row[name] for name in KEYS)
    return variant, size, int(steps), float(rate), int(seed)


def _with_defaults(grid: Row) -> Row:
    """Return a grid whose base has all options, also those that are newer than the grid."""
    try:
        return grid | {"base": from_dict(grid["base"]).to_dict()}
    except (KeyError, UserError):  # no config: it differs as it is
        return grid


class Store:
    """A directory with `rows.jsonl`, and with `grid.json`, the grid of these rows."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path, self.grid = folder / "rows.jsonl", folder / "grid.json"

    def claim(self, fingerprint: Row) -> None:
        """Bind the store to the grid with this `Grid.identity`.

        Axes, variants and sizes may be added later. Raise `UserError`, with the keys that differ,
        if the store belongs to another grid.
        """
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        wanted = _with_defaults(json.loads(json.dumps(fingerprint)))
        if self.grid.exists():
            stored = _with_defaults(json.loads(self.grid.read_text()))
            differing = _differing(stored, wanted)
            if differing:
                shown = ", ".join(differing[:4]) + (", ..." if len(differing) > 4 else "")
                raise UserError(
                    f"{self.folder} contains rows of another grid, which differs in {shown}: "
                    "choose another --out"
                )
            for axis in ("variants", "sizes"):
                wanted[axis] = stored[axis] | wanted[axis]
        write_json(self.grid, wanted)

    def append(self, row: Row) -> None:
        """Append one row, completely or not at all."""
        line = json.dumps(row, allow_nan=False) + "\n"
        with disk_errors(self.path):
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":
                    line = "\n" + line  # terminates a truncated line
                os.write(file, line.encode())
                os.fsync(file)
            finally:
                os.close(file)

    def rows(self) -> list[Row]:
        """Return the last row of each key; raise `UserError` if a row is not that of a run."""
        found: dict[Key, Row] = {}
        for number, line in enumerate(self._lines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # truncated by a kill
            check(row, f"{self.path}, line {number}")
            found[key_of(row)] = row
        return list(found.values())

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text().splitlines() if self.path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.path} cannot be read: {error}; restore the file or its permissions"
            ) from error


def check(row: Any, where: str) -> None:
    """Raise `UserError`, which begins with `where`, if `row` is not that of a run."""
    try:
        Result.from_row(row, where)
        if "steps" not in row:
            raise UserError(f"{where}: no steps: add the number of steps")
    except UserError as error:
        raise UserError(f"{error}; or remove the line to repeat the run") from error


def _differing(stored: Row, wanted: Row) -> list[str]:
    """Return the keys in which two grids differ, sorted.

    Ignores variants and sizes that only one of them has, and keys about the execution of runs.
    """
    found = []
    for axis in ("variants", "sizes"):
        for name in stored[axis].keys() & wanted[axis].keys():
            found += _keys(stored[axis][name], wanted[axis][name], f"{axis}.{name}.")
    for part in ("base", "spikes"):
        found += _keys(stored[part], wanted[part], f"{part}.")
    return sorted(found)


def _keys(old: Row, new: Row, prefix: str) -> list[str]:
    a, b = flatten(old), flatten(new)
    keys = (key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    return [prefix + key for key in keys if not key.startswith(EXECUTION_KEYS)]
