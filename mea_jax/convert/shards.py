"""Files of safetensors: read by their headers and checked before a number is used, and written.

The format: 8 bytes with the length of a JSON header, the header with each tensor's dtype, shape and
place, and the tensors' bytes, end to end (github.com/huggingface/safetensors). A model lies in
`model.safetensors`, or in several such files and `model.safetensors.index.json`, which names the
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
_ALIGNED = 8  # bytes, to which a header is filled up with spaces


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies; nothing of it is read yet."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file

    def array(self) -> np.ndarray:
        """The tensor, mapped into memory: only what is used is read."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.start, self.shape)


# -- reading -----------------------------------------------------------------------------------


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name.

    Raises `UserError` that names the file where it is missing, cut short or malformed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise UserError(
                    f"{path} is cut short, or no file of safetensors: its header of {length} "
                    f"bytes does not fit in {size} bytes; fetch it again"
                )
            text = file.read(length)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: fetch it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
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
        words = "is cut short" if size < end else "is longer than it says"
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
        raise ValueError("a shape or place that is no whole number")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - start} bytes for a shape of {shape}")
    return Tensor(path, dtype, shape, base + start)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder by name; an index is compared with what is there.

    Raises `UserError` that names what is missing, cut short, or not as the index says.
    """
    if (folder / SINGLE).exists():
        return read_file(folder / SINGLE)
    path = folder / INDEX
    if not path.exists():
        raise UserError(
            f"{folder} holds neither {SINGLE} nor {INDEX}: only safetensors are read; "
            "transformers' save_pretrained writes them"
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
            raise UserError(f"{path}: {name} is not in {file}, where the index says it is")
    for file, tensors in shards.items():
        for name in tensors:
            if places.get(name) != file:
                named = f"puts it in {places[name]}" if name in places else "does not know it"
                raise UserError(f"{path}: {file} holds {name}, and the index {named}")
    return {name: shards[file][name] for name, file in places.items()}


# -- writing -----------------------------------------------------------------------------------

Plan = Sequence[tuple[str, tuple[int, ...]]]


def size_of(plan: Plan, dtype: str) -> int:
    """Bytes of the tensors of `plan`."""
    return sum(math.prod(shape) for _, shape in plan) * jnp.dtype(dtype).itemsize


def write_folder(
    folder: Path,
    plan: Plan,
    arrays: Iterable[tuple[str, np.ndarray]],
    dtype: str,
    shard_size: int,
) -> None:
    """Writes tensors one after another, in files of at most `shard_size` bytes (or one tensor).

    Args:
      plan: names and shapes of all of them, in order.
      arrays: the tensors in the same order, of any dtype; no more than one is held.
      dtype: in which they are written, float32 or bfloat16.

    Raises `OSError` when the disk refuses, `UserError` where `dtype` cannot hold a number.
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
                    raise ValueError(f"{given} {array.shape} where {name} {shape} was planned")
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
