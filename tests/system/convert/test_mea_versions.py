"""modeling_mea.py with other versions of transformers, and trained with transformers."""

import copy
import re
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from mea_jax.convert import composite
from tests.helpers import GROUPED, params_of, tiny_model
from tests.system.convert.exported_mea import load, save

IDS = torch.tensor(np.random.default_rng(0).integers(0, 264, (2, 10)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    changes = {"qk_norm": True, "key_components": (1, 2), "value_components": 2}
    experts = {"n_experts": 4, "experts_per_token": 2, "d_expert": 16}
    model = tiny_model(**GROUPED, **changes, **experts)
    return save(model, params_of(model, noise=0.3), tmp_path_factory.mktemp("mea") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture
def warned(monkeypatch):
    """Return a list that collects the warnings that transformers logs."""
    lines: list[str] = []
    logger = type(logging.get_logger("transformers"))
    monkeypatch.setattr(logger, "warning_once", lambda self, line, *args: lines.append(line))
    return lines


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False], ids=["with logits", "without"])
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_goes_by_either_name(model, name, whole):
    """A cache is taken and returned under both names; `generate` of each version uses one."""
    used = model if whole else model.model

    def result(out):
        return out.logits if whole else out.last_hidden_state

    cache = DynamicCache()
    out = used(IDS[:, :6], **{name: cache})
    returned = [field for field in ("past_key_values", "cache") if hasattr(out, field)]
    assert returned
    assert all(out[field] is cache and getattr(out, field) is cache for field in returned)
    rest = result(used(IDS[:, 6:], **{name: cache}))
    torch.testing.assert_close(rest, result(used(IDS))[:, 6:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cache_by_position_or_twice(model):
    """The fourth argument is the cache, as in stock classes; both names may have the same one."""
    cache = model(IDS[:, :6], None, None, DynamicCache()).past_key_values
    assert cache.get_seq_length() == 6
    assert model(IDS[:, 6:], cache=cache, past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == 10
    with pytest.raises(ValueError, match="not as both"):
        model(IDS, cache=cache, past_key_values=DynamicCache())


@pytest.mark.parametrize(
    "unknown",
    [
        {"memory": DynamicCache()},
        {"cache_params": 1},
        {"past": ((torch.zeros(1),),)},
        {"kv_cache": torch.zeros(1)},
    ],
    ids=lambda unknown: next(iter(unknown)),
)
def test_what_looks_like_a_cache_is_not_ignored(model, unknown):
    (name,) = unknown
    for used in (model, model.model):
        with pytest.raises(TypeError, match=rf"keyword '{name}', which looks like a KV cache"):
            used(IDS, **unknown)


@torch.no_grad()
def test_other_keywords_are_taken(model):
    """Keywords that transformers 4 and 5 pass to any model are accepted."""
    known = {"cache_position": torch.arange(10), "cache_params": None, "token_type_ids": None}
    torch.testing.assert_close(model(IDS, **known).logits, model(IDS).logits, rtol=0, atol=0)
    logits, cache = model(IDS, return_dict=False, use_cache=True)
    torch.testing.assert_close(logits, model(IDS).logits, rtol=0, atol=0)
    assert cache.get_seq_length() == 10
    with pytest.raises(TypeError, match="Cache of transformers such as DynamicCache, not tuple"):
        model(IDS, past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_generation_continues_a_given_cache(model):
    """`generate` of every version takes a given cache under its old name."""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask, cache = torch.ones_like(IDS), DynamicCache()
    with torch.no_grad():
        model(IDS[:, :6], past_key_values=cache)
    fresh = model.generate(IDS, attention_mask=mask, **options)
    with warnings.catch_warnings(action="ignore"):  # 5.24 warns that it prefers another name
        continued = model.generate(IDS, attention_mask=mask, past_key_values=cache, **options)
    assert continued.tolist() == fresh.tolist()
    assert cache.get_seq_length() == 15


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"transformers": "5.4.1", "torch": "2.13.1+cu130"}, ""),
        ({"transformers": "5.24.9"}, ""),
        (
            {"transformers": "5.25.0.dev0"},
            r"with transformers 5\.25\.0\.dev0 \(tested .* to 5\.24\)",
        ),
        ({"transformers": "4.57.6"}, r"with transformers 4\.57\.6 \(tested with 5\.4 to"),
        ({"torch": "2.14.0"}, r"with torch 2\.14\.0 \(tested with 2\.13\)"),
    ],
)
def test_versions_outside_of_the_tested_ones_are_warned_about(
    model, warned, monkeypatch, versions, words
):
    assert model.config.tested_with == composite.TESTED_WITH
    config = copy.deepcopy(model.config)
    config.tested_with = {"transformers": ["5.4", "5.24"], "torch": ["2.13", "2.13"]}
    code = sys.modules[type(model).__module__]
    for name, version in {"transformers": "5.24.0", "torch": "2.13.0", **versions}.items():
        monkeypatch.setattr(getattr(code, name), "__version__", version)
    type(model.model)(config)
    found = [line for line in warned if "tested with" in line]
    assert len(found) == bool(words)
    assert all(re.search(words, line) and "\n" not in line for line in found)


def test_the_versions_of_this_environment_are_not_warned_about(folder, warned):
    load(folder)
    assert not [line for line in warned if "tested with" in line]


def gradients(model, **options):
    """Return the loss of a training step and the gradient of every parameter."""
    model.zero_grad()
    loss = model(IDS, labels=IDS, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing_changes_no_gradient(folder, warned, options):
    model = load(folder).train()
    runs: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    expected = gradients(model)
    assert len(runs) == 1
    model.gradient_checkpointing_enable(options)
    found = gradients(model)
    assert len(runs) == 3  # one above, one forward, one recomputed
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [line for line in warned if "`use_cache=True` is incompatible with gradient" in line]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_caches_under_gradient_checkpointing(folder):
    """Only evaluation returns a cache, as in a stock class; a filled cache is not ignored."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    stock = LlamaForCausalLM(LlamaConfig(vocab_size=264, num_hidden_layers=2, **sizes))
    filled = DynamicCache()
    for model in (load(folder), stock):
        model.train().gradient_checkpointing_enable()
        assert not model(IDS, use_cache=True).past_key_values
        assert model.eval()(IDS, use_cache=True).past_key_values.get_seq_length() == 10
    model = load(folder)
    model(IDS[:, :6], past_key_values=filled)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot continue from a filled KV cache"):
        model(IDS[:, 6:], past_key_values=filled)
    assert filled.get_seq_length() == 6


def test_the_loss_is_divided_by_the_tokens_of_a_whole_update(model):
    """`Trainer` passes this keyword to accumulate gradients, and then does not divide the loss."""
    mean = model(IDS, labels=IDS).loss
    whole = model(IDS, labels=IDS, num_items_in_batch=72).loss
    torch.testing.assert_close(whole, mean * 18 / 72, rtol=1e-6, atol=0)


def test_a_cache_of_fixed_size_with_keys_as_wide_as_values(tmp_path):
    """Before 5.4, transformers can preallocate only this kind; the model passes it the slots."""
    ours = tiny_model(**GROUPED, key_components=2, value_components=2)
    model = load(save(ours, params_of(ours, noise=0.3), tmp_path / "model"))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    grown = model.generate(IDS, **options)
    assert model.generate(IDS, cache_implementation="static", **options).tolist() == grown.tolist()
