"""Tests of the fits and the report of a store whose rows follow a known law."""

import json

import numpy as np
import pytest

from mea_jax.errors import UserError
from mea_jax.study import fit, report
from mea_jax.study.store import Store

PEAKS = {"mha": 4e-3, "mea": 8e-3}
RATES = [5e-4 * 2**i for i in range(8)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return rows of two variants with losses quadratic in log lr around `PEAKS`.

    At the largest rate, the runs of "mha" diverge.
    """
    made = Store(tmp_path_factory.mktemp("store"))
    rng = np.random.default_rng(0)
    for size, parameters in (("s", 800_000), ("m", 2_700_000)):
        for variant, best in PEAKS.items():
            for rate in RATES:
                for seed in range(2):
                    wild = rate == RATES[-1] and variant == "mha"
                    loss = 3.0 + 0.03 * np.log2(rate / best) ** 2 + 0.003 * rng.normal()
                    tokens = np.linspace(0, 500_000, 12)
                    curve = [[int(t), float(loss + 3 * np.exp(-t / 1e5))] for t in tokens]
                    about = {"variant": variant, "size": size, "steps": 500, "seed": seed}
                    made.append(about | {
                        "learning_rate": rate, "parameters": parameters, "tokens": 500_000,
                        "loss": None if wild else float(loss), "diverged": wild, "curve": curve,
                    })  # fmt: skip
    return made


@pytest.mark.slow
def test_the_report_finds_what_the_rows_were_made_of(store, tmp_path):
    text = report.report(store.folder, tmp_path)
    fits = json.loads((tmp_path / "fit.json").read_text())
    assert len(fits["optimum"]) == 4
    for f in fits["optimum"]:
        low, high = f["learning_rate"]["low"], f["learning_rate"]["high"]
        assert low < PEAKS[f["variant"]] < high
        assert high / low < 2
    assert "64 runs, 4 of them diverged" in text
    assert (tmp_path / "report.md").read_text() == text
    assert "better than mha by" in text, "mha must be the default baseline"
    other = report.report(store.folder, tmp_path / "other", "mea")
    assert "better than mea by" in other
    assert "--baseline mea`" in other, "the report must have the command that makes it again"
    for name in report.FIGURES:
        assert f"]({name}.png)" in text
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
        assert (tmp_path / f"{name}.svg").read_text().rstrip().endswith("</svg>")


def test_the_same_rows_give_the_same_report(store, tmp_path):
    assert report.report(store.folder, tmp_path / "r") == report.report(
        store.folder, tmp_path / "r"
    )


def test_variants_differ_without_colour(store):
    looks = [(s["marker"], s["linestyle"]) for s in report.styles(store.rows()).values()]
    assert len(set(looks)) == len(PEAKS)


def test_the_smallest_model_comes_first(store):
    assert report.cells(store.rows()) == [("s", 500), ("m", 500)]


def test_no_rows_no_fit(tmp_path):
    with pytest.raises(UserError, match="has no rows: run python -m"):
        fit.fit_store(tmp_path)
