"""Each part of a profile on a mesh of devices equals that of one device."""

import json
import math

import jax
import numpy as np
import pytest

from mea_jax.evaluate.models import load
from mea_jax.evaluate.token_losses import token_nll
from mea_jax.parallel import sharding
from tests.helpers import assert_one_error, params_of, random_batch, tiny_model
from tests.mesh_models import MESHES, MODELS, WRONG, written_run

# 256 tokens hold a pass key; batches of 3 and 2 rows are divided by no mesh of 4 shards.
QUICK = ["--lengths", "8", "--depths", "0.5", "--samples", "2", "--batch_size", "3"]
QUICK += ["--dtype", "float32"]
SPEED = ["--contexts", "16", "--repeats", "1"]
WHOLE = "MEA, half of the heads cached"  # all parts; of other models those of its own programs


@pytest.fixture(scope="module", params=MODELS)
def run(request, tiny, tmp_path_factory):
    """Return (the name of a model, its run directory)."""
    return request.param, written_run(request.param, tiny, tmp_path_factory.mktemp("meshes"))


def numbers(tree, path=""):
    """Yield (path, number) of a report's measurements, without times."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name not in ("speed", "checkpoint"):
                yield from numbers(value, f"{path}/{name}")
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from numbers(value, f"{path}/{i}")
    elif isinstance(tree, int | float):
        yield path, tree


@pytest.mark.slow
def test_every_part_equals_that_of_one_device(run, in_process, tmp_path):
    """1e-4: float32 sums over shards in another order, of losses below 10 nats per token.

    A pass key has 5 tokens, so that its nats may differ by 5 times as much.
    """
    name, workdir = run
    arguments = ["--checkpoint", workdir, *QUICK]
    arguments += SPEED if name == WHOLE else ["--parts", "loss,positions,passkey"]

    def profile(folder, *more, count):
        status, _, err = in_process(
            "mea_jax.evaluate", *arguments, "--out", tmp_path / folder, *more, count=count
        )
        assert status == 0, err
        return json.loads((tmp_path / folder / "report.json").read_text())

    one = profile("one", count=1)
    mesh = MESHES[name][1]
    several = profile("mesh", "--mesh", mesh, count=8)
    assert several["options"]["mesh"] == mesh
    expected, found = (dict(numbers(report["models"])) for report in (one, several))
    assert expected.keys() == found.keys()
    assert any("passkey" in path for path in found)
    assert any("arithmetic" in path for path in found) == (name == WHOLE)
    for path, value in expected.items():
        tolerance = 5e-4 if "passkey" in path or "arithmetic" in path else 1e-4
        if math.isfinite(value):
            assert found[path] == pytest.approx(value, abs=tolerance), path
    if name == WHOLE:
        (row,) = several["models"][0]["speed"]
        assert row["tokens_per_second"]["median"] > 0
        assert row["prefill_seconds"]["median"] > 0


def test_losses_of_shards_are_those_of_their_rows():
    """Chunks of each shard's positions, the last of them filled up, change no loss by 1e-5."""
    model = tiny_model(loss_chunk=1)  # of 264 words: 1 MiB of logits is 992 positions
    params, batch = params_of(model, noise=0.3), random_batch(0, 8, 250, 264)
    expected = np.asarray(jax.jit(token_nll, static_argnums=0)(model, params, batch))
    mesh = sharding.requested_mesh("fsdp=2,tensor=2", "--mesh")
    with jax.set_mesh(mesh):
        placed = {key: jax.device_put(x, sharding.batch_sharding(mesh)) for key, x in batch.items()}
        found = jax.jit(token_nll, static_argnums=0)(model, params, placed)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)


@pytest.mark.slow
def test_meshes_that_do_not_fit_are_one_line(run, in_process, tmp_path):
    name, workdir = run
    if name != "GQA":
        pytest.skip("one model is enough")
    for text, *words in WRONG:
        arguments = ("--checkpoint", workdir, "--out", tmp_path / "out", "--mesh", text)
        status, _, err = in_process("mea_jax.evaluate", *arguments, count=8)
        assert status == 2
        assert_one_error(status, err, *words)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_device_reads_its_part(run):
    name, workdir = run
    mesh = sharding.requested_mesh(MESHES[name][1], "--mesh")
    params = jax.tree.leaves(load(workdir, "on a mesh", "float32", mesh).params)
    matrices = [x for x in params if x.ndim > 2]
    assert matrices
    assert not any(x.sharding.is_fully_replicated for x in matrices if "mixing" not in str(x))
