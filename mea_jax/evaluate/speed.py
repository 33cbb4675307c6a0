"""Measure decoding in tokens per second and prefill in seconds, by context length.

Models take turns, A B A B, in one process: on a shared machine only their ratios within a round are
meaningful.
"""

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mea_jax.cli import progress
from mea_jax.config.schema import ModelConfig
from mea_jax.generate import decode
from mea_jax.model.kv_cache import RECENT, Cache, flush
from mea_jax.ops.resolve import resolve_on


def interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of `repeats` calls of each run, in rounds of one call of each."""
    for run in runs.values():
        for _ in range(warmup):
            jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    return seconds


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return {"median", "low", "high"}: the second, first and third quartile."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def _fill(served, length, dtype, params, tokens_BT) -> tuple[jax.Array, Cache]:
    """Prefill a cache with prompts; return the greedy next token of each row, and the cache."""
    cache = decode.empty_cache(served, tokens_BT.shape[0], length, dtype)
    positions_BT = jnp.broadcast_to(jnp.arange(length)[None], tokens_BT.shape)
    segments_BT = jnp.ones_like(tokens_BT)
    logits_BV, cache = decode.prefill(served, params, cache, tokens_BT, segments_BT, positions_BT)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache


def _cycle(served, params, cache: Cache, tokens_B: jax.Array) -> tuple[Cache, jax.Array]:
    """Decode `RECENT` greedy tokens and flush them to the cache, as generation does repeatedly.

    This overwrites the last `RECENT` slots, so that the context does not grow while it is timed.
    """
    slots = cache.segment_ids_BS.shape[1]
    before_B = jnp.full_like(cache.lengths_B, max(slots - RECENT, 0))
    cache = dataclasses.replace(cache, lengths_B=before_B, positions_B=before_B)

    def one(carry, _):
        cache, tokens_B = carry
        logits_BV, cache = decode.step(served, params, cache, tokens_B)
        return (cache, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)), None

    (cache, tokens_B), _ = jax.lax.scan(one, (cache, tokens_B), None, length=RECENT)
    return flush(cache), tokens_B


def _zero_filled(served, rows: int, length: int, dtype) -> tuple[jax.Array, Cache]:
    """Return tokens and a cache like those of `_fill`, with all keys and values 0."""
    cache = decode.empty_cache(served, rows, length, dtype)
    cache = dataclasses.replace(
        cache,
        segment_ids_BS=jnp.ones_like(cache.segment_ids_BS),
        lengths_B=jnp.full_like(cache.lengths_B, length),
        positions_B=jnp.full_like(cache.positions_B, length),
    )
    return jnp.zeros(rows, jnp.int32), cache


def _programs(
    model: ModelConfig,
    params: Any,
    context: int,
    rows: int,
    cache_dtype: str | None,
    prompts: bool,
    mesh: Mesh | None,
) -> tuple[Callable[[], Any] | None, Callable[[], Any]]:
    """Compile a prefill of `rows` prompts of `context` tokens, and a decode of `RECENT` more each.

    Return both as functions without arguments. Without `prompts` nothing is prefilled, and the
    first is None.
    """
    resolved = resolve_on(dataclasses.replace(model, attention_kernel="auto"), mesh, context)
    served, params = decode.serve(resolved, params)
    dtype = jnp.dtype(cache_dtype or resolved.dtype)
    rng = np.random.default_rng(0)
    tokens_BT = jnp.asarray(rng.integers(0, resolved.vocab_size, (rows, context)), jnp.int32)
    held: dict[str, Any] = {}
    prefill = None
    if prompts:
        fill = jax.jit(functools.partial(_fill, served, context, dtype)).lower(params, tokens_BT)
        filled = fill.compile()
        held["tokens"], held["cache"] = filled(params, tokens_BT)

        def prefill() -> jax.Array:
            return filled(params, tokens_BT)[0]

    else:
        empty = functools.partial(_zero_filled, served, rows, context, dtype)
        held["tokens"], held["cache"] = jax.jit(empty)()
    same = None
    if mesh is not None:  # the next cycle takes what this one returns
        same = jax.tree.map(lambda x: x.sharding, (held["cache"], held["tokens"]))
    cycle = jax.jit(functools.partial(_cycle, served), donate_argnums=1, out_shardings=same)
    compiled = cycle.lower(params, held["cache"], held["tokens"]).compile()

    def advance() -> jax.Array:
        held["cache"], held["tokens"] = compiled(params, held["cache"], held["tokens"])
        return held["tokens"]

    return prefill, advance


def speeds(
    models: Mapping[str, tuple[ModelConfig, Any]],
    *,
    contexts: Sequence[int],
    rows: int = 1,
    repeats: int = 5,
    cache_dtype: str | None = None,
    prefill: bool = True,
    mesh: Mesh | None = None,
    log: Callable[[str], Any] = lambda line: None,
) -> dict[str, list[dict[str, Any]]]:
    """Measure the speed of each model at each context length, the models in turn.

    Args:
      models: (model, training parameters) by name; the attention kernel is chosen for each context.
      contexts: slots of the cache, all of which a step of any model reads.
      rows: sequences per batch. If a mesh does not divide them, each device computes all of them.
      repeats: rounds; each decodes `kv_cache.RECENT` tokens per row, including the cache's flush.
      cache_dtype: of keys and values; None for the model's compute dtype.
      prefill: whether to prefill and time prompts, which takes most of the time for long contexts.
        Otherwise caches are full of zeros: the same program reads the same number of bytes.
      mesh: the mesh of `jax.set_mesh`, on which parameters are placed; None for one device.
      log: prints a line of progress per model and context.

    Returns:
      For each name, rows {"context", "rows", "tokens_per_second", "over_first",
      "prefill_seconds", "prefill_over_first"}. All but the first two are quartiles over the rounds:
      {"median", "low", "high"}. `tokens_per_second` counts all rows; `over_first` divides it by
      that of the first model in the same round. `prefill_over_first` likewise divides seconds. The
      last two are missing without `prefill`.
    """
    result: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    first = next(iter(models))
    for context in progress(contexts, "speed, contexts"):
        programs = {
            name: _programs(model, params, context, rows, cache_dtype, prefill, mesh)
            for name, (model, params) in models.items()
        }
        # Each of these has already run once, to fill its cache.
        fills = {name: p[0] for name, p in programs.items() if p[0] is not None}
        filling = interleaved(fills, repeats, warmup=0)
        decoding = interleaved({name: p[1] for name, p in programs.items()}, repeats)
        for name in models:
            rates = [rows * RECENT / seconds for seconds in decoding[name]]
            ratios = [a / b for a, b in zip(decoding[first], decoding[name], strict=True)]
            row: dict[str, Any] = {
                "context": context,
                "rows": rows,
                "tokens_per_second": quartiles(rates),
                "over_first": quartiles(ratios),
            }
            said = f"{name}: {context:,} positions: {np.median(rates):,.1f} tokens/s"
            if name in filling:
                slower = [a / b for a, b in zip(filling[name], filling[first], strict=True)]
                row["prefill_seconds"] = quartiles(filling[name])
                row["prefill_over_first"] = quartiles(slower)
                said += f", prefill {np.median(filling[name]):.3f} s"
            result[name].append(row)
            log(said)
        del programs, fills
        gc.collect()
    return result
