"""Decide when a run saves: at intervals of steps and of minutes, and on a stop request.

Step numbers are equal on every process, but clocks and signals are not. So the first process
decides, and announces each save two steps ahead: after starting step k and before starting step
k + 1, it announces that step k + 2 will be saved. A process that has started step k + 2 has the
metrics of step k + 1, which needed the first process's part of that step. So the announcement is
there when the process reads it.
"""

import time

from mea_jax.config.schema import CheckpointConfig
from mea_jax.parallel import processes
from mea_jax.parallel.preemption import StopRequest

_AHEAD = 2  # steps between an announcement and its save


class SaveTimes:
    """The schedule of a run's saves. Each process calls `due` once after the start of each step.

    Attributes:
      stopping: whether the save that is due is the last one, because of a stop request.
    """

    def __init__(self, options: CheckpointConfig, stop: StopRequest):
        self.options, self.stop = options, stop
        self.stopping = False
        self._saved = time.monotonic()
        self._board = processes.KeyValueStore("save") if processes.is_distributed() else None
        self._asked = False  # this process has forwarded its stop request to the first one
        self._announced: str | None = None  # by this process, the first one, and not yet saved
        self._round = 0

    def due(self, step: int) -> bool:
        """Return whether the state after `step` is to be saved."""
        every = self.options.every
        by_steps = every > 0 and step % every == 0
        if self._board is None:
            self.stopping = self.stop.requested
            return by_steps or self.stopping or self._time_is_up()
        return self._agreed(step, self._board) or by_steps

    def saved(self) -> None:
        """Record that a checkpoint was saved now."""
        self._saved = time.monotonic()

    def _time_is_up(self) -> bool:
        seconds = self.options.minutes * 60
        return seconds > 0 and time.monotonic() - self._saved >= seconds

    def _agreed(self, step: int, board: "processes.KeyValueStore") -> bool:
        if self.stop.requested and not self._asked:
            self._asked = True
            board.set("stop", "1")
        if processes.is_first() and self._announced is None:
            stopping = board.get("stop") is not None
            if stopping or self._time_is_up():
                self._announced = f"{step + _AHEAD} {int(stopping)}"
                board.set(f"round/{self._round}", self._announced)
        words = self._announced or board.get(f"round/{self._round}")
        if words is None:
            return False
        target, stopping_then = map(int, words.split())
        if step < target:
            return False
        assert step == target, f"the save of step {target} was announced too late, at step {step}"
        self._round, self._announced = self._round + 1, None
        self.stopping = bool(stopping_then)
        return True
