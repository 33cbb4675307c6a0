"""The rows of a study: one JSON line a run, appended by many processes, never damaged by a kill.

A row is written by one `write` to a file opened for appending, under a lock, and forced to disk.
What a kill cut short is a last line without an end: readers leave it out, and the next writer ends
it, so that it costs the row that was being written and no other.
"""

import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from mea_jax.checkpoint.files import disk_errors, write_json
from mea_jax.config.schema import EXECUTION_KEYS, SourceConfig, flatten
from mea_jax.errors import UserError
from mea_jax.study.laws.results import Result

Row = dict[str, Any]
Key = tuple[str, str, int, float, int]  # variant, size, steps, learning rate, seed
KEYS = ("variant", "size", "steps", "learning_rate", "seed")


def key_of(row: Row) -> Key:
    variant, size, steps, rate, seed = (row[name] for name in KEYS)
    return variant, size, int(steps), float(rate), int(seed)


def _with_defaults(grid: Row) -> Row:
    """Return a stored grid whose data sources have the keys that are younger than it."""
    data = grid.get("base", {}).get("data", {})
    if "sources" in data:
        defaults = dataclasses.asdict(SourceConfig())
        data["sources"] = [defaults | source for source in data["sources"]]
    return grid


class Store:
    """`rows.jsonl` and `grid.json`, what its rows are of, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path, self.grid = folder / "rows.jsonl", folder / "grid.json"

    def claim(self, identity: Row) -> None:
        """Makes the store that of a grid. Axes, variants and sizes may be added to it later.

        Raises `UserError` where its rows are of another grid; it names the keys that differ.
        """
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(identity))
        if self.grid.exists():
            stored = _with_defaults(json.loads(self.grid.read_text()))
            differing = _differing(stored, wanted)
            if differing:
                shown = ", ".join(differing[:4]) + (", ..." if len(differing) > 4 else "")
                raise UserError(
                    f"{self.folder} holds rows of another grid, which differs in {shown}: choose "
                    "another --out"
                )
            for axis in ("variants", "sizes"):
                wanted[axis] = stored[axis] | wanted[axis]
        write_json(self.grid, wanted)

    def append(self, row: Row) -> None:
        """One row, whole or not at all."""
        line = json.dumps(row, allow_nan=False) + "\n"
        with disk_errors(self.path):
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":
                    line = "\n" + line  # ends what a kill cut short
                os.write(file, line.encode())
                os.fsync(file)
            finally:
                os.close(file)

    def rows(self) -> list[Row]:
        """All rows, the last one of each key. Raises `UserError` for one that is not a run's."""
        found: dict[Key, Row] = {}
        for number, line in enumerate(self._lines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut short by a kill
            check(row, f"{self.path}, line {number}")
            found[key_of(row)] = row
        return list(found.values())

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text().splitlines() if self.path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path} cannot be read: {error}") from error


def check(row: Any, where: str) -> None:
    """Raises `UserError`, which begins with `where`, unless `row` is a run's."""
    try:
        Result.from_row(row, where)
        if "steps" not in row:
            raise UserError(f"{where}: no steps")
    except UserError as error:
        raise UserError(f"{error}; or remove the line, and the run is done again") from error


def _differing(stored: Row, wanted: Row) -> list[str]:
    """Keys in which two grids differ, but for variants and sizes that only one of them has, and for
    how runs are executed."""
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
