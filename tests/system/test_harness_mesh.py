"""HarnessModel on a mesh of devices equals one device; meshes in lm-eval's model arguments."""

import json

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from mea_jax.evaluate.harness.model import HarnessModel, join_mesh
from studies import harness_suite as suite
from tests.helpers import assert_one_error
from tests.mesh_models import MESHES, MODELS, WRONG, written_run

TEXTS = ["a quick brown fox", "seven wizards box by moonlight and", "lazy"]
OPTIONS = {"until": ["z"], "max_gen_toks": 8}


@pytest.fixture(scope="module", params=MODELS)
def run(request, tiny, tmp_path_factory):
    """Return (the name of a model, its run directory)."""
    return request.param, written_run(request.param, tiny, tmp_path_factory.mktemp("meshes"))


def asked(kind, *arguments):
    return [Instance(kind, {}, a, i, ("a_task", i, 1)) for i, a in enumerate(arguments)]


def answers(model):
    """Return log-likelihoods, greedy flags, rolling log-likelihoods and generated texts."""
    pairs = [(text, new) for text in TEXTS for new in (" jumps over", " s")]
    scored = model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    texts = [(text * 4,) for text in TEXTS]
    rolled = model.loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True)
    prompts = [(text, OPTIONS) for text in TEXTS]
    written = model.generate_until(asked("generate_until", *prompts), disable_tqdm=True)
    return [x for x, _ in scored] + rolled, [greedy for _, greedy in scored], written


@pytest.mark.slow
def test_answers_equal_those_of_one_device(run, devices):
    """1e-4 per token: float32 sums over shards in another order. A text has at most 136 tokens."""
    name, workdir = run
    devices(1)
    expected = answers(HarnessModel(str(workdir), max_length=48, dtype="float32"))
    devices(8)
    arguments = f"checkpoint={workdir},max_length=48,dtype=float32,mesh={MESHES[name][1]}"
    model = HarnessModel.create_from_arg_string(arguments)
    wanted = dict(part.split("=") for part in MESHES[name][1].split(","))
    assert {k: str(n) for k, n in model.mesh.shape.items() if n > 1} == wanted
    sharded = [x for x in jax.tree.leaves(model.params) if not x.sharding.is_fully_replicated]
    assert len(sharded) > len(jax.tree.leaves(model.params)) / 2
    found = answers(model)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-3, rtol=1e-5)
    assert found[1:] == expected[1:]


@pytest.mark.slow
def test_meshes_that_do_not_fit_are_one_line(run, devices, capsys):
    name, workdir = run
    if name != "GQA":
        pytest.skip("one model is enough")
    devices(8)
    for text, *words in WRONG[:-1]:
        with pytest.raises(SystemExit) as stopped:
            HarnessModel.create_from_arg_string(f"checkpoint={workdir},mesh={text}")
        assert_one_error(stopped.value.code, capsys.readouterr().err, *words)
    with pytest.raises(SystemExit) as stopped:  # an axis without its mesh
        HarnessModel.create_from_arg_string(f"checkpoint={workdir},tensor=4")
    assert_one_error(stopped.value.code, capsys.readouterr().err, "--model_args tensor=")


@pytest.mark.slow
def test_tasks_on_a_mesh_have_the_results_of_one_device(run, in_process, tmp_path):
    name, workdir = run
    if name != "mixture of experts":
        pytest.skip("one model is enough")
    (tmp_path / "suite").mkdir()
    suite.write(tmp_path / "suite", count=4, seed=0, letters=200)
    arguments = ["--checkpoint", workdir, "--include_path", tmp_path / "suite", "--limit", 2]
    arguments += ["--tasks", "mea_recall", "--max_length", 512]
    arguments += ["--dtype", "float32", "--log_samples"]
    samples = []
    for count, more in ((1, ()), (8, ("--mesh", MESHES[name][1]))):
        out = tmp_path / str(count)
        status, _, err = in_process(
            "mea_jax.evaluate", *arguments, "--out", out, *more, count=count
        )
        assert status == 0, err
        rows = (out / "samples" / "checkpoint" / "mea_recall.jsonl").read_text().splitlines()
        responses = [json.loads(row)["response"] for row in rows]
        samples.append([float(r[0][0]) for response in responses for r in response])
        results = json.loads((out / "results.json").read_text())
        assert results["options"]["mesh"] == (more[1] if more else None)
    np.testing.assert_allclose(samples[1], samples[0], atol=1e-3)


def test_a_mesh_with_commas_is_one_argument():
    assert join_mesh({"checkpoint": "a", "mesh": "tensor=4", "fsdp": 2}) == {
        "checkpoint": "a",
        "mesh": "tensor=4,fsdp=2",
    }
    assert join_mesh({"checkpoint": "a", "mesh": None}) == {"checkpoint": "a", "mesh": None}
    assert join_mesh({"fsdp": 2}) == {"fsdp": 2}, "an unknown argument without a mesh"
