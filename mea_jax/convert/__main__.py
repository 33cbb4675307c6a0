"""Models of Hugging Face transformers in, and out again.

    python -m mea_jax.convert from_hf --model Qwen3-0.6B --out runs/qwen3
    python -m mea_jax.convert to_hf --checkpoint runs/qwen3 --out exported/qwen3

Each word is a module of `mea_jax.convert` and has its own --help.
"""

import runpy
import sys

from mea_jax.errors import fail, nearest

COMMANDS = ("from_hf", "to_hf")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        print(f"commands: {', '.join(COMMANDS)}")
        sys.exit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
    command = sys.argv.pop(1)
    if command not in COMMANDS:
        fail(f"convert {command}: {nearest(command, COMMANDS)}")
    runpy.run_module(f"mea_jax.convert.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
