"""Tests of the guards: spikes, skipped updates, rewinds, and their state in checkpoints."""

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_jax.config.schema import GuardConfig
from mea_jax.data.pipeline import batch_number
from mea_jax.errors import UserError
from mea_jax.train.guards import SKIP_WINDOW, Guards, Spike, SpikeDetector, merge

MANY = settings(max_examples=300)
# Halves, so that some losses are exactly at the margin, which is not a spike.
LOSSES = st.lists(
    st.sampled_from([0.5 * i for i in range(12)] + [math.nan, math.inf]), min_size=1, max_size=40
)
CONFIGS = st.builds(
    GuardConfig,
    max_skipped=st.integers(0, 3),
    spike_margin=st.sampled_from([0.5, 1.0, 2.0]),
    spike_steps=st.integers(0, 4),
    spike_smoothing=st.sampled_from([1, 3]),
)
INTERVALS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 5)).map(lambda pair: (pair[0], sum(pair))),
    max_size=8,
)


def metrics(loss=2.0, skipped=0.0, empty_windows=0.0, tokens=64.0):
    return {
        "loss": loss,
        "grad_norm": math.nan if skipped else 1.0,
        "skipped": skipped,
        "empty_windows": empty_windows,
        "tokens": tokens,
    }


def lowest_mean(losses, w):
    """Return the lowest mean of `w` losses in a row; infinity if there are fewer."""
    means = (sum(losses[i : i + w]) / w for i in range(len(losses) - w + 1))
    return min(means, default=math.inf)


def spikes_by_definition(losses, margin, n, w):
    """Return {step: ("begin", first step) or ("end", None)} by the module's definition.

    A spike is n or more losses in a row. Each exceeds the lowest mean of w losses in a row before
    the spike by more than the margin, or is not finite and follows one that did. Losses that exceed
    it are in no mean. This function reads the entire sequence, not step by step.
    """
    high: list[bool] = []
    for i, loss in enumerate(losses):
        low = [x for x, above in zip(losses, high, strict=False) if math.isfinite(x) and not above]
        lowest = lowest_mean(low, w)
        high.append(loss > lowest + margin if math.isfinite(loss) else i > 0 and high[-1])
    found = {}
    for i, loss in enumerate(losses):
        if all(high[max(i - n + 1, 0) : i + 1]) and i >= n - 1 and not (i >= n and high[i - n]):
            found[i + 1] = ("begin", i - n + 2)
        if not high[i] and i >= n and all(high[i - n : i]) and math.isfinite(loss):
            found[i + 1] = ("end", None)
    return found


@MANY
@given(LOSSES, st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_spikes_are_those_of_the_definition(losses, margin, n, w):
    """The detector agrees with the definition, also at the margin.

    Means of 1, 2 and 4 halves are exact in binary.
    """
    detector, found = SpikeDetector(margin, n, w), {}
    for step, loss in enumerate(losses, start=1):
        if (change := detector.feed(step, loss)) is not None:
            found[step] = (change, detector.first if change == "begin" else None)
    assert found == spikes_by_definition(losses, margin, n, w)


def test_a_spike_and_its_end():
    """With a margin of 1 and a lowest loss of 2, 3.0 is not above; nan does not begin a spike."""
    losses = [5.0, 2.0, 3.0, math.nan, 3.1, math.nan, 3.2, 3.3, 2.9, 3.5, 1.0]
    detector = SpikeDetector(1.0, 3)
    assert [detector.feed(step, loss) for step, loss in enumerate(losses, start=1)] == (
        [None] * 6 + ["begin", None, "end", None, None]
    )
    assert (detector.first, detector.lowest) == (10, 1.0)
    off = SpikeDetector(1.0, 0)
    assert [off.feed(step, loss) for step, loss in enumerate(losses, start=1)] == [None] * 11


# -- events ---------------------------------------------------------------------------------


def test_events_of_a_run():
    guards = Guards(GuardConfig(spike_margin=1.0, spike_steps=2, spike_smoothing=1))
    assert guards.check(1, metrics(2.0)) == []
    (event,) = guards.check(2, metrics(2.0, empty_windows=3.0))
    assert (event.kind, event.values) == ("empty_windows", {"count": 3})
    assert event.line == "step 2: 3 stored windows cannot be read and were left out"
    (event,) = guards.check(3, metrics(math.nan, skipped=1.0))
    assert event.kind == "skipped_update"
    assert event.values["count"] == 1
    assert "loss nan at step 3: update left out (1 of 10)" in event.line
    assert guards.check(4, metrics(4.0)) == []
    (event,) = guards.check(5, metrics(4.5))
    assert (event.kind, event.values) == ("spike", {"first": 4, "lowest": 2.0, "loss": 4.5})
    assert guards.check(6, metrics(4.5)) == []  # already reported
    (event,) = guards.check(7, metrics(2.5))
    assert (event.kind, event.values) == ("spike_end", {"first": 4, "loss": 2.5})
    both = guards.check(8, metrics(math.nan, skipped=1.0, empty_windows=8.0))
    assert [event.kind for event in both] == ["empty_windows", "skipped_update"]


def test_a_spike_that_is_to_be_rewound_is_raised_with_its_steps():
    guards = Guards(GuardConfig(spike_margin=1.0, spike_steps=2, spike_smoothing=1, rewind=True))
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
        guards.check(step, metrics(loss))
    with pytest.raises(Spike) as raised:
        guards.check(4, metrics(3.0))
    assert (raised.value.first, raised.value.last) == (3, 4)


def test_updates_left_out_count_over_a_thousand_steps():
    """Two are allowed within 1000 steps; a third stops the run unless the first is too old."""
    for third, stops in ((SKIP_WINDOW, True), (SKIP_WINDOW + 1, False)):
        guards = Guards(GuardConfig(max_skipped=2))
        for step in (1, 500):
            guards.check(step, metrics(skipped=1.0))
        if stops:
            with pytest.raises(
                UserError, match=rf"step {third}: 3 of the last .* are left out, more .*=2"
            ):
                guards.check(third, metrics(skipped=1.0))
        else:
            (event,) = guards.check(third, metrics(skipped=1.0))
            assert event.values["count"] == 2


@MANY
@given(st.sets(st.integers(1, 4000), max_size=12), st.integers(0, 4))
def test_the_limit_holds_for_every_window(steps, most):
    guards, taken = Guards(GuardConfig(max_skipped=most)), []
    for step in sorted(steps):
        taken.append(step)
        within = sum(step - SKIP_WINDOW < earlier for earlier in taken)
        try:
            (event,) = guards.check(step, metrics(skipped=1.0))
        except UserError:
            assert within > most
            return
        assert event.values["count"] == within <= most


def test_none_may_be_left_out():
    with pytest.raises(UserError, match=r"gradient norm is nan .* at step 1: 1 of .* are left out"):
        Guards(GuardConfig(max_skipped=0)).check(1, metrics(skipped=1.0))
    with pytest.raises(UserError, match=r"no window of the batch of step 1 can be read: .*data"):
        Guards(GuardConfig(max_skipped=0)).check(1, metrics(math.nan, 1.0, 8.0, tokens=0.0))


# -- state in checkpoints -------------------------------------------------------------------


def outcome(guards, step, values):
    try:
        return guards.check(step, values)
    except (UserError, Spike) as error:
        return type(error), str(error)


@MANY
@given(CONFIGS, LOSSES, st.booleans(), st.data())
def test_a_resumed_run_decides_as_one_that_was_not_cut(config, losses, rewind, data):
    """A state restored from JSON at any step gives the same events, errors and spikes."""
    whole = Guards(GuardConfig(**vars(config) | {"rewind": rewind}))
    cut = Guards(whole.config)
    for guards in (whole, cut):
        guards.left_out, guards.rewinds = [(3, 7)], 1
    at = data.draw(st.integers(0, len(losses)))
    for step, loss in enumerate(losses, start=1):
        if step == at + 1:
            cut = Guards(whole.config, json.loads(json.dumps(cut.state(), allow_nan=False)))
        values = metrics(loss, skipped=float(not math.isfinite(loss)))
        # Values with nan are not equal to themselves, so the texts are compared.
        assert str(outcome(whole, step, values)) == str(outcome(cut, step, values))
    assert whole.state() == cut.state()


def test_state_that_is_malformed_is_one_clear_error():
    good = Guards(GuardConfig()).state()
    for bad in (
        {},
        good | {"lowest": "low"},
        good | {"skipped": 3},
        good | {"left_out": [[1]]},
        good | {"left_out": None},
    ):
        with pytest.raises(UserError, match="checkpoint is malformed"):
            Guards(GuardConfig(), bad)


# -- rewinds --------------------------------------------------------------------------------


@MANY
@given(INTERVALS)
def test_merged_intervals_hold_the_same_numbers(intervals):
    merge_params = merge(intervals)
    numbers = {n for first, last in intervals for n in range(first, last + 1)}
    assert sorted(numbers) == [n for first, last in merge_params for n in range(first, last + 1)]
    # There is a gap of at least one number between any two; adjacent intervals are merged.
    assert all(a[1] + 1 < b[0] for a, b in itertools.pairwise(merge_params))
    # `batch_number` needs this: it counts the numbers outside.
    outside = [n for n in range(60) if n not in numbers]
    assert [batch_number(step, merge_params) for step in range(15)] == outside[:15]


def test_rewound():
    """A rewind is added to the guards of the checkpoint, and its batches are left out."""
    guards = Guards(GuardConfig(rewind=True, max_rewinds=2, spike_smoothing=1))
    event = guards.rewound(Spike(21, 25), (19, 24))
    assert (guards.rewinds, guards.left_out) == (1, [(19, 24)])
    assert event.kind == "rewind"
    assert event.values == {"first": 21, "last": 25, "left_out": [19, 24]}
    assert "steps 21 to 25: rewound; batches 19 to 24 are left out (rewind 1 of 2)" in event.line
    guards.rewound(Spike(20, 24), (25, 30))
    assert (guards.rewinds, guards.left_out) == (2, [(19, 30)])
    for step, loss in enumerate([1.0] + [9.0] * 4, start=1):
        guards.check(step, metrics(loss))
    with pytest.raises(UserError, match=r"after 2 rewinds: config\.guards\.max_rewinds is reached"):
        guards.check(6, metrics(9.0))
