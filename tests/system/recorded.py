"""Compare the installed packages with the recorded set: `python -m tests.system.recorded`.

The command prints each installed package whose version differs from constraints/PYTHON.txt, and
exits 0: newer versions are expected, and the tests decide whether they work.
`python -m tests.system.recorded --freeze` prints the installed packages in the format of that file.
"""

import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.paths import ROOT

FOLDER = ROOT / "constraints"
# Packages that every environment contains, which are not recorded.
_IGNORED = {"mea-jax", "pip"}


def requirements() -> Iterator[tuple[str, Requirement]]:
    """Yield (group, requirement) of pyproject.toml, without requirements on its own extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = {"build": project["build-system"]["requires"]}
    groups |= {"dependencies": project["project"]["dependencies"]}
    groups |= project["project"]["optional-dependencies"]
    for group, lines in groups.items():
        for line in lines:
            if (requirement := Requirement(line)).name != project["project"]["name"]:
                yield group, requirement


def recorded(path: Path) -> dict[str, Version]:
    """Return the versions that a constraints file pins, by canonical name."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    pins = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): Version(version) for name, version in pins}


def installed() -> dict[str, Version]:
    """Return the public versions of all installed packages, by canonical name."""
    found = {
        canonicalize_name(package.name): Version(Version(package.version).public)
        for package in metadata.distributions()
    }
    return {name: version for name, version in sorted(found.items()) if name not in _IGNORED}


def differences(here: dict[str, Version], there: dict[str, Version]) -> list[str]:
    """Return a line for each package whose versions in `here` and `there` differ."""
    return [
        f"{name}: {here.get(name, 'none')} installed, {there.get(name, 'none')} recorded"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]


def main() -> None:
    if sys.argv[1:] == ["--freeze"]:
        print(*(f"{name}=={version}" for name, version in installed().items()), sep="\n")
        return
    path = FOLDER / f"{sys.version_info.major}.{sys.version_info.minor}.txt"
    if not path.exists():
        print(f"no set of packages is recorded for this Python: there is no {path}")
        return
    here = installed()
    there = {name: version for name, version in recorded(path).items() if name in here}
    lines = differences(here, there)
    print(f"packages that differ from constraints/{path.name}: {len(lines)}", *lines, sep="\n  ")


if __name__ == "__main__":
    main()
