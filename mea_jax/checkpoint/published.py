"""Detect a published model given for a run directory, or a run directory given for a model.

Training and imports write run directories. A published model is a folder as transformers saves it,
a name on the Hugging Face hub, or a GGUF file. When a user gives one for the other, the error names
the command that converts the one into the other.
"""

import os
import re
from pathlib import Path

from mea_jax.errors import UserError

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_GGUF = (
    "is a llama.cpp model (GGUF): import it first, with "
    "python -m mea_jax.convert from_gguf --model FILE.gguf --out RUN"
)


def is_gguf(path: Path) -> bool:
    """Return whether `path` is a GGUF file, or a folder of them without a config.json."""
    if path.suffix.lower() == ".gguf":
        return True
    return any(path.glob("*.gguf")) and not (path / "config.json").is_file()


def is_transformers(path: Path) -> bool:
    """Return whether `path` is a folder with a model as transformers saves it."""
    return (path / "config.json").is_file() and any(any(path.glob(p)) for p in _WEIGHTS)


def refuse_published(path: Path, option: str) -> None:
    """Raise `UserError` if `path`, given for a run directory with `option`, is a published model.

    Raise it also if `path` does not exist: it may be a name on the hub.
    """
    if is_gguf(path):
        raise UserError(f"{option} {path} {_GGUF}")
    folder = path.parent if path.is_file() else path
    if is_transformers(folder):
        raise UserError(
            f"{option} {path} is a model of transformers, not a run directory: import it first, "
            f"with {_convert(folder)}"
        )
    if not os.path.exists(path):  # unlike Path.exists, also for names that the system rejects
        hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) and path.parts[0] != "runs"
        tail = f", or import a model of the Hugging Face hub first: {_convert(path)}"
        raise UserError(
            f"{option} {path}: no such folder; give a run directory of train{tail if hub else ''}"
        )


def refuse_unpublished(path: Path, option: str) -> None:
    """Raise `UserError` if `path`, given for a model's folder, is a run directory or a file."""
    if is_gguf(path):
        raise UserError(f"{option} {path} {_GGUF}")
    if (path / "checkpoints").is_dir():
        raise UserError(
            f"{option} {path} is a run directory already, not a published model: give it to "
            f"generate, evaluate or compress as --checkpoint {path}"
        )
    if path.is_file():
        raise UserError(f"{option} {path} is a file: give the model's folder, {path.parent}")


def _convert(model: Path) -> str:
    return f"python -m mea_jax.convert from_hf --model {model} --out RUN"
