"""Tests of the compression study: resuming its grid, and the tables and figures of its rows."""

import json
from dataclasses import asdict

import pytest

from mea_jax.compress.options import Options
from mea_jax.train.run import train
from studies import compression, compression_figures, recovery
from studies.compression import CompressionName, Study
from studies.compression_figures import BEST, PAPER
from tests.helpers import PLAIN
from tests.paths import ROOT

SMALL = Options(calibration_tokens=512, measure_tokens=256, held_out_tokens=512, repair_steps=2)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "mha-0"
    train(tiny(steps=8, **{f"model.{name}": value for name, value in PLAIN.items()}), workdir)
    return workdir


def test_a_stopped_study_goes_on(run, devices, tmp_path, monkeypatch):
    """Compressions in rows.jsonl are not repeated; finished ones without a row are read."""
    devices(1)
    work, out = tmp_path / "work", tmp_path / "out"
    study, name = Study(work, out), CompressionName("aligned", "measured", "none")
    row = study.compress(run, name, 0.5, SMALL)
    assert Study(work, out).done("mha-0", name, 0.5)
    assert not Study(work, out).done("mha-0", name, 0.25)
    assert not Study(work, out).done("mha-1", name, 0.5)
    layers = compression.read(out / "layers.jsonl")
    assert [(r["layer"], r["which"]) for r in layers] == [
        (0, "key"), (0, "value"), (1, "key"), (1, "value"),
    ]  # fmt: skip
    (out / "rows.jsonl").unlink()
    monkeypatch.setattr(compression, "compress", lambda *args: 1 / 0)
    again = Study(work, out)
    assert again.compress(run, name, 0.5, SMALL)["increase"] == row["increase"]
    assert compression.read(out / "layers.jsonl") == layers


@pytest.mark.slow
def test_budgets_measured_once_serve_every_share(run, devices, tmp_path, monkeypatch):
    devices(1)
    study, name = (
        Study(tmp_path / "work", tmp_path / "out"),
        CompressionName("aligned", "measured", "none"),
    )
    half = study.compress(run, name, 0.5, SMALL)
    monkeypatch.setattr("mea_jax.compress.measurements.SensitivityProbe", lambda *args: 1 / 0)
    quarter = study.compress(run, name, 0.25, SMALL)
    assert quarter["bytes"] <= half["bytes"] / 2
    assert (tmp_path / "work" / "mha-0" / name.folder(0.5)).exists()
    assert not (tmp_path / "work" / "mha-0" / name.folder(0.25)).exists()


def test_more_effort_is_more_steps_on_more_text():
    usual = Options(repair_steps=100, calibration_tokens=1000)
    name = CompressionName("aligned", "repaired", "layerwise", effort=4)
    asked = name.of(usual, 0.5)
    assert (asked.repair_steps, asked.repair_tokens) == (400, 4000)
    assert asked.calibration_tokens == 1000  # otherwise budgets would be measured again
    assert name.folder(0.5) != CompressionName("aligned", "repaired", "layerwise").folder(0.5)


def test_a_part_of_the_study_by_its_flags(run, devices, tmp_path, in_process):
    devices(1)
    few = [f"--{name}_tokens=512" for name in ("calibration", "measure", "held_out")]
    out = ["--work", tmp_path / "work", "--out", tmp_path / "out"]
    part = ["--keep=0.5", "--keep=0.25", "--budget=uniform", "--repair=none", "--method=svd"]
    arguments = ["--model", run, *out, *few, *part]
    status, _, err = in_process("studies.compression", *arguments)
    assert status == 0, err
    rows = compression.read(tmp_path / "out" / "rows.jsonl")
    assert [(r["method"], r["keep"]) for r in rows] == [("svd", 0.25), ("svd", 0.5)]
    status, _, err = in_process("studies.compression", *arguments, "--effort=4")
    assert (status, "no compression of the study matches" in err) == (2, True)


def row(kind, seed, name, keep, increase):
    domains = {"python": increase, "english": increase / 2}
    return {"kind": kind, "seed": seed, **asdict(name), "keep": keep, "increase": increase} | {
        "domains": domains, "keys": [4, 2], "values": [1, 1],
    }  # fmt: skip


ROWS = [
    row("mha", seed, name, 0.5, increase)
    for seed, paper, best in ((0, 0.8, 0.01), (1, 0.9, 0.018))
    for name, increase in ((PAPER, paper), (BEST, best))
]


def test_ratios_are_to_the_papers_method_at_the_same_seed():
    assert compression_figures.ratios(ROWS, "mha", BEST, 0.5) == pytest.approx([1 / 80, 1 / 50])
    assert compression_figures.ratios(ROWS[:3], "mha", BEST, 0.5) == pytest.approx([1 / 80])
    table = compression_figures.increases_table(ROWS, 0.5)
    assert "| aligned, measured repaired | +0.0100, +0.0180 | 1/80, 1/50 |" in table
    assert "svd (the paper) | +0.8000, +0.9000 |  |" in table
    short = compression_figures.short_table(ROWS)
    assert "| aligned, measured repaired | +0.0140, 1/61.5 |" in short  # of 1/80 and 1/50
    assert "| svd (the paper) | +0.8500 |" in short
    assert compression_figures.share(1.104) == "1.10"


def test_means_of_seeds_have_the_error_of_a_mean():
    """Independent errors add as squares.

    If a row has no error, the mean has none; without the paper's row there is no ratio.
    """
    known = [
        r | {"error": e, "divergence": r["increase"] / 2}
        for r, e in zip(ROWS, (3e-2, 3e-3, 4e-2, 4e-3), strict=True)
    ]
    short = compression_figures.short_table(known)
    assert "| svd (the paper) | +0.8500 ±0.0250 |" in short
    assert "| aligned, measured repaired | +0.0140 ±0.0025, 1/61.5 |" in short
    mixed = compression_figures.short_table([*known[:2], *ROWS[2:]])
    assert "| aligned, measured repaired | +0.0140, 1/61.5 |" in mixed
    assert (
        "| aligned, measured repaired | 0.0070, 1/61.5 |"
        in compression_figures.divergence_table(known)
    )
    assert "| aligned, measured repaired | 0.0050 |" in compression_figures.divergence_table(
        [*ROWS[2:], known[1]]
    )


def test_one_command_redraws_all(tmp_path):
    lines = [json.dumps(r) + "\n" for r in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    losses = [0.3, 0.2, 0.1, 0.0]
    layer = {"kind": "mha", "seed": 0, "method": "aligned", "repaired": False, "losses": losses}
    layers = [layer | {"layer": i, "which": w} for i in range(2) for w in ("key", "value")]
    (tmp_path / "layers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in layers))
    compression_figures.redraw(tmp_path)
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    assert "+0.0140" in (tmp_path / "tables.md").read_text()  # the mean over seeds, by domain


@pytest.mark.slow
def test_recovery_starts_from_what_was_compressed(run, devices, tmp_path, monkeypatch):
    """Each run starts at the loss of its model, the control at the original's.

    Finished runs are not repeated.
    """
    devices(1)
    quick = (
        PAPER,
        CompressionName("aligned", "uniform", "none"),
    )  # the other starts are equal here
    monkeypatch.setattr(recovery, "STARTS", quick)
    monkeypatch.setattr(recovery, "DISTILLED", quick[1])
    study = Study(tmp_path / "work", tmp_path / "out")
    kept = {name: study.compress(run, name, 0.5, SMALL) for name in recovery.STARTS}
    recipe = str(ROOT / "configs" / "recover.py")
    config = recovery.recovery_config(recipe, run, 4, 1e-3)
    assert (config.steps, config.optimizer.learning_rate) == (4, 1e-3)
    rows = recovery.recover(run, tmp_path / "work", recipe, 4, 1e-3)
    first = {row["start"]: row["loss"] for row in rows if row["step"] == 0}
    assert len(first) == 2 + len(kept)
    ended = json.loads((run / "summary.json").read_text())["held_out_loss"]
    assert first["original"] == pytest.approx(ended, abs=1e-4)
    best = recovery.DISTILLED.folder(0.5)
    assert first[best] == first[f"{best}, taught"]
    after = {row["start"]: row["loss"] for row in rows}
    assert after[best] != after[f"{best}, taught"]
    assert recovery.recover(run, tmp_path / "work", recipe, 4, 1e-3) == rows
    table = compression_figures.recovery_table(rows)
    assert f"| MHA | 0 | original | +0.0000 | +0.0000 | {after['original']:.4f} |" in table
    lost = first[best] - first["original"]
    assert f"| MHA | 0 | aligned | {lost:+.4f} | " in table
    compression_figures.draw_recovery(rows, tmp_path / "recovery.png")
    assert (tmp_path / "recovery.png").stat().st_size > 10_000


def test_nothing_compressed_nothing_recovered(tmp_path):
    with pytest.raises(compression.UserError, match=r"run python -m studies\.compression"):
        recovery.starts(tmp_path / "mha-0", tmp_path)


def test_no_rows_no_study(tmp_path):
    with pytest.raises(compression.UserError, match="has no rows"):
        compression_figures.redraw(tmp_path)
