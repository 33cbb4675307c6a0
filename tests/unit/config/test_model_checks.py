"""Tests of the checks of a model's config: one line for each impossible model."""

import json
from typing import Any

import pytest

from mea_jax.config.checks import validate
from mea_jax.config.model_checks import validate_from_scratch
from mea_jax.config.parse import from_dict
from mea_jax.config.schema import TrainConfig
from mea_jax.errors import UserError
from tests.helpers import PLAIN, tiny_model

HEADS: dict[str, Any] = {"n_heads": 8, "n_kv_heads": 4}
PLAIN_V2: dict[str, Any] = {"variant": "differential_v2"} | PLAIN
EXPERTS: dict[str, Any] = {"n_experts": 4, "experts_per_token": 2, "d_expert": 8}
YARN: dict[str, Any] = {"rope_scaling.kind": "yarn", "rope_scaling.factor": 8.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 6, "n_kv_heads": 4}, r"n_heads=6 is not a multiple of n_kv_heads=4"),
        ({"n_heads": 2, "n_kv_heads": 4}, r"n_heads=2 is not a multiple of n_kv_heads=4"),
        (HEADS | {"key_components": 8}, r"key_components=8 \(layer 0\) exceeds n_kv_heads=4"),
        (HEADS | {"value_components": (4, 5)}, r"value_components=5 \(layer 1\) exceeds"),
        (HEADS | {"value_components": (4,)}, r"value_components lists 1 layers, but n_layers=2"),
        (HEADS | {"key_components": 0}, r"key_components=0 \(layer 0\) must be at least 1"),
        (HEADS | {"hlc": "none", "key_components": 2}, r"below n_kv_heads=4, but hlc="),
        (HEADS | {"hlc": "v", "key_components": 2}, r"hlc='v' does not mix keys"),
        ({"head_dim": 7}, r"head_dim=7 must be even"),
        ({"d_model": 0}, r"d_model=0 must be positive"),
        ({"vocab_size": -1}, r"vocab_size=-1 must be positive"),
        ({"hlc": "keys"}, r"hlc='keys': did you mean|hlc='keys': known"),
        ({"dtype": "float16"}, r"dtype='float16': did you mean '(b)?float"),
        ({"remat": "all"}, r"remat='all': "),
        ({"backend": "tpu"}, r"backend='tpu': did you mean 'cpu'\?"),
        ({"hlc_form": "absorbed"}, r"hlc_form='absorbed': "),
        ({"loss_chunk": -1}, r"loss_chunk=-1 must be 0 or more"),
        ({"norm_eps": -1.0}, r"norm_eps=-1.0 must be"),
        ({"rope_theta": 0.0}, r"rope_theta=0.0 must be"),
        ({"rope_scaling.kind": "yarns"}, r"rope_scaling\.kind='yarns': did you mean 'yarn'\?"),
        ({"rope_scaling.factor": 8.0}, r"factor=8\.0 has no effect with kind='none': set kind"),
        (YARN | {"rope_scaling.factor": 0.5}, r"rope_scaling\.factor=0\.5 must be 1 or more"),
        (YARN | {"rope_scaling.beta_slow": 32.0}, r"beta_slow=32\.0 must be positive and below"),
        (YARN | {"rope_scaling.mscale": -1.0}, r"mscale=-1\.0 must be positive, or 0"),
        (YARN | {"rope_theta": 1.0}, r"kind='yarn' needs config\.model\.rope_theta=1\.0 above 1"),
        (YARN | {"layer_thetas": (1e4, 1.0)}, r"kind='yarn' needs .*layer_thetas=1\.0 above 1"),
        ({"window": (8,)}, r"window lists 1 layers, but n_layers=2"),
        ({"window": -1}, r"window=-1 must be positive, or 0 for no window"),
        ({"window": (8, -2)}, r"window=-2 must be positive, or 0 for no window"),
        ({"window": 8, "variant": "talking_heads"} | PLAIN, r"window has no effect on .*talking"),
        ({"layer_thetas": (1e4,) * 3}, r"layer_thetas lists 3 layers, but n_layers=2"),
        ({"layer_thetas": (1e4, 0.5)}, r"layer_thetas=0\.5 must be 1 or more, or 0 for a layer"),
        ({"layer_thetas": (1e4, 0.0), "positions": "none"}, r"layer_thetas needs rotary positions"),
        ({"norms": "sandwich"}, r"norms='sandwich': known: both, post, pre"),
        ({"activation": "gelu_tanh"}, r"activation='gelu_tanh': did you mean 'gelu'\?"),
        (EXPERTS | {"activation": "gelu"}, r"activation='gelu' has no effect on experts"),
        ({"attention_scale": -0.5}, r"attention_scale=-0\.5 must be positive, or 0 for 1/sqrt"),
        ({"qk_norm": True, "qk_norm_over": "both"}, r"qk_norm_over='both': "),
        ({"qk_norm_over": "all", "hlc": "v"}, r"qk_norm_over='all' needs qk_norm and unmixed keys"),
        ({"qk_norm_over": "all", "qk_norm": True}, r"qk_norm_over='all' needs .* hlc='kv'"),
        (PLAIN_V2 | {"qkv_bias": True}, r"qkv_bias=True belongs to variant 'mea'"),
        (PLAIN_V2 | {"out_bias": True}, r"out_bias=True belongs to variant 'mea'"),
        (PLAIN_V2 | {"attention_scale": 0.5}, r"attention_scale=0\.5 belongs to variant 'mea'"),
        (
            {"rope_scaling.kind": "dynamic", "rope_scaling.original_context": 255},
            r"original_context=255 is below data\.context_length=256: .* so shorten the windows",
        ),
    ],
)
def test_models_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message) as error:
        validate(TrainConfig(model=tiny_model(**changes)))
    assert str(error.value).startswith("config.model.")


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 8, "layer_thetas": (1e4, 0.0)},
        {"window": (0, 2**31 - 1), "qkv_bias": True, "out_bias": True},
        PLAIN_V2 | {"window": (8, 0), "norms": "both", "activation": "gelu"},
        {"window": 0, "variant": "talking_heads"} | PLAIN,
        {"qk_norm": True, "qk_norm_over": "all", "hlc": "v", "norms": "post"},
        {"attention_scale": 0.5, "embedding_scale": 5.6},
        EXPERTS | {"qkv_bias": True, "window": 4},
        # Layers with a window and a base of their own are not scaled, others not rotated.
        YARN | {"n_layers": 3, "layer_thetas": (1e4, 1.0, 0.0), "window": (0, 4, 0)},
        YARN | {"layer_thetas": (0.0, 0.0)},
    ],
)
def test_models_that_can_be(changes):
    config = TrainConfig(model=tiny_model(**changes))
    validate(config)
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_any_component_count_is_a_model_but_not_a_fresh_one():
    """A compressed checkpoint may have 3 of 4 heads, for which block identity is not defined."""
    model = tiny_model(key_components=(4, 3))
    validate(TrainConfig(model=model))
    with pytest.raises(UserError, match=r"key_components=3 \(layer 1\) does not divide .*=4"):
        validate_from_scratch(model)
    validate_from_scratch(tiny_model(key_components=(4, 2), value_components=1))
