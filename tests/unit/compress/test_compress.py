"""Tests of the compress command, from a trained model to a smaller one, and of interruptions."""

import dataclasses
import functools
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.checkpoint.layerwise import StoredModel
from mea_jax.checkpoint.load import load
from mea_jax.checkpoint.manager import Checkpoints
from mea_jax.compress import repair
from mea_jax.compress import run as compress_run
from mea_jax.compress.options import Options
from mea_jax.compress.run import compress
from mea_jax.config.schema import Side, SourceConfig
from mea_jax.data.tokenizers import from_directory
from mea_jax.errors import UserError
from mea_jax.generate.generator import Decoding, Generator
from mea_jax.model.layer_spec import layer_specs
from mea_jax.train.run import train
from tests.helpers import PLAIN, apply_logits, assert_close, assert_equal

SMALL: dict[str, Any] = {
    "calibration_tokens": 512,
    "measure_tokens": 256,
    "held_out_tokens": 512,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Train an MHA model of two layers and four heads; return its run directory."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    config = tiny(steps=8, **{f"model.{name}": value for name, value in PLAIN.items()})
    train(config, workdir)
    return workdir


@pytest.fixture
def one(devices):
    devices(1)


def options(**changes):
    return Options(**(SMALL | changes))


def params_of(path):
    model, params, _, _ = load(path, dtype="float32")
    return model, params


def logits(model, params):
    tokens = np.random.default_rng(0).integers(0, 256, (2, 16), np.int32)
    places = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    arrays = map(jnp.asarray, (tokens, places, np.ones_like(tokens)))
    with jax.default_matmul_precision("highest"):
        return apply_logits(model, params, *arrays)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svd", "calibrated", "aligned", "frequency"])
def test_keeping_all_heads_keeps_the_model(run, one, tmp_path, method):
    compress(run, tmp_path / "out", options(keep=1.0, method=method))
    assert_close(logits(*params_of(tmp_path / "out")), logits(*params_of(run)), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_half_the_cache(run, one, tmp_path):
    """The result generates with half the cache, and the summary states its bytes correctly."""
    out = tmp_path / "out"
    summary = compress(run, out, options(method="aligned"))
    model, params, tokenizer, length = load(out, dtype="float32")
    assert model.components(Side.KEY) == model.components(Side.VALUE) == (2, 2)
    generator = Generator(model, params, length=length, cache_dtype="bfloat16")
    assert generator.cache_bytes_per_token() == summary["cache_bytes_per_token"]["after"]
    assert summary["cache_kept"] == 0.5
    stored = json.loads((out / "compression.json").read_text())
    assert stored["held_out"]["increase"] == summary["held_out"]["increase"]
    assert (out / "compression.png").stat().st_size > 10_000
    prompt = [tokenizer.separator, *tokenizer.encode_batch(["fox"])[0]]
    absorbed = generator.run([prompt], Decoding(8))
    folded = Generator(model, params, length=length, form="folded").run([prompt], Decoding(8))
    assert absorbed == folded
    assert not (tmp_path / "out.part").exists()


@pytest.mark.slow
def test_data_that_changed_are_read_in_the_models_own_tokens(tiny, corpus, one, tmp_path):
    """The run's tokenizer is used: one trained on the changed text would differ."""
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    changes = {f"model.{name}": value for name, value in PLAIN.items()}
    source = SourceConfig(source="text", path=str(text))
    data = {"data.tokenizer": "bpe:260", "data.sources": (source,)}
    train(tiny(steps=1, **changes, **data, **{"optimizer.warmup_steps": 0}), tmp_path / "run")
    for path in text.iterdir():
        path.write_text(path.read_text().replace("o", "zu"))
    said: list[str] = []
    made = compress_run.CompressionPass(tmp_path / "run", tmp_path / "out", options(), said.append)
    trained = from_directory(tmp_path / "run" / "tokenizer")
    assert made.texts.prepared.tokenizer.encode_batch(["fox"]) == trained.encode_batch(["fox"])
    assert made.texts.prepared.tokenizer.content == trained.content
    assert any("data have changed since training" in line for line in said)


def test_the_loss_before_is_that_of_the_run(run, one, tmp_path):
    """The layer-wise evaluation computes the model: its held-out loss is that of the run's end."""
    summary = compress(run, tmp_path / "out", options(keep=1.0, held_out_tokens=1_000_000))
    ended = json.loads((run / "summary.json").read_text())
    assert summary["held_out"]["before"] == pytest.approx(ended["held_out_loss"], rel=1e-5)
    assert summary["held_out"]["increase"] == pytest.approx(0, abs=1e-5)
    assert summary["held_out"]["divergence"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_what_was_measured_serves_other_devices_too(run, devices, tmp_path):
    """Measurements made on one device are reused on two, and on one again without the residuals.

    The batch size depends on the number of devices, and so do the stored held-out residuals.
    """
    found = []
    for number, count in enumerate((1, 2, 1, 1)):
        devices(count)
        if number == 3:
            shutil.rmtree(next((tmp_path / "known").glob("held_out-*")))
        out = tmp_path / f"out-{number}"
        found.append(compress(run, out, options(budget="measured"), tmp_path / "known"))
    first, two, again, without = (summary["held_out"] for summary in found)
    assert first["divergence"] > 1e-4
    assert again == without == first
    assert two["divergence"] == pytest.approx(first["divergence"], rel=0.5)
    assert not (tmp_path / "known" / "calibration").exists()


def test_measurements_of_other_text_are_refused(run, one, tmp_path):
    compress(run, tmp_path / "out", options(), tmp_path / "known")
    settings = tmp_path / "known" / "settings.json"
    stored = json.loads(settings.read_text())
    settings.write_text(json.dumps(stored | {"text": "of another day"}))
    with pytest.raises(UserError, match="was made with another text"):
        compress(run, tmp_path / "again", options(keep=0.25), tmp_path / "known")


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["measured", "repaired"])
def test_measured_budgets_cost_no_more_bytes(run, one, tmp_path, budget):
    repair = {"repair": "layerwise", "repair_steps": 4} if budget == "repaired" else {}
    summary = compress(run, tmp_path / "out", options(budget=budget, **repair))
    assert summary["cache_bytes_per_token"]["after"] <= 128
    assert summary["cache_bytes_per_token"]["before"] == 256
    model, params = params_of(tmp_path / "out")
    with Checkpoints(tmp_path / "out") as checkpoints:
        config = checkpoints.config(8)
    assert config.model.components(Side.KEY) == model.components(Side.KEY)
    assert len(summary["sensitivities"]) == 4
    assert all(s["losses"][-1] == 0 for s in summary["sensitivities"])
    generator = Generator(model, params, length=32, cache_dtype="bfloat16")
    assert generator.cache_bytes_per_token() == summary["cache_bytes_per_token"]["after"]


@pytest.mark.slow
def test_residual_budgets_need_no_text(run, one, tmp_path):
    summary = compress(run, tmp_path / "out", options(budget="residual", calibration_tokens=0))
    assert summary["cache_bytes_per_token"]["after"] <= 128


@pytest.mark.slow
def test_repair_brings_layers_nearer(run, one, tmp_path):
    """Both repairs start at the same error, and the one with more parameters reduces it more."""
    output = compress(run, tmp_path / "b", options(method="svd", repair="output"))
    more = options(method="svd", repair="layerwise", repair_steps=40)
    layerwise = compress(run, tmp_path / "c", more)
    for a, b in zip(output["layers"], layerwise["layers"], strict=True):
        assert a["repair"][0] == b["repair"][0]
        assert b["repair"][1] < a["repair"][1] < a["repair"][0]


def residual_after(run, path, folder):
    """Return the last residual of the model at `path`, on the calibration text of `run`."""
    made = compress_run.CompressionPass(
        run, path.with_name(f"{path.name}-unused"), options(), print
    )
    stream = made.texts.training(folder, 512)
    model = dataclasses.replace(params_of(path)[0], backend="xla", attention_kernel="einsum")
    stored = StoredModel(path, print)
    stream.embed(model, stored.top())
    for index in range(model.n_layers):
        stream.advance(layer_specs(model)[index], stored.layer(index))
    return np.stack([np.asarray(stream.residual(i, model)) for i in range(len(stream))])


@pytest.mark.slow
def test_blocks_make_up_for_what_earlier_ones_lost(run, one, tmp_path):
    """Block-wise repair brings the last residual nearer to the original's than layer-wise."""
    lost = {}
    whole = residual_after(run, run, tmp_path / "whole")
    for kind in ("layerwise", "blockwise"):
        asked = options(method="svd", keep=0.25, repair=kind, repair_steps=60)
        compress(run, tmp_path / kind, asked)
        lost[kind] = np.square(residual_after(run, tmp_path / kind, tmp_path / "r") - whole).sum()
    assert lost["blockwise"] < 0.7 * lost["layerwise"]


@pytest.mark.slow
def test_a_block_that_nothing_was_taken_from_stays(run, one, tmp_path):
    """Blocks before the first layer with fewer heads equal the original's and are not trained."""
    compress(run, tmp_path / "out", options(repair="blockwise", repair_steps=4, layers="1"))
    original, compressed = StoredModel(run, print), StoredModel(tmp_path / "out", print)
    assert_equal(compressed.layer(0)["mlp"], original.layer(0)["mlp"])
    with pytest.raises(AssertionError):
        assert_equal(compressed.layer(1)["mlp"], original.layer(1)["mlp"])


def first_layer(run, folder, **changes):
    """Return the first layer's spec and parameters, and the other arguments of `OriginalLayer`."""
    made = compress_run.CompressionPass(run, folder / "out", options(), print)
    stream = made.texts.training(folder / "text", 512)
    stream.embed(made.model, made.source.top())
    tree = made.source.layer(0)
    spec = layer_specs(dataclasses.replace(made.model, **changes))[0]
    return spec, tree["attention"], (tree["attention_norm"]["scale"], stream)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_layer_that_is_too_soft_is_sharpened(run, one, tmp_path, qk_norm):
    """If logits are 1/1.2 of the original's, the temperature that restores them is 1.2."""
    spec, attention, rest = first_layer(run, tmp_path, qk_norm=qk_norm)
    attention = attention | {"query": 4 * attention["query"]}
    if qk_norm:
        scale_H = 3 * np.ones(8, np.float32)
        attention |= {"query_norm": {"scale": scale_H}, "key_norm": {"scale": scale_H}}
    soft = repair.sharpened(attention, 1 / 1.2)
    original = repair.OriginalLayer(spec, attention, *rest)
    assert repair.temperature(original, (spec, soft)) == 1.2
    assert original.error((spec, repair.sharpened(soft, 1.2))) < 1e-9


def test_a_layer_that_is_nearly_whole_is_not_shaken(run, one, tmp_path):
    """Repair reduces the error of a layer even if it is already small."""
    spec, attention, rest = first_layer(run, tmp_path)
    original = repair.OriginalLayer(spec, attention, *rest)
    rng = np.random.default_rng(0)
    for size in (0.1, 0.01, 0.001):
        moved = {
            name: leaf * (1 + size * rng.normal(size=leaf.shape)).astype(np.float32)
            for name, leaf in attention.items()
        }
        before = original.error((spec, moved))
        after = repair.reconstruct(original, (spec, moved), repair._FEW)
        assert original.error((spec, after)) < before


@pytest.mark.slow
def test_only_our_methods_are_sharpened(run, one, tmp_path):
    plain = compress(run, tmp_path / "a", options(method="svd"))
    ours = compress(run, tmp_path / "b", options(method="aligned"))
    assert all("temperature" not in row for row in plain["layers"])
    assert all(row["temperature"] >= 1 for row in ours["layers"])


def test_some_layers_only(run, one, tmp_path):
    summary = compress(run, tmp_path / "out", options(layers="1"))
    assert [row["keys"] for row in summary["layers"]] == [4, 2]
    source, result = StoredModel(run, print).layer(0), StoredModel(tmp_path / "out", print).layer(0)
    assert_equal(source["mlp"], result["mlp"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["calibrate", "divide", "_compress_layer", "look", "finish"])
def test_a_killed_pass_goes_on(run, one, tmp_path, monkeypatch, stage):
    """A pass killed after any stage (or layer) resumes and ends with the same parameters."""
    how = options(budget="measured", repair="output")
    compress(run, tmp_path / "whole", how)
    original, calls = getattr(compress_run.CompressionPass, stage), []

    def dies(self, *args, **kwargs):
        result = original(self, *args, **kwargs) if stage != "finish" else None
        calls.append(stage)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(compress_run.CompressionPass, stage, dies)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in run.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        compress(run, tmp_path / "out", how)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(compress_run.CompressionPass, stage, original)
    compress(run, tmp_path / "out", how)
    assert_equal(params_of(tmp_path / "out")[1], params_of(tmp_path / "whole")[1])
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in run.rglob("*"))


def test_eight_devices_see_the_same_moments(run, devices, tmp_path):
    """The moments of one device and of eight are equal: the same windows are split over them."""
    found = []
    for count in (1, 8):
        devices(count)
        out = tmp_path / str(count)
        made = compress_run.CompressionPass(run, out, options(calibration_tokens=2048), print)
        made.calibrate()
        found.append([vars(made.measurements.moments(index)) for index in range(2)])
    for a, b in zip(*found, strict=True):
        assert a["tokens"] == b["tokens"] > 1500
        scale = {name: np.abs(a[name]).max() for name in ("keys", "values", "queries", "outputs")}
        for name, size in scale.items():
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5 * size)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.625, 0.375])
def test_a_division_over_layers_meets_shares_between_whole_heads(run, one, tmp_path, keep):
    """In two layers of four heads, a share of 0.625 is five key heads and five value heads."""
    summary = compress(run, tmp_path / "out", options(budget="measured", keep=keep))
    assert summary["cache_kept"] == keep


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "met"), [(0.4, 0.375), (0.47, 0.5)])
def test_a_share_that_no_division_meets_becomes_the_nearest_and_is_named(
    run, one, tmp_path, keep, met, capsys
):
    """The nearest possible share is used and logged; here, shares are multiples of 1/16."""
    summary = compress(run, tmp_path / "out", options(budget="residual", keep=keep))
    assert summary["cache_kept"] == met
    lines = capsys.readouterr().err.splitlines()
    (said,) = [line for line in lines if line.startswith("--keep=")]
    assert said.startswith(f"--keep={keep}: the nearest")
    assert said.endswith(f"reach is {met:.3g}")


@pytest.fixture
def shell(in_process):
    """Return `shell(*arguments)`, which runs the command in this process: (status, out, err)."""
    return functools.partial(in_process, "mea_jax.compress")


def test_the_command_prints_a_table(run, shell, tmp_path):
    flags_ = [f"--{name}={value}" for name, value in SMALL.items()]
    status, out, _ = shell("--checkpoint", run, "--out", tmp_path / "out", *flags_)
    assert status == 0
    assert "256 > 128 bytes per token, 50.0% kept (--keep=0.5)" in out
    assert "held-out loss" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "0.1"], "leaves less than one of 4 heads"),
        (["--keep", "0.6"], "2 are 0.5 of the cache and 3 are 0.75; give one of these"),
        (["--method", "alined"], "aligned"),
        (["--calibration_tokens", "100000000"], "the text has"),
        (["--method", "calibrated", "--calibration_tokens", "0"], "needs activations"),
        (["--repair", "output", "--calibration_tokens", "0"], "needs text"),
        (["--budget", "repaired"], "add --repair layerwise"),
        (["--layers", "9"], "the model has layers 0 to 1"),
        (["--calibration_source", "jsonl:/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--repair_steps", "0"], "not a positive integer"),
        (["--repair_tokens", "64"], "add --repair layerwise"),
        (["--repair_tokens", "100000000", "--repair", "layerwise"], "the text has"),
        (["--repair_tokens", "-1", "--repair", "output"], "not a non-negative integer"),
    ],
)
def test_mistakes_get_one_line(run, shell, tmp_path, arguments, words):
    status, _, err = shell("--checkpoint", run, "--out", tmp_path / "out", *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert (status, len(lines)) == (2, 1)
    assert words in lines[0]
    assert "Traceback" not in err


def test_an_output_that_exists_is_kept(run, shell, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    status, _, err = shell("--checkpoint", run, "--out", tmp_path / "out")
    assert status == 2
    assert "exists: choose another" in err
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_other_options_do_not_go_on_with_an_unfinished_pass(run, one, tmp_path, monkeypatch):
    monkeypatch.setattr(compress_run.CompressionPass, "divide", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(run, tmp_path / "out", options())
    with pytest.raises(compress_run.UserError, match="unfinished compression with other options"):
        compress(run, tmp_path / "out", options(method="svd"))
