r"""Compress the KV cache of a trained model: find fewer key and value heads, without training.

python -m mea_jax.compress --checkpoint runs/quickstart --keep 0.5 --out runs/half
python -m mea_jax.compress --checkpoint runs/quickstart --keep 0.5 --budget measured \
    --repair layerwise --out runs/half
"""

import sys
from pathlib import Path

import jax
from absl import flags

from mea_jax import cli
from mea_jax.compress import budgets, damage, methods, repair
from mea_jax.compress.options import Options
from mea_jax.compress.run import compress
from mea_jax.errors import UserError


def main() -> None:
    """Run the command."""
    if CHECKPOINT.value is None or OUT.value is None:
        raise UserError(
            "--checkpoint or --out is missing: give both, such as --checkpoint runs/quickstart "
            "--out runs/half"
        )
    values = flags.FLAGS.flag_values_dict()
    options = Options(**{name: values[name] for name in Options.__dataclass_fields__})
    cli.enable_compilation_cache()
    if not options.calibration_tokens:
        print("no calibration text: the methods use the weights only", file=sys.stderr)
    measurements = Path(MEASUREMENTS.value) if MEASUREMENTS.value else None
    summary = compress(Path(CHECKPOINT.value), Path(OUT.value), options, measurements)
    print(damage.table(summary))
    print(f"\nverdict       {damage.verdict(summary)}")
    print(f"run directory {OUT.value}, contains compression.json and compression.png")
    print(f"devices       {len(jax.devices())} x {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_string(
        "checkpoint", None, "run directory, or one of its checkpoint steps"
    )
    OUT = flags.DEFINE_string("out", None, "new run directory for the compressed model")
    MEASUREMENTS = flags.DEFINE_string(
        "measurements", None, "folder for measurements of the original, shared by compressions"
    )
    flags.DEFINE_float("keep", Options.keep, "share of the cache to keep in the chosen layers")
    flags.DEFINE_enum("method", Options.method, methods.METHODS, "how heads are rebuilt")
    flags.DEFINE_enum(
        "budget",
        Options.budget,
        budgets.BUDGETS,
        "how the cache is divided over layers, keys and values",
    )
    flags.DEFINE_string(
        "layers", "full", "layers to compress: full, deep, half (as in the paper), or 2,4-7"
    )
    flags.DEFINE_enum(
        "repair", Options.repair, repair.REPAIRS, "what is fitted to the original model"
    )
    flags.DEFINE_integer(
        "repair_steps",
        repair.STEPS,
        "steps for each layer, with --repair layerwise or blockwise",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "repair_tokens",
        0,
        "tokens of training text for --repair; 0: as many as --calibration_tokens",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "calibration_tokens",
        Options.calibration_tokens,
        "tokens of training text for calibration; 0: use the weights only",
        lower_bound=0,
    )
    flags.DEFINE_string(
        "calibration_source",
        "",
        "other calibration text, such as jsonl:FILE,text:FOLDER, in equal parts",
    )
    flags.DEFINE_string(
        "held_out_source",
        "",
        "other text to measure the loss on, such as jsonl:FILE,text:FOLDER; a row for each",
    )
    flags.DEFINE_integer(
        "measure_tokens",
        Options.measure_tokens,
        "tokens on which --budget measured or repaired tries each layer",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "held_out_tokens",
        Options.held_out_tokens,
        "maximum number of held-out tokens on which the loss is compared",
        lower_bound=1,
    )
    flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "dtype of matrix products")
    flags.DEFINE_integer("seed", 0, "seed for the choice of calibration text")
    cli.run(main, "stopped; run the same command again to continue")
