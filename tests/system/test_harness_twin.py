"""Results of each task equal those of the harness's own model on a copy of the checkpoint."""

import jax
import lm_eval.evaluator
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from mea_jax.evaluate.harness import run
from mea_jax.evaluate.harness.model import HarnessModel
from studies import harness_suite as suite
from tests.helpers import flat
from tests.whole_runs import train_on_one_device

ROLLING = """task: twin_rolling
custom_dataset: !function load.documents
dataset_kwargs:
  file: mea_recall.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""


def twin(config, params):
    """Return a Llama of transformers with our parameters.

    Rotary features have the same layout; kernels (in, heads, width) become (heads x width, in).
    """
    c = config.model
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_ff,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            max_position_embeddings=1024,
            tie_word_embeddings=False,
        )
    )
    leaves = flat(params)
    state = {"model.embed_tokens.weight": leaves["embedding"], "lm_head.weight": leaves["head"].T}
    state["model.norm.weight"] = leaves["final_norm/scale"]
    names = {
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/out": "self_attn.o_proj",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
        "attention_norm/scale": "input_layernorm",
        "mlp_norm/scale": "post_attention_layernorm",
    }
    for ours, theirs in names.items():
        for layer, leaf in enumerate(np.asarray(leaves[f"layers_0/{ours}"])):
            if leaf.ndim > 1:
                rows = c.n_heads * c.head_dim if ours.endswith("out") else leaf.shape[0]
                leaf = leaf.reshape(rows, -1).T
            state[f"model.layers.{layer}.{theirs}.weight"] = leaf
    model.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in state.items()})
    return model.eval()


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """Run the harness on four tasks; return the results of our model and of the copy."""
    folder = tmp_path_factory.mktemp("twin")
    llama = {"model.hlc": "none", "model.head_norm": False, "model.n_kv_heads": 2}
    llama |= {"model.tie_embeddings": False, "data.tokenizer": "bpe:264"}
    config = tiny(**llama, **{"mesh.data": 1, "mesh.fsdp": -1})
    train_on_one_device(config, folder / "run")
    (folder / "suite").mkdir()
    suite.write(folder / "suite", count=8, seed=0, letters=400)
    (folder / "suite" / "twin_rolling.yaml").write_text(ROLLING)
    everything = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: everything[:1])
        ours = HarnessModel(
            str(folder / "run"), max_length=400, dtype="float32", add_bos_token=False
        )
        words = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_file(
                str(folder / "run" / "tokenizer" / "tokenizer.json")
            ),
            bos_token="<|endoftext|>",
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
        )
        theirs = HFLM(
            pretrained=twin(config, ours.params),
            tokenizer=words,
            max_length=400,
            batch_size=4,
            add_bos_token=False,
        )
        options = run.Options(
            tasks=("mea_arithmetic", "mea_arithmetic_choice", "mea_code", "twin_rolling"),
            include_path=str(folder / "suite"),
        )
        tasks = run.load_tasks(options)
        return tuple(
            lm_eval.evaluator.evaluate(lm=model, task_dict=tasks, bootstrap_iters=0)
            for model in (ours, theirs)
        )


def answers(results, task):
    rows = sorted(results["samples"][task], key=lambda row: row["doc_id"])
    return [response[0] for row in rows for response in row["resps"]]


@pytest.mark.parametrize("task", ["mea_arithmetic_choice", "mea_code", "twin_rolling"])
def test_log_likelihoods_agree(measured, task):
    ours, theirs = (answers(results, task) for results in measured)
    assert len(ours) == {"twin_rolling": 8}.get(task, 32)
    for a, b in zip(ours, theirs, strict=True):
        (x, *greedy), (y, *greedy_too) = (np.atleast_1d(v).tolist() for v in (a, b))
        assert x == pytest.approx(y, abs=1e-3)
        assert greedy == greedy_too
    assert len({round(float(np.atleast_1d(a)[0]), 2) for a in ours}) > 4, (
        "the log-likelihoods hardly differ from each other"
    )


def test_answers_agree(measured):
    ours, theirs = (answers(results, "mea_arithmetic") for results in measured)
    assert ours == theirs
    assert any(ours)


def test_metrics_agree(measured):
    ours, theirs = (results["results"] for results in measured)
    assert ours.keys() == theirs.keys()
    for task, metrics in ours.items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert value == pytest.approx(theirs[task][name], rel=1e-4), (task, name)
