"""Tests of waiting for the process that prepares the data.

tests/system/test_processes.py tests the complete preparation by several processes.
"""

import time

import pytest

from mea_jax.data import multi_host
from mea_jax.errors import UserError


class Clock:
    """A clock that only `sleep` advances, with the progress of process 0 as a function of time."""

    def __init__(self, value):
        self.now, self.value = 0.0, value

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def look(self):
        return self.value(self.now)


def test_a_preparation_that_goes_on_is_waited_for(monkeypatch):
    """There is no limit on the duration as long as there is progress now and then."""
    clock = Clock(lambda now: "done" if now > 100_000 else f"{now // 1500} 0")
    monkeypatch.setattr(multi_host, "time", clock)
    multi_host.wait(clock.look)
    assert 100_000 < clock.now < 100_010


def test_a_preparation_that_stands_still_is_not(monkeypatch):
    clock = Clock(lambda now: None if now < 60 else "5 0")
    monkeypatch.setattr(multi_host, "time", clock)
    with pytest.raises(UserError, match=r"has neither read nor written anything for 30 minutes"):
        multi_host.wait(clock.look)
    assert 1860 < clock.now < 1870


def test_the_first_process_reports_its_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(multi_host, "_REPORT_SECONDS", 0.01)
    values: list[str] = []
    with multi_host._reports(values.append, tmp_path) as count:
        for expected in ("0 0", "7 0", "7 5"):
            deadline = time.monotonic() + 10
            while values[-1:] != [expected] and time.monotonic() < deadline:
                time.sleep(0.01)
            assert values[-1] == expected
            if expected == "0 0":
                count(7)
            else:
                (tmp_path / "x.incomplete-1").mkdir(exist_ok=True)
                (tmp_path / "x.incomplete-1" / "shard").write_text("12345")
