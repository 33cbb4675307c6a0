"""Chats in --tasks: requests and log-likelihoods equal those of the harness's own model."""

import jax
import numpy as np
import pytest
import transformers
from lm_eval.models.huggingface import HFLM

from mea_jax.convert.importing import import_model
from mea_jax.errors import UserError
from mea_jax.evaluate.harness import run
from mea_jax.evaluate.harness.model import HarnessModel
from studies import harness_suite as suite
from tests.system.convert import small_models
from tests.system.convert.published import VOCABULARY, publish


@pytest.fixture(scope="module", params=[False, True], ids=["no start", "start"])
def measured(request, corpus, tmp_path_factory):
    """Return the results of our model and of the harness's own, on two tasks as chats."""
    folder = tmp_path_factory.mktemp("chat")
    model = small_models.make("llama", vocab_size=VOCABULARY, max_position_embeddings=1024)
    published = small_models.save(model, folder / "published")
    publish(published, request.param)
    import_model(published, folder / "run", context_length=64, text=f"text:{corpus}")
    (folder / "suite").mkdir()
    suite.write(folder / "suite", count=4, seed=0, letters=200)
    options = run.Options(
        tasks=("mea_arithmetic_choice", "mea_code"),
        num_fewshot=2,
        include_path=str(folder / "suite"),
        apply_chat_template=True,
        system_instruction="Answer briefly.",
        fewshot_as_multiturn=True,
    )
    options.check()
    tasks = run.load_tasks(options)
    everything = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: everything[:1])
        ours = HarnessModel(str(folder / "run"), dtype="float32")
        assert ours.max_length == 1024
        words = transformers.AutoTokenizer.from_pretrained(published)
        theirs = HFLM(pretrained=model, tokenizer=words, batch_size=4, max_length=1024)
        return tuple(run._measure(lm, tasks, options) for lm in (ours, theirs))


def samples(results, task):
    return sorted(results["samples"][task], key=lambda row: row["doc_id"])


@pytest.mark.parametrize("task", ["mea_arithmetic_choice", "mea_code"])
def test_requests_and_log_likelihoods_are_the_same(measured, task):
    ours, theirs = (samples(results, task) for results in measured)
    assert len(ours) == 4
    assert [row["arguments"] for row in ours] == [row["arguments"] for row in theirs]
    assert "<|start|>system\nAnswer briefly." in ours[0]["arguments"][0][0]
    for a, b in zip(ours, theirs, strict=True):
        found, expected = (np.array([r[0][0] for r in row["resps"]], float) for row in (a, b))
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)


def test_what_chats_need_is_said():
    with pytest.raises(UserError, match="--fewshot_as_multiturn requires --apply_chat_template"):
        run.Options(tasks=("piqa",), fewshot_as_multiturn=True).check()


def test_a_model_without_a_template_is_refused(tiny, tmp_path):
    from tests.whole_runs import train_on_one_device

    train_on_one_device(tiny(**{"mesh.data": 1, "mesh.fsdp": -1}), tmp_path / "run")
    model = HarnessModel(str(tmp_path / "run"), dtype="float32")
    assert model.chat_template(False) is None
    with pytest.raises(UserError, match=r"--apply_chat_template: .* has no chat template"):
        model.chat_template(True)
