"""Tests of `python -m mea_jax.evaluate`: two checkpoints end to end, and bad input."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import jax
import pytest

from mea_jax.data.tokenizers import BytesTokenizer
from mea_jax.errors import UserError
from mea_jax.evaluate import models, run
from mea_jax.evaluate.run import Options, fill_defaults
from mea_jax.train.run import train
from tests.helpers import assert_one_error, tiny_model

pytestmark = pytest.mark.slow

ONE = {"mesh.data": 1, "mesh.fsdp": -1}
QUICK: tuple[str, ...] = (
    "--lengths",
    "8",
    "--depths",
    "0,1",
    "--samples",
    "2",
    "--contexts",
    "16,200",
)
QUICK += ("--repeats", "2", "--dtype", "float32")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Train four runs on the same text and return their folder.

    "whole" caches all heads, "half" half of them, "learned" has learned positions, and "wide" has a
    larger vocabulary.
    """
    root = tmp_path_factory.mktemp("runs")
    half = tiny_model(key_components=2, value_components=2)
    learned = tiny_model(positions="learned", max_positions=40)
    train(tiny(**ONE), root / "whole")
    train(tiny(model=half, **ONE), root / "half")
    train(tiny(steps=1, model=learned, **ONE), root / "learned")
    train(tiny(steps=1, model=tiny_model(vocab_size=272), **ONE), root / "wide")
    return root


@pytest.fixture
def evaluate(in_process):
    """Return `evaluate(*arguments)`: it runs the command here, on 8 devices: (status, out, err)."""
    return functools.partial(in_process, "mea_jax.evaluate", count=8)


def both(runs):
    return "--checkpoint", runs / "whole", "--checkpoint", runs / "half"


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_two_checkpoints_side_by_side(runs, tmp_path, evaluate):
    folder = tmp_path / "new" / "profile"
    status, out, err = evaluate(*both(runs), "--out", folder, *QUICK)
    assert status == 0, err
    report = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    check_schema(report)
    whole, half = report["models"]
    assert (whole["name"], half["name"]) == ("whole", "half")
    # Two layers, keys and values of 4 or 2 heads of width 8, float32.
    assert whole["cache"]["bytes_per_token"] == 2 * 2 * 4 * 8 * 4
    assert half["cache"]["bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    summaries = [json.loads((runs / n / "summary.json").read_text()) for n in ("whole", "half")]
    for model, summary in zip((whole, half), summaries, strict=True):
        # The last evaluation of training; float32 sums over other batches differ by less than 1e-4.
        assert model["loss"]["all"]["loss"] == pytest.approx(summary["held_out_loss"], rel=1e-4)
        bits = summary["held_out_bits_per_byte"]
        assert model["loss"]["all"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    more = half["loss"]["all"]["loss"] - whole["loss"]["all"]["loss"]
    assert half["loss"]["all"]["increase"] == pytest.approx(more, rel=1e-6)
    assert whole["loss"]["all"]["increase"] == 0
    assert [row["length"] for row in whole["passkey"]] == [256, 256]
    assert [row["context"] for row in half["speed"]] == [16, 200]

    for name in ("loss.png", "positions.png", "passkey.png", "speed.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    table = (folder / "table.txt").read_text()
    assert table in out
    assert f"{whole['loss']['all']['loss']:.4f}" in table
    assert f"{more:+.4f}" in table
    assert "256 (0.5x)" in table
    assert "whole: held-out loss" in err
    assert "Traceback" not in err


def check_schema(report):
    top = {"command", "date", "versions", "machine", "seed", "options", "window", "data", "models"}
    assert report.keys() == top
    assert report["seed"] == report["options"]["seed"] == 0
    assert {"mea_jax", "commit", "python", "jax", "flax", "numpy"} <= report["versions"].keys()
    assert {"platform", "device", "cores"} <= report["machine"].keys()
    assert report["window"] == 32
    described = {"name", "checkpoint", "step", "parameters", "dtype", "cache"}
    counted = {"samples", "exact", "nats", "nats_error"}
    sizes = {"loss", "error", "increase", "increase_error", "tokens"}
    ratios = {"tokens_per_second", "over_first", "prefill_seconds", "prefill_over_first"}
    for model in report["models"]:
        assert model.keys() == described | set(run.PARTS)
        assert model["cache"].keys() == {"bytes_per_token", "dtype", "forms"}
        assert list(model["loss"])[-1] == "all"
        for cell in model["loss"].values():
            assert cell.keys() == sizes | {"bits_per_byte", "documents"}
        for buckets in model["positions"].values():
            assert [(b["from"], b["to"]) for b in buckets] == [(0, 15), (16, 31)]
            assert all(b.keys() == sizes | {"from", "to"} for b in buckets)
        for row in model["passkey"]:
            assert row.keys() == counted | {"length", "depth"}
        for row in model["arithmetic"]:
            assert row.keys() == counted | {"operation", "digits"}
        for row in model["speed"]:
            assert row.keys() == ratios | {"context", "rows"}
            assert all(row[key].keys() == {"median", "low", "high"} for key in ratios)


def test_decoding_without_prompts(runs, tmp_path, evaluate):
    only = ("--parts", "speed", "--noprefill", "--contexts", "16,300", "--repeats", "2")
    status, out, err = evaluate(*both(runs), "--out", tmp_path, *only, "--dtype", "float32")
    assert status == 0, err
    for model in json.loads((tmp_path / "report.json").read_text())["models"]:
        assert [row["context"] for row in model["speed"]] == [16, 300]
        assert all("prefill_seconds" not in row for row in model["speed"])
    assert "tokens/s" in out
    assert "prefill" not in out
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_one_checkpoint_and_some_parts(runs, tmp_path, evaluate):
    step = runs / "whole" / "checkpoints" / "4"
    arguments = ("--checkpoint", step, "--out", tmp_path, "--parts", "positions,loss")
    status, out, err = evaluate(*arguments, "--dtype", "float32")
    assert status == 0, err
    (model,) = json.loads((tmp_path / "report.json").read_text())["models"]
    assert (model["name"], model["step"]) == ("whole@4", 4)
    assert {"loss", "positions"} <= model.keys()
    assert not {"passkey", "arithmetic", "speed"} & model.keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("loss.png", "positions.png", "report.json", "table.txt")
    ]
    assert "pass keys" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no checkpoint given"),
        (("whole", "--parts", "los"), "--parts los: did you mean 'loss'?"),
        (("whole", "--parts", ""), "--parts is empty"),
        (("whole", "--contexts", "0"), "--contexts 0: contexts must be whole numbers"),
        (("whole", "--contexts", "1k"), "--contexts 1k: contexts must be whole numbers"),
        (("whole", "--contexts", ""), "--contexts is empty"),
        (("whole", "--depths", "1.5"), "--depths 1.5: depths must be in [0, 1]"),
        (("whole", "--lengths", "nan"), "--lengths nan: lengths must be multiples"),
        (("whole", "--samples", "0"), "--samples=0: 0 is not a positive integer"),
        (("whole", "--cache_dtype", "int9"), "one of <auto|float32|bfloat16|int8>"),
        (("whole", "--seed", "-1"), "--seed=-1: -1 is not an integer in"),
        (("nowhere",), "nowhere: no such folder"),
        (("whole", "whole"), "is given 2 times"),
        (("whole", "wide"), "a vocabulary of 272 tokens"),
        (("whole", "--lengths", "1"), "--lengths 1 is 32 tokens, but a pass key"),
        (("learned", "--lengths", "8"), "256 is longer than the 40 positions of a model"),
        (
            ("whole", "learned", "--contexts", "64", "--parts", "speed"),
            "--contexts 64 is longer than the 40 positions",
        ),
        (("whole", "--checkpont", "x"), "unknown flag --checkpont"),
    ],
)
def test_bad_input_is_one_line(runs, tmp_path, evaluate, arguments, message):
    checkpoints = [a for a in arguments[:2] if not a.startswith("--") and a not in ("los",)]
    given = [x for name in checkpoints for x in ("--checkpoint", runs / name)]
    out = tmp_path / "out"
    status, _, err = evaluate(*given, "--out", out, *arguments[len(checkpoints) :])
    assert status == 2
    assert_one_error(status, err, message)
    assert not out.exists(), "nothing is written before all arguments are checked"


def test_checkpoints_that_are_damaged_or_of_another_tokenizer(runs, tmp_path, evaluate):
    damaged = tmp_path / "damaged"
    shutil.copytree(runs / "half", damaged)
    shutil.rmtree(damaged / "checkpoints" / "4")
    victim = max((damaged / "checkpoints" / "8").rglob("*"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    status, _, err = evaluate("--checkpoint", damaged, "--out", tmp_path / "out")
    assert status == 2
    assert_one_error(status, err, f"every checkpoint in {damaged / 'checkpoints'} is damaged")

    one = models.load(runs / "whole", "whole", "float32")
    other = BytesTokenizer()
    other.content = b"other"
    with pytest.raises(UserError, match="has a different tokenizer from"):
        models.check_comparable([one, dataclasses.replace(one, tokenizer=other)])


def test_folders_that_cannot_be_written(runs, tmp_path, evaluate):
    checkpoint = ("--checkpoint", runs / "whole", "--parts", "arithmetic", "--samples", 1)
    status, _, err = evaluate(*checkpoint)
    assert status == 2
    assert_one_error(status, err, "no folder for the report given")
    (tmp_path / "file").write_text("")
    for folder in ("/proc/report", tmp_path / "file", tmp_path / "file" / "below"):
        status, _, err = evaluate(*checkpoint, "--out", folder)
        assert status == 2
        assert_one_error(status, err, f"--out {folder} cannot be written")
    (tmp_path / "report.json").mkdir()
    status, _, err = evaluate(*checkpoint, "--out", tmp_path, "--dtype", "float32")
    assert status == 2
    assert_one_error(status, err, "cannot be written: Is a directory")


def test_texts_that_are_not_there(runs, tmp_path, evaluate):
    moved = tmp_path / "moved"
    shutil.copytree(runs / "half", moved)
    loaded = models.load(moved, "moved", "float32")
    (source,) = loaded.config.data.sources
    gone = dataclasses.replace(source, path="texts/that/are/not/here")
    data = dataclasses.replace(loaded.config.data, sources=(gone,))
    loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=data))
    with pytest.raises(UserError, match=r"(?s)texts/that/are/not/here.*leave out what needs them"):
        run.held_out_text(loaded, lambda line: None)


def test_defaults_are_what_the_models_can_take(runs):
    whole = models.load(runs / "whole", "whole", "float32")
    learned = models.load(runs / "learned", "learned", "float32")
    said: list[str] = []
    found = fill_defaults([whole, learned], Options(parts=("speed",)), said.append)
    assert found.contexts == (40,)
    assert "a model has 40" in said[0]

    def with_window(length: int) -> models.Loaded:
        data = dataclasses.replace(whole.config.data, context_length=length)
        return dataclasses.replace(whole, config=dataclasses.replace(whole.config, data=data))

    with pytest.raises(UserError, match="no default context for pass keys fits"):
        fill_defaults([with_window(16)], Options(parts=("passkey",)), said.append)
    found = fill_defaults([with_window(200)], Options(), said.append)
    assert (found.lengths, found.contexts) == ((1.0, 2.0, 4.0), run.CONTEXTS)
    with pytest.raises(UserError, match="context_length=200 is longer than the 40 positions"):
        fill_defaults([with_window(200), learned], Options(parts=("loss",)), said.append)


def test_names_are_short_and_different():
    paths = [Path("runs/a"), Path("runs/a/checkpoints/500"), Path("other/b"), Path("runs/b")]
    assert models.names(paths) == ["a", "a@500", "other/b", "runs/b"]
    with pytest.raises(UserError, match="runs/a is given 2 times"):
        models.names([Path("runs/a"), Path("runs/a")])


def test_parameters_are_on_one_device_and_counted(runs):
    loaded = models.load(runs / "whole", "whole", "float32")
    leaves = jax.tree.leaves(loaded.params)
    assert {len(leaf.devices()) for leaf in leaves} == {1}
    assert math.prod(loaded.params["embedding"].shape) == 264 * 32
