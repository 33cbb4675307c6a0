"""Tests of speed measurements: the same programs as in generation, models in turns.

No test asserts a time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.evaluate import speed
from mea_jax.generate import decode
from mea_jax.generate.generator import Decoding, Generator
from mea_jax.model.kv_cache import RECENT
from tests.helpers import params_of, tiny_model

MODEL = tiny_model(key_components=2, value_components=1)
PARAMS = params_of(MODEL, noise=0.3)


def test_models_take_turns():
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ABC"}
    seconds = speed.interleaved(runs, repeats=3, warmup=1)
    assert "".join(order) == "ABC" + 3 * "ABC"
    assert {name: len(s) for name, s in seconds.items()} == {"A": 3, "B": 3, "C": 3}


def test_quartiles():
    assert speed.quartiles([1.0, 2.0, 3.0, 4.0, 10.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


@pytest.mark.slow
def test_a_cycle_writes_the_tokens_of_generation():
    """A cycle over a cache with room for one cycle gives the greedy tokens of `Generator.run`."""
    served, params = decode.serve(MODEL, PARAMS)
    length, prompt = RECENT + 20, np.arange(20, dtype=np.int32)
    cache = decode.empty_cache(served, 1, length, jnp.float32)
    where = np.ones((1, 20), np.int32), prompt[None]
    logits_BV, cache = decode.prefill(served, params, cache, prompt[None], *where)
    _, last = speed._cycle(served, params, cache, jnp.argmax(logits_BV, -1).astype(jnp.int32))
    (expected,) = Generator(MODEL, PARAMS, length=400).run([prompt.tolist()], Decoding(RECENT + 1))
    assert int(last[0]) == expected[-1]


@pytest.mark.slow
@pytest.mark.parametrize("context", [1, 40, RECENT + 40])
def test_a_cycle_does_not_lengthen_the_context(context):
    served, params = decode.serve(MODEL, PARAMS)
    tokens = np.ones((2, context), np.int32)
    first, cache = speed._fill(served, context, jnp.dtype("float32"), params, tokens)
    for _ in range(2):
        cache, first = speed._cycle(served, params, cache, first)
        assert cache.segment_ids_BS.shape == (2, context)
        assert int(cache.lengths_B[0]) == context
        assert int(cache.recent_count) == 0


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_a_cache_taken_as_full_is_read_as_one_that_prompts_filled(cache_dtype):
    """Both caches have the same shapes, lengths and counters; only keys and values differ.

    So the same program serves both, and reads the same number of bytes.
    """
    served, params = decode.serve(MODEL, PARAMS)
    of, dtype = (2, 40), jnp.dtype(cache_dtype)
    _, filled = speed._fill(served, of[1], dtype, params, np.ones(of, np.int32))
    _, taken = speed._zero_filled(served, *of, dtype)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), filled, taken)
    for name in ("segment_ids_BS", "lengths_B", "recent_count", "positions_B"):
        np.testing.assert_array_equal(getattr(filled, name), getattr(taken, name))


def test_decoding_alone():
    (rows,) = speed.speeds({"whole": (MODEL, PARAMS)}, contexts=[16], prefill=False).values()
    assert rows[0].keys() == {"context", "rows", "tokens_per_second", "over_first"}
    assert rows[0]["tokens_per_second"]["low"] > 0


@pytest.mark.slow
def test_rows_of_each_model_and_context():
    models = {"whole": (MODEL, PARAMS), "again": (MODEL, PARAMS)}
    said: list[str] = []
    found = speed.speeds(models, contexts=[16, 64], rows=2, repeats=3, log=said.append)
    assert list(found) == ["whole", "again"]
    assert len(said) == 4
    for name, rows in found.items():
        assert [row["context"] for row in rows] == [16, 64]
        for row in rows:
            assert row["rows"] == 2
            for key in ("tokens_per_second", "prefill_seconds", "over_first"):
                assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"]
            if name == "whole":
                assert row["over_first"]["median"] == row["prefill_over_first"]["median"] == 1
