"""Plan a step for a machine that need not exist here: memory, FLOPs, bytes, collectives, time.

python -m mea_jax.plan --config configs/mea_1b.py --topology v5p:4x4x4
python -m mea_jax.plan --config configs/mea_1b.py --topology v5e:16x16 --sweep
python -m mea_jax.plan --config configs/mea_1b.py --topology v6e:1x1 --step decode --batch 16
"""

import re
import sys

from mea_jax.plan import target


def _topology(argv: list[str]) -> str:
    """Return the value of --topology, before jax is imported and reads its environment."""
    for i, argument in enumerate(argv):
        if found := re.fullmatch(r"--?topology=(.*)", argument):
            return found.group(1)
        if argument in ("--topology", "-topology") and i + 1 < len(argv):
            return argv[i + 1]
    return "local"


if __name__ == "__main__":
    target.prepare_environment(_topology(sys.argv))
    from absl import flags

    from mea_jax import cli
    from mea_jax.plan import run

    flags.adopt_module_key_flags(run)
    cli.run(run.main, interrupted="stopped; nothing was written")
