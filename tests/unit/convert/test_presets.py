"""Tests of published models at full size without allocation: counts, names and our configs."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from mea_jax.config.parse import from_config_dict
from mea_jax.config.schema import ModelConfig, flatten
from mea_jax.convert import config_reading, config_writing, tensors
from mea_jax.model.params import abstract_params
from tests.paths import ROOT

CONFIGS = ROOT / "configs"
QWEN3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Published config.json, and the number of parameters in the model's card or files.
PUBLISHED = {
    "qwen3_0_6b": (
        QWEN3
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    "llama3_2_1b": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 128256,
        },
        1_235_814_400,
    ),
    "qwen3_30b_a3b": (
        QWEN3
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
        30_532_122_624,
    ),
}
# Options that do not change the model's function.
OWN = ("dtype", "backend", "attention_kernel", "hlc_form", "remat", "scan_unroll", "loss_chunk")


def config_of(name, argument=""):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(argument))


def computed(model: ModelConfig):
    tree = flatten(dataclasses.asdict(model))
    return {key: value for key, value in tree.items() if key not in OWN}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_our_config_of_that_name(name):
    config, count = PUBLISHED[name]
    model = config_reading.model_config(config, name)
    assert computed(model) == computed(config_of(name).model)
    assert model.dtype == "bfloat16"
    plain = dataclasses.replace(model, backend="xla", attention_kernel="einsum")
    leaves = jax.tree.leaves(abstract_params(plain))
    assert sum(leaf.size for leaf in leaves) == count
    entries = tensors.entries(plain)
    assert sum(int(np.prod(entry.hf_shape)) for entry in entries) == count
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_comes_back(name):
    """All keys are restored except those that have no effect on the stock class."""
    config, _ = PUBLISHED[name]
    back = config_writing.stock_config(
        config_reading.model_config(config, name), "bfloat16", config
    )
    aside = ("sliding_window", "use_sliding_window", "max_window_layers")
    meant = {key: value for key, value in config.items() if key not in aside}
    assert meant == {key: back[key] for key in meant}


@pytest.mark.parametrize("name", ["qwen3_0_6b", "llama3_2_1b"])
def test_the_argument_is_where_training_starts(name):
    config = config_of(name, "runs/imported")
    assert config.start.checkpoint == "runs/imported"
    assert config.data.tokenizer == "runs/imported/tokenizer"
    docstring = (CONFIGS / f"{name}.py").read_text().split('"""')[1]
    assert f"python -m mea_jax.train --config configs/{name}.py" in docstring
