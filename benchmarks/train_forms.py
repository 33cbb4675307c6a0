"""Measure MEA's cost in training: MHA against MEA with explicit and folded mixing.

    python -m benchmarks.train_forms [--repeats 9] [--out bench/train_forms]
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.train_forms --topology v5e:2x2

The first command times complete training steps (forward, backward, AdamW) and only the loss with
its gradient, interleaved in one process on the local device; ratios are within a round. The second
compiles one layer's attention, forward and backward, for a TPU that need not be present, and
reports the bytes that the compiler counts: with plain einsums, and with the splash kernel. The
splash kernel moves fewer bytes, so the same extra bytes are a larger share.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.harness import bars, print_table, ratios, spread, time_interleaved, write_json
from mea_jax.config.schema import ModelConfig, OptimizerConfig, Side, TrainConfig
from mea_jax.model.attention import Attention
from mea_jax.model.context import Context
from mea_jax.model.params import abstract_params
from mea_jax.model.transformer import rope_of
from mea_jax.ops.resolve import resolve
from mea_jax.parallel import sharding, topology
from mea_jax.parallel.host import keep_freed_memory
from mea_jax.train.step import batch_loss, compile_train_step, create_state

# The prototype's two shapes (D, L, N, F), with heads of width 32 and 64 and 8 x 256 positions.
SHAPES: dict[str, dict[str, Any]] = {
    "D 256, 6 layers": {"d_model": 256, "n_layers": 6, "n_heads": 8, "head_dim": 32, "d_ff": 704},
    "D 512, 4 layers": {"d_model": 512, "n_layers": 4, "n_heads": 8, "head_dim": 64, "d_ff": 1408},
}
BATCH, LENGTH, VOCAB = 8, 256, 2048
MHA = "MHA"


def forms(shape: dict[str, Any], **options: Any) -> dict[str, ModelConfig]:
    """Return MHA, MHA with head norm, and MEA with C = K = N in both training forms."""
    base = ModelConfig(
        vocab_size=VOCAB,
        n_kv_heads=shape["n_heads"],
        tie_embeddings=False,
        scan_unroll=shape["n_layers"],
        loss_chunk=0,
        **shape,
        **options,
    )
    plain = dataclasses.replace(base, hlc="none")
    return {
        MHA: dataclasses.replace(plain, head_norm=False),
        "head norm alone": plain,
        "MEA folded": dataclasses.replace(base, hlc_form="folded"),
        "MEA explicit": dataclasses.replace(base, hlc_form="explicit"),
    }


def runs_of(model: ModelConfig) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return functions that run a complete training step, and the loss with its gradient."""
    config = TrainConfig(
        batch_size=BATCH, model=model, optimizer=OptimizerConfig(learning_rate=1e-3)
    )
    mesh = sharding.make_mesh(config.mesh)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH), np.int32)
    fields = {
        "inputs": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
    }
    where = sharding.batch_sharding(mesh)
    batch = {name: jax.device_put(x, where) for name, x in fields.items()}
    with jax.set_mesh(mesh):
        state = create_state(config, mesh)
        params = jax.tree.map(jnp.copy, state.params)
        step = compile_train_step(config, mesh).lower(state, batch).compile()
        gradient = (
            jax.jit(jax.value_and_grad(lambda p, b: batch_loss(config, p, b)[0]))
            .lower(params, batch)
            .compile()
        )
    held = {"state": state}

    def run_step() -> jax.Array:
        held["state"], metrics = step(held["state"], batch)
        return metrics["loss"]

    return run_step, lambda: gradient(params, batch)


def timed(repeats: int) -> list[dict[str, Any]]:
    devices, rows = jax.devices(), []
    for label, shape in SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            models = {
                name: resolve(model, devices, LENGTH)
                for name, model in forms(shape, dtype=dtype).items()
            }
            runs = {name: runs_of(model) for name, model in models.items()}
            for part, index in (("training step", 0), ("loss and gradient", 1)):
                times = time_interleaved({n: r[index] for n, r in runs.items()}, repeats)
                for name, over in ratios(times, MHA).items():
                    rows.append(
                        {
                            "what": f"{label}, {dtype}: {part}",
                            "name": name,
                            **spread(times[name]),
                            "over_mha": round(statistics.median(over), 4),
                            "over_mha_min": round(min(over), 4),
                            "over_mha_max": round(max(over), 4),
                        }
                    )
                print_rows(rows[-len(models) :])
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['what']}")
    columns = {
        "name": ("", "s"),
        "median_ms": ("ms", ".1f"),
        "min_ms": ("min", ".1f"),
        "max_ms": ("max", ".1f"),
        "over_mha": ("over MHA", ".3f"),
        "over_mha_min": ("min", ".3f"),
        "over_mha_max": ("max", ".3f"),
    }
    print_table(rows, columns)


# The reference layer: B 8, T 2048, D 2048, N = K, H 128, one layer's attention.
TPU_SHAPE: dict[str, Any] = {
    "d_model": 2048,
    "n_layers": 1,
    "n_heads": 16,
    "head_dim": 128,
    "d_ff": 8192,
}
TPU_BATCH, TPU_LENGTH = 8, 2048


def tpu_models(kernel: str) -> dict[str, tuple[ModelConfig, str]]:
    """Return a map from name to (model, name of its baseline)."""
    shared = {"dtype": "bfloat16", "backend": "xla", "attention_kernel": kernel}
    models = {name: (model, MHA) for name, model in forms(TPU_SHAPE, **shared).items()}
    base = models["MEA folded"][0]
    grouped = dataclasses.replace(base, n_heads=32, n_kv_heads=8, head_dim=64)
    half = dataclasses.replace(grouped, key_components=4, value_components=4)
    models["GQA, K 8"] = (dataclasses.replace(grouped, hlc="none", head_norm=False), "GQA, K 8")
    for form in ("folded", "explicit"):
        model = dataclasses.replace(half, hlc_form=form)
        models[f"MEA {form}, K 8, C 4"] = (model, "GQA, K 8")
    return models


def compiled_bytes(topology_name: str) -> list[dict[str, Any]]:
    """Return the TPU compiler's count of bytes of one layer's attention and its gradients."""
    where = SingleDeviceSharding(topology.describe(topology_name)[0])
    rows: list[dict[str, Any]] = []
    for kernel in ("einsum", "splash"):
        gbytes = {}
        for name, (model, base) in tpu_models(kernel).items():
            cost = layer_gradient(model, where).cost_analysis()
            gbytes[name] = cost["bytes accessed"] / 1e9
            rows.append(
                {
                    "kernel": kernel,
                    "name": name,
                    "gbytes": gbytes[name],
                    "tflops": cost["flops"] / 1e12,
                    "over_base": gbytes[name] / gbytes[base],
                }
            )
    print(f"\nOne layer's attention, forward and backward, compiled for {topology_name}:")
    columns = {
        "kernel": ("attention", "s"),
        "name": ("", "s"),
        "gbytes": ("GB accessed", ".3f"),
        "tflops": ("TFLOPs", ".3f"),
        "over_base": ("bytes over MHA / GQA", ".3f"),
    }
    print_table(rows, columns)
    return rows


def layer_gradient(model: ModelConfig, where: SingleDeviceSharding) -> Any:
    """Compile the gradient of one attention layer of `model`."""
    components = model.components(Side.KEY)[0], model.components(Side.VALUE)[0]
    stacked = abstract_params(model)["layers_0"]["attention"]
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=where), stacked
    )
    shape = (TPU_BATCH, TPU_LENGTH)
    x_BTD = jax.ShapeDtypeStruct((*shape, model.d_model), jnp.bfloat16, sharding=where)
    ids_BT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)

    def loss(params, x_BTD, positions_BT, ids_BT, weight_BTD):
        context = Context(ids_BT, rope_of(model, positions_BT))
        layer = Attention(model, *components)
        out_BTD, _ = layer.apply({"params": params}, x_BTD, context, 0)
        return jnp.vdot(out_BTD.astype(jnp.float32), weight_BTD.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return gradient.lower(params, x_BTD, ids_BT, ids_BT, x_BTD).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--out", default="bench/train_forms", help="path of the .json and .png, without suffix"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--topology", help="count bytes for this TPU instead, such as v5e:2x2")
    args = parser.parse_args()
    if args.topology:
        write_json(
            f"{args.out}_{args.topology.replace(':', '_')}.json", compiled_bytes(args.topology)
        )
        return
    if jax.devices()[0].platform == "cpu":
        keep_freed_memory()
    rows = timed(args.repeats)
    write_json(f"{args.out}.json", rows)
    steps = [r for r in rows if r["what"].endswith("training step") and r["name"] != MHA]
    bars(
        f"{args.out}.png",
        {
            f"{r['name']}\n{r['what'].removesuffix(': training step')}": [
                r["over_mha_min"],
                r["over_mha"],
                r["over_mha_max"],
            ]
            for r in steps
        },
        title="Time of a training step relative to MHA",
        x="ratio of interleaved wall times (median, minimum, maximum)",
        base=1.0,
    )
    print(f"\n{args.out}.json and {args.out}.png")


if __name__ == "__main__":
    main()
