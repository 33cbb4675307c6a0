"""Tests of the committed learning-rate study: its rows, its report and its page."""

import importlib.util

from mea_jax.study.grid import grid_of
from mea_jax.study.report import report
from mea_jax.study.store import Store, key_of
from tests.paths import ROOT

STUDY = ROOT / "docs" / "studies" / "learning_rate"


def grid():
    spec = importlib.util.spec_from_file_location("lr_study", ROOT / "configs" / "lr_study.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return grid_of(module.get_config())


def test_its_rows_are_the_runs_of_its_config(tmp_path):
    made = grid()
    wanted = {
        (cell.variant, cell.size, cell.steps, member.learning_rate, member.seed)
        for cell in made.cells
        for member in cell.members
    }
    rows = Store(STUDY).rows()
    assert {key_of(row) for row in rows} == wanted
    assert len(rows) == len(wanted) == 190
    copy = Store(tmp_path)
    copy.grid.write_bytes((STUDY / "grid.json").read_bytes())
    copy.claim(made.fingerprint)  # raises if the rows are of another grid


def test_its_report_is_what_its_rows_give(tmp_path):
    """The tables are equal in all digits; the first lines, with folder names, are not compared."""
    made = report(STUDY, tmp_path).splitlines()
    assert made[3:] == (STUDY / "report.md").read_text().splitlines()[3:]


def test_the_page_says_what_the_report_says():
    page = (ROOT / "docs" / "studies" / "learning_rate.md").read_text()
    rows = Store(STUDY).rows()
    for variant, name in (("mha", "MHA"), ("mea_no_norm", "mixing, no norm"), ("mea", "MEA")):
        for size in ("d128", "d192"):
            of = [r for r in rows if (r["variant"], r["size"]) == (variant, size)]
            losses = {
                rate: [r["loss"] for r in of if r["learning_rate"] == rate]
                for rate in sorted({r["learning_rate"] for r in of})
            }
            means = [f"{sum(some) / len(some):.3f}" for some in losses.values()]
            best = min(means)
            shown = " | ".join(f"**{m}**" if m == best else m for m in means)
            assert f"| {name} | {shown} |" in page
