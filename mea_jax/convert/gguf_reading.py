"""Open GGUF files with llama.cpp's package, and report what is wrong with one on one line."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mea_jax.data.bad_input import first_line
from mea_jax.errors import UserError

VERSIONS = (2, 3)  # of the format, as the package reads it


def require_gguf(what: str) -> Any:
    """Return the module `gguf`; raise `UserError` that starts with `what` if it is missing."""
    try:
        import gguf  # an optional extra
    except ImportError as error:
        raise UserError(
            f"{what}: reading GGUF files needs the package gguf: pip install 'mea_jax[gguf]'"
        ) from error
    return gguf


def read(path: Path) -> Any:
    """Return the library's reader of a file, whose tensors all end within it.

    Raise `UserError` if there is no such file, or it is damaged.
    """
    import gguf

    try:
        with path.open("rb") as file:
            magic, number = file.read(4), file.read(4)
    except OSError as error:
        raise UserError(f"--model {path} cannot be read: {error.strerror}; give a file") from error
    if magic != b"GGUF":
        raise UserError(f"--model {path} is not a GGUF file: give one, or a folder to from_hf")
    found = {order: int.from_bytes(number, order) for order in ("little", "big")}
    if len(number) == 4 and not set(found.values()) & set(VERSIONS):
        raise UserError(
            f"{path} is damaged, or has version {found['little']} of the format, of which the "
            f"package gguf {_version()} reads {' and '.join(map(str, VERSIONS))}: fetch it again, "
            "or a newer one"
        )
    try:
        reader = gguf.GGUFReader(path)
        for tensor in reader.tensors:
            if tensor.data.nbytes != tensor.n_bytes:
                raise ValueError(f"{tensor.name} ends outside of the file")
    except Exception as error:  # of many kinds: it reads whatever the bytes say
        reason = first_line(error)
        if "GGMLQuantizationType" in reason:
            raise UserError(
                f"{path}: has a tensor of a type that the package gguf {_version()} does not know "
                f"({reason}): upgrade gguf, or choose another quantisation of the model"
            ) from error
        raise UserError(
            f"{path} is cut short or damaged: cannot be read in its {path.stat().st_size:,} bytes "
            f"({reason}); compare that with the published size, and fetch it again"
        ) from error
    return reader


def _version() -> str:
    return version("gguf")


def check_type(name: str, stored: Any, file: Path) -> None:
    """Raise `UserError` if the library cannot dequantise a tensor's type."""
    import gguf

    kind = stored.tensor_type
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError as error:
        raise UserError(
            f"{file}: the tensor {name} has type {kind.name}, which the package gguf {_version()} "
            "cannot dequantise: choose another quantisation of the model"
        ) from error
