"""HarnessModel: log-likelihoods, windows of long texts, generated answers, options, processes."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from mea_jax.errors import UserError
from mea_jax.evaluate.harness.model import HarnessModel
from mea_jax.evaluate.models import load
from mea_jax.generate.generator import Decoding, Generator, continuation
from tests.helpers import apply_logits, assert_one_error, change
from tests.paths import ROOT
from tests.whole_runs import train_on_one_device

TEXTS = ["a quick brown fox", "seven wizards box by moonlight and", "lazy", "the lazy dog while"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_on_one_device(tiny(**{"mesh.data": 1, "mesh.fsdp": -1}), folder)
    return folder


@pytest.fixture(scope="module")
def one_device():
    everything = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: everything[:1])
        yield


@pytest.fixture(scope="module")
def model(run, one_device):
    return HarnessModel(str(run), max_length=48, dtype="float32")


def asked(kind, *arguments, task="a_task"):
    return [Instance(kind, {}, a, i, (task, i, 1)) for i, a in enumerate(arguments)]


def pairs():
    found = [(text, new) for text in TEXTS for new in (" jumps over", " s", "\nthe end")]
    return [*found, ("", "a text"), ("space at the end  ", "x"), ("x" * 90, " far")]


APPLY = jax.jit(apply_logits, static_argnums=0)


def _plain(model):
    return dataclasses.replace(model.scorer._resolved(64), attention_kernel="einsum")


def logs(model, tokens):
    """Return log p(token i + 1 | tokens up to i), (T - 1,), and whether each is the likeliest."""
    ids = np.zeros((1, 64), np.int32)
    ids[0, : len(tokens)] = tokens
    positions = np.arange(64, dtype=np.int32)[None]
    logits = APPLY(_plain(model), model.params, ids, positions, np.ones_like(ids))[0]
    table = np.asarray(jax.nn.log_softmax(logits, axis=-1))[: len(tokens) - 1]
    return table[np.arange(len(tokens) - 1), tokens[1:]], table.argmax(1) == tokens[1:]


def test_log_likelihoods_are_those_of_the_whole_sequence(model):
    requests = asked("loglikelihood", *pairs())
    before = model.truncated
    found = model.loglikelihood(requests, disable_tqdm=True)
    for (context, new), (log_probability, greedy) in zip(pairs(), found, strict=True):
        # Byte tokens of context and continuation concatenate. Documents begin with the separator.
        tokens = [256, *(context + new).encode()]
        tokens = tokens[-49:]  # the model reads 48
        expected, right = logs(model, tokens)
        n = len(new.encode()) + len(context) - len(context.rstrip())
        assert log_probability == pytest.approx(expected[-n:].sum(), abs=1e-4)
        assert greedy == right[-n:].all()
    assert model.truncated == before + 1
    assert model.loglikelihood(asked("loglikelihood", ("a", "")), disable_tqdm=True) == [(0, True)]


def test_rolling_is_the_sum_over_windows(model):
    texts = ["short", "one two three four five six seven " * 4, "", "x"]
    found = model.loglikelihood_rolling(
        asked("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True
    )
    for text, total in zip(texts, found, strict=True):
        tokens, expected = [256, *text.encode()], 0.0
        for start in range(1, len(tokens), 48):  # windows of 48 scored tokens
            stop = min(start + 48, len(tokens))
            window = tokens[max(stop - 49, 0) : stop]
            expected += logs(model, window)[0][-(stop - start) :].sum() if len(window) > 1 else 0
        assert total == pytest.approx(expected, abs=1e-3)


def test_answers_end_before_any_of_the_texts_that_end_them(model):
    contexts = [*TEXTS, "a quick brown fox jumps over the lazy dog while seven wizards"]
    plain = model.generate_until(
        asked("generate_until", *((c, {"until": [], "max_gen_toks": 12}) for c in contexts)),
        disable_tqdm=True,
    )
    # Greedy, one prompt at a time, with the KV cache of mea_jax.generate.
    loaded = load(model.run, "alone", "float32")
    generator = Generator(loaded.resolved(48), loaded.params, length=48)
    for context, text in zip(contexts, plain, strict=True):
        prompt = [256, *context.encode()][-36:]
        (new,) = generator.run([prompt], Decoding(12, stop=(256,)))
        assert text == continuation(loaded.tokenizer, prompt, new)
    until = [[text[4:6], "never"] if len(text) > 6 else ["never"] for text in plain]
    options = [{"until": u, "max_gen_toks": 12, "do_sample": False} for u in until]
    cut = model.generate_until(
        asked("generate_until", *zip(contexts, options, strict=True)), disable_tqdm=True
    )
    assert cut == [text.split(u[0])[0] for text, u in zip(plain, until, strict=True)]
    assert any(len(a) < len(b) for a, b in zip(cut, plain, strict=True))
    report = model.report()["answers"]
    assert report["prompt_real"] <= report["prompt_computed"]
    assert report["new_real"] <= report["new_computed"]


def test_sampled_answers_do_not_depend_on_their_neighbours(model):
    options = {
        "until": "\n",
        "max_gen_toks": 8,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.9,
    }
    requests = asked("generate_until", *((text, options) for text in TEXTS))
    together = model.generate_until(requests, disable_tqdm=True)
    assert together[:1] == model.generate_until(requests[:1], disable_tqdm=True)
    assert together == model.generate_until(requests, disable_tqdm=True)


def test_what_cannot_fit_is_one_line(model):
    with pytest.raises(
        UserError, match="task a_task: a continuation of 60 tokens does not fit in 48"
    ):
        model.loglikelihood(asked("loglikelihood", ("a", "b" * 60)), disable_tqdm=True)
    with pytest.raises(UserError, match=r"a_task asks for 256 new tokens.*--max_length above 256"):
        model.generate_until(asked("generate_until", ("a", {"until": ["x"]})), disable_tqdm=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"num_beams": 4},
            "a_task: .* num_beams=4 is not supported: set num_beams=1 or remove it; ",
        ),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported"),
        ({"min_p": 0.1}, "min_p=0.1 is not supported"),
        (
            {"max_gentoks": 3},
            "max_gentoks=3 is not supported: remove it; supported options: until, .*max_gen",
        ),
        ({"temperature": "warm"}, "temperature='warm' must be a number"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number"),
    ],
)
def test_unsupported_generation_options_are_errors(model, option, message):
    given = asked("generate_until", ("a", {"until": ["x"], "max_gen_toks": 4, **option}))
    with pytest.raises(UserError, match=message):
        model.generate_until(given, disable_tqdm=True)


def test_neutral_and_equivalent_generation_options_change_nothing(model):
    def write(**options):
        given = asked("generate_until", ("a quick", {"until": [], **options}))
        return model.generate_until(given, disable_tqdm=True)

    plain = write(max_gen_toks=5)
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": None, "no_repeat_ngram_size": 0}
    assert write(max_gen_toks=5, **neutral, early_stopping=False, use_cache=True) == plain
    assert write(max_new_tokens=5, temperature=0.7, do_sample=False, top_k=3, top_p=0.5) == plain
    assert write(max_tokens=5) == plain
    prompt = len(model.tok_encode("a quick"))
    assert write(max_length=prompt + 5) == plain
    with pytest.raises(UserError, match=rf"prompt of {prompt} tokens and max_length={prompt}"):
        write(max_length=prompt)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("foo=1,checkpoint=runs/a", ["foo=", "known arguments: checkpoint, max_length", "dtype"]),
        (
            "max_length=8",
            ["has no checkpoint: add checkpoint=", "known arguments: checkpoint, max_length"],
        ),
        ("", ["has no checkpoint: add checkpoint="]),
    ],
)
def test_bad_model_arguments_are_one_line(arguments, parts, capsys):
    with pytest.raises(SystemExit) as stopped:
        HarnessModel.create_from_arg_string(arguments, {"batch_size": 1, "device": None})
    assert_one_error(stopped.value.code, capsys.readouterr().err, *parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float31"}, "did you mean 'float32'"),
        ({"max_length": 1}, "max_length=1 must be"),
        ({"batch_tokens": "many"}, "batch_tokens=many must be"),
        ({"checkpoint": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_options(run, one_device, options, message):
    with pytest.raises(UserError, match=message):
        HarnessModel(**{"checkpoint": str(run), **options})


def test_learned_positions_end(tiny, tmp_path, one_device):
    changes = {"model.positions": "learned", "model.max_positions": 40, "steps": 1}
    train_on_one_device(change(tiny(), **changes), tmp_path / "learned")
    with pytest.raises(UserError, match="max_length=64: the model has 40 positions"):
        HarnessModel(str(tmp_path / "learned"), max_length=64)


# Each of two processes, or a single one, without torch.
PROCESS = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None
address, index, count, checkpoint, out = sys.argv[1:]
sys.argv = sys.argv[:1]
from mea_jax import cli
from mea_jax.parallel import processes

def main():
    if int(count) > 1:
        processes.start(coordinator=address, count=int(count), index=int(index), timeout=100)
    cli.enable_compilation_cache()
    from lm_eval.api.instance import Instance
    from mea_jax.evaluate.harness.model import HarnessModel
    model = HarnessModel(checkpoint, max_length=48, dtype="float32")
    pairs, texts = json.loads(sys.stdin.read())
    def asked(kind, arguments):
        return [Instance(kind, {}, tuple(a), i, ("t", i, 1)) for i, a in enumerate(arguments)]
    options = {"until": ["z"], "max_gen_toks": 12}
    found = {
        "pairs": model.loglikelihood(asked("loglikelihood", pairs)),
        "rolling": model.loglikelihood_rolling(asked("rolling", [[t] for t in texts])),
        "answers": model.generate_until(asked("generate_until", [[t, options] for t in texts])),
        "mesh": dict(model.mesh.shape),
    }
    with open(f"{out}/{count}-{index}.json", "w") as file:
        json.dump(found, file)

cli.run(main)
"""


def test_two_processes_without_torch_give_what_one_gives(run, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    given = json.dumps([pairs(), TEXTS])
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

    def start(index, count):
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={2 // count}")
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index), str(count), run, tmp_path],
            env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    processes = [start(0, 2), start(1, 2), start(0, 1)]
    try:
        for process in processes:  # input for all first, because two wait for each other
            process.stdin.write(given)
            process.stdin.close()
            process.stdin = None
        for process in processes:
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err[-3000:]
    finally:
        for process in processes:
            process.kill()
    one, *two = (
        json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json")
    )
    assert two[0] == two[1]
    assert one["mesh"] == two[0]["mesh"]
    assert max(one["mesh"].values()) == 2
    for key in ("pairs", "rolling"):
        np.testing.assert_allclose(
            np.array(one[key], float), np.array(two[0][key], float), rtol=1e-5, atol=1e-4
        )
    assert one["answers"] == two[0]["answers"]


def test_the_harness_command_line_knows_the_model(run, tmp_path):
    """A missing checkpoint is one error line of the command, which runs in a separate process."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mea_jax.evaluate.harness", "run", "--model", "mea_jax"),
            *("--model_args", f"checkpoint={tmp_path / 'none'}", "--tasks", "hellaswag"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert_one_error(done.returncode, done.stderr, str(tmp_path / "none"))


def test_the_entry_point_leads_to_the_model():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["mea_jax"].partition(":")
    assert getattr(sys.modules[module], name) is HarnessModel
