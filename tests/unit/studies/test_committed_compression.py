"""Tests of the committed compression study: its rows, its tables and its page."""

import json
import re
import shutil

from studies import compression_figures as figures
from studies.compression import read, variants
from tests.paths import ROOT

DATA = ROOT / "docs" / "studies" / "compression"
PAGE = ROOT / "docs" / "studies" / "compression.md"


def test_its_rows_are_of_the_study_and_none_twice():
    rows = read(DATA / "rows.jsonl")
    keys = [(row["kind"], row["seed"], figures.name_of(row), row["keep"]) for row in rows]
    assert len(set(keys)) == len(keys) > 100
    assert all(name in set(variants(keep)) for _, _, name, keep in keys)
    assert {kind for kind, *_ in keys} == set(figures.KINDS)


def test_rows_of_a_share_have_no_more_bytes_than_the_papers():
    rows = read(DATA / "rows.jsonl")
    for row in rows:
        (paper,) = (
            other
            for other in figures.select(rows, kind=row["kind"], seed=row["seed"], keep=row["keep"])
            if figures.name_of(other) == figures.PAPER
        )
        assert row["bytes"] <= paper["bytes"], row
        assert row["before"] == paper["before"], "the held-out text differs"


def test_its_tables_are_what_its_rows_give(tmp_path):
    for name in ("rows", "layers", "recovery"):
        shutil.copy(DATA / f"{name}.jsonl", tmp_path)
    assert figures.redraw(tmp_path) == (DATA / "tables.md").read_text()


def test_the_page_shows_the_table_of_the_rows():
    assert figures.short_table(read(DATA / "rows.jsonl")) in PAGE.read_text()


def test_readme_shows_the_numbers_of_both_studies():
    """The real model's increases are those of its rows, the small one's those of the page."""
    page, readme = PAGE.read_text(), (ROOT / "README.md").read_text()
    for increase in ("0.7798", "0.0780", "0.0105"):  # of MHA
        assert increase in readme
        assert re.search(rf"\| \+{increase} ±", page)
    folder = ROOT / "docs" / "studies" / "real_models"
    names = [f"bits_information_{share}" for share in (50, 37, 25, 18, 12)]
    found = [json.loads((folder / f"{name}.json").read_text()) for name in names]
    shown = " | ".join(f"{row['increase']:.4f}" for row in found)
    assert f"| increase of the loss | {shown} |" in readme
    aligned = json.loads((folder / "aligned_67.json").read_text())
    assert f"loses {aligned['increase']:.4f} there" in readme


def test_the_page_tells_what_was_retrieved():
    """The page has the means over depths of `retrieval.jsonl`, at each length."""
    rows, page = read(DATA / "retrieval.jsonl"), PAGE.read_text()
    models = list(dict.fromkeys(row["model"] for row in rows))
    assert len(models) == 5
    for model in models:
        cells = []
        for length in (256, 512, 1024):
            of = [r for r in rows if (r["model"], r["length"]) == (model, length)]
            assert sum(r["samples"] for r in of) == 100
            right, nats = (sum(r[name] for r in of) / len(of) for name in ("exact", "nats"))
            cells.append(f"{right:.0%}, {nats:.2f}")
        assert f"| {model} | {' | '.join(cells)} |" in page
