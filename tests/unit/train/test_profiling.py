"""Tests of profiles: the traced steps, the log lines, and invalid ranges of steps."""

import gzip
import json

import jax
import pytest

from mea_jax.errors import UserError
from mea_jax.train import profiling
from mea_jax.train.loop import Loop
from mea_jax.train.run import train

pytestmark = pytest.mark.slow


class SimulatedKill(BaseException):
    """An exception that stands for a kill."""


@pytest.fixture(scope="module")
def traced(tiny, tmp_path_factory):
    """Return (run directory, log lines) of a run of 8 steps, traced from 3 to 5 and cut at 6."""
    workdir = tmp_path_factory.mktemp("profile") / "run"
    everything, lines = jax.devices(), []
    report = Loop.report_step

    def stop(self, step, *args):
        if step == 6:
            raise SimulatedKill
        return report(self, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: everything[:1])
        patch.setattr(Loop, "report_step", stop)
        patch.setattr(
            "mea_jax.checkpoint.metrics.Progress.log", lambda self, line: lines.append(line)
        )
        with pytest.raises(SimulatedKill):
            train(tiny(), workdir, (3, 5))
    return workdir, lines


def events(workdir):
    (path,) = (workdir / "profile").glob("plugins/profile/*/*.trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_the_trace_has_the_steps_asked_for(traced):
    workdir, _ = traced
    steps = [
        int(event["args"]["step_num"])
        for event in events(workdir)
        if event.get("name") == profiling.STEP_NAME and "step_num" in event.get("args", {})
    ]
    assert sorted(steps) == [3, 4, 5]
    assert list((workdir / "profile").glob("plugins/profile/*/*.xplane.pb"))


def test_the_trace_has_what_ran(traced):
    """The trace has events of the runtime for programs, in addition to our own names."""
    workdir, _ = traced
    names = [event["name"] for event in events(workdir) if event.get("ph") == "X"]
    runs = [name for name in names if "Execute" in name or "ThunkExecutor" in name]
    assert runs, sorted(set(names))


def test_it_is_said_how_to_look_at_it(traced):
    workdir, lines = traced
    (line,) = [line for line in lines if "profile" in line]
    assert f"profile of steps 3 to 5 in {workdir / 'profile'}" in line
    assert f"xprof --logdir {workdir / 'profile'}" in line


def test_a_resumed_run_past_the_steps_says_so(traced, tiny, devices, capsys):
    workdir, _ = traced
    devices(1)
    before = sorted((workdir / "profile").rglob("*"))
    train(tiny(), workdir, (1, 4))
    assert "no profile: steps 1 to 4 are done, the run is at step 4" in capsys.readouterr().err
    train(tiny(), workdir, (7, 8))  # finished by now
    assert "no profile: steps 7 to 8 are done, the run is at step 8" in capsys.readouterr().err
    assert sorted((workdir / "profile").rglob("*")) == before


def test_nothing_is_traced_unless_asked(tiny, devices, tmp_path, monkeypatch):
    devices(1)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: pytest.fail("traced"))
    train(tiny(steps=2, **{"optimizer.warmup_steps": 1}), tmp_path / "run")
    assert not (tmp_path / "run" / "profile").exists()


@pytest.fixture
def traces(monkeypatch):
    """Return a list to which a `Profile` appends its operations, in order."""
    done = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: done.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: done.append("stop"))
    monkeypatch.setattr(jax, "block_until_ready", lambda x: done.append(f"wait {x}"))
    return done


def test_waits_before_and_after(traces, tmp_path):
    with profiling.Profile((2, 3), tmp_path, 0, traces.append) as profile:
        for step in (1, 2, 3, 4):
            with profile.step(step, f"inputs {step}"):
                traces.append(step)
            profile.after(step, f"results {step}")
    said = traces.pop(-2)
    assert said.startswith("profile of steps 2 to 3")
    assert traces == [1, "wait inputs 2", "start", 2, 3, "wait results 3", "stop", 4]


def test_steps_done_before_are_left_out(traces, tmp_path):
    with profiling.Profile((2, 5), tmp_path, 3, traces.append) as profile:
        for step in (4, 5):
            with profile.step(step, "x"):
                traces.append(step)
            profile.after(step, "y")
    assert traces[:5] == ["wait x", "start", 4, 5, "wait y"]
    assert traces[-1].startswith("profile of steps 4 to 5")


def test_an_error_between_ends_the_trace(traces, tmp_path):
    profile = profiling.Profile((1, 5), tmp_path, 0, traces.append)
    with pytest.raises(SimulatedKill), profile, profile.step(1, "x"):
        raise SimulatedKill
    assert traces[1:3] == ["start", "stop"]
    assert traces[-1].startswith("profile of steps 1 to 1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5", "write FIRST:LAST"),
        ("a:b", "write FIRST:LAST"),
        ("-1:3", "write FIRST:LAST"),
        ("9:3", "the last step comes before the first"),
        ("0:3", "counted from 1"),
        ("3:9", "the run ends at config.steps=8"),
    ],
)
def test_steps_that_cannot_be(text, words):
    with pytest.raises(UserError, match=f"--profile_steps {text}: .*{words}"):
        profiling.parse_steps(text, 8)
    assert profiling.parse_steps(" 3:8 ", 8) == (3, 8)
