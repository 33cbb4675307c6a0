"""A small sample of the corrupted checkpoints of `tests.campaigns.fuzz`."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings

from tests.campaigns.fuzz import checkpoints

FLIPPED = checkpoints.Damage("sealed", "flip", 0.5, 0.5, b"\1")


@settings(max_examples=40)
@given(checkpoints.STRATEGY)
@example(FLIPPED)
@example(checkpoints.Damage("forged", "link", 0.6, 0.0, b"\0"))
@example(checkpoints.Damage("forged", "words", 0.23, 0.0, b"\7"))
@example(checkpoints.Damage("unsealed", "words", 0.35, 0.0, b"\7"))
def test_a_corrupted_checkpoint_is_refused_in_a_line_or_read_as_arrays(damage):
    with tempfile.TemporaryDirectory() as folder:
        outcome = checkpoints.check(damage, Path(folder))
    # Checksums leave nothing that has changed to be read.
    assert damage.kind != "sealed" or outcome in ("refused: damage", "unchanged")


@pytest.mark.parametrize("change", ["flip", "cut", "remove", "link"])
def test_every_file_of_a_checkpoint_is_watched(change, tmp_path):
    """Damage to any single file is detected."""
    count = sum(path.is_file() for path in (checkpoints.OLD / "checkpoints").rglob("*"))
    for number in range(count + 1):  # including the file of checksums
        damage = checkpoints.Damage("sealed", change, (number + 0.5) / (count + 1), 0.5, b"\3")
        folder = tmp_path / str(number)
        folder.mkdir()
        assert checkpoints.check(damage, folder) == "refused: damage"
