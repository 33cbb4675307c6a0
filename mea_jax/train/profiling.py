"""Trace some training steps for xprof: what ran on the device and the host, and when."""

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mea_jax.errors import UserError

STEP_NAME = "train"


def parse_steps(text: str, steps: int) -> tuple[int, int]:
    """Return the first and last step of `text`, which is "FIRST:LAST" within 1 to `steps`.

    Raises `UserError` for any other text.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None:
        raise UserError(
            f"--profile_steps {text}: write FIRST:LAST, two steps of the run such as 10:12"
        )
    first, last = int(match[1]), int(match[2])
    if first < 1:
        raise UserError(f"--profile_steps {text}: steps are counted from 1; raise the first step")
    if last < first:
        raise UserError(
            f"--profile_steps {text}: the last step comes before the first; change their order"
        )
    if last > steps:
        raise UserError(f"--profile_steps {text}: the run ends at config.steps={steps}; lower LAST")
    return first, last


class Profile:
    """A context manager around a loop that traces its steps `first` to `last` into `directory`.

    With `steps` None it does nothing and touches no file.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        directory: Path,
        start: int,
        log: Callable[[str], Any],
    ):
        """Trace `steps` of a loop that begins after `start` updates; `log` logs the result."""
        self.first, self.last = steps or (0, -1)
        self.reached = start
        self.directory, self.log, self.active = directory, log, False
        self.first = max(self.first, start + 1)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.active:  # after an error, write the trace so far
            self._stop()

    def step(self, number: int, before: Any) -> contextlib.AbstractContextManager:
        """Return a context for the dispatch of step `number`, which names the step for xprof.

        Before the first traced step, wait for `before`, the work of earlier steps, and start
        tracing.
        """
        if number == self.first <= self.last:
            jax.block_until_ready(before)  # keeps earlier steps out of the trace
            jax.profiler.start_trace(self.directory)
            self.active = True
        if self.active:
            self.reached = number
            return jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=number)
        return contextlib.nullcontext()

    def after(self, number: int, results: Any) -> float:
        """Write the trace if step `number` is the last one; return the seconds that writing took.

        First wait for `results`, the arrays that the step returns; this time is not included.
        """
        if not self.active or number != self.last:
            return 0.0
        jax.block_until_ready(results)
        began = time.perf_counter()
        self._stop()
        return time.perf_counter() - began

    def _stop(self) -> None:
        self.active = False
        jax.profiler.stop_trace()
        self.log(
            f"profile of steps {self.first} to {self.reached} in {self.directory}; to view it: "
            f"pip install xprof; xprof --logdir {self.directory}"
        )
