"""Export a checkpoint to a folder that transformers loads: a stock class, or with its own code."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mea_jax.checkpoint.files import disk_errors
from mea_jax.checkpoint.layerwise import StoredModel, places
from mea_jax.cli import progress
from mea_jax.config.schema import ModelConfig, Side
from mea_jax.convert import (
    absorbed,
    composite,
    config_writing,
    families,
    folders,
    shards,
    tensors,
    tokenizer_files,
    vllm_export,
)
from mea_jax.data.tokenizers import from_directory
from mea_jax.errors import UserError, nearest
from mea_jax.model.layer_spec import fold_model
from mea_jax.model.params import abstract_params

FORMS = ("auto", "stock", "absorbed", "vllm", "mea")
Arrays = Iterator[tuple[str, np.ndarray]]
Plan = list[tuple[str, tuple[int, ...]]]
_SPARE = 1 << 27  # bytes of disk in addition to the tensors


def choose_form(model: ModelConfig, form: str) -> str:
    """Return `form`, or for "auto" the one that keeps the cache as small as it is.

    That is "stock" if a stock class computes `model` as it is, "mea" if heads are mixed, and
    "absorbed" for single slots, or "stock" where that is not possible. Raise `UserError` if `form`
    is unknown.
    """
    if form not in FORMS:
        raise UserError(f"--form={form}: {nearest(form, FORMS)}")
    if form != "auto":
        return form
    if model.key_slots or model.value_slots:
        try:
            absorbed.check(model)
        except UserError:
            return "stock"
        return "absorbed"
    try:
        config_writing.stock_family(model)
    except UserError:
        return "mea"
    return "stock"


def _mixes(model: ModelConfig) -> bool:
    return model.mixes(Side.KEY) or model.mixes(Side.VALUE)


class _Stock:
    """The export to a stock class: tensor by tensor, or layer by layer if heads are mixed.

    Mixed heads are rebuilt, or, if the class is to be `absorbed`, cached as they are.
    """

    def __init__(self, stored: StoredModel, published: str | None, is_absorbed: bool = False):
        self.stored, self.own = stored, stored.config.model
        self.model, self.is_absorbed = self.own, is_absorbed
        if is_absorbed:
            self.model = absorbed.absorbed_model(self.own)
        elif _mixes(self.own):
            composite.check_rebuildable(self.own)
            self.model = fold_model(self.own)
        self.family = config_writing.stock_family(self.model, published)

    def config(self, dtype: str, kept: families.Json) -> dict[str, Any]:
        config = config_writing.stock_config(self.model, dtype, kept)
        if not self.is_absorbed:
            return config
        return config | absorbed.rope_config(self.own, config["max_position_embeddings"])

    def plan(self) -> Plan:
        return [(entry.name, entry.hf_shape) for entry in self._entries()]

    def _entries(self) -> list[tensors.Entry]:
        return tensors.entries(self.model, self.family.norm_offset)

    def arrays(self) -> Arrays:
        layer: dict[str, Any] = {}
        current = None
        for entry in self._entries():
            if entry.layer is None or not _mixes(self.own) or entry.path[0] == "mlp":
                array = self.stored.leaf(entry.path, entry.layer, entry.expert)
            else:
                if current != entry.layer:
                    current = entry.layer
                    layer = self._rebuilt(self.stored.layer(current))
                array = _at(layer, entry.path)
            theirs = entry.to_hf(np.asarray(array))
            yield entry.name, theirs - np.float32(entry.offset) if entry.offset else theirs

    def _rebuilt(self, layer: dict[str, Any]) -> dict[str, Any]:
        if not self.is_absorbed:
            return composite.rebuild(self.own, layer)[1]
        size = self.model.head_dim
        return layer | {"attention": absorbed.absorb_layer(self.own, layer["attention"], size)}

    @property
    def cached(self) -> int:
        """The numbers that are cached per token in all layers."""
        return cached_numbers(self.model)

    def finish(self, folder: Path) -> None:
        """Do nothing: a stock class needs no further files."""


class _Own:
    """The export with our own code next to the weights, which keep their component heads."""

    def __init__(self, stored: StoredModel, context_length: int):
        self.stored, self.model = stored, stored.config.model
        composite.check_exportable(self.model)
        self._config = composite.mea_config(self.model, context_length)

    def config(self, dtype: str, kept: families.Json) -> dict[str, Any]:
        given = {key: kept[key] for key in families.KEPT if key in kept}
        return given | self._config | {"dtype": dtype}

    def plan(self) -> Plan:
        shapes = abstract_params(self.model)

        def empty(name: str, skip: int) -> dict[str, Any]:
            def zeros(x: Any) -> np.ndarray:  # takes no memory
                return np.broadcast_to(np.float32(0), x.shape[skip:])

            return jax.tree.map(zeros, shapes[name])

        names = [name for name in shapes if not name.startswith("layers_")]
        layers = (empty(stack, 1) for stack, _ in places(self.model))
        found = self._tensors({name: empty(name, 0) for name in names}, layers)
        return [(name, array.shape) for name, array in found]

    def arrays(self) -> Arrays:
        layers = map(self.stored.layer, range(self.model.n_layers))
        return self._tensors(self.stored.top(), layers)

    def _tensors(self, top: dict[str, Any], layers: Iterable[dict[str, Any]]) -> Arrays:
        yield from composite.mea_top_tensors(self.model, top).items()
        for index, layer in enumerate(layers):
            yield from composite.mea_tensors(self.model, index, layer).items()

    @property
    def cached(self) -> int:
        """The numbers that are cached per token in all layers."""
        return cached_numbers(self.model)

    def finish(self, folder: Path) -> None:
        for file in composite.MODEL_FILES:
            shutil.copy(file, folder / file.name)


class _Plugin:
    """The export for vLLM with a plug-in (vllm_export.py)."""

    def __init__(self, stored: StoredModel):
        self.stored, self.own = stored, stored.config.model
        self.model = vllm_export.target_model(self.own)

    def config(self, dtype: str, kept: families.Json) -> dict[str, Any]:
        return vllm_export.config(self.own, dtype, kept)

    def plan(self) -> Plan:
        return list(vllm_export.plan(self.own))

    def arrays(self) -> Arrays:
        return vllm_export.arrays(self.own, self.stored)

    def finish(self, folder: Path) -> None:
        vllm_export.finish(folder)

    @property
    def cached(self) -> int:
        """The numbers that are cached per token in all layers."""
        return vllm_export.cached(self.own)


def cached_numbers(model: ModelConfig) -> int:
    """Return the numbers that are cached per token in all layers."""
    return model.head_dim * sum(sum(model.components(side)) for side in Side)


def _at(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def export_model(
    checkpoint: Path,
    out: Path,
    log: Callable[[str], Any],
    form: str = "auto",
    dtype: str = "auto",
    shard_size: int = 5 * 10**9,
) -> dict[str, Any]:
    """Write a checkpoint to the folder `out` as a model of transformers.

    Args:
      checkpoint: a run directory, or one of its steps.
      out: the folder, which must not exist.
      log: receives a line for each damaged checkpoint that is skipped.
      form: "stock", "absorbed" (absorbed.py), "vllm" (vllm_export.py), "mea" or "auto"
        (`choose_form`).
      dtype: the dtype of the tensors; "auto": the dtype in the checkpoint.
      shard_size: the largest size of a file in bytes.

    Returns:
      The class, form, dtype, number of parameters and bytes of the model, the numbers that it
      caches per token and those of its composite heads, and the widths of a head.

    Raises:
      UserError: if the model cannot be exported or written; then there is no `out`.
    """
    with folders.atomic_folder(out) as part:
        stored = StoredModel(checkpoint, log)
        form = choose_form(stored.config.model, form)
        dtype = str(stored.dtype) if dtype == "auto" else dtype
        length = stored.config.data.context_length
        tokenizer = from_directory(stored.run / "tokenizer")
        kept = tokenizer_files.kept_config(tokenizer, length)
        longest = kept["max_position_embeddings"]
        model: _Stock | _Own | _Plugin
        if form == "vllm":
            model = _Plugin(stored)
        elif form == "mea":
            model = _Own(stored, longest)
        else:
            model = _Stock(stored, kept.get("model_type"), form == "absorbed")
        config, plan, folder = model.config(dtype, kept), model.plan(), part / "result"
        size = shards.size_of(plan, dtype)
        folders.check_space(part, size + _SPARE)
        arrays = progress(model.arrays(), "writing tensors", len(plan))
        with disk_errors(out):
            shards.write_folder(folder, plan, arrays, dtype, shard_size)
            tokenizer_files.write(tokenizer, folder, length)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            model.finish(folder)
    width = model.model.head_dim
    parameters = sum(math.prod(shape) for _, shape in plan)
    return {
        "class": config["architectures"][0],
        "form": form,
        "dtype": dtype,
        "parameters": parameters,
        "bytes": size,
        "cached": model.cached,
        "uncompressed": cached_numbers(fold_model(model.stored.config.model)),
        "widths": vllm_export.sizes(stored.config.model) if form == "vllm" else [width],
    }
