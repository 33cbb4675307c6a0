"""Tests of the config: round trips through JSON, types, and one line for each invalid value."""

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mea_jax.config import schema as config_lib
from mea_jax.config.checks import validate
from mea_jax.config.parse import from_config_dict, from_dict
from mea_jax.config.presets import apply_variant
from mea_jax.config.schema import (
    ModelConfig,
    RopeScaling,
    Side,
    SourceConfig,
    TrainConfig,
    default_config,
    differences,
    flatten,
)
from mea_jax.errors import UserError, nearest
from tests.helpers import change, tiny_model


def tree_with(path, value):
    """Return the default config's JSON with `value` at a path such as "data.sources[0].path"."""
    tree = TrainConfig().to_dict()
    *parents, last = re.findall(r"\w+", path)
    node: Any = tree
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    node[last] = value
    return tree


@given(
    kv=st.sampled_from([1, 2, 4, 8]),
    components=st.sampled_from([None, 1, (1, 1), (1, 1)]),
    sources=st.integers(1, 3),
    rate=st.floats(1e-6, 1.0),
)
def test_json_and_back(kv, components, sources, rate):
    config = change(
        TrainConfig(),
        model=tiny_model(n_heads=8, n_kv_heads=kv, key_components=components),
        **{
            "data.sources": tuple(SourceConfig(weight=i + 0.5) for i in range(sources)),
            "optimizer.learning_rate": rate,
        },
    )
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_default_config_holds_every_option_at_its_default():
    assert from_config_dict(default_config()) == TrainConfig()
    assert json.loads(default_config().to_json()) == TrainConfig().to_dict()


def test_default_config_is_locked():
    config = default_config()
    with pytest.raises(AttributeError, match="learning_rte"):
        config.optimizer.learning_rte = 1.0


def test_whole_numbers_may_be_floats_but_not_the_other_way():
    tree = tree_with("optimizer.learning_rate", 1)
    assert isinstance(from_dict(tree).optimizer.learning_rate, float)
    tree["steps"] = 10.0
    with pytest.raises(UserError, match=r"config\.steps must be of type int, not 10\.0"):
        from_dict(tree)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("steps", "many", r"config\.steps must be of type int, not 'many'"),
        ("steps", True, r"config\.steps must be of type int, not True"),
        ("name", 3, r"config\.name must be of type str, not 3"),
        ("model.head_norm", 1, r"config\.model\.head_norm must be of type bool, not 1"),
        ("model.key_components", "4", r"config\.model\.key_components must be a list, not '4'"),
        ("model.key_components", 2.5, r"config\.model\.key_components must be a list"),
        ("model.key_components", [4, "x"], r"config\.model\.key_components\[1\] must be of type"),
        ("model.window", 0.5, r"config\.model\.window must be a list, not 0\.5"),
        ("model.layer_thetas", 1e4, r"config\.model\.layer_thetas must be a list, not 10000\.0"),
        ("model.layer_thetas", ["1e4"], r"config\.model\.layer_thetas\[0\] must be of type float"),
        ("optimizer.learning_rate", None, r"config\.optimizer\.learning_rate must be of type"),
        ("data.sources", "text", r"config\.data\.sources must be a list, not 'text'"),
        ("data.sources", ["text"], r"config\.data\.sources\[0\] must contain the keys of Source"),
        ("model", 7, r"config\.model must contain the keys of ModelConfig, not 7"),
    ],
)
def test_wrong_types(path, value, message):
    tree = tree_with(path, value)
    with pytest.raises(UserError, match=message):
        from_dict(tree)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("steps", 2**31, r"config\.steps=2147483648 must be within \+-2\^31: integers"),
        ("seed", -(2**40), r"config\.seed=-1099511627776 must be within"),
        pytest.param(
            *("steps", 10**5000, r"config\.steps=something of type int must be within"),
            id="a number that has no repr",
        ),
        ("model.key_components", 2**31, r"key_components=2147483648 must be within"),
        ("model.value_components", [4, 2**70], r"value_components\[1\]=1180591\d* must be within"),
        (
            "optimizer.learning_rate",
            10**400,
            r"learning_rate=1000*\.\.\.0* must be within \+-3\.4e38",
        ),
        ("optimizer.learning_rate", 1e39, r"learning_rate=1e\+39 is infinite in float32"),
        ("optimizer.eps", 1e-300, r"eps=1e-300 is 0 in float32"),
        ("model.norm_eps", 1e-40, r"norm_eps=1e-40 is 0 in float32"),
        ("model.rope_scaling", {"factor": 1e300}, r"rope_scaling\.factor=1e\+300 is infinite"),
        ("model.rope_theta", 1e-30, r"rope_theta=1e-30 must be 1 or more"),
        ("model.layer_thetas", [1e4, 1e39], r"layer_thetas\[1\]=1e\+39 is infinite in float32"),
        ("model.layer_thetas", [math.inf, 1.0], r"layer_thetas\[0\]=inf must be a finite number"),
        ("model.window", 2**31, r"config\.model\.window=2147483648 must be within"),
        ("data.sources", [{"weight": 1e-300}], r"data\.sources\[0\]\.weight=1e-300 is 0"),
        ("data.sources", [{"path": "a\0b"}], r"data\.sources\[0\]\.path='a\\x00b' contains a null"),
        ("model.n_layers", 2**31 - 1, r"config\.model\.n_layers=2147483647 must be at most 10,000"),
        ("data.prefetch", 1_001, r"config\.data\.prefetch=1001 must be at most 1,000"),
        ("data.read_threads", 10**6, r"read_threads=1000000 must be at most 1,000"),
        ("model.d_ff", 2**31 - 1, None),  # large but addressable: train/memory.py refuses it
        (
            "model",
            {"d_model": 2**31 - 2, "d_ff": 2**31 - 2},
            r"config\.model describes about \de\+\d+ parameters, which no computer can address",
        ),
        ("name", "..", r"config\.name='\.\.' must be the name of a folder"),
        (
            "name",
            "é" * 128,
            r"config\.name='é*\.\.\.é*' must be the name of a folder .* 255 bytes",
        ),
        ("name", "a\0b", r"config\.name='a\\x00b' contains a null character"),
        ("evaluate.sample_prompt", "\udcff", r"sample_prompt='\\udcff' is not valid UTF-8"),
        ("model.dtype", "x" * 10_000, r"config\.model\.dtype='x*\.\.\.x*': known: auto"),
        (
            "steps",
            [1] * 10_000,
            r"config\.steps must be of type int, not \[1, [1, ]*\.\.\.[1, ]*\]$",
        ),
        ("checkpoint", {1: 2}, r"unknown config key config\.checkpoint\.1: known: every"),
        (
            "checkpoint",
            {"a\nb": 2},
            r"unknown config key config\.checkpoint\.'a\\nb': known: every",
        ),
    ],
)
def test_what_no_run_can_compute_with_is_one_short_line(path, value, message):
    tree = tree_with(path, value)
    if message is None:
        from_dict(tree)
        return
    with pytest.raises(UserError, match=message) as error:
        from_dict(tree)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 400


def test_numpy_numbers_become_plain_ones():
    """`ConfigDict` accepts numpy's float64, a subclass of float; it is converted to float."""
    tree = tree_with("optimizer.learning_rate", np.float64(0.5))
    assert type(from_dict(tree).optimizer.learning_rate) is float


def test_a_sample_needs_room_for_a_token():
    config = change(TrainConfig(), **{"data.context_length": 1})
    validate(config)
    with pytest.raises(UserError, match=r"sample_prompt='x' cannot be continued within"):
        validate(change(config, **{"evaluate.sample_prompt": "x"}))


@pytest.mark.parametrize(
    ("path", "close"),
    [
        ("modle", "model"),
        ("optimizer.learning_rte", "learning_rate"),
        ("model.n_head", "n_heads"),
        ("model.rope_scaling.facter", "factor"),
        ("data.sources[0].pth", "path"),
    ],
)
def test_a_misspelt_key_names_the_nearest(path, close):
    tree = tree_with(path, 1)
    line = rf"unknown config key config\.{re.escape(path)}: did you mean '{close}'\?"
    with pytest.raises(UserError, match=line):
        from_dict(tree)


def test_a_key_like_no_other_lists_what_there_is():
    with pytest.raises(UserError, match="known: every, keep"):
        from_dict(tree_with("checkpoint.zzz", 1))


@given(name=st.sampled_from(sorted(flatten(TrainConfig().to_dict()))), cut=st.integers(0, 99))
def test_nearest_finds_a_key_with_a_letter_missing(name, cut):
    leaf = name.split(".")[-1]
    if len(leaf) < 4:
        return
    known = [f.name for f in dataclasses.fields(ModelConfig)] + [leaf]
    cut %= len(leaf)
    misspelt = leaf[:cut] + leaf[cut + 1 :]
    if misspelt not in known:
        assert nearest(misspelt, known).startswith("did you mean")


@pytest.mark.parametrize(
    ("window", "each"), [(128, (128,) * 6), ((0, 64, 0, 0, 9, 0), (0, 64, 0, 0, 9, 0))]
)
def test_a_window_and_bases_of_a_config_file(window, each):
    """`ConfigDict` has no type for an option that is None by default; whole bases become floats."""
    config = default_config()
    assert from_config_dict(config).model.windows() == (0,) * 6
    config.model.window, config.model.layer_thetas = window, [10_000, 0, 1e6, 0, 0, 0]
    model = from_config_dict(config).model
    assert model.windows() == each
    assert model.layer_thetas == (1e4, 0.0, 1e6, 0.0, 0.0, 0.0)


def test_a_config_stored_before_options_existed_is_one_with_their_defaults():
    """So a run that such a config describes goes on: nothing differs that changes its result."""
    tree = TrainConfig().to_dict()
    added = ["window", "layer_thetas", "qkv_bias", "out_bias", "norms", "qk_norm_over"]
    for name in [*added, "activation", "attention_scale", "embedding_scale"]:
        del tree["model"][name]
    assert from_dict(tree) == TrainConfig()
    assert differences(from_dict(tree).to_dict(), TrainConfig().to_dict()) == []
    new = change(TrainConfig(), **{"model.window": 4}).to_dict()
    assert differences(from_dict(tree).to_dict(), new) == ["model.window: None -> 4"]


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ({"factor": 8.0, "original_context": 16}, "llama3"),
        ({"factor": 8.0, "original_context": 1}, "linear"),
        ({"factor": 1.0}, "none"),
        ({"factor": 8.0, "kind": "yarn"}, "yarn"),
    ],
)
def test_a_rotary_scaling_without_a_kind_is_an_older_one(stored, kind):
    tree = TrainConfig().to_dict()
    tree["model"]["rope_scaling"] = stored
    assert from_dict(tree).model.rope_scaling == RopeScaling(**stored | {"kind": kind})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"config\.steps=0 must be positive"),
        ({"batch_size": -8}, r"config\.batch_size=-8 must be positive"),
        ({"accumulate": 3}, r"accumulate=3 does not divide batch_size=8"),
        ({"log_every": 0}, r"log_every=0 must be positive"),
        ({"evaluate.every": -1}, r"evaluate\.every=-1 must"),
        ({"data.sources": ()}, r"data\.sources is empty"),
        ({"data.sources": (SourceConfig(weight=0.0),)}, r"sources\[0\]\.weight=0\.0 must be pos"),
        (
            {"data.held_out_fraction": -0.1},
            r"held_out_fraction=-0\.1 must be 0 or more and below 1",
        ),
        ({"data.held_out_fraction": 1.0}, r"held_out_fraction=1\.0 must be 0 or more and below 1"),
        ({"data.sources": (SourceConfig(held_out=True),)}, r"every source is held_out; add one"),
        ({"optimizer.schedule": "cosin"}, r"schedule='cosin': did you mean 'cosine'\?"),
        ({"optimizer.warmup_steps": 1000}, r"warmup_steps=1000 must be .* below steps=1000"),
        ({"optimizer.warmup_steps": -1}, r"warmup_steps=-1"),
        ({"optimizer.learning_rate": 0.0}, r"learning_rate=0\.0 must be positive"),
        ({"optimizer.learning_rate": float("nan")}, r"learning_rate=nan must be a finite"),
        ({"optimizer.final_fraction": 1.5}, r"final_fraction=1\.5 must be in \[0, 1\]"),
        ({"optimizer.clip_norm": -1.0}, r"clip_norm=-1\.0 must"),
        ({"optimizer.b2": 1.0}, r"b2=1\.0 must"),
        ({"optimizer.z_loss": -1.0}, r"z_loss=-1\.0 must"),
        ({"optimizer.weight_decay": -0.1}, r"weight_decay=-0\.1 must"),
        ({"evaluate.sample_temperature": -1.0}, r"sample_temperature=-1\.0 must"),
        ({"mesh.tensor": 0}, r"mesh\.tensor=0 must be positive, or -1"),
        ({"mesh.fsdp": -2}, r"mesh\.fsdp=-2 must be positive, or -1"),
        ({"mesh.fsdp": -1}, r"only one axis can be -1"),
    ],
)
def test_runs_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        validate(change(TrainConfig(), **changes))


def test_differences_are_those_that_change_the_result():
    old, new = TrainConfig(), TrainConfig(log_every=3, accumulate=2, seed=1)
    new = change(
        new, **{"model.remat": "full", "mesh.fsdp": 2, "data.prefetch": 1, "optimizer.b1": 0.8}
    )
    assert differences(old.to_dict(), new.to_dict()) == ["optimizer.b1: 0.9 -> 0.8", "seed: 0 -> 1"]
    assert differences(old.to_dict(), old.to_dict()) == []
    source = change(old, **{"data.sources": (SourceConfig(weight=2.0),)})
    assert len(differences(old.to_dict(), source.to_dict())) == 1


def test_every_execution_key_exists():
    keys = flatten(TrainConfig().to_dict())
    for prefix in config_lib.EXECUTION_KEYS:
        assert any(key.startswith(prefix) for key in keys), prefix


@pytest.mark.parametrize("variant", ["mha", "gqa", "no_norm"])
def test_variants_are_baselines_of_the_same_shape(variant):
    base = from_config_dict(default_config())
    found = from_config_dict(apply_variant(default_config(), variant))
    assert found.name == f"{base.name}_{variant}"
    same = [f.name for f in dataclasses.fields(ModelConfig)]
    changed = {name for name in same if getattr(found.model, name) != getattr(base.model, name)}
    assert changed <= {"hlc", "head_norm", "n_kv_heads", "key_components", "value_components"}
    assert found.model.mixes(Side.KEY) == (variant == "no_norm")
    assert not found.model.head_norm


def test_an_unknown_variant_names_the_nearest():
    with pytest.raises(UserError, match=r"no variant 'nonorm': did you mean 'no_norm'\?"):
        apply_variant(default_config(), "nonorm")
