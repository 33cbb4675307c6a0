"""Record the history of each run of a sweep: its losses, its spikes, whether it diverged."""

import dataclasses
import math
from collections import deque
from typing import Any

from mea_jax.study.grid import Cell, Member
from mea_jax.train.guards import SpikeDetector

Row = dict[str, Any]


class History:
    """The history of one run, updated at each step; `state` and `restored` are for checkpoints.

    Spikes are defined in `mea_jax.train.guards` and are detected in the mean of the last
    `smoothing` losses, because small batches make single losses too noisy.
    """

    def __init__(self, spikes: tuple[float, int, int]):
        margin, steps, smoothing = spikes
        self.detector = SpikeDetector(margin, steps)
        self.recent: deque[float] = deque(maxlen=smoothing)
        self.spikes: list[list[int]] = []  # [first step, step at which it had ended, or 0]
        self.skipped = 0  # skipped updates, whose gradient was not finite
        self.stuck = 0  # skipped updates since the last one that was applied
        self.curve: list[list[float]] = []  # [tokens, held-out loss]

    def feed(self, step: int, loss: float, skipped: bool) -> None:
        """Add a step's training loss, and whether its update was skipped."""
        self.skipped += skipped
        self.stuck = self.stuck + 1 if skipped else 0
        self.recent.append(loss)
        if len(self.recent) < (self.recent.maxlen or 1):
            return
        mean = sum(self.recent) / len(self.recent)
        change = self.detector.feed(step, mean)
        if change == "begin":
            self.spikes.append([self.detector.first, 0])
        elif change == "end":
            self.spikes[-1][1] = step

    def state(self) -> Row:
        """Return the history as JSON values, with None for losses that are not finite."""
        detector = self.detector
        lowest = detector.lowest if math.isfinite(detector.lowest) else None
        return {
            "detector": [lowest, detector.above, detector.first],
            "recent": [x if math.isfinite(x) else None for x in self.recent],
            "spikes": self.spikes,
            "skipped": [self.skipped, self.stuck],
            "curve": [[t, x if math.isfinite(x) else None] for t, x in self.curve],
        }

    def restored(self, state: Row) -> "History":
        """Set the history to one returned by `state`, and return it."""
        lowest, self.detector.above, self.detector.first = state["detector"]
        self.detector.lowest = math.inf if lowest is None else lowest
        self.recent.extend(math.nan if x is None else x for x in state["recent"])
        self.spikes = [list(spike) for spike in state["spikes"]]
        self.skipped, self.stuck = state["skipped"]
        self.curve = [[t, math.nan if x is None else x] for t, x in state["curve"]]
        return self

    def why_diverged(self, loss: float) -> str | None:
        """Return why a run with this final held-out loss counts as diverged, or None."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if self.stuck:  # its parameters no longer change, whatever the loss
            return f"the last {self.stuck} gradients were not finite"
        if self.spikes and not self.spikes[-1][1]:
            return f"the spike at step {self.spikes[-1][0]} has not ended"
        if self.curve and not loss < self.curve[0][1]:
            return "the loss is no lower than at initialisation"
        return None


def row_of(cell: Cell, member: Member, history: History, loss: float, seconds: float) -> Row:
    """Return a finished run's row for the store; `loss` is held out, in nats per token."""
    why = history.why_diverged(loss)
    return {
        "variant": cell.variant,
        "size": cell.size,
        "steps": cell.steps,
        **dataclasses.asdict(member),
        "parameters": cell.parameters(),
        "tokens": cell.tokens(),
        "loss": round(loss, 6) if math.isfinite(loss) else None,
        "diverged": why is not None,
        "why": why,
        "spikes": history.spikes,
        "skipped": history.skipped,
        "curve": [[int(t), round(x, 6)] for t, x in history.curve if math.isfinite(x)],
        "seconds": round(seconds, 1),
    }
