"""Fixtures for tests that start processes."""

import pytest

from tests.system.launch_machine import Machine


@pytest.fixture
def machine(tmp_path):
    """Return a checkout, a home folder and fakes of all programs that launchers call."""
    return Machine(tmp_path)
