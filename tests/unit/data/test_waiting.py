"""Tests of long calls: they can be interrupted, and return and raise as direct calls do."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mea_jax.data import waiting


def test_a_call_returns_and_raises_as_without_a_thread():
    assert waiting.call(sorted, iter([3, 1, 2])) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        waiting.call(lambda: 1 / 0)


def test_an_interrupted_call_gets_no_more_items():
    read, started = [], threading.Event()

    def items():
        while True:
            read.append(1)
            started.set()
            time.sleep(0.001)
            yield 1

    def interrupt():
        started.wait()
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background jobs start with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            waiting.call(sum, items())
    finally:
        signal.signal(signal.SIGINT, before)
    count = len(read)
    time.sleep(0.02)
    assert len(read) <= count + 1


@pytest.mark.process
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_signals_end_a_call_that_holds_on(number, status):
    """The call represents one of a library that releases the GIL, as BPE training does."""
    script = (
        "import time\n"
        "from mea_jax import cli\n"
        "from mea_jax.parallel import preemption\n"
        "from mea_jax.data import waiting\n"
        "def main():\n"
        "    with preemption.listen():\n"
        "        print('ready', flush=True)\n"
        "        waiting.call(time.sleep, 600)\n"
        "cli.run(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
