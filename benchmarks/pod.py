"""Plan pod runs with the TPU compiler: memory, bottleneck, cost of MEA, compile time, loss memory.

    python -m benchmarks.pod [--only fit,mea,depth,loss] [--out bench/pod]

Four tables, each compiled ahead of time by libtpu (`pip install -e ".[tpu]"`); no TPU is needed.

- fit: configs/mea_1b.py at the paper's batch on two pods: memory, bottleneck, time.
- mea: MEA, folded and explicit, against plain attention of the same shape on fsdp x tensor.
- depth: seconds to compile 8 and 64 layers.
- loss: memory of the step with vocabularies of 32,000 and 128,256 tokens at 8,192 positions.
"""

import argparse
import sys
from typing import Any

from mea_jax.plan import target as targets

PODS: dict[str, dict[str, Any]] = {
    # One window per replica at a time on v5e, whose chips have a sixth of v5p's memory.
    "v5p:4x4x4": {"mesh.fsdp": 64},
    "v5e:16x16": {"mesh.fsdp": 128, "mesh.tensor": 2},
}


def config_of(variant: str, changes: dict[str, Any]) -> Any:
    """Return the validated config of configs/mea_1b.py with some keys changed."""
    import importlib.util

    from mea_jax.config.parse import from_config_dict

    spec = importlib.util.spec_from_file_location("mea_1b", "configs/mea_1b.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    config.update_from_flattened_dict(changes)
    return from_config_dict(config)


def planned(config: Any, target: targets.Target) -> dict[str, Any]:
    from mea_jax.plan import output
    from mea_jax.plan.programs import train_program
    from mea_jax.plan.roofline import roofline

    compiled = train_program(config, target)
    tokens = config.batch_size * config.data.context_length
    roof = roofline(compiled, target)
    return output.summary(compiled, target, roof, "train", tokens, compiled.mesh.size)


def fit() -> list[dict[str, Any]]:
    rows = []
    for name, changes in PODS.items():
        plan = planned(config_of("", changes), targets.find(name))
        rows.append(
            {
                "name": name,
                "mesh": " x ".join(f"{a} {n}" for a, n in plan["mesh"].items() if n > 1),
                "peak_gb": plan["bytes_per_device"]["peak"] / 1e9,
                "free": 1 - plan["bytes_per_device"]["peak"] / plan["memory_per_device"],
                **{part: s for part, s in plan["seconds"].items() if s is not None},
                "binds": plan["binds"],
                "mfu": plan["mfu_upper_bound"],
                "days": plan["days"],
            }
        )
    print("\nmea_1b, 19.9M tokens per step")
    show(
        rows,
        {
            "name": ("", "s"),
            "mesh": ("mesh", "s"),
            "peak_gb": ("GB per device", ".2f"),
            "free": ("free", ".1%"),
            "compute": ("compute s", ".2f"),
            "HBM": ("HBM s", ".2f"),
            "ICI": ("ICI s", ".2f"),
            "compute_by_cycles": ("by cycles s", ".2f"),
            "binds": ("binds", "s"),
            "mfu": ("MFU at most", ".1%"),
            "days": ("days at least", ".1f"),
        },
    )
    return rows


# A step with one window of 8,192 positions per device.
ONE_WINDOW = {"batch_size": 16, "accumulate": 1, "mesh.fsdp": 16, "mesh.tensor": 1}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain attention": ("gqa", {}),
    "MEA, folded": ("", {"model.hlc_form": "folded"}),
    "MEA, explicit": ("", {"model.hlc_form": "explicit"}),
}


RATIOS = ("tflop", "accessed_gb", "hbm_gb", "wire_gb", "cycles")


def mea() -> list[dict[str, Any]]:
    """Compile on fsdp 4 x tensor 4, with one window of 8,192 positions per replica."""
    rows = []
    for name, (variant, changes) in FORMS.items():
        config = config_of(
            variant, ONE_WINDOW | {"batch_size": 4, "mesh.fsdp": 4, "mesh.tensor": 4} | changes
        )
        plan = planned(config, targets.find("v5e:4x4"))
        rows.append(
            {
                "name": name,
                "tflop": plan["flops_per_device"] / 1e12,
                "accessed_gb": plan["bytes_accessed_per_device"] / 1e9,
                "hbm_gb": plan["hbm_bytes_per_device"] / 1e9,
                "wire_gb": plan["collective_bytes_per_device"] / 1e9,
                "cycles": plan["seconds"]["compute_by_cycles"],
            }
        )
    base = rows[0]
    for row in rows:
        row |= {f"{k}_ratio": row[k] / base[k] for k in RATIOS}
    print("\nMEA against plain attention: mea_1b's shape, v5e:4x4, fsdp 4 x tensor 4, 4 windows")
    show(
        rows,
        {
            "name": ("", "s"),
            "tflop": ("TFLOP per device", ".3f"),
            "tflop_ratio": ("ratio", ".4f"),
            "accessed_gb": ("GB accessed", ".2f"),
            "accessed_gb_ratio": ("ratio", ".4f"),
            "hbm_gb": ("HBM GB", ".2f"),
            "hbm_gb_ratio": ("ratio", ".4f"),
            "wire_gb": ("collectives GB", ".3f"),
            "wire_gb_ratio": ("ratio", ".4f"),
            "cycles_ratio": ("compiler's cycles, ratio", ".4f"),
        },
    )
    return rows


def depth() -> list[dict[str, Any]]:
    rows = []
    for layers in (8, 64, 8, 64):
        config = config_of("", ONE_WINDOW | {"model.n_layers": layers, "model.remat": "full"})
        plan = planned(config, targets.find("v5e:4x4"))
        rows.append({"name": f"{layers} layers", "seconds": plan["compile_seconds"]})
    print("\nSeconds to compile the step (each twice)")
    show(rows, {"name": ("", "s"), "seconds": ("s", ".1f")})
    return rows


def loss() -> list[dict[str, Any]]:
    """Compile one window per device with 2 layers, so that the loss dominates memory."""
    rows = []
    for words in (32_000, 128_256):
        config = config_of("", ONE_WINDOW | {"model.n_layers": 2, "model.vocab_size": words})
        plan = planned(config, targets.find("v5e:4x4"))
        argument_bytes = plan["bytes_per_device"]
        # The complete unembedding in bfloat16 and its float32 gradient have the parameters' size.
        whole = words * config.model.d_model * (2 + 4)
        rows.append(
            {
                "name": f"{words:,} words",
                "temporaries_gb": argument_bytes["temporaries"] / 1e9,
                "apart_gb": (argument_bytes["temporaries"] - whole) / 1e9,
            }
        )
    print("\nTemporaries of a step at 8,192 positions, one window per device, 2 layers")
    show(
        rows,
        {
            "name": ("", "s"),
            "temporaries_gb": ("GB", ".3f"),
            "apart_gb": ("GB without the unembedding and its gradient", ".3f"),
        },
    )
    return rows


def show(rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> None:
    from benchmarks.harness import print_table

    print_table(rows, columns)


def main() -> None:
    targets.prepare_environment("v5e:4x4")  # before jax is imported
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", default="bench/pod", help="path of the .json, without suffix")
    parser.add_argument("--only", default="fit,mea,depth,loss")
    args = parser.parse_args()
    from benchmarks.harness import write_json
    from mea_jax.errors import UserError, fail

    tables = {"fit": fit, "mea": mea, "depth": depth, "loss": loss}
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(tables):
        fail(UserError(f"--only {','.join(unknown)}: choose from {', '.join(tables)}"))
    try:
        rows = {name: tables[name]() for name in wanted}
    except UserError as error:
        fail(error)
    write_json(f"{args.out}.json", [{"table": name} | row for name in rows for row in rows[name]])
    print(f"\n{args.out}.json", file=sys.stderr)


if __name__ == "__main__":
    main()
