"""Read and write safetensors files; check their headers before a number is used.

The format: 8 bytes with the length of a JSON header, the header with each tensor's dtype, shape and
offsets, and the tensors' bytes without gaps (github.com/huggingface/safetensors). A model is stored
in `model.safetensors`, or in several such files and `model.safetensors.index.json`, which names the
file of each tensor.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mea_jax.convert.casting import casts
from mea_jax.errors import UserError, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
    "F64": np.dtype("float64"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as in the format's own library
_ALIGNED = 8  # bytes: a header is padded with spaces to a multiple of this


@dataclass(frozen=True)
class Tensor:
    """The location of a tensor in a file; its numbers are not read yet."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file

    def array(self) -> np.ndarray:
        """Return the memory-mapped tensor: only the numbers that are used are read."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.start, self.shape)


# -- reading -----------------------------------------------------------------------------------


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one file by name.

    Raise `UserError`, which names the file, if it is missing, cut short or malformed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise UserError(
                    f"{path} is cut short, or not a safetensors file: its header of {length} "
                    f"bytes does not fit in {size} bytes; fetch it again"
                )
            text = file.read(length)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: fetch it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; make it readable") from error
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {name: _tensor(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its header is damaged ({error}); fetch it again") from error
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
        if tensor.start != end:
            raise UserError(f"{path}: its header is damaged ({name} overlaps); fetch it again")
        end += math.prod(tensor.shape) * tensor.dtype.itemsize
    if size != end:
        words = "is cut short" if size < end else "is longer than its header says"
        raise UserError(f"{path} {words}: {size:,} bytes instead of {end:,}; fetch it again")
    return found


def _tensor(path: Path, base: int, entry: Any) -> Tensor:
    if (dtype := _DTYPES.get(entry["dtype"])) is None:
        raise UserError(
            f"{path}: tensors of dtype {shown(entry['dtype'])} are not supported; known: "
            + ", ".join(_DTYPES)
        )
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError("a shape or an offset is not a whole number")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - start} bytes for a shape of {shape}")
    return Tensor(path, dtype, shape, base + start)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a model's folder by name; compare the index with the files.

    Raise `UserError`, which names the file, if one is missing, cut short, malformed, or does not
    match the index.
    """
    if (folder / SINGLE).exists():
        return read_file(folder / SINGLE)
    path = folder / INDEX
    if not path.exists():
        raise UserError(
            f"{folder} contains neither {SINGLE} nor {INDEX}: only safetensors are read; "
            "write them with transformers' save_pretrained"
        )
    try:
        places: dict[str, str] = json.loads(path.read_text())["weight_map"]
        files = sorted(set(places.values()))
        plain = all(Path(file).name == file for file in files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from error
    if not plain:
        raise UserError(f"{path} is damaged: it names files outside its folder; fetch it again")
    shards = {file: read_file(folder / file) for file in files}
    for name, file in places.items():
        if name not in shards[file]:
            raise UserError(
                f"{path}: {name} is not in {file}, where the index puts it; fetch both again"
            )
    for file, tensors in shards.items():
        for name in tensors:
            if places.get(name) != file:
                named = f"puts it in {places[name]}" if name in places else "does not name it"
                raise UserError(
                    f"{path}: {file} contains {name}, but the index {named}; fetch both again"
                )
    return {name: shards[file][name] for name, file in places.items()}


# -- writing -----------------------------------------------------------------------------------

Plan = Sequence[tuple[str, tuple[int, ...]]]


def size_of(plan: Plan, dtype: str) -> int:
    """Return the bytes of the tensors of `plan`."""
    return sum(math.prod(shape) for _, shape in plan) * jnp.dtype(dtype).itemsize


def write_folder(
    folder: Path,
    plan: Plan,
    arrays: Iterable[tuple[str, np.ndarray]],
    dtype: str,
    shard_size: int,
) -> None:
    """Write tensors one after another as safetensors files, with an index if there are several.

    Args:
      folder: an existing folder.
      plan: names and shapes of all tensors, in order.
      arrays: the tensors in the same order, of any dtype; at most one is in memory.
      dtype: the dtype in the files, float32 or bfloat16.
      shard_size: the largest size of a file in bytes; a larger tensor gets its own file.

    Raises:
      OSError: if the disk refuses.
      UserError: if `dtype` cannot represent a number.
      ValueError: if `arrays` does not match `plan`.
    """
    target = jnp.dtype(dtype)
    shards: list[list[tuple[str, tuple[int, ...]]]] = []
    room = 0
    for name, shape in plan:
        size = math.prod(shape) * target.itemsize
        if not shards or size > room:
            shards.append([])
            room = shard_size
        shards[-1].append((name, shape))
        room -= size
    count, tensors = len(shards), iter(arrays)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    for file, shard in zip(names, shards, strict=True):
        with (folder / file).open("wb") as out:
            out.write(_header(shard, target))
            for name, shape in shard:
                given, array = next(tensors)
                if (given, array.shape) != (name, shape):
                    raise ValueError(f"{given} {array.shape} must be {name} {shape} of the plan")
                for _, piece in casts(name, array, target):
                    out.write(piece.reshape(-1).view(np.uint8).data)
            out.flush()
            os.fsync(out.fileno())
    if count > 1:
        places = {n: file for file, shard in zip(names, shards, strict=True) for n, _ in shard}
        index = {"metadata": {"total_size": size_of(plan, dtype)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(shard: Plan, dtype: np.dtype) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shard:
        end = start + math.prod(shape) * dtype.itemsize
        entry = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        header[name], start = entry, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return struct.pack("<Q", len(text)) + text
