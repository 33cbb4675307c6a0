"""Compare a PyTorch decode step with half the cache to its uncompressed twin, on a CPU.

    python -m benchmarks.torch_decode [--contexts 4096,16384,32768] [--out bench/torch_decode]

The models have the classes of an export: the twin is transformers' own class (Llama with the same
number of heads and plain attention), MEA with C = K/2 is that of modeling_mea.py. A Llama with K/2
heads, whose cache has the compressed size, is timed as well. Weights are random float32; steps are
interleaved in one process. A step runs a token through the full model with `DynamicCache`, which
copies the cache to make room; the token is then removed, so that the context keeps its length. "in
place" is the same step with `StaticCache`, which only writes one slot. Bytes are counted from the
tensors of the caches.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks import decode_step
from benchmarks.harness import lines, print_table, ratios, spread, time_interleaved, write_json
from mea_jax.config.schema import ModelConfig
from mea_jax.convert.composite import mea_config
from mea_jax.convert.configuration_mea import MEAConfig
from mea_jax.convert.modeling_mea import MEAForCausalLM

TWIN, HALF, GROUPED = "stock, K heads", "MEA, C = K/2", "stock, K/2 heads"


def base_model(n: int, k: int, h: int, d: int, layers: int) -> ModelConfig:
    """Return the model of `benchmarks.decode_step` with tied embeddings and without head norm.

    A Llama has no head norm and can have tied embeddings.
    """
    base = decode_step.base_model(n, k, h, d, layers, "float32")
    return dataclasses.replace(base, head_norm=False, tie_embeddings=True)


def stock(model: ModelConfig, heads: int) -> Any:
    """Return a Llama of the same widths with plain attention and `heads` key and value heads."""
    config = mea_config(dataclasses.replace(model, hlc="none", n_kv_heads=heads))
    names = LlamaConfig().to_dict().keys() & config.keys()
    names -= {"architectures", "model_type", "auto_map"}
    return LlamaForCausalLM(LlamaConfig(**{name: config[name] for name in names}))


def models(model: ModelConfig) -> dict[str, Any]:
    k = model.n_kv_heads
    made = {
        TWIN: stock(model, k),
        HALF: MEAForCausalLM(MEAConfig(**mea_config(model))),
        GROUPED: stock(model, k // 2),
    }
    return {name: module.eval() for name, module in made.items()}


def cache_bytes(cache: Any) -> int:
    """Return the bytes of the tensors that contain keys and values."""
    kept = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def filled(module: Any, context: int, batch: int) -> Any:
    """Return a cache of `context` random positions, whose values do not affect the time."""
    cache: Any = DynamicCache()
    with torch.no_grad():
        module(torch.zeros(batch, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys = torch.randn(batch, layer.keys.shape[1], context, layer.keys.shape[3])
        layer.values = torch.randn(batch, layer.values.shape[1], context, layer.values.shape[3])
    return cache


def growing(module: Any, cache: Any, batch: int) -> Callable[[], Any]:
    """Return a step that copies the cache to make room for its token, and removes the token."""
    token = torch.zeros(batch, 1, dtype=torch.long)

    @torch.no_grad()
    def step() -> None:
        module(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def in_place(module: Any, cache: Any, batch: int) -> Callable[[], Any]:
    """Return a step that writes its token to the last slot of a cache of fixed size."""
    context = cache.get_seq_length()
    room: Any = StaticCache(config=module.config, max_cache_len=context + 1)
    for index, layer in enumerate(cache.layers):
        room.update(layer.keys, layer.values, index)
    token = torch.zeros(batch, 1, dtype=torch.long)
    mask = torch.ones(batch, 1, 1, context + 1, dtype=torch.bool)
    places = torch.full((batch, 1), context)

    @torch.no_grad()
    def step() -> None:
        module(token, attention_mask=mask, position_ids=places, past_key_values=room)
        for layer in room.layers:
            layer.cumulative_length.fill_(context)

    return step


def timed(made: dict[str, Any], contexts: list[int], batch: int, repeats: int) -> list[Any]:
    rows: list[dict[str, Any]] = []
    for context in contexts:
        for kind, step_of in (("growing", growing), ("in place", in_place)):
            caches = {name: filled(module, context, batch) for name, module in made.items()}
            sizes = {name: cache_bytes(cache) for name, cache in caches.items()}
            steps = {name: step_of(made[name], caches.pop(name), batch) for name in made}
            times = time_interleaved(steps, repeats)
            relative = ratios(times, TWIN)
            here = [
                {
                    "context": context,
                    "cache": kind,
                    "name": name,
                    "cache_bytes": sizes[name],
                    "bytes_ratio": sizes[name] / sizes[TWIN],
                    **spread(times[name]),
                    "ratio": statistics.median(relative[name]),
                    "ratio_min": min(relative[name]),
                    "ratio_max": max(relative[name]),
                }
                for name in made
            ]
            print(f"\n{context} positions, batch {batch}, cache {kind}")
            print_table(
                here,
                {
                    "name": ("", "s"),
                    "cache_bytes": ("cache bytes", ",d"),
                    "bytes_ratio": ("x twin", ".3f"),
                    "median_ms": ("ms", ".1f"),
                    "min_ms": ("min", ".1f"),
                    "max_ms": ("max", ".1f"),
                    "ratio": ("x twin", ".3f"),
                    "ratio_min": ("min", ".3f"),
                    "ratio_max": ("max", ".3f"),
                },
            )
            rows += here
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="4096,16384,32768")
    parser.add_argument("--shape", default="16,8,64,512,4", help="N,K,H,D,layers")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="threads of PyTorch; 0: its default")
    parser.add_argument("--out", default="bench/torch_decode")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    contexts = [int(x) for x in args.contexts.split(",")]
    made = models(base_model(*(int(x) for x in args.shape.split(","))))
    rows = timed(made, contexts, args.batch, args.repeats)
    write_json(f"{args.out}.json", rows)
    series = {
        f"{name}, {cache}": [
            (row["context"], row["ratio"])
            for row in rows
            if row["name"] == name and row["cache"] == cache
        ]
        for name in (HALF, GROUPED)
        for cache in ("growing", "in place")
    }
    title = "A decode step's time over that of the uncompressed twin, PyTorch on a CPU"
    lines(f"{args.out}.png", series, title=title, x="positions in the cache", y="ratio", log_x=True)


if __name__ == "__main__":
    main()
