"""Every dependency has an upper bound, and the recorded package sets are within the bounds."""

import re
import sys

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.system.recorded import FOLDER, ROOT, differences, main, recorded, requirements

FILES = sorted(FOLDER.glob("*.txt"))
# Groups that the recorded sets do not contain: the tests do not install Beam.
ELSEWHERE = {"beam"}


def test_sets_are_recorded_for_the_oldest_and_the_newest_python():
    assert [file.stem for file in FILES] == ["3.11", "3.13"]


@pytest.mark.parametrize(
    ("group", "requirement"), list(requirements()), ids=lambda value: getattr(value, "name", value)
)
def test_every_requirement_has_an_upper_bound(group, requirement):
    bounds = [bound for bound in requirement.specifier if bound.operator in ("<", "<=", "==")]
    assert len(bounds) == 1, f"{group}: {requirement}"
    assert "*" not in bounds[0].version


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recorded_set_is_within_every_bound(file):
    pins = recorded(file)
    for group, requirement in requirements():
        version = pins.get(canonicalize_name(requirement.name))
        assert version or group in ELSEWHERE, f"{requirement.name} of {group} is not in {file}"
        if version:
            assert requirement.specifier.contains(version), f"{group}: {requirement}, {version}"


@pytest.mark.parametrize("group", ["dependencies", "hf", "eval", "test", "test-full"])
def test_bounds_are_next_to_the_newest_version_that_was_run(group):
    """An upper bound is at most one major version above the newest recorded version."""
    sets = [recorded(file) for file in FILES]
    for _, requirement in (pair for pair in requirements() if pair[0] == group):
        newest = max(pins[canonicalize_name(requirement.name)] for pins in sets)
        (upper,) = (Version(b.version) for b in requirement.specifier if b.operator != ">=")
        assert upper <= Version(f"{newest.major + 1}"), requirement


def test_recorded_sets_install_anywhere():
    """The sets contain no paths and no local versions such as 2.13.0+cpu."""
    for file in FILES:
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), file


def test_differences_are_printed(monkeypatch, capsys):
    here = {"jax": Version("0.12.1"), "numpy": Version("2.5"), "mine": Version("1")}
    there = {"jax": Version("0.12.0"), "numpy": Version("2.5"), "torch": Version("2.13.0")}
    assert differences(here, there) == [
        "jax: 0.12.1 installed, 0.12.0 recorded",
        "mine: 1 installed, none recorded",
        "torch: none installed, 2.13.0 recorded",
    ]
    monkeypatch.setattr(sys, "argv", ["recorded"])
    main()
    out = capsys.readouterr().out
    assert re.match(
        r"packages that differ from constraints/3\.\d+\.txt: \d+|no set of packages", out
    )


def test_the_documented_command_names_the_files():
    page = (ROOT / "docs" / "install.md").read_text()
    assert all(f"constraints/{file.name}" in page for file in FILES)
