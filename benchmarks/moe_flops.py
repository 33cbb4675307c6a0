"""Compare the compiled FLOPs of a mixture-of-experts step to those of its active parameters.

    python -m benchmarks.moe_flops [--topology gpu:4] [--out bench/moe_flops]

The step is compiled ahead of time and never runs: "gpu:4" is compiled by XLA for CPUs, as is any
device but a TPU; "v5e:2x2" is compiled by libtpu (`pip install -e ".[tpu]"`). The reference follows
the convention of `mea_jax.model.flops`, plus the half of attention's pairs that the mask hides if
attention is a plain einsum. The model has two layers of D 512 with 32 experts of width 256, 4 per
token.
"""

import argparse
import dataclasses
import sys
from typing import Any

from mea_jax.plan import target as targets

LENGTH, BATCH = 1024, 16
MESHES: dict[str, dict[str, int]] = {
    "data 4": {"data": 4},
    "fsdp 4": {"data": 1, "fsdp": 4},
    "fsdp 2 x expert 2": {"data": 1, "fsdp": 2, "expert": 2},
    "expert 4": {"data": 1, "expert": 4},
}


def row(name: str, mesh: dict[str, int], target: Any, remat: str = "none") -> dict[str, Any]:
    """Compile one step and return its table row, with "ratio" and "gflop" over all devices."""
    from mea_jax.config.schema import DataConfig, MeshConfig, ModelConfig, TrainConfig
    from mea_jax.model import flops
    from mea_jax.plan.programs import train_program

    model = ModelConfig(
        vocab_size=8192,
        d_model=512,
        n_layers=2,
        n_heads=8,
        n_kv_heads=8,
        head_dim=64,
        n_experts=32,
        experts_per_token=4,
        d_expert=256,
        remat=remat,
    )
    config = TrainConfig(
        batch_size=BATCH,
        model=model,
        data=DataConfig(context_length=LENGTH),
        mesh=dataclasses.replace(MeshConfig(), **mesh),
    )
    compiled = train_program(config, target)
    m = compiled.config.model
    useful = flops.step_flops(m, LENGTH, BATCH * LENGTH)
    if m.attention_kernel == "einsum":
        useful += 3 * m.n_layers * 2 * 2 * BATCH * LENGTH**2 / 2 * m.n_heads * m.head_dim
    moved = sum(
        c.nbytes * c.times for c in compiled.costs.collectives if "mlp/shard_map" in c.source
    )
    return {
        "name": name,
        "ratio": compiled.costs.flops * compiled.mesh.size / useful,
        "gflop": useful / 1e9,
        "moved_mb": moved / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--topology", default="gpu:4", help="must have 4 devices")
    parser.add_argument(
        "--out", default="bench/moe_flops", help="path of the .json, without suffix"
    )
    args = parser.parse_args()
    targets.prepare_environment(args.topology)  # before jax is imported
    from benchmarks.harness import print_table, write_json
    from mea_jax.errors import UserError, fail

    try:
        target = targets.find(args.topology)
        rows = [row(name, mesh, target) for name, mesh in MESHES.items()]
        rows.append(row("data 4, remat dots", MESHES["data 4"], target, "dots"))
    except UserError as error:
        fail(error)
    columns = {
        "name": (args.topology, "s"),
        "gflop": ("GFLOP of active parameters", ".1f"),
        "ratio": ("compiled, ratio", ".3f"),
        "moved_mb": ("MB per device in the experts' collectives", ".1f"),
    }
    print_table(rows, columns)
    write_json(f"{args.out}.json", rows)
    print(f"\n{args.out}.json", file=sys.stderr)


if __name__ == "__main__":
    main()
