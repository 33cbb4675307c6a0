"""Studies of learning rates and sizes, and of what trained models have learned.

    python -m mea_jax.study run --config configs/lr_study.py
    python -m mea_jax.study report --store runs/lr_study
    python -m mea_jax.study heads --checkpoint runs/quickstart

Each word is a module of `mea_jax.study` and has its own --help.
"""

import runpy
import sys

from mea_jax.errors import fail, nearest

COMMANDS = (
    "run",
    "fit",
    "report",
    "heads",
    "compression",
    "compression_figures",
    "recovery",
    "texts",
    "halve",
)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        print(f"commands: {', '.join(COMMANDS)}")
        sys.exit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
    command = sys.argv.pop(1)
    if command not in COMMANDS:
        fail(f"study {command}: {nearest(command, COMMANDS)}")
    runpy.run_module(f"mea_jax.study.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
