"""Fixtures of tests that start processes."""

import pytest

from tests.system.launch_machine import Machine


@pytest.fixture
def machine(tmp_path):
    """A checkout, a home folder and fakes of every program that a launcher runs."""
    return Machine(tmp_path)
