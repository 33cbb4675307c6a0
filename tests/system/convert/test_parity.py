"""Imported models equal those of transformers: logits, caches, generation, and exported again."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mea_jax.checkpoint.layerwise import StoredModel
from mea_jax.checkpoint.load import load
from mea_jax.compress.options import Options
from mea_jax.compress.run import compress
from mea_jax.config.schema import Side
from mea_jax.convert.exporting import export_model
from mea_jax.convert.importing import import_model
from mea_jax.generate import decode
from mea_jax.generate.generator import Decoding, Generator
from mea_jax.ops.sampling import Sampling
from tests.helpers import apply_logits
from tests.system.convert import exported_mea, small_models

LIMIT = 1e-4  # largest difference of float32 logits, whose spread is about one
LENGTH = 48
FAMILIES = ["llama", "qwen3 tied", "qwen3_moe"]  # one of each form, for long compilations
CACHED = [*FAMILIES, "qwen3 yarn", "qwen2 window", "smollm3", "olmo2", "gemma3"]
OWN = ["qwen2", "qwen2 window", "smollm3", "gemma3", "mistral window", "llama biases"]
COMPRESSED = [*FAMILIES, "qwen3 yarn", "llama biases", "qwen2", "smollm3", "gemma3"]


@pytest.fixture(scope="module")
def pair(corpus, tmp_path_factory):
    """Return `pair(kind)`, which makes (model of transformers, its folder, the imported run)."""

    @functools.cache
    def make(kind):
        root = tmp_path_factory.mktemp("pair")
        model = small_models.make(kind)
        folder = small_models.save(model, root / "theirs", max_shard_size="40KB")
        import_model(folder, root / "ours", context_length=64, text=f"text:{corpus}")
        return model, folder, root / "ours"

    return make


def loaded(run):
    config, params, _, _ = load(run, dtype="float32")
    return config, params


_logits = jax.jit(apply_logits, static_argnums=0)


def our_logits(model, params, tokens_BT, positions_BT=None, segments_BT=None):
    if positions_BT is None:
        natural_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
        positions_BT = np.broadcast_to(natural_T, tokens_BT.shape)
    segments_BT = np.ones_like(tokens_BT) if segments_BT is None else segments_BT
    arrays = map(jnp.asarray, (tokens_BT, positions_BT, segments_BT))
    return np.asarray(_logits(model, params, *arrays))


def kl(a, b):
    """Return the largest KL(a || b) of all positions, in nats."""
    p, q = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (a, b))
    return float(jnp.max(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


def assert_same(a, b):
    assert np.abs(a).max() > 1, "the logits are too small to distinguish models"
    np.testing.assert_allclose(a, b, rtol=0, atol=LIMIT)
    assert kl(a, b) < LIMIT


@pytest.mark.parametrize("kind", small_models.KINDS)
def test_logits(pair, kind, devices):
    devices(1)
    model, _, run = pair(kind)
    config, params = loaded(run)
    tokens_BT = small_models.tokens(0, 2, LENGTH)
    assert_same(small_models.logits(model, tokens_BT), our_logits(config, params, tokens_BT))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_padding(pair, kind, side, devices):
    """A mask and positions of transformers act as our segments and positions."""
    devices(1)
    model, _, run = pair(kind)
    config, params = loaded(run)
    tokens_BT = small_models.tokens(1, 3, LENGTH)
    real_BT = np.arange(LENGTH)[None] < np.array([[LENGTH], [31], [1]])
    real_BT = real_BT[:, ::-1] if side == "left" else real_BT
    segments_BT = real_BT.astype(np.int32)
    positions_BT = np.maximum(np.cumsum(segments_BT, axis=1) - 1, 0).astype(np.int32)
    theirs = small_models.logits(
        model, tokens_BT, attention_mask=segments_BT, position_ids=positions_BT
    )
    ours = our_logits(config, params, tokens_BT, positions_BT, segments_BT)
    assert_same(theirs[real_BT], ours[real_BT])


@pytest.mark.parametrize("kind", CACHED)
def test_cache(pair, kind, devices):
    """Logits are equal after a prefill of two prompt lengths and after each decode step."""
    devices(1)
    model, _, run = pair(kind)
    config, params = loaded(run)
    tokens_BT, prompts, steps = small_models.tokens(2, 2, LENGTH), (20, 33), 8
    served, ready = decode.serve(config, params)
    prefill, step = (jax.jit(f, static_argnums=0) for f in (decode.prefill, decode.step))
    cache = decode.empty_cache(served, 2, LENGTH, jnp.float32)
    segments_BP = (np.arange(40)[None] < np.array(prompts)[:, None]).astype(np.int32)
    positions_BP = np.broadcast_to(np.arange(40, dtype=np.int32), (2, 40))
    found_BV, cache = prefill(
        served, ready, cache, jnp.asarray(tokens_BT[:, :40]), segments_BP, positions_BP
    )
    ours = [np.asarray(found_BV)]
    for i in range(steps):
        next_B = np.array([row[p + i] for row, p in zip(tokens_BT, prompts, strict=True)])
        found_BV, cache = step(served, ready, cache, jnp.asarray(next_B))
        ours.append(np.asarray(found_BV))
    for row, prompt in enumerate(prompts):
        ids, theirs = torch.tensor(tokens_BT[row : row + 1]).long(), []
        with torch.no_grad():
            out = model(ids[:, :prompt], use_cache=True)
            theirs.append(out.logits[0, -1].numpy())
            for i in range(steps):
                one = ids[:, prompt + i : prompt + i + 1]
                out = model(one, past_key_values=out.past_key_values, use_cache=True)
                theirs.append(out.logits[0, -1].numpy())
        assert_same(np.stack(theirs), np.stack(ours)[:, row])


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_generation(pair, kind, devices):
    devices(1)
    model, _, run = pair(kind)
    config, params = loaded(run)
    prompts = [small_models.tokens(3, 1, n)[0].tolist() for n in (9, 17)]
    generator = Generator(config, params, length=LENGTH, cache_dtype="float32")
    ours = generator.run(prompts, Decoding(16, sampling=Sampling(0.0)))
    for prompt, found in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)
        assert theirs[0, len(prompt) :].tolist() == found


@pytest.mark.parametrize("kind", small_models.KINDS)
def test_the_way_back_is_bit_exact(pair, kind, tmp_path):
    model, folder, run = pair(kind)
    summary = export_model(run, tmp_path / "back", print, shard_size=50_000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert type(again) is type(model)
    assert summary["form"] == "stock"
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    old, new = model.state_dict(), again.state_dict()
    assert old.keys() == new.keys()
    # Norms of Gemma are stored less 1, which float32 rounds.
    atol = 1e-7 if kind.startswith("gemma3") else 0.0
    assert all(torch.allclose(old[name], new[name], rtol=0, atol=atol) for name in old)
    for key, value in model.config.to_dict().items():
        if key not in ("dtype", "_name_or_path", "transformers_version"):
            assert again.config.to_dict()[key] == value, key
    kept = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert kept == json.loads((folder / "generation_config.json").read_text())


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressing_to_all_heads_keeps_the_model(pair, kind, devices, tmp_path):
    devices(1)
    model, _, run = pair(kind)
    options = Options(
        keep=1.0, method="svd", calibration_tokens=0, held_out_tokens=512, dtype="float32"
    )
    compress(run, tmp_path / "same", options)
    tokens_BT = small_models.tokens(4, 2, LENGTH)
    theirs = small_models.logits(model, tokens_BT)
    config, params = loaded(tmp_path / "same")
    assert_same(theirs, our_logits(config, params, tokens_BT))
    # So does its export in a stock class, which rebuilds the mixed heads.
    export_model(tmp_path / "same", tmp_path / "stock", print, form="stock")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    assert type(again) is type(model)
    assert_same(theirs, small_models.logits(again, tokens_BT))


@torch.no_grad()
@pytest.mark.parametrize("kind", OWN)
def test_half_the_heads_in_our_own_code(pair, kind, devices, tmp_path):
    """A compressed model has our logits in one pass and with a cache, and our greedy tokens."""
    devices(1)
    run = pair(kind)[2]
    options = Options(
        keep=0.5, method="svd", calibration_tokens=0, held_out_tokens=512, dtype="float32"
    )
    compress(run, tmp_path / "half", options)
    config, params = loaded(tmp_path / "half")
    assert set(config.components(Side.KEY) + config.components(Side.VALUE)) == {1}
    export_model(tmp_path / "half", tmp_path / "mea", print, form="mea")
    exported = exported_mea.load(tmp_path / "mea")
    tokens_BT = small_models.tokens(4, 2, LENGTH)
    ours = our_logits(config, params, tokens_BT)
    assert_same(small_models.logits(exported, tokens_BT), ours)
    ids, past, pieces = torch.tensor(tokens_BT).long(), None, []
    for piece in ids.split([30, 1, 1, 3, 12, 1], dim=1):
        out = exported(piece, past_key_values=past)
        past = out.past_key_values
        pieces.append(out.logits)
    assert_same(torch.cat(pieces, dim=1).numpy(), ours)
    prompt = tokens_BT[0, :30].tolist()
    found = Generator(config, params, length=LENGTH).run([prompt], Decoding(12))
    theirs = exported.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
    assert theirs[0, 30:].tolist() == found[0]


def test_bfloat16_is_stored_as_it_is_published(tmp_path, devices):
    devices(1)
    model = small_models.make("qwen3").to(torch.bfloat16)
    folder = small_models.save(model, tmp_path / "theirs")
    import_model(folder, tmp_path / "ours", dtype="bfloat16")
    export_model(tmp_path / "ours", tmp_path / "back", print)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    import_model(folder, tmp_path / "wide", dtype="float32")
    stored = [StoredModel(tmp_path / name, print) for name in ("ours", "wide")]
    assert [str(one.dtype) for one in stored] == ["bfloat16", "float32"]
    trees = [jax.tree.leaves(loaded(tmp_path / name)[1]) for name in ("ours", "wide")]
    for a, b in zip(*trees, strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)
