"""Tests of the times at which a run saves, with one process and with several."""

import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_jax.config.schema import CheckpointConfig
from mea_jax.parallel import processes
from mea_jax.parallel.preemption import StopRequest
from mea_jax.train import saving
from mea_jax.train.saving import SaveTimes

STEPS = 24


@pytest.fixture
def clock(monkeypatch):
    """Return a namespace whose `now` is the time in seconds."""
    now = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(saving.time, "monotonic", lambda: now.now)
    return now


def saved(saves, clock, steps=12, seconds=60.0):
    """Return the steps that a process saves, with `seconds` per step."""
    found = []
    for step in range(1, steps + 1):
        clock.now += seconds
        if saves.due(step):
            found.append(step)
            saves.saved()
    return found


# -- one process ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "minutes", "expected"),
    [
        (5, 0.0, [5, 10]),
        (0, 3.0, [3, 6, 9, 12]),
        (0, 2.5, [3, 6, 9, 12]),
        (5, 3.0, [3, 5, 8, 10]),  # minutes count from the last save of either kind
        (0, 0.0, []),
        (1, 10.0, list(range(1, 13))),
    ],
)
def test_by_steps_and_by_minutes(clock, every, minutes, expected):
    saves = SaveTimes(CheckpointConfig(every=every, minutes=minutes), StopRequest())
    assert saved(saves, clock) == expected
    assert not saves.stopping


def test_a_save_that_takes_long_is_not_followed_by_another(clock):
    """Minutes are counted from the end of a save."""
    saves = SaveTimes(CheckpointConfig(every=0, minutes=1.0), StopRequest())
    clock.now += 60
    assert saves.due(1)
    clock.now += 600
    saves.saved()
    clock.now += 59
    assert not saves.due(2)
    clock.now += 1
    assert saves.due(3)


def test_a_request_to_stop_saves_at_once(clock):
    stop = StopRequest()
    saves = SaveTimes(CheckpointConfig(every=5, minutes=0.0), stop)
    assert not saves.due(1)
    stop.requested = True
    assert saves.due(2)
    assert saves.stopping


# -- several processes ----------------------------------------------------------------------


class Process:
    """A process of a simulated run, with the operations of `Loop` in each step, in that order.

    It starts step k and waits for the metrics of k - 1, for which all processes must have started
    k - 1. It then checks whether k is due, and before it saves it waits for the metrics of k.
    """

    def __init__(self, run, index, options):
        self.run, self.index = run, index
        self.started, self.asked, self.done = 0, 0, False
        self.now, self.stop = 1000.0, StopRequest()
        self.saves: list[tuple[int, bool]] = []
        self.saving = False
        run.current = self
        self.times = SaveTimes(options, self.stop)

    def all_started(self, step):
        return all(process.started >= step for process in self.run.processes)

    def can_go_on(self):
        if self.done:
            return False
        if self.asked == self.started:
            return not self.saving or self.all_started(self.started)
        return self.all_started(self.started - 1)

    def go_on(self):
        self.run.current = self
        if self.saving:
            self.saving = False
            self.saves.append((self.started, self.times.stopping))
            self.times.saved()
            self.done = self.times.stopping
        elif self.asked == self.started:
            self.started += 1
        else:
            self.asked = self.started
            self.saving = self.times.due(self.started)
        if self.asked == STEPS and not self.saving:
            self.done = True


class Run:
    """Several processes with a shared key-value store; `current` is the one whose code runs."""

    current: Process

    def __init__(self, patch, count, options):
        words: dict[str, str] = {}

        class KeyValueStore:
            def __init__(self, name):
                pass

            set = staticmethod(words.__setitem__)
            get = staticmethod(words.get)

        self.processes: list[Process] = []
        patch.setattr(processes, "KeyValueStore", KeyValueStore)
        patch.setattr(processes, "is_distributed", lambda: True)
        patch.setattr(processes, "is_first", lambda: self.current.index == 0)
        patch.setattr(saving.time, "monotonic", lambda: self.current.now)
        self.processes += [Process(self, index, options) for index in range(count)]

    def ready(self):
        return [process for process in self.processes if process.can_go_on()]


@settings(max_examples=200)
@given(st.data())
def test_all_processes_save_at_the_same_steps(data):
    """All save at the same steps, for any order, clocks and requests to stop.

    A request to stop takes effect within six steps: two to reach the first process, two for a save
    by time that is already announced, and two for the stop.
    """
    options = CheckpointConfig(
        every=data.draw(st.sampled_from([0, 1, 5])), minutes=data.draw(st.sampled_from([0, 1]))
    )
    count = data.draw(st.integers(2, 4))
    requests = data.draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, 60)))
    # Processes that are chosen repeatedly run ahead as far as the lockstep allows.
    order = data.draw(st.lists(st.integers(0, 3), min_size=20, max_size=200))
    paces = data.draw(st.lists(st.sampled_from([0.0, 7.0, 30.0, 90.0]), min_size=4, max_size=4))
    with pytest.MonkeyPatch.context() as patch:
        run, moves, asked_in = Run(patch, count, options), 0, []
        while ready := run.ready():
            for index, when in requests.items():
                process = run.processes[index]
                if when == moves and not process.done:
                    process.stop.requested = True
                    asked_in.append(process.asked + 1)
            choice = order[moves % len(order)]
            process = next((p for p in ready if p.index == choice), ready[choice % len(ready)])
            process.now += paces[process.index]
            process.go_on()
            moves += 1
        assert all(process.done for process in run.processes)
    first, *others = [process.saves for process in run.processes]
    assert all(saves == first for saves in others)
    stopped = [step for step, stopping in first if stopping]
    assert len(stopped) <= 1
    if stopped:
        assert asked_in
        assert first[-1][0] == stopped[0] <= min(asked_in) + 6
    elif asked_in:
        assert min(asked_in) + 6 > STEPS
    if options.every:
        last = stopped[0] if stopped else STEPS
        by_steps = set(range(options.every, last + 1, options.every))
        assert by_steps <= {step for step, _ in first}
    elif not options.minutes and not asked_in:
        assert first == []


def test_minutes_go_by_the_clock_of_the_first_process(monkeypatch):
    """With a minute per step and saves every three minutes, step 3 announces the save of step 5.

    The clock of the other process has no effect, at any speed.
    """
    run = Run(monkeypatch, 2, CheckpointConfig(every=0, minutes=3.0))
    while ready := run.ready():
        for process in ready:
            if process.started == process.asked and not process.saving:
                process.now += 60.0 if process.index == 0 else 1e6
            process.go_on()
    assert [step for step, _ in run.processes[0].saves] == [5, 10, 15, 20]
    assert run.processes[1].saves == run.processes[0].saves


def test_a_request_to_stop_of_any_process_stops_all(monkeypatch):
    """A request to stop, of any of three processes, stops all; an announced save comes first."""
    for index in range(3):
        run = Run(monkeypatch, 3, CheckpointConfig(every=0, minutes=0.0))
        run.processes[index].stop.requested = True
        while ready := run.ready():
            for process in ready:
                process.go_on()
        assert [process.saves for process in run.processes] == [run.processes[0].saves] * 3
        ((step, stopping),) = run.processes[0].saves
        assert stopping
        assert step in (3, 4)
