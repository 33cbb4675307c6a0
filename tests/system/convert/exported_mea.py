"""Write models as exported directories, without the exporter, and load their modeling_mea.py."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, dynamic_module_utils, utils

from mea_jax.config.schema import ModelConfig
from mea_jax.convert import composite
from mea_jax.model.transformer import runs_of_equal_layers

torch.set_num_threads(1)
utils.logging.disable_progress_bar()
# transformers copies a directory's code here; one per process, because Python caches its packages.
_MODULES = tempfile.TemporaryDirectory()
dynamic_module_utils.HF_MODULES_CACHE = _MODULES.name


def layers_of(model: ModelConfig, params: Any) -> list[Any]:
    """Return the parameters of each layer, without the axis of layers."""
    return [
        jax.tree.map(lambda x, i=i: np.asarray(x[i]), params[f"layers_{first}"])
        for first, length, *_ in runs_of_equal_layers(model)
        for i in range(length)
    ]


def save(model: ModelConfig, params: Any, folder: Path) -> Path:
    """Write the model as an exported directory; return `folder`."""
    folder.mkdir(parents=True)
    tensors = composite.mea_top_tensors(model, params)
    for index, layer in enumerate(layers_of(model, params)):
        tensors |= composite.mea_tensors(model, index, layer)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(composite.mea_config(model)))
    for file in composite.MODEL_FILES:
        shutil.copy(file, folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    """Load an exported directory as users do, and check that all tensors match the model."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()
