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
from mea_jax.compress import damage, option_flags
from mea_jax.compress.run import compress
from mea_jax.errors import UserError


def main() -> None:
    """Run the command."""
    if CHECKPOINT.value is None or OUT.value is None:
        raise UserError(
            "--checkpoint or --out is missing: give both, such as --checkpoint runs/quickstart "
            "--out runs/half"
        )
    options = option_flags.options()
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
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, option_flags.CHECKPOINT)
    OUT = flags.DEFINE_string("out", None, "new run directory for the compressed model")
    MEASUREMENTS = flags.DEFINE_string("measurements", None, option_flags.MEASUREMENTS)
    option_flags.define()
    cli.run(main, "stopped; run the same command again to continue")
