"""Values that config.json can give under two keys: read as in transformers, or refused."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from mea_jax.checkpoint.load import load
from mea_jax.config.schema import RopeScaling
from mea_jax.convert import config_reading, config_writing
from mea_jax.convert.importing import import_model, open_source
from mea_jax.convert.shards import SINGLE
from mea_jax.errors import UserError
from tests.helpers import apply_logits
from tests.system.convert import small_models

LIMIT = 1e-4  # largest difference of float32 logits, whose spread is about one
LLAMA3 = {key: value for key, value in small_models.LLAMA3.items() if key != "rope_theta"}
DEFAULT = {"rope_type": "default"}
ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# Changes to the config.json of a Llama; None removes a key.
AGREED = {
    "transformers 4": {"rope_parameters": None, "rope_scaling": LLAMA3, "rope_theta": 3e4},
    "type": {
        "rope_parameters": None,
        "rope_scaling": {"type": "llama3"} | {k: v for k, v in LLAMA3.items() if k != "rope_type"},
        "rope_theta": 3e4,
    },
    "theta inside rope_scaling": {
        "rope_parameters": None,
        "rope_scaling": LLAMA3 | {"rope_theta": 3e4},
    },
    "both": {
        "rope_parameters": LLAMA3 | {"rope_theta": 3e4},
        "rope_scaling": LLAMA3,
        "rope_theta": 30_000,
    },
    "no context inside": {
        "rope_parameters": {
            k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"
        },
        "max_position_embeddings": 64,
    },
    "neither": {"rope_parameters": None},
    "yarn with all defaults": {"rope_parameters": None, "rope_scaling": YARN, "rope_theta": 3e4},
    "yarn with nulls": {"rope_parameters": YARN | dict.fromkeys(("beta_fast", "mscale"))},
    "yarn of two mscales": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.3}},
    "yarn with its own factor": {"rope_parameters": YARN | {"attention_factor": 1.3}},
    "yarn without a context inside": {
        "rope_parameters": {k: v for k, v in YARN.items() if k != ORIGINAL},
        "max_position_embeddings": 64,
    },
    "a context outside": {
        "rope_parameters": {k: v for k, v in YARN.items() if k != ORIGINAL},
        ORIGINAL: 16,
    },
    "type linear": {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "an empty one": {"rope_parameters": LLAMA3 | {"rope_theta": 3e4}, "rope_scaling": {}},
}
DISAGREED = {
    "yarn in rope_scaling": (
        {"rope_parameters": DEFAULT, "rope_scaling": YARN},
        ["rope_parameters.rope_type='default'", "rope_scaling.rope_type='yarn'"],
    ),
    "llama3 in rope_scaling": (
        {"rope_parameters": DEFAULT, "rope_scaling": LLAMA3},
        ["rope_parameters.rope_type='default'", "rope_scaling.rope_type='llama3'"],
    ),
    "factor": (
        {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 4.0}},
        ["rope_parameters.factor=8.0", "rope_scaling.factor=4.0"],
    ),
    "theta of the object that is not read": (
        {"rope_parameters": DEFAULT | {"rope_theta": 1e6}, "rope_scaling": DEFAULT},
        ["rope_parameters.rope_theta=1000000.0", "rope_scaling.rope_theta=10000.0"],
    ),
    "theta that only the object that is not read has": (
        {"rope_parameters": LLAMA3 | {"rope_theta": 2e4}, "rope_scaling": LLAMA3},
        ["rope_parameters.rope_theta=20000.0", "rope_scaling.rope_theta=10000.0"],
    ),
    "theta": (
        {"rope_parameters": DEFAULT | {"rope_theta": 1e6}, "rope_theta": 1e4},
        ["rope_parameters.rope_theta=1000000.0", "rope_theta=10000.0"],
    ),
    "type": (
        {"rope_parameters": LLAMA3 | {"type": "linear"}},
        ["rope_parameters.rope_type='llama3'", "type='linear'"],
    ),
    "original context": (
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 99},
        ["rope_parameters.original_max_position_embeddings=16", "=99"],
    ),
    "partial rotation": (
        {"rope_parameters": DEFAULT | {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 0.5},
        ["rope_parameters.partial_rotary_factor=1.0", "partial_rotary_factor=0.5"],
    ),
    "positions by layer type": (
        {"rope_parameters": {"full_attention": DEFAULT | {"rope_theta": 1e6}}},
        ["rope_parameters.full_attention=", "is not supported"],
    ),
    "dtype": (
        {"dtype": "bfloat16", "torch_dtype": "float32"},
        ["dtype='bfloat16'", "torch_dtype='float32'"],
    ),
    "layers": (
        {"layer_types": ["full_attention"] * 5},
        ["num_hidden_layers=1", "the length of layer_types=5"],
    ),
}


def edited(config, changes):
    tree = config | changes
    return {key: value for key, value in tree.items() if value is not None}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = small_models.make("llama", num_hidden_layers=1)
    return small_models.save(model, tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def theirs_and_ours(llama, tmp_path, devices):
    """Return `theirs_and_ours(changes)`: the logits of transformers and ours, for a new config."""
    devices(1)

    def compute(changes):
        folder = tmp_path / "model"
        folder.mkdir()
        for path in llama.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        path = folder / "config.json"
        path.write_text(json.dumps(edited(json.loads(path.read_text()), changes)))
        tokens_BT = small_models.tokens(0, 2, 48)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        import_model(folder, tmp_path / "run", context_length=64)
        model, params, _, _ = load(tmp_path / "run", dtype="float32")
        natural_BT = np.broadcast_to(np.arange(48, dtype=np.int32), tokens_BT.shape)
        arrays = map(jnp.asarray, (tokens_BT, natural_BT, natural_BT * 0 + 1))
        return small_models.logits(theirs, tokens_BT), np.asarray(
            apply_logits(model, params, *arrays)
        )

    return compute


@pytest.mark.parametrize("spelling", AGREED)
def test_positions_are_those_of_transformers(spelling, theirs_and_ours):
    theirs, ours = theirs_and_ours(AGREED[spelling])
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=LIMIT)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(),
        RopeScaling("linear", 2.0),
        RopeScaling("llama3", 8.0, 0.5, 2.0, 64),
        RopeScaling("dynamic", 2.0, original_context=64),
        RopeScaling("yarn", 2.0, original_context=64),
        RopeScaling("yarn", 2.0, beta_fast=8.0, beta_slow=0.5, attention_factor=1.5),
        RopeScaling("yarn", 2.0, mscale=0.7, mscale_all_dim=0.3, truncate=False),
    ],
)
def test_an_exported_scaling_is_read_again(scaling):
    """The original context of "dynamic" is the model's maximum, not that of its windows."""
    plain = config_reading.model_config(small_models.make("llama").config.to_dict(), "")
    model = dataclasses.replace(plain, rope_scaling=scaling)
    config = config_writing.stock_config(model, "float32", {"max_position_embeddings": 32})
    assert config_reading.model_config(config, "").rope_scaling == scaling


@pytest.mark.parametrize("fact", DISAGREED)
def test_two_values_of_one_fact_are_refused_by_their_keys(fact, llama):
    changes, words = DISAGREED[fact]
    config = edited(config_reading.read_config(llama), changes)
    with pytest.raises(UserError, match="^here: " + ".*".join(map(re.escape, words))) as caught:
        config_reading.model_config(config, "here")
    assert "\n" not in str(caught.value)


def test_numbers_of_experts_have_two_names():
    config = small_models.make("qwen3_moe").config.to_dict()
    config |= {"architectures": ["Qwen3MoeForCausalLM"]}
    for name in ("num_experts", "num_local_experts"):
        config.pop(name, None)
    for one in ({"num_experts": 8}, {"num_local_experts": 8}):
        assert config_reading.model_config(config | one, "").n_experts == 8
    both = config | {"num_experts": 8, "num_local_experts": 4}
    with pytest.raises(UserError, match="num_experts=8 and num_local_experts=4 disagree"):
        config_reading.model_config(both, "")
    with pytest.raises(UserError, match="num_experts=None must be a positive whole number"):
        config_reading.model_config(config, "")


def test_a_dtype_that_both_keys_name_is_read(llama):
    config = config_reading.read_config(llama)
    for names in (
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"dtype": "bfloat16", "torch_dtype": "torch.bfloat16"},
    ):
        plain = {key: value for key, value in config.items() if "dtype" not in key}
        assert config_reading.model_config(plain | names, "").dtype == "bfloat16"


BUFFERS = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.masked_bias",
)


def test_buffers_of_old_versions_are_passed_over(llama, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    file = folder / SINGLE
    save_file(load_file(file) | {name: np.ones(8, np.float32) for name in BUFFERS}, file)
    plain = {entry.name: array for entry, array in open_source(llama).arrays()}
    found = {entry.name: array for entry, array in open_source(folder).arrays()}
    assert found.keys() == plain.keys()
    assert all(np.array_equal(found[name], plain[name]) for name in plain)
