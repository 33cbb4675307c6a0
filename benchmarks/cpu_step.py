"""Training-step speed on a CPU: the kernels of `mea_jax.cpu_kernels` against plain einsum.

    python -m benchmarks.cpu_step [--json out.json] [--repeats 9]

One process, variants interleaved A B C D A B C D, medians. First the plain product of the model's
main shape, the bound on what a step can reach; then the whole step (forward, backward, clipping,
AdamW) of a small LLaMA-shaped transformer in float32 and bfloat16. FLOP counted: 6 per parameter of
a product and token, plus causal attention halved: 6 * T * N * H per layer and token.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mea_jax import cpu_kernels

Array = jax.Array


@dataclass(frozen=True)
class Shape:
    """LLaMA-shaped decoder with untied embeddings; the defaults are the repository's benchmark."""

    batch: int = 8
    length: int = 256
    d_model: int = 256
    n_layers: int = 6
    n_heads: int = 8
    head_dim: int = 32
    d_ff: int = 704
    vocab: int = 2048

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def step_flop(self) -> float:
        """Products of one step, forward and backward (twice the forward)."""
        heads = self.n_heads * self.head_dim
        layer = 4 * self.d_model * heads + 3 * self.d_model * self.d_ff
        products = self.n_layers * layer + self.d_model * self.vocab
        attention = self.n_layers * self.length * heads
        return 6.0 * self.tokens * (products + attention)


class Kernels(NamedTuple):
    """The four functions in which the variants differ; each already knows its dtype."""

    dense: Callable[[Array, Array], Array]
    swiglu: Callable[[Array, Array], Array]
    attention: Callable[[Array, Array, Array, Array], Array]  # q, k, v (B,T,N,H), segments (B,T)
    loss: Callable[[Array, Array, Array], Array]  # x (tokens, D), w (D, V), targets: mean nll


def fast_kernels(shape: Shape, dtype: Any, module: Any = cpu_kernels) -> Kernels:
    def loss(x: Array, w: Array, targets: Array) -> Array:
        weights = jnp.ones(targets.shape, jnp.float32)
        total, _ = module.cross_entropy(x, w, targets, weights, dtype=dtype, chunk=2048)
        return total / targets.size

    scale = shape.head_dim**-0.5
    return Kernels(
        lambda x, w: module.dense(x, w, dtype),
        lambda gate, up: module.swiglu(gate, up, dtype),
        functools.partial(module.causal_attention, scale=scale, dtype=dtype),
        loss,
    )


def naive_kernels(shape: Shape, dtype: Any) -> Kernels:
    def attention(q: Array, k: Array, v: Array, segments: Array) -> Array:
        scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * shape.head_dim**-0.5
        causal = jnp.tril(jnp.ones((shape.length, shape.length), bool))
        seen = causal & (segments[:, None, :, None] == segments[:, None, None, :])
        p = jax.nn.softmax(jnp.where(seen, scores, -1e30))
        return jnp.einsum("bnts,bsnh->btnh", p.astype(dtype), v)

    def loss(x: Array, w: Array, targets: Array) -> Array:
        logits = jnp.einsum("td,dv->tv", x, w.astype(dtype)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return Kernels(
        lambda x, w: jnp.einsum("...d,df->...f", x.astype(dtype), w.astype(dtype)),
        lambda gate, up: jax.nn.silu(gate) * up,
        attention,
        loss,
    )


def init_params(shape: Shape) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*size: int) -> Array:
        return jnp.asarray(rng.normal(size=size) * 0.02, jnp.float32)

    d, f, heads = shape.d_model, shape.d_ff, shape.n_heads * shape.head_dim
    layers = [
        {
            "norm": [jnp.ones(d), jnp.ones(d)],
            "qkv": [normal(d, heads) for _ in range(3)],
            "out": normal(heads, d),
            "gate": normal(d, f),
            "up": normal(d, f),
            "down": normal(f, d),
        }
        for _ in range(shape.n_layers)
    ]
    return {
        "embedding": normal(shape.vocab, d),
        "layers": layers,
        "norm": jnp.ones(d),
        "head": normal(d, shape.vocab),
    }


def rms_norm(x: Array, weight: Array) -> Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * weight


def rope(x_BTNH: Array, theta: float = 500_000.0) -> Array:
    t, h = x_BTNH.shape[1], x_BTNH.shape[3]
    angle = np.arange(t)[:, None] * theta ** (-np.arange(0, h, 2) / h)
    cos, sin = (jnp.asarray(f(angle), jnp.float32)[:, None] for f in (np.cos, np.sin))
    a, b = jnp.split(x_BTNH, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)


def forward_loss(params: dict, tokens: Array, kernels: Kernels, shape: Shape) -> Array:
    targets, segments = jnp.roll(tokens, -1, 1), jnp.ones(tokens.shape, jnp.int32)
    heads = (*tokens.shape, shape.n_heads, shape.head_dim)
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        h = rms_norm(x, layer["norm"][0])
        q, k, v = (kernels.dense(h, w).reshape(heads) for w in layer["qkv"])
        o = kernels.attention(rope(q), rope(k), v, segments).reshape(*tokens.shape, -1)
        x = x + kernels.dense(o, layer["out"])
        h = rms_norm(x, layer["norm"][1])
        a = kernels.swiglu(kernels.dense(h, layer["gate"]), kernels.dense(h, layer["up"]))
        x = x + kernels.dense(a, layer["down"])
    x = rms_norm(x, params["norm"]).reshape(shape.tokens, shape.d_model)
    return kernels.loss(x, params["head"], targets.reshape(-1))


def transformer_step(shape: Shape, kernels: Kernels) -> Callable[[], Any]:
    """A call that runs one training step and returns its loss; state is kept inside."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.95, weight_decay=0.1)
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: tuple, tokens: Array) -> tuple[tuple, Array]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(forward_loss)(params, tokens, kernels, shape)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    params = init_params(shape)
    held = {"state": (params, optimizer.init(params))}
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, shape.vocab, (shape.batch, shape.length)), jnp.int32)

    def run() -> Array:
        held["state"], loss = step(held["state"], tokens)
        return loss

    return run


def product(shape: Shape, dtype: Any) -> Callable[[], Any]:
    """The model's main product, tokens x D times D x F, from stored inputs to a float32 result."""
    x = jnp.ones((shape.tokens, shape.d_model), dtype)
    w = jnp.ones((shape.d_model, shape.d_ff), dtype)
    dot = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))
    return lambda: dot(x, w)


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2, inner: int = 1
) -> dict[str, list[float]]:
    """Seconds a call, `repeats` figures for each run: one of each in turn, then again.

    A figure is the mean of `inner` calls, for runs too short for the clock.
    """
    for run in runs.values():
        for _ in range(warmup):
            jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(inner):
                jax.block_until_ready(run())
            times[name].append((time.perf_counter() - start) / inner)
    return times


def row(name: str, seconds: list[float], flop: float, tokens: int | None) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "name": name,
        "median_ms": round(1e3 * median, 3),
        "min_ms": round(1e3 * min(seconds), 3),
        "max_ms": round(1e3 * max(seconds), 3),
        "gflop_per_s": round(flop / median / 1e9, 1),
        "tokens_per_s": None if tokens is None else round(tokens / median),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'':24}{'median ms':>11}{'min':>9}{'max':>9}{'GFLOP/s':>10}{'tokens/s':>10}")
    for r in rows:
        print(
            f"{r['name']:24}{r['median_ms']:11.2f}{r['min_ms']:9.2f}{r['max_ms']:9.2f}"
            f"{r['gflop_per_s']:10.0f}{r['tokens_per_s'] or '':>10}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    cpu_kernels.keep_freed_memory()  # before any step, so that both variants have it
    shape = Shape()
    dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

    flop = 2.0 * shape.tokens * shape.d_model * shape.d_ff
    products = {f"product {name}": product(shape, dtype) for name, dtype in dtypes.items()}
    times = time_interleaved(products, args.repeats, inner=20)
    rows = [row(name, seconds, flop, None) for name, seconds in times.items()]

    steps = {}
    for name, dtype in dtypes.items():
        for kind, kernels in (("naive", naive_kernels), ("kernels", fast_kernels)):
            steps[f"step {name} {kind}"] = transformer_step(shape, kernels(shape, dtype))
    times = time_interleaved(steps, args.repeats)
    rows += [row(name, s, shape.step_flop(), shape.tokens) for name, s in times.items()]
    print_table(rows)
    if args.json:
        machine = {"platform": platform.platform(), "jax": jax.__version__}
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "shape": asdict(shape), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
