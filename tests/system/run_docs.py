"""Runs what a page of documentation tells its reader to type.

    python -m tests.system.run_docs FILE

Indented blocks that begin with `python` or `pip` are a shell's, one command each that ends where no
line goes on (a backslash, a here-document). They run from the page's top to its end, in a copy of
the files that git knows, so that nothing is left behind. Skipped are installations and benchmarks,
which take their time; `--list` prints the commands only.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.paths import ROOT

SKIPPED = ("pip ", "python -m pip", "python -m benchmarks.", "python -m pytest")


def blocks(text: str) -> Iterator[list[str]]:
    """Indented blocks of a Markdown page, without their indentation."""
    for block in re.findall(r"(?:^ {4}.*\n|^\s*\n(?= {4}))+", text, flags=re.MULTILINE):
        yield [line[4:] for line in block.splitlines()]


def commands(text: str) -> Iterator[str]:
    """Every command of a page that a shell runs."""
    for lines in blocks(text):
        left = iter(lines)
        for line in left:
            if not line.startswith(("python ", "pip ")):
                continue
            words = [line]
            while words[-1].endswith("\\"):
                words.append(next(left))
            if here := re.search(r"<<'?(\w+)'?", words[-1]):
                while words[-1] != here[1]:
                    words.append(next(left))
            yield "\n".join(words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    typed = [c for page in asked.pages for c in commands(page.read_text())]
    typed = [c for c in typed if not c.startswith(SKIPPED)]
    if asked.list:
        print("\n".join(typed))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        copy = "git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - | "
        copy += f"tar -xf - -C {shlex.quote(folder)}"
        subprocess.run(["bash", "-o", "pipefail", "-c", copy], cwd=ROOT, check=True)
        env = os.environ | {"PYTHONPATH": folder}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        for command in typed:
            print(f"$ {command}", flush=True)
            began = time.monotonic()
            done = subprocess.run(["bash", "-c", command], cwd=folder, env=env)
            if done.returncode:
                print(f"status {done.returncode}: the command above fails", file=sys.stderr)
                return 1
            print(f"({time.monotonic() - began:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
