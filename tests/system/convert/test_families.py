"""Tests of the config.json of each family: windows, positions, functions, and what is refused."""

import pytest

from mea_jax.convert import config_reading
from mea_jax.errors import UserError
from tests.system.convert import small_models


def _config(kind, architecture, **changes):
    config = small_models.make(kind).config.to_dict() | {"architectures": [architecture]} | changes
    return {key: value for key, value in config.items() if value != "nothing"}


def test_windows_are_those_below_the_context():
    """The classes have a window of 4,096 by default; small_models has contexts of 256."""

    def window(**changes):
        config = _config("mistral", "MistralForCausalLM", **changes)
        return config_reading.model_config(config, "here").window

    assert window(sliding_window=None) is None
    assert window(sliding_window=256) is None
    assert window(sliding_window=255) == 255
    assert window(sliding_window="nothing") is None
    assert window(sliding_window="nothing", max_position_embeddings=8192) == 4096
    with pytest.raises(UserError, match=r"^here: sliding_window=0 must be a positive"):
        window(sliding_window=0)


def test_windows_of_some_layers():
    def window(**changes):
        given = {"layer_types": "nothing", "sliding_window": 16} | changes
        config = _config("qwen3", "Qwen3ForCausalLM", **given)
        return config_reading.model_config(config, "here").window

    assert window() is None  # it is off
    assert window(use_sliding_window=True, max_window_layers=1) == (0, 16)
    assert window(use_sliding_window=True, max_window_layers=0) == 16
    assert window(layer_types=["sliding_attention", "full_attention"]) == (16, 0)
    for kinds, words in (
        (["sliding_attention"], "num_hidden_layers=2 and the length of layer_types=1 disagree"),
        (["sliding_attention", "chunked"], "layer_types='chunked' is not supported: known: full"),
        ("full_attention", "layer_types='full_attention' is not supported: it must be a list"),
    ):
        with pytest.raises(UserError, match=f"^here: {words}"):
            window(layer_types=kinds)
    with pytest.raises(UserError, match=r"^here: sliding_window=16 is not supported: rot"):
        window(
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        )


def test_layers_without_positions():
    def thetas(**changes):
        given = {"no_rope_layers": "nothing", "layer_types": "nothing"} | changes
        config = _config("smollm3", "SmolLM3ForCausalLM", **given)
        return config_reading.model_config(config, "here").layer_thetas

    assert thetas(no_rope_layer_interval=2) == (2e6, 0.0)
    assert thetas() == (2e6, 0.0)  # of small_models
    assert thetas(no_rope_layer_interval="nothing") is None  # one of four layers, and here are two
    assert thetas(no_rope_layers=[0, 1, 0]) == (0.0, 2e6)
    with pytest.raises(UserError, match=r"no_rope_layers=\[1\] .* it must list 2 layers"):
        thetas(no_rope_layers=[1])


GEMMA3 = {
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": True,
    "hidden_activation": "silu",
    "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
}


@pytest.mark.parametrize("key", GEMMA3)
def test_what_gemma_3_may_ask_for_and_we_do_not_compute(key):
    config = _config("gemma3", "Gemma3ForCausalLM")
    config_reading.model_config(config, "here")
    with pytest.raises(UserError, match=rf"^here: {key}[.=].* is not supported: "):
        config_reading.model_config(config | {key: GEMMA3[key]}, "here")


def test_gemma_3_in_the_spelling_of_transformers_4():
    new = _config("gemma3", "Gemma3ForCausalLM")
    old = _config("gemma3", "Gemma3ForCausalLM", rope_parameters="nothing", layer_types="nothing")
    old |= {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "sliding_window_pattern": 2,
    }
    found = config_reading.model_config(old, "")
    assert found.window == (20, 0, 20)
    assert found.layer_thetas == (1e4, 1e6, 1e4)
    assert found == config_reading.model_config(new, "")
