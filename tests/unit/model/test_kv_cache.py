"""Tests of the KV cache's size: its arrays, and the memory of a compiled decode step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.generate.decode import empty_cache, serve, step
from mea_jax.model.kv_cache import count_bytes, empty_heads, write_heads
from tests.helpers import PLAIN, params_of, tiny_model


def bytes_of(model, form="auto", rows=4, length=64):
    """Return the bytes of a bfloat16 cache without allocating it or parameters."""

    def empty(params):
        return empty_cache(serve(model, params, form)[0], rows, length, jnp.bfloat16).layers

    return count_bytes(jax.eval_shape(empty, params_of(model)))


WIDE = {"n_layers": 3, "n_heads": 8, "n_kv_heads": 8}
POSITIONS = 4 * 64 * 3  # rows x slots x layers


@pytest.mark.slow
def test_bytes_are_in_proportion_to_component_heads():
    plain = bytes_of(tiny_model(**WIDE | PLAIN))
    assert plain == 2 * POSITIONS * 8 * 8 * 2  # keys and values, K = 8 heads of width 8, two bytes
    for components in (1, 4, 6):
        model = tiny_model(**WIDE, key_components=components, value_components=components)
        for form in ("auto", "absorbed", "explicit"):
            assert bytes_of(model, form) * 8 == plain * components
        assert bytes_of(model, "folded") == plain
    assert bytes_of(tiny_model(**WIDE)) == plain
    apart = tiny_model(**WIDE, key_components=(1, 2, 8), value_components=4)
    assert bytes_of(apart) == 4 * 64 * 8 * 2 * ((1 + 4) + (2 + 4) + (8 + 4))


def test_bytes_of_extensions():
    """Complex and dense mixing need no bytes; a key norm needs a float32 per composite head."""
    half = {"key_components": 4, "value_components": 4}
    base = bytes_of(tiny_model(**WIDE, **half))
    kinds = {"key_mixing": "frequency", "value_mixing": "dense"}
    assert bytes_of(tiny_model(**WIDE, **half, **kinds)) == base
    normed = tiny_model(**WIDE, **half, qk_norm=True)
    assert bytes_of(normed) == base + POSITIONS * 8 * 4
    after = tiny_model(**WIDE, **half, qk_norm=True, hlc_order="after")
    assert bytes_of(after) == base  # with "after" the components are normed
    collaborative = tiny_model(**WIDE | PLAIN, variant="collaborative", key_components=2)
    assert bytes_of(collaborative) == 2 * POSITIONS * 8 * (2 + 8)


def test_a_cache_is_planned_without_memory():
    """The bytes of a billion positions are computed on this machine."""
    model = tiny_model(**WIDE, key_components=2, value_components=2)
    assert bytes_of(model, rows=1024, length=1 << 20) == 2 * (1 << 30) * 3 * 2 * 8 * 2


@pytest.mark.parametrize("form", ["direct", "absorbed"])
def test_int8_rounds_to_a_step_of_its_vector(form):
    """Errors are at most half a step, 1/254 of the vector's largest entry; zeros stay zeros."""
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    x[:, 1] *= 1e-6
    x[:, 2] = 0
    cache = write_heads(empty_heads(form, 2, 5, 3, 8, jnp.int8), jnp.asarray(x), 0)
    assert cache.data.dtype == jnp.int8
    vectors = np.swapaxes(x, 1, 2) if form == "direct" else x.reshape(2, 5, 24)
    largest = np.abs(vectors).max(axis=-1, keepdims=True)
    restored = np.asarray(cache.data) * np.asarray(cache.step)[..., None]
    assert (np.abs(restored - vectors) <= largest / 254 * (1 + 1e-5)).all()
    assert np.abs(restored - vectors).max() > 0.001 * largest.max(), "nothing was rounded"


# -- the compiled step --------------------------------------------------------------------------

BATCH, LONG, HEADS, WIDTH = 2, 640, 8, 16


@functools.cache  # a program read from the disk has no memory analysis
def compiled_step(form):
    """Compile a step of one layer with 2 of 8 heads cached and the cache donated.

    Return (compiled step, the cache's shapes).
    """
    model = tiny_model(
        n_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        head_dim=WIDTH,
        key_components=2,
        value_components=2,
    )
    served, params = serve(model, params_of(model), form)
    cache = jax.eval_shape(lambda: empty_cache(served, BATCH, LONG, jnp.float32))
    jitted = jax.jit(step, static_argnums=0, donate_argnums=2)
    tokens = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    return jitted.lower(served, params, cache, tokens).compile(), cache


@pytest.mark.parametrize("form", ["absorbed", "explicit"])
def test_nothing_of_the_whole_caches_size_is_made(form):
    """The absorbed form makes no array of S x K x H numbers; the explicit form does."""
    compiled, _ = compiled_step(form)
    shapes = re.findall(r"[a-z]\d+\[([\d,]+)\]", compiled.as_text())
    sizes = {int(np.prod([int(d) for d in shape.split(",")])) for shape in shapes}
    assert BATCH * LONG * 2 * WIDTH in sizes, "the cache is missing"
    assert (max(sizes) >= BATCH * LONG * HEADS * WIDTH) == (form == "explicit")


def test_a_donated_cache_is_updated_in_place():
    """Every array of the new cache reuses the old one's memory, and none is copied.

    Temporary memory contains queries, logits and weights of 8 heads; the cache has 2 x 2 heads of
    width 16.
    """
    compiled, cache = compiled_step("absorbed")
    memory, whole = compiled.memory_analysis(), count_bytes(cache.layers)
    assert memory.alias_size_in_bytes >= whole + count_bytes(cache.recent)
    assert memory.temp_size_in_bytes < whole / 2
