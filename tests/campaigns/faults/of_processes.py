"""Faults of processes: kills, SIGTERM, a second process in a run directory, a lost host."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaigns.faults.runs import (
    EVERY,
    REFERENCES,
    SLOW,
    STEPS,
    Failed,
    Process,
    Scratch,
    expect,
    expect_same,
    free_address,
    reference,
    steps_of,
    until,
)

_LOST = 20  # seconds without a heartbeat until a process counts as lost


def _killed(trial: Scratch, ready: Callable[[], Any], pause: float) -> None:
    """Kill a run up to `pause` seconds after `ready()` is true, and start it again."""
    wanted = reference(trial, "plain")
    process = trial.start(SLOW)
    until(ready, process)
    time.sleep(trial.rng.uniform(0, pause))
    process.kill()
    process.wait()
    trial.run()
    expect_same(trial, wanted)


def kill(trial: Scratch) -> None:
    """Send SIGKILL at a random moment between the start and the end of a process."""
    _killed(trial, lambda: True, 8)


def kill_in_save(trial: Scratch) -> None:
    """Send SIGKILL while a checkpoint is written, or just after."""
    step = trial.rng.randrange(EVERY, STEPS, EVERY)
    _killed(trial, lambda: list(trial.workdir.glob(f"checkpoints/{step}*")), 0.15)


def term(trial: Scratch) -> None:
    """Send SIGTERM at a random moment: the run saves, exits with 75, and resumes at that step."""
    wanted = reference(trial, "plain")
    process = trial.start("wait=0.03")
    metrics = trial.workdir / "metrics.jsonl"
    # The file exists before the step is compiled, which takes long on a busy machine.
    until(lambda: metrics.exists() and '"kind": "train"' in metrics.read_text(), process)
    time.sleep(trial.rng.uniform(0.0, 1.2))
    process.kill(signal.SIGTERM)
    status = process.wait()
    expect(status == 75, f"exit status {status}, not 75: {process.said()[-600:]}")
    stopped = re.search(rf"stopped by SIGTERM after step (\d+) of {STEPS}", process.said())
    if stopped is None:
        raise Failed(f"the step was not printed: {process.said()[-600:]}")
    words = trial.run()
    expect(f"resuming from step {stopped[1]} " in words, f"resumed elsewhere: {words[-600:]}")
    expect_same(trial, wanted)


def second(trial: Scratch) -> None:
    """Start a second process in the run directory: it is refused, and the first continues."""
    wanted = reference(trial, "plain")
    process = trial.start("wait=0.1")
    until(lambda: (trial.workdir / "metrics.jsonl").exists(), process)
    words = trial.run(status=2, order=trial.path / "other.jsonl")
    expect(f"process {process.popen.pid} on " in words, f"not named: {words[-600:]}")
    expect(process.running, "the first process has ended")
    expect(process.wait() == 0, f"the first process failed: {process.said()[-600:]}")
    expect_same(trial, wanted)


def _start_hosts(trial: Scratch, run: Path, record: Path, *words: str) -> list[Process]:
    """Start the four processes of one run on this machine; `words` are faults and flags."""
    address = free_address()
    return [
        trial.start(
            *(word for word in words if not word.startswith("--")),
            flags=(
                *("--config.mesh.data=2", "--config.mesh.fsdp=2", "--coordinator", address),
                *("--num_processes", "4", "--process_id", str(index), "--startup_timeout", "120"),
                *(word for word in words if word.startswith("--")),
            ),
            workdir=run,
            order=record.with_suffix(f".{index}"),
        )
        for index in range(4)
    ]


def _finish_hosts(trial: Scratch) -> None:
    """Resume with four processes; the run must end like one of four without a fault."""
    wanted = trial.campaign / "references" / "hosts"
    with REFERENCES:
        if not wanted.exists():
            wanted.mkdir(parents=True)
            for process in _start_hosts(trial, wanted / "run", wanted / "order"):
                expect(process.wait() == 0, f"the reference failed: {process.said()[-600:]}")
            (wanted / "order.0").rename(wanted / "order.jsonl")
    for process in _start_hosts(trial, trial.workdir, trial.order):
        expect(process.wait() == 0, f"the restart failed: {process.said()[-600:]}")
    trial.order = trial.order.with_suffix(".0")
    expect_same(trial, wanted)


def host(trial: Scratch) -> None:
    """Kill one of four hosts: the others end with an error line, and a restart resumes the run.

    In half of the trials this happens during a save, while the others wait for it at a barrier.
    """
    processes = _start_hosts(trial, trial.workdir, trial.order, SLOW, f"lost={_LOST}")
    until(lambda: (trial.workdir / "checkpoints" / "10").exists(), processes[0], 120)
    if trial.rng.random() < 0.5:
        until(lambda: list(trial.workdir.glob("checkpoints/*.part*")), processes[0])
        time.sleep(trial.rng.uniform(0, 0.05))
    else:
        time.sleep(trial.rng.uniform(0, 1))
    victim = trial.rng.randrange(4)
    processes[victim].kill()
    for index, process in enumerate(processes):
        status = process.wait(_LOST + 40)  # time to detect the loss, report it and end
        if index != victim:
            words = process.said()
            # Without process 0 there is no coordination service, and jax aborts by itself.
            aborted = victim == 0 and "distributed service detected fatal errors" in words
            expect(status != 0 and ("error: " in words or aborted), f"no error: {words[-600:]}")
    _finish_hosts(trial)


def host_term(trial: Scratch) -> None:
    """Send SIGTERM to one of four hosts, which save by the clock of process 0: all save and end."""
    timed = ("--config.checkpoint.every=0", "--config.checkpoint.minutes=0.01")
    processes = _start_hosts(trial, trial.workdir, trial.order, "wait=0.05", *timed)
    until(lambda: list(trial.workdir.glob("checkpoints/[0-9]*")), processes[0], 120)
    time.sleep(trial.rng.uniform(0, 1))
    processes[trial.rng.randrange(4)].kill(signal.SIGTERM)
    found = [(process.wait(60), process.said()) for process in processes]
    expect(all(status == 75 for status, _ in found), f"not all ended with 75: {found}"[:2000])
    stopped = re.search(rf"stopped by SIGTERM after step (\d+) of {STEPS}", found[0][1])
    if stopped is None:
        raise Failed(f"the step was not printed: {found[0][1][-600:]}")
    expect(
        stopped[1] in steps_of(trial.workdir),
        f"step {stopped[1]} is not saved: {steps_of(trial.workdir)}",
    )
    _finish_hosts(trial)
