"""Export a model for vLLM with the plug-in of vllm_mea.py: what a stock class cannot compute.

A folder has the weights, the plug-in's module, and metadata by which vLLM finds it if the folder is
on Python's path. Each layer has the width of what it caches, the larger of its keys and values.
With a head norm or a gate the mixing of values is a map between attention and W_o.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mea_jax.config.schema import ModelConfig, Side
from mea_jax.convert import absorbed, config_writing, families, tensors
from mea_jax.convert.composite import check_exportable
from mea_jax.errors import UserError
from mea_jax.model.layer_spec import LayerSpec, layer_specs

Tree = dict[str, Any]
PLUGIN = Path(__file__).with_name("vllm_mea.py")
_NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
# What makes Python find the plug-in in a folder of its path, as in one that pip has installed to.
_METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: mea-vllm\nVersion: 1\n",
    "entry_points.txt": "[vllm.general_plugins]\nmea = vllm_mea:register\n",
}


def check(model: ModelConfig) -> None:
    """Raise `UserError`, which names the feature, if the plug-in cannot compute `model`."""
    check_exportable(model)
    for lacking, what in (
        (model.qk_norm, "a factor for each cached key and composite head (qk_norm)"),
        (model.positions != "rope", f"positions={model.positions!r}"),
        (model.rope_scaling.kind == "dynamic", "rope_type 'dynamic'"),
        (len(set(model.windows()) - {0}) > 1, f"windows of several sizes, {model.windows()}"),
    ):
        if lacking:
            raise UserError(
                f"the plug-in for vLLM cannot have {what}: export the model with --form "
                f"{absorbed.other_form(model)}"
            )
    if cached(model) >= 2 * model.n_layers * model.n_kv_heads * model.head_dim:
        raise UserError(
            f"the layers cache {cached(model):,} numbers per token as one head each, no fewer than "
            f"as {model.n_kv_heads} heads of {model.head_dim}: compress the model first, or export "
            "it with --form auto"
        )


def target_model(model: ModelConfig) -> ModelConfig:
    """Return the Llama whose embeddings, norms and feed-forward halves the export has.

    Raise `UserError` as `check`, or if `model` has other halves than a Llama's.
    """
    check(model)
    plain = dataclasses.replace(
        absorbed.as_one_head(model, max(sizes(model))),
        head_norm=False,
        gate="none",
        layer_thetas=None,
        window=None,
    )
    family = next(family for family in families.FAMILIES if family.model_type == "llama")
    if lacks := family.lacks(plain):
        raise UserError(
            f"the plug-in for vLLM has the layers of a Llama, which cannot have {lacks}: export "
            "the model with --form mea"
        )
    return plain


def size_of(spec: LayerSpec) -> int:
    """Return the width R of a layer's only key/value head."""
    return absorbed.width(spec.alone)


def sizes(model: ModelConfig) -> list[int]:
    """Return the width of each layer's only key/value head."""
    own = dataclasses.replace(model, n_layers=1, window=None, layer_thetas=None)
    pairs = zip(*(model.components(side) for side in Side), strict=True)
    return [
        absorbed.width(dataclasses.replace(own, key_components=key, value_components=value))
        for key, value in pairs
    ]


def cached(model: ModelConfig) -> int:
    """Return the numbers that are cached per token in all layers."""
    return 2 * sum(sizes(model))


def maps_values(model: ModelConfig) -> bool:
    """Return whether something stands between attention and the output projection."""
    return model.head_norm or model.gate != "none"


def config(model: ModelConfig, dtype: str, kept: families.Json) -> dict[str, Any]:
    """Return the content of config.json; `kept` as in `config_writing.stock_config`."""
    found = config_writing.stock_config(target_model(model), dtype, kept)
    specs = layer_specs(model)
    waves = [
        absorbed.wavelengths(spec.alone, size_of(spec)) if spec.model.rope_theta else None
        for spec in specs
    ]
    mea = {
        "widths": sizes(model),
        "wavelengths": waves,
        "composite_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "maps_values": maps_values(model),
        "head_norm": model.head_norm,
        "gate": model.gate,
    }
    windows = model.windows()
    if any(windows):
        found |= {
            "sliding_window": max(windows),
            "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
        }
    return found | {
        "architectures": ["MEALlamaForCausalLM"],
        "model_type": "mea_llama",
        "rope_theta": 1.0,
        "rope_scaling": None,
        "mea": mea,
    }


def plan(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of each tensor, in the order of `arrays`."""
    target, specs = target_model(model), layer_specs(model)
    d, n, h = model.d_model, model.n_heads, model.head_dim
    gates = {"none": 0, "head": 1, "feature": h}[model.gate]
    for name, index, entry in _places(target):
        if entry is not None:
            yield name, entry.hf_shape
            continue
        size, inner = size_of(specs[index]), maps_values(model)
        yield f"{name}.q_proj.weight", (n * size, d)
        yield f"{name}.k_proj.weight", (size, d)
        yield f"{name}.v_proj.weight", (size, d)
        yield f"{name}.o_proj.weight", (d, n * (h if inner else size))
        if target.qkv_bias:
            yield f"{name}.q_proj.bias", (n * size,)
            yield f"{name}.k_proj.bias", (size,)
            yield f"{name}.v_proj.bias", (size,)
            yield f"{name}.o_proj.bias", (d,)
        if inner:
            yield f"{name}.value_map", (model.n_kv_heads, size, h)
        if model.head_norm:
            yield f"{name}.head_norm", (h,)
        if gates:
            yield f"{name}.head_gate.weight", (n * gates, d)


def arrays(model: ModelConfig, stored: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the values of each tensor of a `StoredModel`, float32."""
    specs = layer_specs(model)
    for name, index, entry in _places(target_model(model)):
        if entry is not None:
            array = entry.to_hf(np.asarray(stored.leaf(entry.path, entry.layer, entry.expert)))
            yield name, array
            continue
        attention, spec = stored.layer(index)["attention"], specs[index]
        size, own = size_of(spec), spec.alone
        if maps_values(model):
            tree = absorbed.absorb_projections(own, attention, size)
            tree["out"] = np.asarray(attention["out"], np.float32)
            tree = absorbed.with_biases(own, attention, tree)
        else:
            tree = absorbed.absorb_layer(own, attention, size)
        for ours, theirs in _NAMES.items():
            inputs = 2 if ours == "out" else 1
            flat = tree[ours].reshape(int(np.prod(tree[ours].shape[:inputs])), -1)
            yield f"{name}.{theirs}.weight", np.ascontiguousarray(flat.T)
        if "out_bias" in tree:
            for ours, theirs in _NAMES.items():
                yield f"{name}.{theirs}.bias", np.ravel(tree[f"{ours}_bias"])
        if maps_values(model):
            yield f"{name}.value_map", absorbed.value_maps(own, attention, size)
        if model.head_norm:
            yield f"{name}.head_norm", np.asarray(attention["head_norm"]["scale"], np.float32)
        if model.gate != "none":
            gate = np.asarray(attention["output_gate"], np.float32)
            yield f"{name}.head_gate.weight", np.ascontiguousarray(gate.reshape(len(gate), -1).T)


def _places(target: ModelConfig) -> Iterator[tuple[str, int, tensors.Entry | None]]:
    """Yield each tensor that is a Llama's, and for the attention of each layer its name alone."""
    done = set()
    for entry in tensors.entries(target):
        if entry.path[0] != "attention":
            yield entry.name, entry.layer or 0, entry
        elif entry.layer not in done:
            done.add(entry.layer)
            assert entry.layer is not None
            yield f"model.layers.{entry.layer}.self_attn", entry.layer, None


def finish(folder: Path) -> None:
    """Write the plug-in and its metadata into the exported folder."""
    shutil.copy(PLUGIN, folder / PLUGIN.name)
    metadata = folder / "mea_vllm-1.dist-info"
    metadata.mkdir()
    for name, content in _METADATA.items():
        (metadata / name).write_text(content)
