"""Read and write checkpoints layer by layer, with at most one layer's parameters in memory.

Reading takes slices of the stacked arrays directly from the store that orbax wrote. Writing fills
memory-mapped files, from which orbax writes the checkpoint chunk by chunk at the end; until then
they survive a kill.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging as absl_logging

from mea_jax.checkpoint import digests
from mea_jax.checkpoint.files import disk_errors
from mea_jax.checkpoint.load import open_trained
from mea_jax.checkpoint.manager import FORMAT
from mea_jax.checkpoint.orbax_store import array_shapes, missing, plain_path
from mea_jax.config.schema import ModelConfig, TrainConfig
from mea_jax.errors import UserError
from mea_jax.model.params import abstract_params
from mea_jax.model.transformer import runs_of_equal_layers

Tree = dict[str, Any]
_STACK = re.compile(r"layers_(\d+)")
_CHUNK = 64 << 20  # bytes of a chunk of a written array
_FILE = 128 << 20  # bytes of a data file of the store: chunks not yet written to one are in memory
_CACHE = 256 << 20  # bytes of decoded chunks that reading may cache: a chunk may span many layers


def _flat(tree: Tree, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            yield from _flat(leaf, (*prefix, name))
        else:
            yield (*prefix, name), leaf


def _nested(leaves: Iterator[tuple[tuple[str, ...], Any]]) -> Tree:
    tree: Tree = {}
    for path, leaf in leaves:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def places(model: ModelConfig) -> list[tuple[str, int]]:
    """Return, for each layer, the name of its stack of equal layers and its index in the stack."""
    return [
        (f"layers_{first}", i)
        for first, length, *_ in runs_of_equal_layers(model)
        for i in range(length)
    ]


def _float32(read: Any) -> np.ndarray:
    return np.asarray(read.result()).astype(np.float32, copy=False)


class StoredModel:
    """A checkpoint's config, and its parameters one layer at a time.

    Attributes:
      run: the run directory.
      step: the step of the checkpoint.
      config: the config of the training run.
    """

    def __init__(self, path: Path, log: Callable[[str], Any]):
        """Open the newest good checkpoint of a run directory, or one step of it.

        `log` receives a line for each damaged checkpoint that is skipped. Raise `UserError` if
        there is no good one at `path`.
        """
        trained = open_trained(path, log)
        self.step, self.config = trained.step, trained.config
        self.run = trained.checkpoints.directory.parent
        self.folder = self.run / "checkpoints" / str(self.step)
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
        self._shapes = dict(_flat(abstract_params(self.config.model)))
        self._places = places(self.config.model)

    @property
    def digest(self) -> str:
        """The digest of the training data; "" for a model that was not trained here."""
        return json.loads((self.folder / "data" / "metadata").read_text())["digest"]

    def _open(self, path: tuple[str, ...]) -> Any:
        store = {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{self.folder.absolute()}/state/"},
            "path": ".".join(("params", *path)) + "/",
        }
        spec = {"driver": "zarr", "kvstore": store, "recheck_cached_data": False}
        try:
            array = ts.open(spec, open=True, read=True, context=self._context).result()
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self.folder} cannot be read at {'/'.join(path)}: {reason}; use another "
                "checkpoint"
            ) from error
        if array.shape != self._shapes[path].shape:
            raise UserError(
                f"{self.folder} contains {'/'.join(path)} with shape {array.shape}, its config "
                f"says {self._shapes[path].shape}: use another checkpoint"
            )
        return array

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the parameters on disk: float32, or bfloat16 after an import."""
        return self._open(("embedding",)).dtype.numpy_dtype

    def leaf(self, path: tuple[str, ...], layer: int | None = None, item: int | None = None):
        """Return a parameter in its stored dtype, or the `item` of its first axis (an expert).

        `path` is the path within the layer, or within the entire tree if `layer` is None. Raise
        `UserError` if the parameter cannot be read.
        """
        where: tuple[int, ...] = ()
        if layer is not None:
            stack, place = self._places[layer]
            path, where = (stack, *path), (place,)
        where = where if item is None else (*where, item)
        return np.asarray(self._open(path)[where].read().result())

    def layer(self, index: int) -> Tree:
        """Return one layer's parameters, without the axis of layers, float32 on the host."""
        stack, place = self._places[index]
        paths = [path for path in self._shapes if path[0] == stack]
        reads = [(path[1:], self._open(path)[place].read()) for path in paths]
        return _nested((path, _float32(read)) for path, read in reads)

    def top(self) -> Tree:
        """Return the parameters outside the layers (embeddings, final norm), float32 on host."""
        paths = [path for path in self._shapes if not _STACK.fullmatch(path[0])]
        return _nested((path, _float32(self._open(path).read())) for path in paths)


class Writer:
    """A writer of a checkpoint, layer by layer; its files below `folder` survive a kill.

    `dtype` is the dtype of the stored parameters, float32 or bfloat16. Weights of norms are float32
    always: some published ones are stored less 1, which bfloat16 could not add exactly.
    """

    def __init__(self, folder: Path, model: ModelConfig, dtype: str = "float32"):
        self.folder, self.model, self.dtype = folder, model, jnp.dtype(dtype)
        self._shapes = dict(_flat(abstract_params(model)))
        self._places = places(model)
        plain_path(folder)  # raises now rather than at the end
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def _array(self, path: tuple[str, ...], mode: str) -> Any:
        file, dtype = self.folder / (".".join(path) + ".npy"), self._dtype(path)
        if not file.exists():
            # The .npy format has no bfloat16: its bits are stored as unsigned integers.
            kept = np.dtype(f"u{dtype.itemsize}")
            array = np.lib.format.open_memmap(file, "w+", kept, self._shapes[path].shape)
        else:
            array = np.lib.format.open_memmap(file, mode)
        return array.view(dtype)

    def _dtype(self, path: tuple[str, ...]) -> np.dtype:
        return np.dtype(np.float32) if path[-1] == "scale" else self.dtype

    def open(self, path: tuple[str, ...], layer: int | None = None) -> np.ndarray:
        """Return one parameter, to be filled in place; `path` is as in `StoredModel.leaf`."""
        with disk_errors(self.folder):
            if layer is None:
                return self._array(path, "r+")
            stack, place = self._places[layer]
            return self._array((stack, *path), "r+")[place]

    def _write(self, path: tuple[str, ...], place: int | None, value: np.ndarray) -> None:
        with disk_errors(self.folder):
            array = self._array(path, "r+")
            where = ... if place is None else place
            if array[where].shape != value.shape:
                raise ValueError(f"{path}: shape {value.shape} must be {array[where].shape}")
            array[where] = value
            array.flush()

    def write_layer(self, index: int, tree: Tree) -> None:
        """Write the parameters of one layer, without the axis of layers."""
        stack, place = self._places[index]
        for path, leaf in _flat(tree):
            self._write((stack, *path), place, leaf)

    def write_non_layer(self, tree: Tree) -> None:
        """Write the parameters outside the layers."""
        for path, leaf in _flat(tree):
            self._write(path, None, leaf)

    def layer(self, index: int) -> Tree:
        """Return a layer that was written, float32."""
        stack, place = self._places[index]
        paths = [path for path in self._shapes if path[0] == stack]
        found = ((path, self._array(path, "r")[place]) for path in paths)
        return _nested((path[1:], np.array(array, np.float32)) for path, array in found)

    @property
    def bytes(self) -> int:
        """The size of all parameters in bytes."""
        sizes = {path: math.prod(leaf.shape) for path, leaf in self._shapes.items()}
        return sum(size * self._dtype(path).itemsize for path, size in sizes.items())

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(leaf.shape) for leaf in self._shapes.values())

    def save(self, checkpoint: Path, config: TrainConfig, digest: str) -> None:
        """Write the checkpoint with checksums: parameters only, no moments, data from batch 0 on.

        Raise `UserError` if it cannot be written, or cannot be read back.
        """
        arrays = {path: np.asarray(self._array(path, "r")) for path in self._shapes}
        params = _nested(iter(arrays.items()))
        chunks = jax.tree.map(
            lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK, shard_axes=(0,)), params
        )
        # Orbax warns that there is no handler for jax's arrays; there are no such arrays here.
        absl_logging.set_verbosity(absl_logging.FATAL)
        # The default handler would copy all arrays first.
        numpy_handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, numpy_handler))
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            config=ocp.JsonCheckpointHandler(),
            data=ocp.JsonCheckpointHandler(),
        )
        content = {"format": FORMAT, "next_batch": 0, "digest": digest, "guards": None}
        with disk_errors(checkpoint), ocp.Checkpointer(handler) as writer:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            writer.save(
                plain_path(checkpoint.parent) / checkpoint.name,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(
                        {"params": params},
                        save_args={"params": chunks},
                        ocdbt_target_data_file_size=_FILE,
                    ),
                    config=ocp.args.JsonSave(config.to_dict()),
                    data=ocp.args.JsonSave(content),
                ),
                force=True,
            )
            if problem := missing(checkpoint / "state", array_shapes({"params": params})):
                raise UserError(
                    f"{checkpoint} was written, but cannot be read back: {problem}; check the disk "
                    "and run the command again"
                )
            digests.write_checksums(checkpoint)
