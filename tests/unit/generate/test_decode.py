"""Tests of prefill and decode steps with a cache against the model on the full text.

The tolerance for logits is 1e-5 of the largest logit. It covers float32 rounding of products of up
to 48 terms (none sums over the vocabulary) in a different order, through one or two layers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.config.checks import validate
from mea_jax.config.schema import RopeScaling, TrainConfig
from mea_jax.generate import decode
from mea_jax.generate.decode import empty_cache, prefill, serve, step
from mea_jax.model.kv_cache import flush
from mea_jax.ops import backend, cpu
from tests.helpers import PLAIN, apply_logits, change, params_of, tiny_model

TOLERANCE = 1e-5
NEW, SLOTS = 20, 32
FLUSHED = 7  # steps between two flushes, fewer than `kv_cache.RECENT`
# Rows of a batch, padded to 9 tokens: a document, a short one, and two with the second continued.
PROMPTS = [[9], [3], [4, 4]]
PADDED = 9

GROUPED: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "MHA": PLAIN,
    "GQA, untied": PLAIN | GROUPED | {"tie_embeddings": False},
    "layers that differ": {
        "n_layers": 2,
        "n_heads": 8,
        "key_components": (4, 3),
        "value_components": (2, 4),
    },
    "complex keys, dense values": {
        "key_mixing": "frequency",
        "value_mixing": "dense",
        "key_components": 2,
        "value_components": 3,
        "head_norm": False,
    },
    "some slots": {
        "key_mixing": "frequency",
        "value_mixing": "dense",
        "key_components": 3,
        "key_slots": "11111111" + "10101010" + "01000100",
        "value_slots": "11111111" * 2 + "00110000" + "00000001",
        "qkv_bias": True,
        "head_norm": False,
    },
    "some slots of keys, key norm": {
        "key_components": 3,
        "key_mixing": "frequency",
        "key_slots": "11111111" + "01110111" + "10001000",
        "qk_norm": True,
    },
    "key norm": {"key_components": 2, "value_components": 2, "qk_norm": True},
    "key norm, complex": {"key_components": 3, "key_mixing": "frequency", "qk_norm": True},
    "key norm, scaled logits": {
        "key_components": 2,
        "qk_norm": True,
        "rope_scaling": RopeScaling("yarn", 8.0, original_context=8),
    },
    "key norm, mixed after": {"key_components": 2, "hlc_order": "after", "qk_norm": True},
    "ALiBi, gate": {"key_components": 2, "positions": "alibi", "gate": "head"},
    "learned positions": {
        "value_components": 2,
        "hlc": "v",
        "positions": "learned",
        "max_positions": SLOTS,
        "gate": "feature",
    },
    "no positions": {"key_components": 1, "hlc": "k", "positions": "none"},
    # Below, equal to and above a flush of the cache. The last layer is not rotated.
    "windows": {
        "n_layers": 4,
        "window": (3, FLUSHED, 12, 0),
        "layer_thetas": (1e4, 1e4, 5e5, 0.0),
        "rope_scaling": RopeScaling("linear", 4.0),
        "key_components": 2,
        "value_components": (1, 2, 3, 4),
    },
    "biases, sandwich norms, GELU": {
        "qkv_bias": True,
        "out_bias": True,
        "norms": "both",
        "activation": "gelu",
        "embedding_scale": 2.0,
        "tie_embeddings": False,
        "key_components": 2,
        "value_components": 3,
        "window": 5,
    },
    "norm of all heads, after each half": {
        "qk_norm": True,
        "qk_norm_over": "all",
        "norms": "post",
        "attention_scale": 0.5,
        "hlc": "v",
        "value_components": 2,
    },
    "differential V1, window": PLAIN | {"variant": "differential_v1", "window": 4},
    "collaborative, window": PLAIN | {"variant": "collaborative", "window": 4, "n_heads": 8},
    "differential V1": PLAIN | {"variant": "differential_v1", "n_heads": 8, "n_layers": 2},
    "differential V1, ALiBi": PLAIN | {"variant": "differential_v1", "positions": "alibi"},
    "differential V2": PLAIN | GROUPED | {"variant": "differential_v2"},
    "talking heads": PLAIN | GROUPED | {"variant": "talking_heads"},
    "talking heads, ALiBi": PLAIN | {"variant": "talking_heads", "positions": "alibi"},
    "collaborative": PLAIN | {"variant": "collaborative", "key_components": 3, "n_heads": 8},
}
# "auto" is direct without mixing and where C = K; otherwise it is absorbed.
CASES = [(name, "auto") for name in MODELS] + [
    (name, form)
    for name in (
        "layers that differ",
        "complex keys, dense values",
        "some slots",
        "some slots of keys, key norm",
        "key norm, complex",
        "windows",
        "biases, sandwich norms, GELU",
    )
    for form in ("absorbed", "explicit", "folded")
]


def model_of(name, **changes):
    model = tiny_model(**{"n_layers": 1} | MODELS[name] | changes)
    validate(change(TrainConfig(model=model), **{"data.context_length": SLOTS}))
    return model


def prompts(rows, padded=PADDED, seed=0):
    """Return (tokens, segment ids, positions), each (B, padded), with padding after documents."""
    rng = np.random.default_rng(seed)
    tokens, segments, positions = (np.zeros((len(rows), padded), np.int32) for _ in range(3))
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, start=1):
            tokens[row, start : start + length] = rng.integers(0, 264, length)
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    return tokens, segments, positions


def greedy(served, params, cache, inputs, count=NEW, flushed=FLUSHED):
    """Return (tokens (B, count), the logits (B, count, V) that chose them, the last cache)."""

    @jax.jit
    def run(params, cache, inputs):
        def body(carry, _):
            logits, cache = carry
            full = cache.recent_count == flushed
            cache = jax.lax.cond(full, flush, lambda cache: cache, cache)
            chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return step(served, params, cache, chosen), (chosen, logits)

        start = prefill(served, params, cache, *inputs)
        (_, cache), (tokens, logits) = jax.lax.scan(body, start, length=count)
        return jnp.swapaxes(tokens, 0, 1), jnp.swapaxes(logits, 0, 1), cache

    return jax.tree.map(np.asarray, run(params, cache, inputs))


def fresh_cache(served, rows=3, length=SLOTS, dtype="float32"):
    return empty_cache(served, rows, length, jnp.dtype(dtype))


def second_token(served):
    """Return a function that gives the logits after the prompts and one more token, and the cache.

    It runs prefill and one step, which reads the prompts from the cache.
    """

    @jax.jit
    def run(params, cache, inputs):
        _, cache = prefill(served, params, cache, *inputs)
        return step(served, params, cache, jnp.array([5, 6, 7]))

    return functools.partial(run, inputs=prompts(PROMPTS))


@functools.cache
def generated(name, form):
    model = model_of(name)
    served, params = serve(model, params_of(model, noise=0.2), form)
    return greedy(served, params, fresh_cache(served), prompts(PROMPTS))


@functools.cache
def whole_text(model):
    return jax.jit(functools.partial(apply_logits, model))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), CASES)
def test_steps_are_the_model_on_the_whole_text(name, form):
    """Logits equal those of each row's last document and its new tokens, run in a separate row.

    So rows of different lengths do not affect one another, and of two packed documents only the
    last is continued.
    """
    model = model_of(name)
    chosen, logits, _ = generated(name, form)
    given, _, _ = prompts(PROMPTS)
    tokens = np.zeros((len(PROMPTS), PADDED + NEW), np.int32)
    for row, lengths in enumerate(PROMPTS):
        end, last = sum(lengths), lengths[-1]
        tokens[row, : last + NEW] = [*given[row, end - last : end], *chosen[row]]
    spans = [lengths[-1] + NEW for lengths in PROMPTS]
    segments = (np.arange(PADDED + NEW)[None] < np.array(spans)[:, None]).astype(np.int32)
    positions = np.tile(np.arange(PADDED + NEW, dtype=np.int32), (len(PROMPTS), 1))
    params = params_of(model, noise=0.2)
    expected = np.asarray(whole_text(model)(params, tokens, positions, segments))
    assert len(np.unique(chosen)) > 8, "the generated text must vary"
    for row, lengths in enumerate(PROMPTS):
        want = expected[row, lengths[-1] - 1 : lengths[-1] - 1 + NEW]
        error = np.abs(logits[row] - want).max()
        assert error <= TOLERANCE * np.abs(want).max()
        np.testing.assert_array_equal(chosen[row], want.argmax(axis=1))


@pytest.mark.slow
def test_prompts_end_in_padding_of_any_width():
    """A prompt with more padding gives the same tokens: slots of padding are not read."""
    model = model_of("layers that differ")
    served, params = serve(model, params_of(model, noise=0.2))
    narrow, wide = (
        greedy(served, params, fresh_cache(served, rows=1), prompts([[5]], padded=padded), 8)
        for padded in (5, 16)
    )
    np.testing.assert_array_equal(narrow[0], wide[0])
    assert np.abs(narrow[1] - wide[1]).max() <= TOLERANCE * np.abs(wide[1]).max()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("layers that differ", "absorbed"),
        ("key norm", "explicit"),
        ("differential V1", "auto"),
        ("talking heads", "auto"),
        ("collaborative", "auto"),
    ],
)
def test_slots_not_in_use_are_not_read(name, form):
    """Large numbers in slots that prefill does not overwrite do not change a bit of the results."""
    model = model_of(name)
    served, params = serve(model, params_of(model, noise=0.2), form)
    cache = fresh_cache(served)
    loud = cache.replace(
        layers=jax.tree.map(lambda x: jnp.full_like(x, 1e4), cache.layers),
        recent=jax.tree.map(lambda x: jnp.full_like(x, 1e4), cache.recent),
    )
    quiet = generated(name, form)
    noisy = greedy(served, params, loud, prompts(PROMPTS))
    np.testing.assert_array_equal(noisy[0], quiet[0])
    np.testing.assert_array_equal(noisy[1], quiet[1])
    assert noisy[2].layers[0].key.data.max() == 1e4, "the last slots must not be overwritten"


@pytest.mark.slow
def test_it_does_not_matter_when_the_cache_is_flushed():
    """Flushing at every step, every 7 steps or never gives the same text and final cache."""
    model = model_of("layers that differ")
    served, params = serve(model, params_of(model, noise=0.2))
    tokens, logits, cache = generated("layers that differ", "auto")
    ends = jax.jit(flush)(cache)
    for flushed in (1, NEW + 1):
        run = greedy(served, params, fresh_cache(served), prompts(PROMPTS), flushed=flushed)
        np.testing.assert_array_equal(run[0], tokens)
        assert np.abs(run[1] - logits).max() <= TOLERANCE * np.abs(logits).max()
        end = jax.jit(flush)(run[2])
        np.testing.assert_array_equal(end.segment_ids_BS, ends.segment_ids_BS)
        np.testing.assert_array_equal(end.lengths_B, [sum(p) + NEW for p in PROMPTS])
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-4), end.layers, ends.layers
        )


@pytest.mark.slow
def test_a_full_cache_drops_what_does_not_fit():
    """The keys and values in a full cache do not change: writes do not wrap around."""
    model = model_of("layers that differ")
    served, params = serve(model, params_of(model, noise=0.2))
    cache = fresh_cache(served, rows=1, length=8)
    _, _, cache = greedy(served, params, cache, prompts([[5]], padded=5), 3)
    full = jax.jit(flush)(cache)
    assert full.lengths_B[0] == 8
    _, after = jax.jit(functools.partial(step, served))(params, full, np.array([7], np.int32))
    after = jax.jit(flush)(after)
    assert after.lengths_B[0] == 8
    jax.tree.map(np.testing.assert_array_equal, after.layers, full.layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("layers that differ", "auto"),
        ("key norm", "absorbed"),
        ("key norm", "explicit"),
        ("GQA, untied", "auto"),
        ("collaborative", "auto"),
        ("some slots", "auto"),
    ],
)
def test_int8_cache_is_close_and_small(name, form):
    """Logits differ by less than 3% of their spread.

    An entry differs by at most half of 1/127 of its vector's largest, averaged over tokens.
    """
    model = model_of(name)
    served, params = serve(model, params_of(model, noise=0.2), form)
    results = {
        dtype: second_token(served)(params, fresh_cache(served, dtype=dtype))
        for dtype in ("float32", "int8")
    }
    exact, rounded = results["float32"][0], results["int8"][0]
    assert 0 < np.abs(exact - rounded).std() < 0.03 * exact.std()
    low, whole = results["int8"][1].layers, results["float32"][1].layers
    for few, many in zip(low, whole, strict=True):
        for which in ("key", "value"):
            data, steps = getattr(few, which).data, getattr(few, which).step
            assert 4 * data.nbytes == getattr(many, which).data.nbytes
            assert steps.nbytes * data.shape[-1] == 4 * data.nbytes  # one per vector


@pytest.mark.parametrize("name", ["GQA, untied", "layers that differ", "key norm"])
def test_long_prompts_get_the_same_results_from_another_kernel(name, monkeypatch):
    """A long prompt is prefilled by `chunked`, with equal logits and cache up to rounding."""
    model = model_of(name, backend="cpu", attention_kernel="cpu")
    served, params = serve(model, params_of(model, noise=0.2))
    calls, chunked = [], backend.chunked_attention

    def counted(*arrays, **options):
        calls.append(1)
        return chunked(*arrays, **options)

    monkeypatch.setattr(backend, "chunked_attention", counted)
    results = []
    for longest in (PADDED + 1, PADDED):
        monkeypatch.setattr(decode, "_LONG_PREFILL", longest)
        results.append(second_token(served)(params, fresh_cache(served)))
        assert len(calls) == (longest == PADDED) * model.n_layers
    for short, long in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(short, long, rtol=0, atol=TOLERANCE * np.abs(short).max())


@pytest.fixture
def one_device():
    """Select the code for one device; the suite has eight, where bfloat16 operands are widened."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cpu, "_several_devices", lambda: False)
    yield
    patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("layers that differ", "auto"),
        ("layers that differ", "explicit"),
        ("complex keys, dense values", "auto"),
        ("complex keys, dense values", "explicit"),
        ("key norm", "auto"),
        ("differential V1", "auto"),
        ("talking heads", "auto"),
        ("collaborative", "auto"),
    ],
)
def test_bfloat16_products_on_a_cpu(one_device, name, form):
    """The products compile for one device; logits are within 5% of the spread of exact ones."""
    results = []
    for kind, dtype in (("xla", "float32"), ("cpu", "bfloat16")):
        model = model_of(name, backend=kind, dtype=dtype)
        served, params = serve(model, params_of(model, noise=0.2), form)

        results.append(second_token(served)(params, fresh_cache(served, dtype=dtype))[0])
    exact, low = results
    assert 0 < np.abs(exact - low).std() < 0.05 * exact.std()
