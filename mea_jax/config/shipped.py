"""The config files of the package: `--config quickstart` selects one by its name.

They are in `configs/` of a clone. A wheel installs them in `share/mea_jax/configs`.
"""

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from mea_jax.errors import UserError

_INSTALLED = "share/mea_jax/configs/*.py"


def shipped_configs() -> dict[str, Path]:
    """Return the config files by name: those of the clone if any, or the installed ones."""
    clone = Path(__file__).parents[2] / "configs"
    paths = list(clone.glob("*.py"))
    if not paths:
        try:
            files = metadata.files("mea_jax") or []
        except metadata.PackageNotFoundError:
            files = []
        paths = [Path(str(file.locate())) for file in files if file.match(_INSTALLED)]
    return {path.stem: path for path in sorted(paths) if path.stem != "__init__"}


def is_shipped(path: str) -> bool:
    """Return True if the file name of `path` is that of a shipped config."""
    return Path(path).suffix == ".py" and Path(path).stem in shipped_configs()


def find_shipped(argv: Sequence[str]) -> list[str]:
    """Return `argv` with the name of a shipped config after --config replaced by its path.

    A name has no suffix and no folder, and is not an existing file. The part after a colon is kept.
    Raises `UserError`, which lists the names, for an unknown name.
    """
    found = list(argv)
    for index, argument in enumerate(found):
        flag, equals, value = argument.partition("=")
        if flag == "--":
            break
        if flag not in ("--config", "-config"):
            continue
        if equals:
            found[index] = f"{flag}={_resolve(value)}"
        elif index + 1 < len(found):
            found[index + 1] = _resolve(found[index + 1])
    return found


def _resolve(value: str) -> str:
    name, colon, variant = value.partition(":")
    if not re.fullmatch(r"\w[\w-]*", name) or Path(name).exists():
        return value
    known = shipped_configs()
    if name not in known:
        raise UserError(
            f"--config {name}: no such file and no installed config of that name; "
            f"choose a file or one of: {', '.join(known)}"
        )
    return f"{known[name]}{colon}{variant}"
