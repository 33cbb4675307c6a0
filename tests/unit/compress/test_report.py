"""Tests of what the compress command prints before it starts, about its text, and at its end."""

import dataclasses
import types
from typing import Any

import pytest

from mea_jax.compress import damage, expected
from mea_jax.compress.calibration import CalibrationTexts
from mea_jax.compress.options import Options
from mea_jax.config.schema import DataConfig, SourceConfig, TrainConfig
from mea_jax.data.tokenizers import train_bpe
from mea_jax.errors import UserError
from tests.helpers import tiny_model


def summary(increase, error=0.001, kept=0.5, **options):
    domain = {"increase": increase, "error": error}
    return {
        "held_out": {"domains": {"easy": {"increase": 0.0, "error": 0.1}, "hard": domain}}
        | {"tokens": 4096},
        "options": {"repair": "none", "budget": "uniform", "method": "aligned"} | options,
        "cache_kept": kept,
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (summary(0.0015), ["+0.0015 nats on hard: no loss that 4,096 tokens can show"]),
        (summary(0.004), ["+0.0040 nats on hard: close to the original"]),
        (summary(0.01, error=0.02), ["a small loss", "May help: --repair layerwise, --budget"]),
        (summary(0.05, repair="layerwise"), ["a clear loss", "May help: --budget measured, a l"]),
        (summary(7.3, budget="measured"), ["a damaged model; do not use", "--repair layerwise, a"]),
        (
            summary(0.05, method="bits"),
            ["May help: --repair layerwise, --budget information, a larger --keep"],
        ),
        (summary(-0.2), ["+0.0000 nats on easy: close to the original"]),
        (summary(0.0, error=float("nan")), ["close to the original"]),
    ],
)
def test_the_verdict_is_that_of_the_worst_domain(given, words):
    found = damage.verdict(given)
    assert all(word in found for word in words), found
    assert "\n" not in found
    if given["held_out"]["domains"]["hard"]["increase"] < 0.005:
        assert "May help" not in found


def test_the_expected_work_counts_each_stage():
    model = tiny_model(n_layers=4, hlc="none")
    plain = Options(calibration_tokens=1000, held_out_tokens=300)
    found = expected.passes(model, plain, layers=4, batch_tokens=64)
    assert found == {"calibrating": 1300, "compressing": 4 * 1000, "evaluating": 300}
    half = expected.passes(model, plain, layers=2, batch_tokens=64)
    assert half["compressing"] == found["compressing"] / 2
    repaired = dataclasses.replace(plain, repair="layerwise", repair_steps=10)
    more = expected.passes(model, repaired, layers=4, batch_tokens=64)["compressing"]
    assert more - found["compressing"] == 4 * 1000 + 10 * 3 * 64
    measured = dataclasses.replace(plain, budget="measured", measure_tokens=100)
    candidates = 2 * 3 * 4  # keys and values of 1 to 3 of 4 heads, in 4 layers
    assert expected.passes(model, measured, 4, 64)["dividing"] == candidates * 100 / 2
    assert "TFLOP" in expected.describe(dataclasses.replace(model, dtype="float32"), plain, 4, 8, 8)


def published(run, data) -> Any:
    """Return a published model as `CalibrationTexts` sees it, without a digest of training data."""
    config = TrainConfig(data=data, model=tiny_model(vocab_size=300))
    return types.SimpleNamespace(run=run, digest="", config=config)


def test_other_held_out_text(tmp_path, devices):
    devices(1)
    (tmp_path / "tokenizer").mkdir()
    train_bpe(iter(["some words to merge"]), 264).save(tmp_path / "tokenizer")
    for name in ("own", "other"):
        (tmp_path / f"{name}.txt").write_text(f"{name} words. " * 400)
    own = SourceConfig(source="text", path=str(tmp_path / "own.txt"))
    data = DataConfig(sources=(own,), context_length=16, held_out_fraction=0.5)
    lines: list[str] = []
    options = Options(held_out_source=f"text:{tmp_path / 'other.txt'}", held_out_tokens=64)
    texts = CalibrationTexts(published(tmp_path, data), options, lines.append)
    stream = texts.held_out(tmp_path / "held_out")
    assert {label.rpartition("/")[2] for label in stream.labels} == {"other.txt"}
    words = texts.prepared.tokenizer.decode(stream.batches[0]["inputs"][0].tolist())
    assert "other" in words
    assert lines == []
    assert texts.training(tmp_path / "training", 64).batches
    with pytest.raises(UserError, match=r"missing\.txt"):
        CalibrationTexts(
            published(tmp_path, data),
            Options(held_out_source=f"text:{tmp_path / 'missing.txt'}"),
            print,
        )


def test_an_import_without_text_is_told_so(tmp_path, monkeypatch, devices):
    devices(1)
    lines: list[str] = []
    source = types.SimpleNamespace(held_out_windows=1)
    prepared = types.SimpleNamespace(sources=[source])
    monkeypatch.setattr(CalibrationTexts, "_own", lambda *_: prepared)
    CalibrationTexts(published(tmp_path, DataConfig()), Options(), lines.append)
    assert len(lines) == 1
    assert "Python's standard library" in lines[0]
    assert "--held_out_source" in lines[0]
