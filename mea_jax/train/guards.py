"""Detect loss spikes and non-finite gradients from each step's metrics.

The device has already left out an update whose gradient is not finite (`train_step`); this module
counts it. All variants and studies share one definition of a spike:

    s(t) = mean of the last w losses up to step t that did not exceed m by the margin,
    m(t) = min of s(w), .., s(t), infinite before step w,
    a spike begins at step a and is detected at step a + n - 1 when
    loss(a), .., loss(a + n - 1) all exceed m(a - 1) + margin.

The mean over w steps keeps a single lucky batch from lowering m. Without it, runs with small
batches of mixed text would report spikes all the time.

All decisions are functions of the metrics, which are equal on every process, and of a small state
that each checkpoint stores. So a resumed run decides as an uninterrupted run does.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from mea_jax.config.schema import GuardConfig
from mea_jax.errors import UserError

SKIP_WINDOW = 1000  # steps over which `GuardConfig.max_skipped` counts


class Spike(Exception):
    """A loss spike from step `first` to step `last` that requires a rewind."""

    def __init__(self, first: int, last: int):
        super().__init__(f"the loss spiked at steps {first} to {last}")
        self.first, self.last = first, last


@dataclasses.dataclass(frozen=True)
class Event:
    """A row of metrics.jsonl: its kind, its values, and its log line."""

    kind: str  # "skipped_update", "spike", "spike_end", "rewind", "empty_windows"
    values: Mapping[str, Any]
    line: str


class SpikeDetector:
    """A detector of the spikes defined above, which reads one loss at a time.

    Attributes:
      lowest: m(t), nats; infinite before `smoothing` losses.
      recent: the losses whose mean is s(t).
      above: the number of latest consecutive steps whose losses exceed `lowest` by the margin.
      first: the first of these steps; after a spike, its first step.
    """

    def __init__(self, margin: float, steps: int, smoothing: int = 1):
        self.margin, self.steps = margin, steps
        self.recent: deque[float] = deque(maxlen=smoothing)
        self.lowest, self.above, self.first = math.inf, 0, 0

    def feed(self, step: int, loss: float) -> str | None:
        """Return "begin" when a spike is detected, "end" at the first step after it, or None.

        A non-finite loss, whose update was left out, neither begins nor ends a spike; after a loss
        above the margin it counts as another one.
        """
        if self.steps == 0 or (not math.isfinite(loss) and not self.above):
            return None
        if not loss <= self.lowest + self.margin:
            self.first = self.first if self.above else step
            self.above += 1
            return "begin" if self.above == self.steps else None
        ended = self.above >= self.steps
        self.above = 0
        self.recent.append(loss)
        if len(self.recent) == self.recent.maxlen:
            self.lowest = min(self.lowest, sum(self.recent) / len(self.recent))
        return "end" if ended else None


class Guards:
    """The guards of one run.

    Attributes:
      left_out: closed intervals (first, last) of batch numbers that are never read.
      rewinds: the number of rewinds so far.
    """

    def __init__(self, config: GuardConfig, stored: Mapping[str, Any] | None = None):
        """Restore the guards from `stored`, a result of `state`; None at the start of a run.

        Raises `UserError` if `stored` is malformed.
        """
        self.config = config
        self.detector = SpikeDetector(
            config.spike_margin, config.spike_steps, config.spike_smoothing
        )
        self.skipped: list[int] = []  # left-out updates, the last SKIP_WINDOW steps
        self.left_out: list[tuple[int, int]] = []
        self.rewinds = 0
        if stored is not None:
            try:
                self._restore(stored)
            except (LookupError, TypeError, ValueError) as error:
                raise UserError(
                    f"config.guards: the guards' state in the checkpoint is malformed ({error!r}): "
                    "use an earlier checkpoint"
                ) from error

    def _restore(self, stored: Mapping[str, Any]) -> None:
        lowest = stored["lowest"]
        self.detector.lowest = math.inf if lowest is None else float(lowest)
        self.detector.recent.extend(float(loss) for loss in stored.get("recent", ()))
        self.detector.above, self.detector.first = int(stored["above"]), int(stored["first"])
        self.skipped = [int(step) for step in stored["skipped"]]
        self.left_out = merge([(int(first), int(last)) for first, last in stored["left_out"]])
        self.rewinds = int(stored["rewinds"])

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values, which `__init__` accepts as `stored`."""
        lowest = self.detector.lowest
        return {
            "lowest": lowest if math.isfinite(lowest) else None,
            "recent": list(self.detector.recent),
            "above": self.detector.above,
            "first": self.detector.first,
            "skipped": self.skipped,
            "left_out": [list(interval) for interval in self.left_out],
            "rewinds": self.rewinds,
        }

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Event]:
        """Return the events of `step`, given the `metrics` of its `train_step`.

        Raises:
          UserError: too many updates were left out, or the loss spiked too often.
          Spike: the run must be rewound.
        """
        events = []
        if metrics["empty_windows"]:
            count = int(metrics["empty_windows"])
            line = f"step {step}: {count} stored windows cannot be read and were left out"
            events.append(Event("empty_windows", {"count": count}, line))
        if metrics["skipped"]:
            events.append(self._skip(step, metrics))
        change = self.detector.feed(step, metrics["loss"])
        if change == "begin":
            events.append(self._spike(step, metrics["loss"]))
        elif change == "end":
            line = f"step {step}: the loss is back at {metrics['loss']:.4f}"
            values = {"first": self.detector.first, "loss": metrics["loss"]}
            events.append(Event("spike_end", values, line))
        return events

    def _skip(self, step: int, metrics: Mapping[str, float]) -> Event:
        self.skipped = [s for s in self.skipped if s > step - SKIP_WINDOW] + [step]
        count, most = len(self.skipped), self.config.max_skipped
        norm, loss = metrics["grad_norm"], metrics["loss"]
        what = f"the gradient norm is {norm} and the loss {loss} at step {step}"
        remedy = (
            "lower config.optimizer.learning_rate, lengthen the warmup or tighten clip_norm, and "
            "start a new --workdir"
        )
        if metrics["tokens"] == 0:
            what = f"no window of the batch of step {step} can be read"
            remedy = "remove the folder of config.data.cache_dir to prepare the data again"
        if count > most:
            raise UserError(
                f"{what}: {count} of the last {SKIP_WINDOW} updates are left out, more than "
                f"config.guards.max_skipped={most}; {remedy}, or increase max_skipped"
            )
        values = {"grad_norm": norm, "loss": loss, "count": count}
        return Event("skipped_update", values, f"{what}: update left out ({count} of {most})")

    def _spike(self, step: int, loss: float) -> Event:
        c, first, lowest = self.config, self.detector.first, self.detector.lowest
        what = (
            f"the loss spiked at step {first}: it exceeded its lowest mean, {lowest:.4f}, by more "
            f"than {c.spike_margin:g} nats for {c.spike_steps} steps"
        )
        if c.rewind:
            if self.rewinds >= c.max_rewinds:
                raise UserError(
                    f"{what}, after {self.rewinds} rewinds: config.guards.max_rewinds is reached; "
                    "lower config.optimizer.learning_rate and start a new --workdir, or increase "
                    "max_rewinds"
                )
            raise Spike(first, step)
        return Event("spike", {"first": first, "lowest": lowest, "loss": loss}, what)

    def rewound(self, spike: Spike, batches: tuple[int, int]) -> Event:
        """Record a rewind and return its event.

        Call it on the guards of the checkpoint to which the run returns. `batches` are the numbers
        of the first and last batch of the spike; the batches from first to last are never read
        again.
        """
        self.rewinds += 1
        self.left_out = merge([*self.left_out, batches])
        values = {"first": spike.first, "last": spike.last, "left_out": list(batches)}
        line = (
            f"{spike}: rewound; batches {batches[0]} to {batches[1]} are left out "
            f"(rewind {self.rewinds} of {self.config.max_rewinds})"
        )
        return Event("rewind", values, line)


def rewind_distance(config: GuardConfig) -> int:
    """Return how many steps before the newest checkpoint one for a rewind must be; 0: none.

    A spike is detected `spike_steps` steps after the update that may have caused it, and the
    checkpoint must be from a step before that update.
    """
    return config.spike_steps + 1 if config.rewind else 0


def merge(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort closed intervals and join those that touch or overlap."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(intervals):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged
