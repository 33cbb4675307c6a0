"""Measure one decode step by context length, with full and compressed caches.

    python -m benchmarks.decode_step [--contexts 1024,4096,16384,32768] [--out bench/decode_step]
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.decode_step --topology v5e:2x2

The first command times complete decode steps (`mea_jax.generate.decode.step`), interleaved in one
process. The model has the widths below; its variants differ only in key/value heads: K = N in MHA,
K = N/2 in GQA (a cache of the same size as the compressed one), K = N and C = K/2 in MEA in three
forms: absorbed (components are cached and read directly), folded (the whole cache of K heads) and
explicit (components are cached, K heads are rebuilt at each step). A step's time includes its share
of the flush of recent positions, which is timed separately. Bytes of caches are counted from their
arrays. The second command compiles MEA's steps, and one layer's attention, at
three shapes for a TPU that need not be present, and counts bytes.
"""

import argparse
import dataclasses
import functools
import gc
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.harness import lines, print_table, ratios, spread, time_interleaved, write_json
from mea_jax.config.schema import ModelConfig
from mea_jax.generate import decode
from mea_jax.model.context import Context, Slots
from mea_jax.model.kv_cache import RECENT, CachedLayer, count_bytes, flush
from mea_jax.model.params import abstract_params
from mea_jax.model.transformer import rope_of
from mea_jax.model.variants import make_attention
from mea_jax.ops.resolve import resolve
from mea_jax.parallel import topology
from mea_jax.parallel.host import keep_freed_memory

WHOLE = "MEA C = K/2, whole cache"
# Name -> (changes of the model, form of the cache).
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "MHA": ({"hlc": "none", "head_norm": False}, "auto"),
    "GQA K/2": ({"hlc": "none", "head_norm": False, "n_kv_heads": 2}, "auto"),
    WHOLE: ({}, "folded"),
    "MEA C = K/2, absorbed": ({}, "absorbed"),
    "MEA C = K/2, explicit": ({}, "explicit"),
}


def base_model(n: int, k: int, h: int, d: int, layers: int, dtype: str) -> ModelConfig:
    """Return MEA with C = K/2 and a vocabulary so small that the cache dominates."""
    return ModelConfig(
        vocab_size=4096,
        d_model=d,
        n_layers=layers,
        n_heads=n,
        n_kv_heads=k,
        head_dim=h,
        d_ff=4 * d * 2 // 3 // 64 * 64,
        key_components=k // 2,
        value_components=k // 2,
        dtype=dtype,
        tie_embeddings=False,
    )


def variant_of(base: ModelConfig, name: str) -> tuple[ModelConfig, str]:
    """Return the model of a row of `VARIANTS`, and the form of its cache."""
    changes, form = VARIANTS[name]
    changes = dict(changes)
    if "n_kv_heads" in changes:
        changes["n_kv_heads"] = base.n_kv_heads // 2
    if changes.get("hlc") == "none":
        changes |= {"key_components": None, "value_components": None}
    return dataclasses.replace(base, **changes), form


def served_shapes(model: ModelConfig, form: str) -> tuple[decode.ServedModel, Any]:
    """Return the static part of a served model, and the shapes of its parameters."""
    serve = functools.partial(decode.serve, model, form=form)
    held = {}

    def shapes(params):
        held["served"], arrays = serve(params)
        return arrays

    arrays = jax.eval_shape(shapes, abstract_params(model))
    return held["served"], arrays


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def step_of(
    model: ModelConfig, form: str, batch: int, context: int, cache_dtype: Any
) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, int]]:
    """Return functions that run one step and one flush, and the bytes of a step.

    The cache has `context` positions. Each step stores its token in the same slot, so that the
    context does not grow while it is timed.
    """
    served, shapes = served_shapes(model, form)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32), x.dtype), shapes
    )
    cache = jax.jit(functools.partial(decode.empty_cache, served, batch, context, cache_dtype))()
    cache = dataclasses.replace(
        cache,
        segment_ids_BS=jnp.ones((batch, context), jnp.int32),
        lengths_B=jnp.full((batch,), context, jnp.int32),
        positions_B=jnp.full((batch,), context, jnp.int32),
    )
    tokens_B = jnp.zeros((batch,), jnp.int32)

    def step(params, cache, tokens_B):
        logits_BV, new = decode.step(served, params, cache, tokens_B)
        new = dataclasses.replace(
            new, recent_count=cache.recent_count, positions_B=cache.positions_B
        )
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), new

    compiled = jax.jit(step, donate_argnums=1).lower(params, cache, tokens_B).compile()
    held = {"cache": cache}
    # A step reads only one row of the embeddings; the unembedding has a separate kernel.
    weights = nbytes(params) - nbytes(params["top"]["embedding"])
    sizes = {"cache_bytes": count_bytes(cache.layers), "weight_bytes": weights}

    def run() -> jax.Array:
        chosen_B, held["cache"] = compiled(params, held["cache"], tokens_B)
        return chosen_B

    def emptied(cache):
        # The rows are full, and a flush drops what does not fit: free some slots so that it writes.
        room = dataclasses.replace(
            cache, lengths_B=cache.lengths_B - RECENT, recent_count=jnp.asarray(RECENT, jnp.int32)
        )
        return dataclasses.replace(
            flush(room), lengths_B=cache.lengths_B, recent_count=cache.recent_count
        )

    flushed = jax.jit(emptied, donate_argnums=0).lower(cache).compile()

    def run_flush() -> jax.Array:
        held["cache"] = flushed(held["cache"])
        return held["cache"].lengths_B

    return run, run_flush, sizes


def timed(
    base: ModelConfig, batch: int, contexts: list[int], repeats: int, names: list[str]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for context in contexts:
        runs, flushes, sizes = {}, {}, {}
        for name in names:
            model, form = variant_of(base, name)
            model = resolve(model, jax.devices(), context)
            runs[name], flushes[name], sizes[name] = step_of(
                model, form, batch, context, jnp.dtype(base.dtype)
            )
        steps = time_interleaved(runs, repeats, inner=max(1, 16384 // context))
        shares = {
            name: statistics.median(seconds) / RECENT
            for name, seconds in time_interleaved(flushes, 3).items()
        }
        times = {name: [t + shares[name] for t in seconds] for name, seconds in steps.items()}
        faster = ratios(times, WHOLE)
        here = [
            {
                "dtype": base.dtype,
                "context": context,
                "name": name,
                **spread(times[name]),
                "flush_ms": 1e3 * shares[name],
                **sizes[name],
                "cache_bytes_per_token": sizes[name]["cache_bytes"] / batch / context,
                "tokens_per_s": batch / statistics.median(times[name]),
                "speedup": 1 / statistics.median(faster[name]),
                "speedup_min": 1 / max(faster[name]),
                "speedup_max": 1 / min(faster[name]),
            }
            for name in names
        ]
        print(f"\n{base.dtype}, batch {batch}, {context} positions")
        print_table(
            here,
            {
                "name": ("", "s"),
                "cache_bytes": ("cache bytes", ",d"),
                "cache_bytes_per_token": ("per token", ",.0f"),
                "median_ms": ("ms", ".2f"),
                "min_ms": ("min", ".2f"),
                "max_ms": ("max", ".2f"),
                "flush_ms": ("flush share", ".2f"),
                "tokens_per_s": ("tokens/s", ",.1f"),
                "speedup": ("x whole cache", ".2f"),
                "speedup_min": ("min", ".2f"),
                "speedup_max": ("max", ".2f"),
            },
        )
        rows += here
        del runs
        gc.collect()
    return rows


# (N, K, H) of the shapes compiled for a TPU, all with C = K/2.
TPU_SHAPES = ((32, 8, 64), (32, 8, 128), (16, 16, 128))


def attention_step(served: decode.ServedModel, length: int) -> Callable[..., Any]:
    """Return a function that runs one layer's attention of a step, to isolate the cache's cost."""
    spec = served.layers[0]
    layer = make_attention(
        spec.model, spec.key_components, spec.value_components, cached_form=spec.cached_form
    )

    def run(params, cache, x_B1D):
        batch = x_B1D.shape[0]
        distance_BS = jnp.arange(length)[None] - cache.lengths_B[:, None]
        recent_BR = jnp.broadcast_to(jnp.arange(RECENT)[None], (batch, RECENT))
        context = Context(
            segment_ids_BT=jnp.ones((batch, 1), jnp.int32),
            rope=rope_of(spec.model, cache.positions_B[:, None]),
            slot=cache.recent_count,
            main=Slots(cache.segment_ids_BS == 1, distance_BS),
            recent=Slots(recent_BR <= cache.recent_count, recent_BR - cache.recent_count),
        )
        stored = CachedLayer(cache.layers[0], cache.recent[0])
        variables = {"params": params["layers"][0]["attention"]}
        out: Any = layer.apply(variables, x_B1D, context, 0, stored)
        return out[0], dataclasses.replace(cache, layers=(out[1].main,), recent=(out[1].recent,))

    return run


def compiled_bytes(topology_name: str, batch: int, context: int) -> list[dict[str, Any]]:
    """Return the TPU compiler's count of bytes of one layer's attention and of a complete step."""
    where = SingleDeviceSharding(topology.describe(topology_name)[0])
    rows: list[dict[str, Any]] = []

    def placed(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    for what, layers in (("attention of a layer", 1), ("whole step, 2 layers", 2)):
        for n, k, h in TPU_SHAPES:
            base = base_model(n, k, h, 2048, layers, "bfloat16")
            base = dataclasses.replace(base, backend="xla", attention_kernel="einsum")
            gbytes = {}
            for name in [n for n in VARIANTS if n.startswith("MEA")]:
                model, form = variant_of(base, name)
                served, params = served_shapes(model, form)
                cache = jax.eval_shape(
                    functools.partial(decode.empty_cache, served, batch, context, jnp.bfloat16)
                )
                if layers == 1:
                    function: Any = attention_step(served, context)
                    last = jax.ShapeDtypeStruct((batch, 1, model.d_model), jnp.bfloat16)
                else:
                    function = functools.partial(decode.step, served)
                    last = jax.ShapeDtypeStruct((batch,), jnp.int32)
                step = jax.jit(function, donate_argnums=1)
                arguments = placed((params, cache, last))
                compiled: Any = step.lower(*arguments).compile()
                gbytes[name] = compiled.cost_analysis()["bytes accessed"] / 1e9
                rows.append(
                    {
                        "what": what,
                        "shape": f"N {n}, K {k}, C {k // 2}, H {h}",
                        "name": name,
                        "cache_gb": count_bytes(cache.layers) / 1e9,
                        "gbytes": gbytes[name],
                        "over_whole": gbytes[name] / gbytes[WHOLE],
                        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
                    }
                )
    print(f"\nOne step, batch {batch}, {context} positions, compiled for {topology_name}:")
    columns = {
        "what": ("", "s"),
        "shape": ("", "s"),
        "name": ("", "s"),
        "cache_gb": ("cache GB", ".3f"),
        "gbytes": ("GB accessed", ".3f"),
        "over_whole": ("over whole cache", ".3f"),
        "temporary_mb": ("temporary MB", ".1f"),
    }
    print_table(rows, columns)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--out", default="bench/decode_step", help="path of the .json and .png, without suffix"
    )
    parser.add_argument("--contexts", default="1024,4096,16384,32768")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=16, help="N = K; C is half of it")
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--topology", help="count bytes for this TPU instead, such as v5e:2x2")
    args = parser.parse_args()
    if args.topology:
        rows = compiled_bytes(args.topology, 16, 32768)
        write_json(f"{args.out}_{args.topology.replace(':', '_')}.json", rows)
        return
    if jax.devices()[0].platform == "cpu":
        keep_freed_memory()
    contexts = [int(c) for c in args.contexts.split(",")]
    rows, shape = [], (args.heads, args.heads, args.head_dim, args.heads * args.head_dim)
    for dtype in args.dtypes.split(","):
        base = base_model(*shape, args.layers, dtype)
        rows += timed(base, args.batch, contexts, args.repeats, list(VARIANTS))
    write_json(f"{args.out}.json", rows)
    for dtype in args.dtypes.split(","):
        series = {
            name: [
                (r["context"], r["median_ms"])
                for r in rows
                if r["name"] == name and r["dtype"] == dtype
            ]
            for name in VARIANTS
        }
        lines(
            f"{args.out}_{dtype}.png",
            series,
            title=f"One decode step, {dtype} ({args.layers} layers, N = K = {args.heads}, "
            f"H {args.head_dim}, batch {args.batch})",
            x="positions in the cache",
            y="milliseconds",
            log_x=True,
            log_y=True,
        )
    print(f"\n{args.out}.json and one figure per dtype next to it")


if __name__ == "__main__":
    main()
