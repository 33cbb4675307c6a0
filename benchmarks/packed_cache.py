r"""Compare decoding from a cache packed in bits per slot with decoding from a bfloat16 cache.

    python -m benchmarks.packed_cache [--parts attention,step,flush] [--out bench/packed_cache.json]
    python -m benchmarks.packed_cache --contexts 1024,8192 --batches 1,8 --dtypes float32,bfloat16

The shape is SmolLM2-135M's, with random parameters: 30 layers, D 576, N 9, K 3, H 64. The bfloat16
cache is that of plain heads, which a query reads directly. The packed one has a quarter of the
bytes: 192 slots each for keys and values, with 0 to 8 bits, 4 on average; each query head
multiplies all of them. `--dtypes` are those of products.

Three parts: "attention" reads the cache of one layer (logits, softmax, sum of values), "step" is a
complete decode step without flush, "flush" moves 128 recent positions to the large arrays, once in
128 steps. The two caches are timed in turn, in one process. "of bfloat16" is the time of the
bfloat16 cache over that of the packed one, more than 1 if packed is faster: of the fastest calls,
which other work on the machine disturbs least, and the median, least and most within a round.
"""

import argparse
import dataclasses
import functools
import gc
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode_step import step_of
from benchmarks.harness import print_table, ratios, time_interleaved, write_json
from mea_jax.config.schema import ModelConfig
from mea_jax.model import kv_cache
from mea_jax.model.kv_cache import RECENT, LayerCache
from mea_jax.ops.backend import make_backend
from mea_jax.ops.resolve import resolve
from mea_jax.parallel.host import keep_freed_memory

N, K, H, LAYERS = 9, 3, 64, 30
BASE, PACKED = "bfloat16", "packed"


def draw_bits(rng: np.random.Generator) -> tuple[int, ...]:
    """Return bits of K H slots, 0 to 8, 4 on average, in no order."""
    drawn = np.clip(np.round(rng.normal(4, 2, K * H)), 0, 8).astype(int)
    while drawn.sum() != 4 * K * H:
        slot, change = rng.integers(K * H), int(np.sign(4 * K * H - drawn.sum()))
        drawn[slot] = np.clip(drawn[slot] + change, 0, 8)
    return tuple(drawn.tolist())


def models(dtype: str, length: int, layers: int = LAYERS) -> dict[str, ModelConfig]:
    """Return the models of both caches."""
    plain = ModelConfig(
        vocab_size=49152,
        d_model=576,
        n_layers=layers,
        n_heads=N,
        n_kv_heads=K,
        head_dim=H,
        d_ff=1536,
        hlc="none",
        head_norm=False,
        dtype=dtype,
    )
    rng = np.random.default_rng(0)
    key, value = (tuple("".join(map(str, draw_bits(rng))) for _ in range(layers)) for _ in range(2))
    mixed: dict[str, Any] = {"hlc": "kv", "key_mixing": "frequency", "value_mixing": "dense"}
    packed = dataclasses.replace(plain, **mixed, key_bits=key, value_bits=value)
    return {
        name: resolve(model, jax.devices(), length)
        for name, model in ((BASE, plain), (PACKED, packed))
    }


def attention_reads(dtype: str, batch: int, length: int) -> dict[str, Callable[[], Any]]:
    """Return functions that read the cache of one layer for one query per row."""
    runs: dict[str, Callable[[], Any]] = {}
    rng = np.random.default_rng(1)
    for name, model in models(dtype, length, 1).items():
        backend, packed = make_backend(model), name == PACKED
        width = K * H if packed else H
        q_BKGX = jnp.asarray(0.1 * rng.normal(size=(batch, K, N // K, width)), jnp.float32)
        seen_BS = jnp.ones((batch, length), bool)

        def filled(packed: bool = packed) -> kv_cache.HeadCache:
            bits = draw_bits(rng) if packed else None
            form = "absorbed" if packed else "direct"
            empty = kv_cache.empty_heads(form, batch, length, K, H, jnp.bfloat16, bits)
            size = empty.data.shape
            numbers = rng.integers(0, 256, size) if packed else rng.normal(size=size)
            step = jnp.full(K * H, 0.1) if packed else None
            return dataclasses.replace(
                empty, data=jnp.asarray(numbers, empty.data.dtype), step=step
            )

        def attention(q_BKGX, seen_BS, layer, mixing, backend=backend):
            logits_BKGS = kv_cache.read_logits(backend, q_BKGX, layer, "frequency", None)
            hidden_BKGS = kv_cache.mask_logits(logits_BKGS, seen_BS)
            p_BKGS = jnp.exp(hidden_BKGS - jnp.max(hidden_BKGS, axis=-1, keepdims=True))
            o_BKGH = kv_cache.read_values(backend, p_BKGS, layer.value, "dense", mixing)
            return o_BKGH / jnp.sum(p_BKGS, axis=-1, keepdims=True)

        mixing = jnp.asarray(rng.normal(size=(K, H, K, H)), jnp.float32) if packed else None
        arguments = (q_BKGX, seen_BS, LayerCache(filled(), filled(), None), mixing)
        runs[name] = functools.partial(jax.jit(attention).lower(*arguments).compile(), *arguments)
    return runs


def steps(dtype: str, batch: int, length: int, part: str) -> dict[str, Callable[[], Any]]:
    """Return functions that run a decode step, or a flush."""
    runs = {}
    for name, model in models(dtype, length).items():
        step, flush, _ = step_of(model, "auto", batch, length, jnp.bfloat16)
        runs[name] = flush if part == "flush" else step
    return runs


def compare(runs: Mapping[str, Callable[[], Any]], repeats: int, inner: int) -> dict[str, Any]:
    """Time both in turn; return the row of a table."""
    times = time_interleaved(runs, repeats, inner=inner)
    faster = ratios(times, PACKED)[BASE]
    best = {name: 1e3 * min(seconds) for name, seconds in times.items()}
    return {
        "base_ms": best[BASE],
        "packed_ms": best[PACKED],
        "of_best": best[BASE] / best[PACKED],
        "of_median": statistics.median(faster),
        "of_least": min(faster),
        "of_most": max(faster),
    }


COLUMNS = {
    "part": ("", "s"),
    "dtype": ("", "s"),
    "batch": ("rows", "d"),
    "context": ("positions", ",d"),
    "base_ms": ("bfloat16, ms", ".3f"),
    "packed_ms": ("packed, ms", ".3f"),
    "of_best": ("of bfloat16", ".2f"),
    "of_median": ("median", ".2f"),
    "of_least": ("min", ".2f"),
    "of_most": ("max", ".2f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--parts", default="attention,step,flush")
    parser.add_argument("--contexts", default="1024,8192")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", default="bench/packed_cache.json")
    args = parser.parse_args()
    if jax.devices()[0].platform == "cpu":
        keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for part in args.parts.split(","):
        for dtype in args.dtypes.split(","):
            for batch in map(int, args.batches.split(",")):
                for context in map(int, args.contexts.split(",")):
                    if part == "attention":
                        runs = attention_reads(dtype, batch, context)
                    else:
                        runs = steps(dtype, batch, context, part)
                    inner = max(1, 16384 // (batch * context)) if part == "attention" else 1
                    row = {"part": part, "dtype": dtype, "batch": batch, "context": context}
                    rows.append(row | compare(runs, args.repeats, inner))
                    write_json(args.out, rows)
                    del runs
                    gc.collect()
    print(f"\nevery {RECENT} steps end with a flush")
    print_table(rows, COLUMNS)


if __name__ == "__main__":
    main()
