"""Tests of metrics.jsonl, TensorBoard, the figure, progress lines and number formatting."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mea_jax import cli
from mea_jax.checkpoint import files, metrics
from mea_jax.checkpoint.metrics import MetricsWriter, read_metrics
from mea_jax.errors import UserError


def written(workdir, rows, start=0, redo=()):
    writer = MetricsWriter(workdir, start, redo)
    for step, kind in rows:
        writer.write(step, kind, {"loss": float(step)})
    writer.close()
    return [(row["step"], row["kind"]) for row in read_metrics(workdir / "metrics.jsonl")]


def test_rows_of_steps_that_run_again_are_dropped(tmp_path):
    first = [(1, "train"), (2, "train"), (2, "held_out"), (3, "train"), (4, "train")]
    assert written(tmp_path, first) == first
    again = [(3, "train"), (4, "train")]
    assert written(tmp_path, again, start=2) == first[:3] + again


def test_chosen_rows_of_the_first_step_are_redone(tmp_path):
    first = [(1, "train"), (2, "train"), (2, "held_out"), (2, "diagnostics")]
    written(tmp_path, first)
    found = written(tmp_path, [(2, "held_out")], start=2, redo=("held_out", "diagnostics"))
    assert found == [(1, "train"), (2, "train"), (2, "held_out")]


def test_rows_are_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, "train", {"loss": np.float32(2.5), "heads": np.array([[1.0, 2.0]])})
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row == {"step": 1, "kind": "train", "loss": 2.5, "heads": [[1.0, 2.0]]}
    writer.close()


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """The files are strict JSON, which readers other than Python's require."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    old = tmp_path / "metrics.jsonl"
    old.write_text('{"step": 1, "kind": "train", "loss": NaN}\n')  # as earlier versions wrote it
    writer = MetricsWriter(tmp_path, 1)
    writer.write(2, "train", {"loss": np.float32("nan"), "heads": np.array([[-np.inf, 2.0]])})
    writer.close()
    lines = [json.loads(line, parse_constant=refuse) for line in old.read_text().splitlines()]
    assert [row["loss"] for row in lines] == [None, None]
    assert lines[1]["heads"] == [[None, 2.0]]
    files.write_json(tmp_path / "summary.json", {"a": [float("inf")], "b": {"c": (1.5, 2)}})
    stored = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert stored == {"a": [None], "b": {"c": [1.5, 2]}}
    assert metrics.plot_loss(tmp_path, "title", None, {}).exists()


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    assert read_metrics(path) == [{"step": 1, "kind": "train"}]
    assert read_metrics(tmp_path / "missing.jsonl") == []


def test_tensorboard_gets_scalars(tmp_path):
    written(tmp_path, [(1, "train"), (2, "held_out")])
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train/loss" in events
    assert b"held_out/loss" in events


@pytest.mark.parametrize("baselines", [{}, {"gzip -9": 2.0, "xz -9e": 1.9}])
@pytest.mark.parametrize(
    "rows", [[], [(1, "train")], [(1, "train"), (2, "train"), (2, "held_out")]]
)
def test_figure_of_any_run(tmp_path, rows, baselines):
    """A figure is drawn even of a run without rows or without baselines."""
    written(tmp_path, rows)
    path = metrics.plot_loss(tmp_path, "title", 1.5 if baselines else None, baselines)
    assert path.name == "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_progress_without_a_terminal_is_a_line_at_the_end(capsys):
    progress = metrics.Progress(0, 3)
    for step in (1, 2, 3):
        progress.update(step, 1.25, 5000.0)
    progress.close()
    err = capsys.readouterr().err
    assert err.count("\n") == 1, "only the last step is printed: the run took seconds"
    assert "step 3/3" in err
    assert "loss 1.250" in err
    assert "5,000 tokens/s" in err
    assert "ETA 0 s" in err


def test_progress_of_other_processes_is_silent(capsys):
    progress = metrics.Progress(0, 2, enabled=False)
    progress.update(1, 1.0, 1.0)
    progress.update(2, 1.0, 1.0)
    progress.close()
    assert capsys.readouterr().err == ""


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"x\.json cannot be written: No space left on device"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 B"),
        (999.0, "999 B"),
        (1000.0, "1 kB"),
        (1_234_567.0, "1.23 MB"),
        (2.5e9, "2.5 GB"),
        (5e20, "500 EB"),
        (math.inf, "inf B"),
    ],
)
def test_numbers_for_people(value, text):
    assert cli.si(value, "B") == text


@given(exponent=st.floats(3, 20))
def test_numbers_for_people_are_the_number(exponent):
    number, unit = cli.si(10**exponent).split(" ")
    scale = 1000.0 ** (1 + ["k", "M", "G", "T", "P", "E"].index(unit))
    # Three digits.
    assert float(number) * scale == pytest.approx(10**exponent, rel=6e-3)
    assert 1 <= float(number) <= 1000


def test_table_aligns():
    assert cli.table([("a", "1"), ("long", "2")]) == "  a     1\n  long  2"
