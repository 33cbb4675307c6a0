"""Measure the memory bandwidth that decoding reaches, relative to plain copying and reading.

    python -m benchmarks.bandwidth [--contexts 1024,8192,32768] [--out bench/bandwidth]

A decode step must read the weights and the cache once. Its bandwidth is those bytes over its time.
Its share of the memory bound is that bandwidth divided by that of a plain read or copy, measured in
the same process and interleaved with the steps. A copy counts the bytes it reads and writes.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.decode_step import WHOLE, base_model, step_of, variant_of
from benchmarks.harness import lines, print_table, spread, time_interleaved, write_json
from mea_jax.ops.resolve import resolve
from mea_jax.parallel.host import keep_freed_memory

NAMES = ("MHA", "GQA K/2", WHOLE, "MEA C = K/2, absorbed")


def plain_copy(size: int) -> Callable[[], Any]:
    """Return a function that copies `size` bytes: it reads and writes them once."""
    x = jnp.ones((size // 4,), jnp.float32)
    # Negate instead of copy: the compiler may return an unchanged input as it is.
    copy = jax.jit(lambda x: -x)
    return lambda: copy(x)


def plain_read(size: int) -> Callable[[], Any]:
    """Return a function that sums `size` bytes: it reads them once."""
    x = jnp.ones((size // 4096, 1024), jnp.float32)
    total = jax.jit(lambda x: jnp.sum(x, axis=0))
    return lambda: total(x)


def measure(args: argparse.Namespace, dtype: str, context: int) -> list[dict[str, Any]]:
    n, h = args.heads, args.head_dim
    base = base_model(n, n, h, n * h, args.layers, dtype)
    runs: dict[str, Callable[[], Any]] = {}
    moved: dict[str, int] = {}
    for name in NAMES:
        model, form = variant_of(base, name)
        model = resolve(model, jax.devices(), context)
        run, _, sizes = step_of(model, form, args.batch, context, jnp.dtype(dtype))
        runs[name] = run
        moved[name] = sizes["cache_bytes"] + sizes["weight_bytes"]
    size = 256 << 20
    runs |= {"plain copy": plain_copy(size), "plain read": plain_read(size)}
    moved |= {"plain copy": 2 * size, "plain read": size}
    times = time_interleaved(runs, args.repeats)
    rates = {name: moved[name] / statistics.median(times[name]) for name in runs}
    return [
        {
            "dtype": dtype,
            "context": context,
            "name": name,
            "bytes": moved[name],
            **spread(times[name]),
            "gb_per_s": rates[name] / 1e9,
            "of_copy": rates[name] / rates["plain copy"],
            "of_read": rates[name] / rates["plain read"],
        }
        for name in runs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--out", default="bench/bandwidth", help="path of the .json and .png, without suffix"
    )
    parser.add_argument("--contexts", default="1024,8192,32768")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=16, help="N = K; C is half of it")
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if jax.devices()[0].platform == "cpu":
        keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes.split(","):
        for context in map(int, args.contexts.split(",")):
            here = measure(args, dtype, context)
            print(f"\n{dtype}, batch {args.batch}, {context} positions")
            columns = {
                "name": ("", "s"),
                "bytes": ("bytes moved", ",d"),
                "median_ms": ("ms", ".2f"),
                "min_ms": ("min", ".2f"),
                "max_ms": ("max", ".2f"),
                "gb_per_s": ("GB/s", ".1f"),
                "of_copy": ("over copy", ".2f"),
                "of_read": ("over read", ".2f"),
            }
            print_table(here, columns)
            rows += here
    write_json(f"{args.out}.json", rows)
    lines(
        f"{args.out}.png",
        {
            f"{name}, {dtype}": [
                (r["context"], r["of_copy"])
                for r in rows
                if r["name"] == name and r["dtype"] == dtype
            ]
            for dtype in args.dtypes.split(",")
            for name in NAMES
        },
        title="Share of the memory bandwidth that a decode step reaches",
        x="positions in the cache",
        y="bytes per second relative to a copy",
        log_x=True,
    )
    print(f"\n{args.out}.json and {args.out}.png")


if __name__ == "__main__":
    main()
