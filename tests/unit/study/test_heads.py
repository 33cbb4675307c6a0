"""Tests of the analysis of trained W_lc: its rows and the command."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from mea_jax.checkpoint.layerwise import StoredModel, Writer
from mea_jax.model.layer_spec import layer_specs
from mea_jax.ops import hlc
from mea_jax.study import head_measures as measures
from mea_jax.study import heads
from mea_jax.train.run import train
from tests.helpers import PLAIN, assert_one_error, params_of

pytestmark = pytest.mark.slow

ONE = {"mesh.data": 1, "mesh.fsdp": -1}
KINDS = ("heads", "frequency", "dense")


def untrained(mea, run, config):
    """Write a run directory with an untrained checkpoint, whose weights are near their start."""
    shutil.copytree(mea / "tokenizer", run / "tokenizer")
    params, source = params_of(config.model, noise=0.01), StoredModel(mea, print)
    writer = Writer(run / "parts", config.model)
    stack = params.pop("layers_0")
    for index in range(config.model.n_layers):
        writer.write_layer(index, jax.tree.map(lambda leaf, i=index: leaf[i], stack))
    writer.write_non_layer(params)
    writer.save(run / "checkpoints" / "0", config, source.digest)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    grouped = {"model.n_heads": 8, "model.n_kv_heads": 8, "model.key_components": 4}
    train(tiny(**grouped, **ONE), root / "mea")
    others = {
        "plain": PLAIN,
        "extended": {"key_mixing": "frequency", "value_mixing": "dense", "key_components": 2},
        "after": {"qk_norm": True, "hlc_order": "after"},
    }
    for name, changes in others.items():
        config = tiny(**{f"model.{key}": value for key, value in changes.items()})
        untrained(root / "mea", root / name, config)
    return root


@pytest.fixture
def command(in_process):
    """Return `command(*arguments)`, which runs the command here and returns (status, out, err)."""
    return functools.partial(in_process, "mea_jax.study.heads")


QUICK = ("--held_out_tokens", 512, "--shuffles", 19)


def test_a_trained_run(runs, tmp_path, command):
    """The report has all checkpoints, with a row for the keys and the values of each layer.

    Its mixing and distances are those of the stored parameters.
    """
    out = tmp_path / "new" / "heads"
    status, said, err = command("--checkpoint", runs / "mea", "--out", out, *QUICK)
    assert status == 0, err
    report = json.loads((out / "heads.json").read_text())
    assert report["steps"] == [4, 8]
    assert [(r["step"], r["layer"], r["which"]) for r in report["rows"]] == [
        (step, layer, side) for step in (4, 8) for layer in (0, 1) for side in ("key", "value")
    ]
    attention = StoredModel(runs / "mea", print).layer(1)["attention"]
    row = report["rows"][-2]
    np.testing.assert_allclose(row["mixing"], attention["key_mixing"], rtol=1e-5, atol=1e-9)
    assert (row["components"], row["composites"]) == (4, 8)
    start = np.asarray(hlc.block_identity(4, 8))
    moved = np.linalg.norm(attention["key_mixing"] - start) / np.sqrt(8)
    assert row["distance"] == pytest.approx(moved, rel=1e-5)
    assert report["rows"][2]["distance"] < moved  # at step 4
    assert row["columns"]["groups"]
    assert row["rows"] is None or row["rows"]["p"] >= 1 / 20
    assert "clusters:" in said
    assert f"over {report['held_out_tokens']:,} tokens" in said
    names = {
        f"{n}.{e}" for n in ("mixing", "spectra", "redundancy", "training") for e in ("png", "svg")
    }
    assert {path.name for path in out.iterdir()} == names | {"heads.json"}
    assert all((out / name).stat().st_size > 5000 for name in names)


def test_redundancy_is_that_of_the_heads_activations(runs, tmp_path, devices):
    """The covariance of projected inputs is that of the layer's values.

    The second moment of the values minus it is the mean's part, of rank one.
    """
    devices(1)
    folder = runs / "mea" / "checkpoints" / "8"
    looks = heads.RunAnalysis([folder], tmp_path, heads.AnalysisOptions(512, 19, 0), print)
    source = looks.sources[0]
    seen = [inputs_DD for _, _, inputs_DD in looks.layers(source)]
    rows = [row for row in looks.at(source) if row["which"] == "value"]
    assert looks.texts is not None
    stream = looks.texts.held_out(tmp_path / "again")
    stream.embed(looks.model, source.top())
    for index, spec in enumerate(layer_specs(looks.model)):
        tree = source.layer(index)
        sums = stream.advance(spec, tree, collect=True)
        assert sums is not None
        moment = sums["values"] / float(sums["tokens"])
        attention = tree["attention"]
        folded = hlc.fold("heads", attention["value"], attention["value_mixing"])
        mine = measures.covariance_of(np.asarray(folded), seen[index])
        values = np.linalg.eigvalsh(moment - mine)
        assert np.abs(values[:-1]).max() < 1e-4 * np.trace(moment)
        assert values[-1] > 0
        assert rows[index]["after"] == measures.redundancy(mine, 8)


def test_one_step_and_weights_alone(runs, command):
    """The default folder is in the run directory; without text, no data are needed."""
    step = runs / "mea" / "checkpoints" / "4"
    status, said, err = command("--checkpoint", step, "--held_out_tokens", 0, "--shuffles", 19)
    assert status == 0, err
    out = runs / "mea" / "heads"
    report = json.loads((out / "heads.json").read_text())
    assert (report["steps"], report["held_out_tokens"]) == ([4], 0)
    assert "as if inputs were white" in said
    assert not (out / "training.png").exists()
    shutil.rmtree(out)


def test_frequency_and_dense_mixing(runs, tmp_path, command):
    status, said, err = command("--checkpoint", runs / "extended", "--out", tmp_path, *QUICK)
    assert status == 0, err
    rows = json.loads((tmp_path / "heads.json").read_text())["rows"]
    assert {row["kind"] for row in rows} == {"frequency", "dense"}
    for row in rows:
        assert 0 < row["distance"] < 0.1  # the noise of 0.01
        assert row["effective_rank"] == pytest.approx(row["components"], abs=0.05)
        assert row["after"]["cka"] > 0
    assert rows[0]["rows"] is None  # two components
    assert "only each pair's magnitude" in said


def test_keys_mixed_after_their_norm_are_not_compared(runs, tmp_path, command):
    status, said, err = command("--checkpoint", runs / "after", "--out", tmp_path, *QUICK)
    assert status == 0, err
    key, value = json.loads((tmp_path / "heads.json").read_text())["rows"][:2]
    assert key["after"] is None
    assert key["distance"] > 0
    assert value["after"]["cka"] > 0
    assert "normalised before they are mixed" in said


def test_a_compressed_mixing_has_no_start(runs, tmp_path, command):
    """A solved mixing has no distance to a start, and its clusters are those of the full matrix."""
    run = tmp_path / "compressed"
    shutil.copytree(runs / "mea", run)
    (run / "compression.json").write_text("{}")
    status, said, err = command("--checkpoint", run, "--out", tmp_path / "out", *QUICK)
    assert status == 0, err
    rows = json.loads((tmp_path / "out" / "heads.json").read_text())["rows"]
    assert all(row["distance"] is None for row in rows)
    assert rows[0]["columns"]["p"] == 1 / 20  # it is the block identity
    assert "did not begin at block identity" in said


def test_a_damaged_step_is_left_out(runs, tmp_path, command):
    run = tmp_path / "run"
    shutil.copytree(runs / "mea", run)
    (run / "checkpoints" / "4" / "digests.json").unlink()
    status, _, err = command("--checkpoint", run, "--out", tmp_path / "out", *QUICK)
    assert status == 0, err
    assert "the checkpoint of step 4 is damaged" in err
    assert json.loads((tmp_path / "out" / "heads.json").read_text())["steps"] == [8]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ["no model given", "--checkpoint"]),
        (("--checkpoint", "{runs}/plain"), ["no mixing of heads", "hlc='kv'"]),
        (("--checkpoint", "{runs}/nowhere"), ["nowhere", "no such folder"]),
        (("--checkpoint", "{runs}"), ["contains no checkpoints"]),
        (("--checkpoint", "{runs}/mea", "--shuffles", "5"), ["--shuffles=5", "19"]),
        (("--checkpoint", "{runs}/mea", "--held_out_tokens", "-1"), ["--held_out_tokens=-1"]),
        (("--checkpoint", "{runs}/mea", "--out", "/proc/heads"), ["/proc/heads", "written"]),
        (("--checkpoint", "{runs}/mea", "--outt", "x"), ["unknown flag --outt", "out"]),
    ],
)
def test_one_line_for_a_mistake(runs, command, arguments, parts):
    status, _, err = command(*(word.format(runs=runs) for word in arguments))
    assert status == 2
    assert_one_error(status, err, *parts)
