"""The export for vLLM: tensors, config and what it refuses. test_vllm.py runs it in vLLM."""

from importlib.metadata import entry_points
from typing import Any

import jax
import numpy as np
import pytest

from mea_jax.convert import vllm_export
from mea_jax.errors import UserError
from mea_jax.model.transformer import runs_of_equal_layers
from tests.helpers import params_of, tiny_model

MEA: dict[str, Any] = {"key_components": (1, 2), "value_components": (4, 2)}
CASES: dict[str, dict[str, Any]] = {
    "head norm": MEA,
    "gate, biases": MEA | {"gate": "feature", "qkv_bias": True, "head_norm": False},
    "a number per head": MEA | {"gate": "head", "out_bias": True},
    "no norm, other bases": MEA
    | {"head_norm": False, "layer_thetas": (0.0, 1e4), "window": (0, 5)},
}


class Stored:
    """Parameters as `checkpoint.layerwise.StoredModel` reads them."""

    def __init__(self, model, params):
        self.params = params
        self.layers = [
            jax.tree.map(lambda x, i=i: np.asarray(x[i]), params[f"layers_{first}"])
            for first, length, *_ in runs_of_equal_layers(model)
            for i in range(length)
        ]

    def layer(self, index):
        return self.layers[index]

    def leaf(self, path, layer, expert):
        tree = self.params if layer is None else self.layers[layer]
        for name in path:
            tree = tree[name]
        return tree


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_is_written(name):
    model = tiny_model(**CASES[name])
    stored = Stored(model, params_of(model, noise=0.1))
    planned = list(vllm_export.plan(model))
    written = [(name, array.shape) for name, array in vllm_export.arrays(model, stored)]
    assert written == planned
    assert len(dict(planned)) == len(planned)


def test_the_config_states_the_width_of_each_layer():
    model = tiny_model(**CASES["no norm, other bases"])
    found = vllm_export.config(model, "float32", {"max_position_embeddings": 64})
    mea = found["mea"]
    assert (mea["widths"], found["head_dim"], found["num_key_value_heads"]) == ([32, 16], 32, 1)
    assert mea["wavelengths"][0] is None
    assert len(mea["wavelengths"][1]) == 8
    assert found["layer_types"] == ["full_attention", "sliding_attention"]
    assert (mea["maps_values"], found["sliding_window"]) == (False, 5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"positions": "alibi"}, "positions='alibi'"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"norms": "post"}, "norms='post'"),
        ({"window": (3, 5)}, "windows of several sizes, (3, 5)"),
        ({"key_components": 4}, "compress the model first"),
    ],
)
def test_what_is_refused(changes, said):
    with pytest.raises(UserError) as error:
        vllm_export.target_model(tiny_model(**(MEA | changes)))
    assert said in str(error.value)
    assert "--form mea" in str(error.value)


def test_python_finds_the_plug_in_in_the_folder(tmp_path, monkeypatch):
    vllm_export.finish(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = entry_points(group="vllm.general_plugins", name="mea")
    assert found.module == vllm_export.PLUGIN.stem
    assert f"def {found.attr}(" in (tmp_path / f"{found.module}.py").read_text()
