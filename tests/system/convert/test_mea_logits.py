"""modeling_mea.py equals the JAX model: all kinds of attention, padding, caches, generation."""

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch

from mea_jax.config.schema import RopeScaling, Side
from mea_jax.convert import attention_mea, composite
from mea_jax.convert.configuration_mea import MEAConfig
from mea_jax.generate.generator import Decoding, Generator
from mea_jax.ops import rope
from tests.helpers import GROUPED, PLAIN, apply_logits, params_of, tiny_model
from tests.system.convert.exported_mea import load, save

SCALED = {
    "rope_theta": 100.0,
    "rope_scaling.kind": "llama3",
    "rope_scaling.factor": 8.0,
    "rope_scaling.original_context": 16,
}
YARN = {
    "rope_theta": 100.0,
    "rope_scaling.kind": "yarn",
    "rope_scaling.factor": 8.0,
    "rope_scaling.original_context": 16,
    "rope_scaling.beta_fast": 2.0,
}
BIASES = {"qkv_bias": True, "out_bias": True}
# What only Gemma 3 has.
GEMMA = {
    "norms": "both",
    "qk_norm": True,
    "activation": "gelu",
    "attention_scale": 0.6,
    "embedding_scale": 5.7,
    "window": (6, 0),
    "layer_thetas": (30.0, 1000.0),
    "rope_scaling": RopeScaling("linear", 4.0),
}
FREQUENCY = {"key_mixing": "frequency", "value_mixing": "dense"}
CASES: dict[str, dict[str, Any]] = {
    "plain": PLAIN | GROUPED | {"qk_norm": True},
    "C per layer": GROUPED | {"key_components": (1, 2), "value_components": (3, 2)},
    "keys alone, scaled rope": {"hlc": "k", "key_components": 2, "head_norm": False} | SCALED,
    "key norm, yarn": GROUPED | {"key_components": 2, "qk_norm": True} | YARN,
    "values alone, key norm": {"hlc": "v", "value_components": 2, "qk_norm": True},
    "key norm": GROUPED | {"key_components": 2, "value_components": 1, "qk_norm": True},
    "complex keys, key norm": FREQUENCY | {"key_components": 2, "qk_norm": True},
    "complex keys, no norm": FREQUENCY
    | GROUPED
    | {"value_components": 3, "key_components": 3, "head_norm": False},
    "mixed after the norm": {"hlc_order": "after", "key_components": 2, "qk_norm": True},
    "gate per head, untied": {"gate": "head", "tie_embeddings": False, "key_components": 3},
    "gate per feature": GROUPED | {"gate": "feature", "value_components": 2},
    "alibi": GROUPED | {"positions": "alibi", "key_components": 2, "qk_norm": True},
    "learned positions": {"positions": "learned", "max_positions": 24, "value_components": 2},
    "experts": GROUPED
    | {"n_experts": 6, "experts_per_token": 2, "d_expert": 16, "key_components": 2},
    "no positions": {"positions": "none", "key_components": 2},
    "biases": GROUPED | BIASES,
    "biases, window": GROUPED | BIASES | {"window": 6, "key_components": 2, "value_components": 1},
    "biases, complex keys, key norm": FREQUENCY
    | BIASES
    | {"key_components": 2, "value_components": 3, "qk_norm": True},
    "a layer not rotated": {"layer_thetas": (100.0, 0.0), "key_components": (3, 2)},
    "norms of outputs": PLAIN | GROUPED | {"norms": "post", "qk_norm": True, "qk_norm_over": "all"},
    "values alone, one norm of all heads": GROUPED
    | {"hlc": "v", "value_components": 2, "qk_norm": True, "qk_norm_over": "all"},
    "gemma": GROUPED | GEMMA | {"head_norm": False},
    "gemma, half": GROUPED | GEMMA | {"key_components": 2, "value_components": 2},
    "windows of two sizes, alibi": {"window": (3, 7), "positions": "alibi", "key_components": 2},
}
LENGTH = 20
# A row without padding, one padded on the right, one on the left.
SPANS = ((0, 20), (0, 13), (6, 20))


def batch():
    """Return tokens, positions and a mask that is 1 at tokens, each (3, 20)."""
    real = np.zeros((len(SPANS), LENGTH), np.int32)
    for row, (start, end) in zip(real, SPANS, strict=True):
        row[start:end] = 1
    tokens = np.random.default_rng(0).integers(0, 264, real.shape, np.int32)
    places = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    return tokens, places, real


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Return one model in JAX and in torch, and its JAX logits on the batch."""
    model = tiny_model(**CASES[request.param])
    params = params_of(model, noise=0.3)
    tokens, places, real = batch()
    logits = jax.jit(apply_logits, static_argnums=0)(model, params, tokens, places, real)
    exported = load(save(model, params, tmp_path_factory.mktemp("mea") / "model"))
    return SimpleNamespace(
        model=model,
        params=params,
        torch=exported,
        logits=np.asarray(logits),
        inputs={"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(real)},
    )


@torch.no_grad()
def test_logits_are_ours(case):
    """Rows with and without padding are equal at every token; 1e-4 is 100 roundings of float32."""
    logits = case.torch(**case.inputs, use_cache=False).logits.numpy()
    for ours, theirs, (start, end) in zip(case.logits, logits, SPANS, strict=True):
        np.testing.assert_allclose(theirs[start:end], ours[start:end], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("none"),
        RopeScaling("linear", 4.0),
        RopeScaling("dynamic", 4.0),
        RopeScaling("llama3", 4.0, original_context=64),
        RopeScaling("yarn", 4.0, original_context=2048),
        RopeScaling("yarn", 4.0, original_context=2048, truncate=False, attention_factor=1.3),
        RopeScaling("yarn", 4.0, original_context=6, mscale=1.0, mscale_all_dim=0.3),
    ],
)
def test_frequencies_are_ours(scaling):
    model = dataclasses.replace(tiny_model(head_dim=32), rope_scaling=scaling)
    config = MEAConfig(**composite.mea_config(model))
    rope_of_layer = config.rope(0)
    assert rope_of_layer is not None
    found, factor = attention_mea.rope_frequencies(rope_of_layer, config.head_dim)
    wanted = rope.rope_frequencies(32, model.rope_theta, scaling)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)  # float64, returned as float32
    assert factor == pytest.approx(rope.attention_factor(scaling), rel=1e-12)


@torch.no_grad()
def test_dynamic_scaling_refuses_positions_beyond_the_original_context(tmp_path):
    dynamic = RopeScaling("dynamic", 4.0, original_context=16)
    model = tiny_model(rope_scaling=dynamic)
    exported = load(save(model, params_of(model), tmp_path / "model"))
    ids = torch.zeros((1, 17), dtype=torch.long)
    past = exported(ids[:, :16]).past_key_values
    with pytest.raises(ValueError, match="position 16 is not below max_position_embeddings=16"):
        exported(ids[:, 16:], past_key_values=past)


@torch.no_grad()
def test_a_cache_in_pieces_is_the_whole(case):
    """A prompt of 6 tokens, then 1, 3, 9 and 1 more with the cache give the logits of one pass.

    With 1 or 3 tokens the model reads the components as cached; with 9 it mixes them first.
    """
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    pieces, past, end = [], None, 0
    for size in (6, 1, 3, 9, 1):
        start, end = end, end + size
        out = case.torch(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=past)
        past = out.past_key_values
        pieces.append(out.logits)
    logits = torch.cat(pieces, dim=1).numpy()
    for ours, theirs, (start, end) in zip(case.logits, logits, SPANS, strict=True):
        np.testing.assert_allclose(theirs[start:end], ours[start:end], rtol=0, atol=1e-4)


@torch.no_grad()
def test_padding_between_tokens_changes_nothing(case):
    """A prompt can continue after its right padding: 6 tokens, 4 of padding, 4 tokens."""
    if any(case.model.windows()):
        pytest.skip("a window counts padding, as in transformers")
    ids = case.inputs["input_ids"][:1, :10]
    mask = torch.tensor([[1] * 6 + [0] * 4 + [1] * 4])
    first = torch.cat([ids[:, :6], torch.zeros(1, 4, dtype=ids.dtype)], dim=1)
    past = case.torch(first, attention_mask=mask[:, :10]).past_key_values
    logits = case.torch(ids[:, 6:], attention_mask=mask, past_key_values=past).logits
    np.testing.assert_allclose(logits[0], case.logits[0, 6:10], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_holds_components(case, dtype):
    """A cached token is C_k + C_v heads and, with a key norm on mixed keys, K float32 numbers.

    A layer with a window keeps what the next token sees; of several windows, the largest counts.
    """
    config = case.model
    past = copy.deepcopy(case.torch).to(dtype)(**case.inputs).past_key_values
    held = sum(x.numel() * x.element_size() for layer in past.layers for x in layer_tensors(layer))
    scalars = config.qk_norm and config.mixes(Side.KEY) and config.hlc_order == "before"
    counts = (config.components(side) for side in Side)
    expected = 0
    for keys, values, window in zip(*counts, config.windows(), strict=True):
        a_token = (keys + values) * config.head_dim * dtype.itemsize
        a_token += 4 * config.n_kv_heads * scalars
        expected += a_token * len(SPANS) * (max(config.windows()) - 1 if window else LENGTH)
    assert held == expected


def layer_tensors(layer):
    return [x for x in vars(layer).values() if isinstance(x, torch.Tensor) and x.ndim == 4]


PROMPTS = [[5, 9, 200, 31, 77], [18, 3], [150, 151, 152, 153]]


def padded(prompts):
    """Return prompts padded on the left, as `generate` expects them."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generated(model, **options):
    out = model.generate(**padded(PROMPTS), max_new_tokens=12, pad_token_id=0, **options)
    return out[:, max(map(len, PROMPTS)) :].tolist()


@pytest.mark.parametrize("name", ["C per layer", "complex keys, key norm", "gemma, half"])
def test_greedy_tokens_are_ours(name, tmp_path):
    """Continuations of prompts of three lengths in one batch equal those of JAX."""
    model = tiny_model(**CASES[name])
    params = params_of(model, noise=0.3)
    ours = Generator(model, params, length=24).run(PROMPTS, Decoding(12))
    exported = load(save(model, params, tmp_path / "model"))
    assert generated(exported, do_sample=False) == ours


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.9, "top_k": 50},
        {"do_sample": False, "num_beams": 3},
    ],
    ids=["sampling", "beams"],
)
@pytest.mark.parametrize("name", ["key norm", "gemma, half"])
def test_generation_without_a_cache_is_the_same(tmp_path, name, options):
    """The tokens do not depend on the cache, whose rows and scalars beam search reorders."""
    model = tiny_model(**CASES[name])
    exported = load(save(model, params_of(model, noise=0.3), tmp_path / "model"))
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(generated(exported, use_cache=use_cache, **options))
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[0]}) == len(PROMPTS)
