"""SIGTERM and Ctrl-C at any time end a command with their exit status and one line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mea_jax.parallel import preemption
from mea_jax.parallel.preemption import Preempted
from tests.paths import ROOT

MOMENTS = 8
ENDS = {
    "SIGTERM": (75, "stopped by SIGTERM"),
    "SIGINT": (130, "stopped; the same command resumes from the last checkpoint"),
}


def test_at_any_moment_of_compilation(tiny, tmp_path):
    """A signal 0 to 0.2 s after the start of any compilation gives its exit status and line.

    jax compiles in a thread, which continues after the signal's exception in the main thread.
    """
    changes = {"model.n_layers": 1, "optimizer.warmup_steps": 0, "evaluate.every": 0}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny(steps=1, **changes).to_dict()))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[:1]])}
    del environment["XLA_FLAGS"]  # one device
    command = [
        sys.executable,
        "-m",
        "tests.system.interrupted",
        str(config),
        str(tmp_path),
        f"{MOMENTS}",
    ]
    finished = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert len(found) == MOMENTS
    assert len({(program, delay) for program, delay, *_ in found}) == MOMENTS
    for program, delay, name, status, line in found:
        wanted, words = ENDS[name]
        assert status == wanted, (program, delay, name, status, line)
        assert line.startswith(words), (program, delay, name, status, line)


class Interrupted:
    """An object that gets a signal in `__del__`, where Python ignores exceptions."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


def remove_last(kind, number):
    """Create an object, which is removed immediately, and wait for its signal's exception."""
    kind(number)
    time.sleep(60)


@pytest.fixture
def hooked(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    preemption.resend_ignored.cache_clear()
    preemption.resend_ignored()
    yield
    preemption.resend_ignored.cache_clear()


@pytest.mark.usefixtures("hooked")
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)]
)
def test_a_signal_in_a_callback_is_not_lost(number, error):
    with preemption.listen(), pytest.raises(error):
        remove_last(Interrupted, number)


def test_a_request_in_the_loop_is_only_noted():
    with preemption.listen() as stop:
        with stop.deferred():
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        signal.raise_signal(signal.SIGTERM)  # a second signal raises nothing either
