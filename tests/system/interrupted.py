"""Interrupt training runs while they compile.

    python -m tests.system.interrupted CONFIG FOLDER COUNT

CONFIG is a JSON file with a config, FOLDER an existing folder for run directories. The first run
trains its only step to the end and counts the programs that jax compiles. Then COUNT runs get
SIGTERM or SIGINT in turn, each at another moment of these compilations. Each run is a fork of this
process, so that imports run once; it compiles everything, because no cache is used. Prints a JSON
list of [program, seconds after its compilation began, signal, exit status, last line].
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax

from mea_jax import cli
from mea_jax.config.parse import from_dict
from mea_jax.config.schema import TrainConfig
from mea_jax.parallel import preemption
from mea_jax.train.run import train

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # recorded just before XLA compiles


_DELAYS = (0.0, 0.01, 0.03, 0.1, 0.2)  # seconds, shorter than the rest of the run


def start(config: TrainConfig, workdir: Path, program: int, delay: float, number: int) -> int:
    """Fork a run, interrupt it while it compiles, and return its exit status.

    The run gets the signal `number` (0: none) `delay` seconds after it begins to compile the
    program with index `program`. It writes the number of its programs to `workdir`.programs.
    """
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = os.open(workdir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    lowered: list[float] = []

    def send() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), number)

    def listener(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _LOWERED:
            if number and len(lowered) == program:
                threading.Thread(target=send, daemon=True).start()
            lowered.append(duration_secs)

    def main() -> None:
        jax.monitoring.register_event_duration_secs_listener(listener)
        with preemption.listen() as stop:
            train(config, workdir, stop=stop)
        workdir.with_suffix(".programs").write_text(str(len(lowered)))

    sys.argv = ["interrupted"]
    cli.run(main)
    raise AssertionError("cli.run exits")


def main() -> None:
    config = from_dict(json.loads(Path(sys.argv[1]).read_text()))
    folder, count = Path(sys.argv[2]), int(sys.argv[3])
    status = start(config, folder / "whole", 0, 0.0, 0)
    assert status == 0, (folder / "whole.log").read_text()
    programs = (
        int((folder / "whole.programs").read_text()) - 1
    )  # the run may end during the last one
    found = []
    for i in range(count):
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        program, delay = programs * i // count, _DELAYS[i % len(_DELAYS)]
        status = start(config, folder / str(i), program, delay, number)
        lines = (folder / f"{i}.log").read_text().strip().splitlines()
        found.append([program, delay, number.name, status, lines[-1] if lines else ""])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
