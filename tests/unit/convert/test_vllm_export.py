"""The export for vLLM: tensors, config and what it refuses. test_vllm.py runs it in vLLM."""

from importlib.metadata import entry_points
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.config.schema import RopeScaling
from mea_jax.convert import vllm_export
from mea_jax.errors import UserError
from mea_jax.model.transformer import runs_of_equal_layers
from tests.helpers import apply_logits, params_of, tiny_model

MEA: dict[str, Any] = {"key_components": (1, 2), "value_components": (4, 2)}
CASES: dict[str, dict[str, Any]] = {
    "head norm": MEA,
    "gate, biases": MEA | {"gate": "feature", "qkv_bias": True, "head_norm": False},
    "a number per head": MEA | {"gate": "head", "out_bias": True},
    "YaRN, one layer not rotated": MEA
    | {"layer_thetas": (1e4, 0.0), "rope_scaling": RopeScaling("yarn", 4.0, original_context=8)},
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


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * weight


def attention(x_TD, of, index, config):
    """Compute `MEALlamaAttention` of vllm_mea.py for one sequence; `of(name)` is a tensor."""
    mea, n, eps = config["mea"], config["num_attention_heads"], config["rms_norm_eps"]
    size, waves, window = mea["widths"][index], mea["wavelengths"][index], None
    if config.get("layer_types", ["full_attention"] * 2)[index] == "sliding_attention":
        window = config["sliding_window"]

    def project(name, x):
        bias = of(f"{name}.bias")
        return x @ of(f"{name}.weight").T + (0 if bias is None else bias)

    q_TNR = project("q_proj", x_TD).reshape(len(x_TD), n, size)
    k_TR, v_TR = project("k_proj", x_TD), project("v_proj", x_TD)
    if waves is not None:
        angles = np.arange(len(x_TD))[:, None] / np.asarray(waves)
        turn = np.cos(angles) + 1j * np.sin(angles)

        def rotate(x, turn):
            real, imaginary = np.split(x, 2, axis=-1)
            y = (real + 1j * imaginary) * turn
            return np.concatenate([y.real, y.imag], axis=-1)

        q_TNR, k_TR = rotate(q_TNR, turn[:, None]), rotate(k_TR, turn)
    logits_NTS = np.einsum("tnr,sr->nts", q_TNR, k_TR) * size**-0.5
    behind = np.arange(len(x_TD))[:, None] - np.arange(len(x_TD))
    seen = (behind >= 0) & (behind < (window or len(x_TD)))
    weights = np.exp(np.where(seen, logits_NTS, -np.inf))
    o_TNX = np.einsum("nts,sr->tnr", weights / weights.sum(-1, keepdims=True), v_TR)
    if mea["maps_values"]:
        groups = n // mea["composite_heads"]
        o_TNX = np.einsum("tnr,nrh->tnh", o_TNX, np.repeat(of("value_map"), groups, axis=0))
        if mea["head_norm"]:
            o_TNX = rms_norm(o_TNX, of("head_norm"), eps)
        if mea["gate"] != "none":
            gate = x_TD @ of("head_gate.weight").T
            o_TNX = o_TNX / (1 + np.exp(-gate.reshape(len(x_TD), n, -1)))
    return project("o_proj", o_TNX.reshape(len(x_TD), -1))


@pytest.mark.parametrize("name", CASES)
def test_the_tensors_compute_the_model(name):
    """By the plug-in's formulas in numpy, for one sequence."""
    model = tiny_model(**CASES[name])
    params = params_of(model, noise=0.3)
    tensors = dict(vllm_export.arrays(model, Stored(model, params)))
    config = vllm_export.config(model, "float32", {"max_position_embeddings": 64})
    tokens_T = np.random.default_rng(0).integers(0, 264, 12)
    x_TD = tensors["model.embed_tokens.weight"][tokens_T]
    for index in range(model.n_layers):
        at, eps = f"model.layers.{index}", model.norm_eps
        normed = rms_norm(x_TD, tensors[f"{at}.input_layernorm.weight"], eps)
        x_TD = x_TD + attention(
            normed, lambda name, at=at: tensors.get(f"{at}.self_attn.{name}"), index, config
        )
        normed = rms_norm(x_TD, tensors[f"{at}.post_attention_layernorm.weight"], eps)
        gate, up, down = (
            tensors[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down")
        )
        hidden = normed @ gate
        x_TD = x_TD + (hidden / (1 + np.exp(-hidden)) * (normed @ up)) @ down
    x_TD = rms_norm(x_TD, tensors["model.norm.weight"], model.norm_eps)
    found = x_TD @ tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).T
    places = jnp.arange(12)[None]
    wanted = apply_logits(model, params, jnp.asarray(tokens_T)[None], places, jnp.ones_like(places))
    np.testing.assert_allclose(found, wanted[0], rtol=0, atol=1e-4 * np.abs(wanted).max())


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
    assert "--form" in str(error.value)


def test_python_finds_the_plug_in_in_the_folder(tmp_path, monkeypatch):
    vllm_export.finish(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = entry_points(group="vllm.general_plugins", name="mea")
    assert found.module == vllm_export.PLUGIN.stem
    assert f"def {found.attr}(" in (tmp_path / f"{found.module}.py").read_text()
