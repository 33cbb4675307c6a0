"""Commands of two words: `mea_jax.study report`, `mea_jax.convert to_hf`."""

import runpy
import sys
from collections.abc import Sequence

from mea_jax.errors import fail, nearest


def run_word(package: str, commands: Sequence[str], about: str | None) -> None:
    """Runs the module of `mea_jax.<package>` that the first argument names.

    Without one, or with --help, prints `about` and the commands; an unknown one is an error of one
    line. Flags are the module's own: nothing else of the package is imported.
    """
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(about)
        print(f"commands: {', '.join(commands)}")
        sys.exit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
    command = sys.argv.pop(1)
    if command not in commands:
        fail(f"{package} {command}: {nearest(command, commands)}")
    runpy.run_module(f"mea_jax.{package}.{command}", run_name="__main__", alter_sys=True)
