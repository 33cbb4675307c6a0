"""modeling_mea.py: storage, loss, hidden states, fixed caches, initial weights, experts."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from mea_jax.convert import composite
from mea_jax.convert.attention_mea import pack, unpack
from mea_jax.convert.configuration_mea import MEAConfig
from mea_jax.convert.modeling_mea import MEAExperts, MEAForCausalLM
from tests.helpers import GROUPED, params_of, tiny_model
from tests.system.convert.exported_mea import load, save

LATER = (
    *("qk_norm_over", "qkv_bias", "out_bias", "attention_multiplier", "norms", "hidden_act"),
    *("embedding_multiplier", "layer_thetas"),
)
IDS = torch.tensor(np.random.default_rng(0).integers(0, 264, (2, 10)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    heads = {"qk_norm": True, "key_components": (1, 2), "value_components": 2}
    model = tiny_model(**GROUPED, **heads, qkv_bias=True, norms="both", window=(4, 0))
    return save(model, params_of(model, noise=0.3), tmp_path_factory.mktemp("mea") / "model")


def test_it_is_stored_as_it_was_read(folder, tmp_path):
    """`save_pretrained` copies the code and writes the same tensors."""
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    names = {file.name for file in (tmp_path / "again").iterdir()}
    assert {file.name for file in composite.MODEL_FILES} <= names
    again = load(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=0)


@torch.no_grad()
def test_older_exports_are_the_same(tmp_path):
    """A config.json without the keys that came later gives the same logits."""
    ours = tiny_model(key_components=2)
    folder = save(ours, params_of(ours, noise=0.3), tmp_path / "model")
    before, path = load(folder)(IDS).logits, folder / "config.json"
    config = json.loads(path.read_text())
    for key in LATER:
        del config[key]
    path.write_text(json.dumps(config))
    torch.testing.assert_close(load(folder)(IDS).logits, before, rtol=0, atol=0)


def test_loss_and_gradients(folder):
    """The loss is the mean cross-entropy of next tokens; every parameter has a gradient."""
    model = load(folder)
    out = model(IDS, labels=IDS)
    log_p = torch.log_softmax(out.logits[:, :-1], dim=-1)
    expected = -log_p.gather(-1, IDS[:, 1:, None]).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=0)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_hidden_states_and_last_logits(folder):
    """A call can return the states of all depths, or only the logits of the last positions."""
    model = load(folder)
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True)
        last = model(IDS, logits_to_keep=2).logits
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits, rtol=0, atol=0)
    torch.testing.assert_close(last, out.logits[:, -2:], rtol=0, atol=2e-6)


@torch.no_grad()
def test_what_a_window_hides_does_not_depend_on_the_cache_or_the_mask(folder):
    """A cache that keeps all positions, and a complete mask of all of them, change no logit."""
    model = load(folder)
    expected = model(IDS).logits
    complete = torch.ones((1, 1, 10, 10), dtype=torch.bool).tril()
    added = torch.zeros(complete.shape).masked_fill(~complete, torch.finfo(torch.float32).min)
    for cache, kept in ((DynamicCache(), [6, 6]), (DynamicCache(config=model.config), [3, 6])):
        past = model(IDS[:, :6], past_key_values=cache).past_key_values
        assert [layer.keys.shape[2] for layer in past.layers] == kept
        for mask in (complete, added):
            again = copy.deepcopy(past)
            rest = model(IDS[:, 6:], attention_mask=mask[:, :, 6:], past_key_values=again).logits
            torch.testing.assert_close(rest, expected[:, 6:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"positions": "alibi"},
        {"window": (4, 0), "qkv_bias": True},
        {"window": 13},  # reached while generating
        {"window": (4, 9), "positions": "alibi"},
    ],
)
def test_a_cache_of_fixed_size(tmp_path, changes):
    """`generate` gives the same tokens with a static cache, whose masks are already complete."""
    ours = tiny_model(**GROUPED, **changes, key_components=(1, 2))
    model = load(save(ours, params_of(ours, noise=0.3), tmp_path / "model"))
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0  # of 10 tokens
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    grown = model.generate(IDS, **options)
    fixed = model.generate(IDS, cache_implementation="static", **options)
    assert grown.tolist() == fixed.tolist()


@pytest.mark.parametrize("kinds", [("heads", "heads"), ("frequency", "dense")])
def test_a_fresh_model_is_plain_attention(folder, kinds):
    """Mixing starts at block identity, so two components for four heads equal GQA with two."""
    mixed = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    mixed.key_mixing, mixed.value_mixing = kinds
    mixed.key_components = mixed.value_components = [2, 2]
    mixed.head_norm = False
    torch.manual_seed(0)
    mea = AutoModelForCausalLM.from_config(mixed, trust_remote_code=True).eval()
    plain = MEAConfig(**(mixed.to_dict() | {"hlc": "none", "num_key_value_heads": 2}))
    plain.key_components = plain.value_components = None
    gqa = MEAForCausalLM(plain).eval()
    left_out = gqa.load_state_dict(mea.state_dict(), strict=False)
    assert not left_out.missing_keys
    assert all("mixing" in name for name in left_out.unexpected_keys)
    with torch.no_grad():
        torch.testing.assert_close(mea(IDS).logits, gqa(IDS).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scalars_keep_their_bits_in_narrow_caches(dtype):
    scalars = torch.exp(torch.randn(2, 5, 3, generator=torch.manual_seed(0)))
    stored = torch.cat([torch.zeros(2, 5, 4, dtype=dtype), pack(scalars, dtype)], dim=-1)
    torch.testing.assert_close(unpack(stored[..., 4:]), scalars, rtol=0, atol=0)
    assert pack(scalars, dtype).nbytes == scalars.nbytes


@pytest.mark.parametrize("normalise", [True, False])
def test_experts_are_the_sum_of_the_chosen(normalise):
    """The output equals all experts on all tokens, with weight zero for those not chosen."""
    config = MEAConfig(
        hidden_size=8,
        n_experts=6,
        experts_per_token=2,
        d_expert=5,
        normalise_router=normalise,
    )
    torch.manual_seed(0)
    block, x = MEAExperts(config), torch.randn(2, 7, 8)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        p = torch.softmax(x @ block.router.weight.T, dim=-1)
        weights = torch.where(p >= p.sort(dim=-1).values[..., -2:-1], p, 0)
        if normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        gate, up = (torch.einsum("btd,edf->btef", x, w) for w in (block.gate, block.up))
        hidden = gate * torch.sigmoid(gate) * up
        expected = torch.einsum("btef,efd,bte->btd", hidden, block.down, weights)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
