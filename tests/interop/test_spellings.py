"""Facts of a config.json that versions 4 and 5 of transformers spell differently."""

import numpy as np
import pytest

from mea_jax.errors import UserError
from mea_jax.interop import families, importing

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
EXPERTS = BASE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # transformers takes rope_scaling, and would compute with the scaling that this one denies.
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3},
            "rope_parameters has rope_type='default' and rope_scaling rope_type='llama3'",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "yarn", "factor": 4}},
            "rope_parameters has rope_type='default' and rope_scaling rope_type='yarn'",
        ),
        (
            {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 4.0}},
            "rope_parameters has factor=8.0 and rope_scaling factor=4.0",
        ),
        ({"rope_scaling": LLAMA3 | {"type": "linear"}}, "rope_type='llama3' and type='linear'"),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_theta=500000.0 at the top and rope_theta=10000.0 inside",
        ),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype='float32' and torch_dtype='bfl"),
    ],
)
def test_spellings_that_disagree_are_refused_by_name(changes, words):
    with pytest.raises(UserError, match="remove the one that is wrong") as caught:
        families.model_config(BASE | changes, "config.json")
    assert str(caught.value).startswith("config.json: ")
    assert words in str(caught.value)


def test_numbers_of_experts_that_disagree_are_refused():
    for spelling in ({"num_experts": 8}, {"num_local_experts": 8}):
        assert families.model_config(EXPERTS | spelling, "").n_experts == 8
    with pytest.raises(UserError, match="num_experts=8 and num_local_experts=4 disagree"):
        families.model_config(EXPERTS | {"num_experts": 8, "num_local_experts": 4}, "")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA3, "rope_theta": 2e4},
        {"rope_parameters": LLAMA3 | {"rope_theta": 2e4}},
        {"rope_parameters": LLAMA3 | {"rope_theta": 2e4}, "rope_theta": 2e4},
        {"rope_parameters": LLAMA3 | {"rope_theta": 2e4}, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 2e4} | LLAMA3, "rope_scaling": None},
    ],
)
def test_spellings_that_agree_are_one_fact(changes):
    model = families.model_config(BASE | changes, "")
    assert (model.rope_theta, model.rope_scaling.factor) == (2e4, 8.0)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
)
def test_buffers_of_old_versions_are_passed_over(name, tmp_path):
    small_models = pytest.importorskip("small_models", exc_type=ImportError)
    from safetensors.numpy import load_file, save_file

    folder = small_models.save(small_models.make("llama", num_hidden_layers=1), tmp_path / "model")
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: np.ones(8, np.float32)}, file)
    importing.import_model(folder, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()
