"""Tests of every config in configs/, with every variant, at full size without allocation."""

import importlib.util

import jax
import pytest

from mea_jax.config.model_checks import validate_from_scratch
from mea_jax.config.parse import from_config_dict
from mea_jax.model.params import abstract_params
from mea_jax.ops.resolve import resolve
from mea_jax.parallel import sharding
from mea_jax.train.step import abstract_state
from tests.helpers import change, flat
from tests.paths import ROOT

CONFIGS = ROOT / "configs"

# Configs that take no variant: the model is that of a checkpoint (test_recovery.py), they have
# another argument (below), are studies (study/test_sweep.py), are fixed (suite), or are published
# models (below and interop/test_published.py), whose optional argument is a checkpoint.
NO_MODELS: tuple[str, ...] = (
    "__init__",
    "recover",
    "longer",
    "compression_study",
    "lr_study",
    "ablations",
    "suite",
    "qwen3_0_6b",
    "qwen3_30b_a3b",
    "llama3_2_1b",
)

# The number of parameters is
#   V D (2 V D if untied) + D for the final norm
#   + L (2 D N H for queries and output + 2 D K H for keys and values (C = K) + 3 D F + 2 D)
#   + L (2 K K for mixing + H for the head norm), if the model has them.
PARAMETERS = {
    # V 4096, D 256, L 6, N 8, K 8 (gqa: 2), H 32, F 704, untied:
    # 2,097,152 + 256 + 6 (131,072 + 131,072 + 540,672 + 512) + 6 (128 + 32)
    "quickstart": 6_918_336,
    "quickstart:mha": 6_917_376,
    "quickstart:gqa": 6_327_552,
    "quickstart:no_norm": 6_918_144,
    # V 2,048, D 128, L 4, N 4, K 4 (gqa: 1), H 32, E 8, F 192, untied:
    # 524,288 + 128 + 4 (32,768 + 32,768 + 1,024 + 589,824 + 256) + 4 (32 + 32)
    "moe_quickstart": 3_151_232,
    "moe_quickstart:mha": 3_150_976,
    "moe_quickstart:gqa": 3_052_672,
    "moe_quickstart:no_norm": 3_151_104,
    # V 50,304, D 768, L 12, N 12, K 12 (gqa: 3), H 64, F 2048, tied:
    # 38,633,472 + 768 + 12 (1,179,648 + 1,179,648 + 4,718,592 + 1,536) + 12 (288 + 64)
    "mea_125m": 123_591_552,
    "mea_125m:mha": 123_587_328,
    "mea_125m:gqa": 112_970_496,
    "mea_125m:no_norm": 123_590_784,
    # V 128,256, D 2048, L 16, N 32, K 8 (mha: 32), H 64, F 8192, untied:
    # 525,336,576 + 2048 + 16 (8,388,608 + 2,097,152 + 50,331,648 + 4096) + 16 (128 + 64).
    # gqa is LLaMA-3.2-1B with an untied output head: 1,235,814,400 as published + 128,256 x 2048.
    "mea_1b": 1_498_485_760,
    "mea_1b:mha": 1_599_145_984,
    "mea_1b:gqa": 1_498_482_688,
    "mea_1b:no_norm": 1_498_484_736,
}


def load(name):
    file, _, variant = name.partition(":")
    spec = importlib.util.spec_from_file_location(file, CONFIGS / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(variant))


def test_every_config_is_listed_here():
    files = {path.stem for path in CONFIGS.glob("*.py") if path.stem not in NO_MODELS}
    variants = {f"{file}{v}" for file in files for v in ("", ":mha", ":gqa", ":no_norm")}
    assert variants == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    config = load(name)
    model = resolve(config.model, jax.devices(), config.data.context_length)
    config = change(config, model=model)
    validate_from_scratch(config.model)
    mesh = sharding.make_mesh(config.mesh)  # 8 devices
    sharding.check_divisible(config, mesh)
    arrays = len(jax.live_arrays())
    state = abstract_state(config, mesh)
    assert len(jax.live_arrays()) <= arrays + 1, "only a random key may be allocated"
    leaves = flat(state.params)
    assert sum(leaf.size for leaf in leaves.values()) == PARAMETERS[name]
    variant = name.partition(":")[2]
    has_mixing = any("mixing" in path for path in leaves)
    has_norm = any("head_norm" in path for path in leaves)
    assert has_mixing == (variant in ("", "no_norm"))
    assert has_norm == (variant == "")
    assert config.name == name.replace(":", "_"), "variants do not share a run directory"


def test_qwen3_30b_a3b_is_the_published_model():
    """The counts are those of its card: 30.5B parameters, 29.9B without embeddings, 3.3B active."""
    config = load("qwen3_30b_a3b")
    model = resolve(config.model, jax.devices(), config.data.context_length)
    validate_from_scratch(model)
    config = change(config, model=model)
    sharding.check_divisible(config, sharding.make_mesh(config.mesh))  # 8 devices
    leaves = flat(abstract_params(model))
    whole = sum(leaf.size for leaf in leaves.values())
    # 2 V D + D + 48 (D (2 N + 2 K) H + 2 H + 2 D + D E + 3 E D F)
    assert whole == 30_532_122_624
    assert round((whole - leaves["embedding"].size) / 1e9, 1) == 30.2, "the output head is counted"
    outside = leaves["embedding"].size + leaves["head"].size
    assert round((whole - outside) / 1e9, 1) == 29.9
    experts = sum(leaves[f"layers_0/mlp/{name}"].size for name in ("gate", "up", "down"))
    active = whole - experts * (1 - model.experts_per_token / model.n_experts)
    assert round(active / 1e9, 2) == 3.35
    mea = load("qwen3_30b_a3b:mea").model
    assert (mea.hlc, mea.head_norm, mea.n_experts) == ("kv", True, 128)


@pytest.mark.parametrize("name", [name for name in PARAMETERS if ":" not in name])
def test_docstring_holds_the_command(name):
    text = (CONFIGS / f"{name}.py").read_text()
    docstring = text.split('"""')[1]
    assert f"python -m mea_jax.train --config configs/{name}.py" in docstring


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        # V 2,048, D 256, L 6, N 8, K 8 (gqa: 4), H 32, F 704, untied, as for quickstart above;
        # gqa also has two norms of width H per layer.
        ("mha", 5_868_800),
        ("mea", 5_869_760),
        ("gqa", 5_475_968),
    ],
)
def test_the_study_of_compression_has_its_three_models(kind, parameters):
    config = load(f"compression_study:{kind},1")
    model = resolve(config.model, jax.devices()[:1], config.data.context_length)
    assert sum(x.size for x in jax.tree.leaves(abstract_params(model))) == parameters
    assert config.seed == 1
