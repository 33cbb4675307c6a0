"""A trace of some training steps, for xprof: what ran on the device and the host, and when."""

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
    """The first and last step of "first:last", steps counted from 1 to `steps`.

    Raises `UserError` for anything else.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None:
        raise UserError(
            f"--profile_steps {text}: write FIRST:LAST, two steps of the run such as 10:12"
        )
    first, last = int(match[1]), int(match[2])
    if first < 1:
        raise UserError(f"--profile_steps {text}: steps are counted from 1")
    if last < first:
        raise UserError(f"--profile_steps {text}: the last step comes before the first")
    if last > steps:
        raise UserError(f"--profile_steps {text}: the run ends at config.steps={steps}")
    return first, last


class Profile:
    """Traces steps `first` .. `last` of a loop into `directory`; a context manager around it.

    With `steps` None it does nothing, and touches no file.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        directory: Path,
        start: int,
        say: Callable[[str], Any],
    ):
        """`start`: the updates that are done before the loop begins."""
        self.first, self.last = steps or (0, -1)
        self.reached = start
        self.directory, self.say, self.active = directory, say, False
        self.first = max(self.first, start + 1)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.active:  # an error on its way out: what there is, is written
            self._stop()

    def step(self, number: int, before: Any) -> contextlib.AbstractContextManager:
        """Around the dispatch of step `number`; `before` is what must be done ahead of the first.

        xprof sees steps by the name that this gives them.
        """
        if number == self.first <= self.last:
            jax.block_until_ready(before)  # earlier steps do not belong to the trace
            jax.profiler.start_trace(self.directory)
            self.active = True
        if self.active:
            self.reached = number
            return jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=number)
        return contextlib.nullcontext()

    def after(self, number: int, results: Any) -> float:
        """After step `number`, which leaves `results`; the seconds that writing the trace took."""
        if not self.active or number != self.last:
            return 0.0
        jax.block_until_ready(results)
        began = time.perf_counter()
        self._stop()
        return time.perf_counter() - began

    def _stop(self) -> None:
        self.active = False
        jax.profiler.stop_trace()
        self.say(
            f"profile of steps {self.first} to {self.reached} in {self.directory}; to look at it: "
            f"pip install xprof; xprof --logdir {self.directory}"
        )
