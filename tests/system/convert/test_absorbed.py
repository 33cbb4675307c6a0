"""Stock classes whose cache contains component heads, against the model that they come from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from mea_jax.checkpoint.load import load as load_run
from mea_jax.compress.options import Options
from mea_jax.compress.run import compress
from mea_jax.config.schema import RopeScaling, Side
from mea_jax.convert import absorbed, config_writing, tensors
from mea_jax.convert.exporting import export_model
from mea_jax.errors import UserError
from mea_jax.train.run import train
from tests.helpers import PLAIN, params_of, tiny_model
from tests.system.convert.exported_mea import layers_of, load
from tests.system.convert.test_mea_rebuild import logits_of

NO_NORM: dict[str, Any] = {"head_norm": False, "n_kv_heads": 4, "key_components": 2}
NO_NORM |= {"value_components": 2}
COMPLEX = {"key_mixing": "frequency", "value_mixing": "dense"}
YARN = RopeScaling("yarn", factor=4.0, original_context=8)
CASES: dict[str, dict[str, Any]] = {
    "heads": NO_NORM,
    "complex keys, dense values": NO_NORM | COMPLEX | {"key_components": 3, "value_components": 3},
    "biases of queries, keys and values": NO_NORM | COMPLEX | {"qkv_bias": True},
    "all biases": NO_NORM | {"qkv_bias": True, "out_bias": True},
    "a bias of the output": NO_NORM | {"out_bias": True},
    "some slots": NO_NORM
    | COMPLEX
    | {
        "key_slots": "11111111" + "01100110",
        "value_slots": "11111111" + "01001010",
        "qkv_bias": True,
    },
    "an odd number of values": NO_NORM
    | COMPLEX
    | {"value_slots": "11111111" + "00010000"}
    | {"key_components": 1},
    "more slots of keys": NO_NORM | COMPLEX | {"key_components": 3, "key_slots": "11101110" * 3},
    "unequal layers, padded": NO_NORM | {"key_components": (1, 2), "value_components": (3, 1)},
    "keys alone": NO_NORM | {"hlc": "k", "value_components": 4, "n_kv_heads": 4},
    "yarn, own scale": NO_NORM | {"rope_scaling": YARN, "attention_scale": 0.2},
    "llama3": NO_NORM | {"rope_scaling": RopeScaling("llama3", 8.0, original_context=16)},
    "one component": NO_NORM | {"key_components": 1, "value_components": 1},
}
REFUSED: dict[str, dict[str, Any]] = {
    "a norm of each head's output": {"head_norm": True},
    "a norm of each composite key": {"qk_norm": True},
    "gate='head'": {"gate": "head"},
    "positions='alibi'": {"positions": "alibi"},
    "as many as without mixing": {"key_components": 4},
    "other frequencies in some layers": {"layer_thetas": (1e4, 0.0)},
}


def save(model: Any, params: Any, folder: Path) -> Path:
    """Write `model` as the stock class that caches components."""
    target = absorbed.absorbed_model(model)
    config = config_writing.stock_config(target, "float32", {})
    layers = layers_of(model, params)
    size = target.head_dim
    for layer in layers:
        layer["attention"] = absorbed.absorb_layer(model, layer["attention"], size)
    found = {}
    for entry in tensors.entries(target):
        tree = params if entry.layer is None else layers[entry.layer]
        for name in entry.path:
            tree = tree[name]
        found[entry.name] = np.ascontiguousarray(entry.to_hf(np.asarray(tree)))
    folder.mkdir()
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | absorbed.rope_config(model, 64)))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in CASES if n != "keys alone"])
def test_logits_and_cache(name, tmp_path):
    """The class has the model's logits, with and without a cache of one head of C H features."""
    model = tiny_model(**CASES[name])
    params = params_of(model, noise=0.3)
    tokens, ours = logits_of(model, params)
    theirs = load(save(model, params, tmp_path / "out"))
    tokens = torch.tensor(tokens)
    np.testing.assert_allclose(theirs(tokens).logits.numpy(), ours, rtol=0, atol=1e-4)
    first = theirs(tokens[:, :7], use_cache=True)
    keys = first.past_key_values.layers[0].keys
    width = max(
        len(model.slots(side) or range(model.head_dim * max(model.components(side))))
        for side in Side
    )
    width += width % 2
    assert keys.shape == (2, 1, 7, width)
    rest = theirs(tokens[:, 7:], past_key_values=first.past_key_values).logits.numpy()
    np.testing.assert_allclose(rest, ours[:, 7:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("said", REFUSED)
def test_what_no_stock_class_can_cache_is_refused(said):
    model = tiny_model(**(NO_NORM | REFUSED[said]))
    with pytest.raises(UserError) as error:
        absorbed.check(model)
    assert said in str(error.value)
    assert "--form" in str(error.value)


def test_plain_values_are_as_wide_as_before():
    """With values unmixed the head would be as wide as all composite heads: nothing is saved."""
    with pytest.raises(UserError, match="does not mix keys and values both"):
        absorbed.check(tiny_model(**CASES["keys alone"]))


@torch.no_grad()
def test_a_compressed_run(tiny, devices, tmp_path):
    """Half of four heads: bytes, logits, and the widths that config.json states."""
    devices(1)
    run = tmp_path / "run"
    train(tiny(steps=4, **{f"model.{name}": value for name, value in PLAIN.items()}), run)
    options = Options(calibration_tokens=512, held_out_tokens=512, dtype="float32")
    compress(run, tmp_path / "less", options)
    found = export_model(tmp_path / "less", tmp_path / "out", print, form="absorbed")
    assert found["cached"] / found["uncompressed"] == pytest.approx(0.5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["num_key_value_heads"], config["head_dim"]) == (
        ["LlamaForCausalLM"],
        1,
        found["widths"][0],
    )
    model, params, _, _ = load_run(tmp_path / "less", dtype="float32")
    tokens, ours = logits_of(model, params)
    theirs = load(tmp_path / "out")(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
