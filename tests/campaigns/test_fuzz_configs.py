"""A small sample of the random configs of `tests.campaigns.fuzz`."""

import tempfile
from pathlib import Path

from hypothesis import given, settings

from tests.campaigns.fuzz import configs


@settings(max_examples=10)
@given(example=configs.STRATEGY)
def test_a_config_trains_or_is_refused_in_one_line(example):
    with tempfile.TemporaryDirectory() as folder:
        outcome = configs.check(example, Path(folder))
    assert outcome == "ran" or outcome.startswith("refused: config")
