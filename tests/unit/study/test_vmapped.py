"""Tests of several runs in one program: equal to separate runs, resumable, with histories."""

import dataclasses
import importlib.util
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from ml_collections import config_dict

from mea_jax.config.schema import EvalConfig
from mea_jax.errors import UserError
from mea_jax.parallel.preemption import Preempted, StopRequest
from mea_jax.study import run as running
from mea_jax.study.grid import Cell, Grid, Member, default_study, grid_of
from mea_jax.study.histories import History
from mea_jax.study.store import Store
from mea_jax.study.vmapped import Sweep
from mea_jax.train.run import train
from tests.paths import ROOT

MEMBERS = (Member(0, 1e-3), Member(0, 1e-2), Member(1, 1e-3), Member(1, 1e-2))
IDENTITY: dict[str, Any] = {"base": {}, "variants": {}, "sizes": {}, "spikes": {}}


@pytest.fixture
def grid(tiny):
    """Return `grid(**changes)`, which returns a study of one cell with four runs."""

    def make(members=MEMBERS, **changes):
        config = tiny(steps=6, **{"evaluate.every": 2, "checkpoint.every": 2}, **changes)
        return Grid("test", (Cell("v", "s", config, members),), 0, (0.5, 3, 2), IDENTITY)

    return make


def rows_of(folder):
    return {(r["seed"], r["learning_rate"]): r for r in Store(folder).rows()}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 8])
def test_runs_together_are_the_runs_alone(grid, tmp_path, devices, count):
    """Losses agree up to rounding, for runs in sequence in one program or vmapped over a mesh."""
    devices(count)
    study = grid()
    assert running.run(study, tmp_path / "store", print, StopRequest()) == 4
    rows = rows_of(tmp_path / "store")
    devices(1)
    for member in MEMBERS[1:3]:
        config = study.cells[0].config
        rate = dataclasses.replace(config.optimizer, learning_rate=member.learning_rate)
        alone = dataclasses.replace(
            config, optimizer=rate, seed=member.seed, evaluate=EvalConfig(every=2, batches=1)
        )
        run = tmp_path / f"{member.seed}-{member.learning_rate}"
        loss = train(alone, run)["held_out_loss"]
        row = rows[member.seed, member.learning_rate]
        assert row["loss"] == pytest.approx(loss, rel=2e-6)
        metrics = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        curve = [m["loss"] for m in metrics if m["kind"] == "held_out"]
        assert [x for _, x in row["curve"][1:]] == pytest.approx(curve[:2], rel=2e-6)
        assert [t for t, _ in row["curve"]] == [0, 2 * 8 * 32, 4 * 8 * 32]
        assert not row["diverged"]
    assert len({r["loss"] for r in rows.values()}) == 4


@pytest.mark.slow
def test_a_grid_compiles_its_step_once(grid, tmp_path, devices, monkeypatch):
    """The step is traced once for any number of steps and rates."""
    devices(1)
    traced: list[int] = []
    original = Sweep._step

    def counted(self, *arguments):
        traced.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(Sweep, "_step", counted)
    running.run(grid(), tmp_path, print, StopRequest())
    assert len(traced) == 1


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [3, 4])
def test_a_stopped_grid_goes_on(grid, tmp_path, devices, monkeypatch, stop_at):
    """The rows are those of an uninterrupted grid, except the seconds; no run is repeated."""
    devices(1)
    running.run(grid(), tmp_path / "whole", print, StopRequest())
    stop, taken = StopRequest(), running.SweepRun._take

    def take(self, step, *rest):
        taken(self, step, *rest)
        stop.requested = step == stop_at

    monkeypatch.setattr(running.SweepRun, "_take", take)
    with pytest.raises(Preempted, match="which is saved"):
        running.run(grid(), tmp_path / "cut", print, stop)
    monkeypatch.setattr(running.SweepRun, "_take", taken)
    said: list[str] = []
    running.run(grid(), tmp_path / "cut", said.append, StopRequest())
    assert any("resuming from step" in line for line in said)
    whole, cut = rows_of(tmp_path / "whole"), rows_of(tmp_path / "cut")
    for key, row in whole.items():
        assert row | {"seconds": 0} == cut[key] | {"seconds": 0}
    assert running.run(grid(), tmp_path / "cut", print, StopRequest()) == 0
    assert not any((tmp_path / "cut" / "unfinished").iterdir())


@pytest.mark.slow
def test_missing_runs_only(grid, tmp_path, devices):
    devices(1)
    running.run(grid(MEMBERS[:1]), tmp_path, print, StopRequest())
    first = rows_of(tmp_path)
    assert running.run(grid(), tmp_path, print, StopRequest()) == 3
    assert rows_of(tmp_path)[0, 1e-3] == first[0, 1e-3]


@pytest.mark.slow
def test_a_run_that_diverges_is_a_row_and_harms_no_other(grid, tmp_path, devices):
    devices(1)
    wild = (Member(0, 1e-3), Member(0, 1e5))
    running.run(grid(wild), tmp_path / "a", print, StopRequest())
    running.run(grid(wild[:1]), tmp_path / "b", print, StopRequest())
    rows = rows_of(tmp_path / "a")
    assert rows[0, 1e5]["diverged"]
    assert "gradients were not finite" in rows[0, 1e5]["why"]
    assert not rows[0, 1e-3]["diverged"]
    assert rows[0, 1e-3]["loss"] == rows_of(tmp_path / "b")[0, 1e-3]["loss"]


def test_shards_split_the_programs(tmp_path, devices, tiny, monkeypatch):
    devices(1)
    config = tiny(steps=6)
    cells = tuple(Cell(v, "s", config, MEMBERS[:1]) for v in "abc")
    done: list[str] = []
    monkeypatch.setattr(
        running.SweepRun, "train", lambda self, *rest: done.append(self.cell.variant)
    )
    for index in range(2):
        study = Grid("test", cells, 0, (0.5, 3, 2), IDENTITY)
        running.run(study, tmp_path, print, StopRequest(), (index, 2))
    assert done == ["a", "c", "b"]


# -- histories --------------------------------------------------------------------------------


def fed(losses, spikes=(0.5, 3, 2)):
    history = History(spikes)
    history.curve.append([0, 7.0])
    for step, loss in enumerate(losses, start=1):
        history.feed(step, loss, not math.isfinite(loss))
    return history


def test_why_a_run_diverged():
    assert fed([3.0] * 9).why_diverged(2.9) is None
    assert fed([3.0] * 9).why_diverged(math.nan) == "the loss is not finite"
    assert "no lower than" in str(fed([3.0] * 9).why_diverged(7.1))
    assert "last 2 gradients" in str(fed([3.0, math.inf, math.nan]).why_diverged(2.9))
    assert fed([3.0, math.inf, 3.0]).why_diverged(2.9) is None
    rising = fed([3.0] * 4 + [4.0] * 6)
    assert rising.spikes == [
        [6, 0]
    ]  # from here the mean of two exceeds the lowest by more than 0.5
    assert "spike at step 6" in str(rising.why_diverged(4.0))
    back = fed([3.0] * 4 + [4.0] * 6 + [3.0] * 3)
    assert back.spikes == [[6, 11]]
    assert back.why_diverged(3.0) is None
    assert fed([3.0, 9.0] * 6, (0.5, 3, 4)).spikes == []  # noise between batches is not a spike


def test_a_history_survives_a_checkpoint():
    losses = [*np.linspace(5, 3, 20), 4.2, 4.3, math.nan, 4.4, 4.4, 3.0, 3.0, 3.0]
    for cut in range(len(losses)):
        history = fed(losses[:cut])
        again = History((0.5, 3, 2)).restored(json.loads(json.dumps(history.state())))
        for step, loss in enumerate(losses[cut:], start=cut + 1):
            again.feed(step, loss, not math.isfinite(loss))
        assert json.dumps(again.state()) == json.dumps(fed(losses).state())


def config_module(name):
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_study_is_a_grid():
    module = config_module("lr_study")
    config = module.get_config()
    assert isinstance(config, config_dict.ConfigDict)
    grid = grid_of(config)
    assert {c.variant for c in grid.cells} == set(module.VARIANTS)
    rates = sorted({m.learning_rate for m in grid.cells[0].members})
    assert len(rates) >= 7
    assert all(b / a <= 2.0000001 for a, b in itertools.pairwise(rates))
    assert set(default_study().keys()) == set(config.keys())


@pytest.mark.parametrize("group", ["", "parts", "order", "positions", "baselines"])
def test_ablations_are_grids_of_models_that_differ(group):
    grid = grid_of(config_module("ablations").get_config(group))
    models = [cell.config.model for cell in grid.cells]
    decays = [cell.config.optimizer.decay_mixing for cell in grid.cells]
    assert len(set(zip(models, decays, strict=True))) == len(models) > 1


def test_a_small_study_and_arguments_that_are_none():
    small = grid_of(config_module("lr_study").get_config("small"))
    assert [len(cell.members) for cell in small.cells] == [5, 5]
    with pytest.raises(UserError, match="has no argument 'tiny': use small, or none"):
        config_module("lr_study").get_config("tiny")
    with pytest.raises(UserError, match="did you mean 'baselines'"):
        config_module("ablations").get_config("baseline")
