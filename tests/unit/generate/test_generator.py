"""Tests of generation: the same tokens as recomputing each prefix, in any batch; the command."""

import dataclasses
import json
import re
import subprocess
import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.config.schema import MeshConfig
from mea_jax.data.tokenizers import BytesTokenizer
from mea_jax.errors import UserError
from mea_jax.generate.generator import Decoding, Generator, Report
from mea_jax.generate.run import (
    Session,
    Stream,
    continue_file,
    cut_at,
    encode,
    read_prompts,
    stream_one,
)
from mea_jax.model import kv_cache
from mea_jax.model.params import init_params
from mea_jax.ops.sampling import Sampling
from mea_jax.parallel import sharding
from mea_jax.train.run import train
from tests.helpers import apply_logits, params_of, tiny_model

PROMPTS = [[5, 6, 7, 8, 9], [200, 3], [17] * 11]


@pytest.fixture(scope="module")
def generator():
    model = tiny_model(key_components=2, value_components=1)
    return Generator(model, params_of(model, noise=0.3), length=200)


def recomputed(generator, params, prompt, count):
    """Return greedy tokens, each from a forward pass over its prefix, padded to a fixed length."""
    model, tokens = tiny_model(key_components=2, value_components=1), list(prompt)
    length = len(prompt) + count
    where = jnp.arange(length)[None], jnp.ones((1, length), jnp.int32)
    logits = jax.jit(lambda t: apply_logits(model, params, t, *where))
    for _ in range(count):
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(logits(padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_tokens_are_those_of_recomputing_every_prefix(generator):
    """The tokens are equal over more steps than `RECENT`, so that the cache is flushed.

    C_k = 2, C_v = 1 and K = 4.
    """
    params = params_of(tiny_model(key_components=2, value_components=1), noise=0.3)
    count = kv_cache.RECENT + 20
    new = generator.run(PROMPTS, Decoding(count))
    for prompt, tokens in zip(PROMPTS, new, strict=True):
        assert tokens == recomputed(generator, params, prompt, count)


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch_nor_on_the_chunk(generator):
    how = Decoding(count=30, sampling=Sampling(1.0, top_k=50, top_p=0.9), seed=3)
    together = generator.run(PROMPTS, dataclasses.replace(how, chunk=7))
    alone = [generator.run([p], how, rows=[i])[0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    other = generator.run(PROMPTS, dataclasses.replace(how, seed=4))
    assert together != other
    assert together[0] != generator.run([PROMPTS[0]], how, rows=[1])[0]


def test_rows_stop_by_themselves(generator):
    free = generator.run(PROMPTS, Decoding(40))
    stop = free[0][9]
    first = free[0].index(stop)
    stopped = generator.run(PROMPTS, Decoding(40, stop=(stop,)))
    assert stopped[0] == free[0][:first]
    for tokens, before in zip(stopped[1:], free[1:], strict=True):
        assert tokens == (before[: before.index(stop)] if stop in before else before)


def test_a_full_cache_ends_a_row(generator):
    long = [(7 * i) % 250 for i in range(195)]
    report = Report()
    new = generator.run([long, PROMPTS[1]], Decoding(12), report=report)
    assert [len(tokens) for tokens in new] == [5, 12]
    assert report.tokens == 17
    assert new[1] == generator.run([PROMPTS[1]], Decoding(12), rows=[1])[0]


def test_a_looker_on_can_stop_a_row(generator):
    seen = []

    def on_tokens(new):
        seen.append([len(tokens) for tokens in new])
        return [len(new[0]) >= 8, False, False]

    new = generator.run(PROMPTS, Decoding(20, chunk=4), on_tokens=on_tokens)
    assert [len(tokens) for tokens in new] == [8, 20, 20]
    assert seen[:2] == [[4, 4, 4], [8, 8, 8]]


def test_a_looker_on_never_sees_a_stop_token(generator):
    stop = generator.run(PROMPTS, Decoding(40))[0][9]
    seen: list[list[int]] = []

    def on_tokens(new):
        seen.extend(map(list, new))  # copies, because the lists grow
        return [False] * len(new)

    new = generator.run(PROMPTS, Decoding(40, stop=(stop,), chunk=4), on_tokens=on_tokens)
    assert seen[-len(new) :] == new
    assert all(stop not in tokens for tokens in seen)


def test_the_report_counts_the_first_rows_only(generator):
    report = Report()
    new = generator.run([*PROMPTS, PROMPTS[2]], Decoding(9), report=report, counted=3)
    assert report.tokens == sum(map(len, new[:3])) == 27
    assert len(new) == 4


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 1, 4)], ids=["data 2, tensor 2", "tensor 4"])
def test_a_mesh_gives_the_tokens_of_one_device(sizes):
    """The tokens are equal over more steps than `RECENT`: a flush keeps the carry's shardings."""
    model, length, count = tiny_model(), 256, kv_cache.RECENT + 72
    params = params_of(model, noise=0.3)
    expected = Generator(model, params, length=length).run(PROMPTS[:1], Decoding(count))

    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[:4])
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(boxed, mesh))
        found = Generator(model, placed, length=length).run(PROMPTS[:1], Decoding(count))
    assert found == expected
    assert len(found[0]) == count


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1] * 200, "200 tokens, which leave no room .* 200 positions"),
        ([1, 264], "token 264, and the model's vocabulary has 264"),
        ([7, -1], "token -1, and the model's vocabulary has 264"),
    ],
)
def test_prompts_that_cannot_be_continued(generator, prompt, message):
    with pytest.raises(UserError, match=message):
        generator.run([prompt], Decoding(3))


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "learned", "max_positions": 16},
        {"rope_scaling.kind": "dynamic", "rope_scaling.original_context": 16},
    ],
    ids=["learned", "dynamic"],
)
def test_a_limit_of_positions_bounds_the_cache(changes):
    model = tiny_model(**changes)
    Generator(model, params_of(model), length=16)
    with pytest.raises(UserError, match="17 positions is longer than the 16"):
        Generator(model, params_of(model), length=17)


# -- text ---------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose ids are the code units of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_a_stream_prints_every_character_once_and_none_half(capsys):
    text, shown = "naïve → END of it", []
    stream = Stream(cast(Any, Letters()), ["END"], sys.stdout)
    data = text.encode()
    stopped = []
    for i in range(1, len(data) + 1):
        stopped.append(stream.show(list(data[:i])))
        shown.append(capsys.readouterr().out)
    assert "".join(shown) == "naïve → "  # without the stop text, which came byte by byte
    assert stopped.index(True) == len("naïve → END".encode()) - 1
    assert "\ufffd" not in "".join(shown)


@pytest.fixture(scope="module")
def writer():
    """Return a generator that writes ASCII characters and, often, the separator."""
    model = tiny_model(tie_embeddings=False)
    params = params_of(model, noise=0.3)
    params["head"][:, 256] *= 5
    params["head"][:, 128:256] = params["head"][:, 257:] = 0
    return Generator(model, params, length=64)


@pytest.mark.slow
def test_streamed_text_holds_neither_separator_nor_stop_text(writer, capsys):
    tokenizer = BytesTokenizer()
    session = Session(writer, tokenizer, Decoding(40, stop=(256,)), [])
    (ids,) = encode(tokenizer, ["over"], "{}")
    (free,) = writer.run([ids], Decoding(40))
    end = free.index(256)
    assert 10 < end < 39  # after the first check for stop texts
    text = tokenizer.decode(free[:end])
    assert stream_one(session, "over", ids) == "end_of_document"
    assert capsys.readouterr().out == f"over{text}\n"
    # The first check for stop texts is after the first two letters of this one.
    session = dataclasses.replace(session, stops=["never", text[6:10]])
    assert stream_one(session, "over", ids) == "stop"
    assert capsys.readouterr().out == f"over{text[: text.index(text[6:10])]}\n"


def test_a_file_is_reported_without_what_fills_its_last_batch(writer):
    tokenizer, prompts = BytesTokenizer(), ["a quick", "over", "seven"]
    ids = encode(tokenizer, prompts, "{}")
    session = Session(writer, tokenizer, Decoding(10), [])
    records = list(continue_file(session, prompts, ids, 2))
    assert [record["prompt"] for record in records] == prompts
    assert session.report.tokens == sum(record["tokens"] for record in records) == 30


def test_cut_at_the_first_stop():
    assert cut_at("a b c", ["c", "b"]) == ("a ", True)
    assert cut_at("a b c", ["x"]) == ("a b c", False)


def test_prompt_files(tmp_path):
    lines, records = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("one\n\n  two\n")
    assert read_prompts(lines) == ["one", "  two"]
    records.write_text('{"prompt": "a\\nb"}\n{"prompt": "c"}\n')
    assert read_prompts(records) == ["a\nb", "c"]
    records.write_text('{"prompt": "a"}\n{"text": "c"}\n')
    with pytest.raises(UserError, match="line 2: expected an object"):
        read_prompts(records)
    lines.write_text("\n")
    with pytest.raises(UserError, match="contains no prompt"):
        read_prompts(lines)


def test_a_line_of_text_may_hold_other_separators(tmp_path):
    """U+2028 and similar characters end a line for `str.splitlines`, but not in a text file."""
    text = "one\u2028and\u2029the\x85same\x0cline"
    lines, records = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text(f"{text}\nanother\n", encoding="utf-8")
    assert read_prompts(lines) == [text, "another"]
    records.write_text('{"prompt": "one\u2028line"}\n', encoding="utf-8")
    assert read_prompts(records) == ["one\u2028line"]


# -- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_directory(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("generate") / "run"
    model = tiny_model(key_components=2, value_components=2)
    train(tiny(model=model, **{"mesh.data": 1, "mesh.fsdp": -1}), workdir)
    return workdir


def generate(*arguments):
    options = ("--dtype", "float32")  # "auto" would depend on the machine
    command = [sys.executable, "-m", "mea_jax.generate", *map(str, arguments), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.process
@pytest.mark.slow
def test_the_command_continues_a_prompt_and_a_file(run_directory, tmp_path):
    checkpoint = ("--checkpoint", run_directory)
    one = generate(*checkpoint, "--prompt", "a quick", "--max_tokens", 12, "--temperature", 0)
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("a quick")
    assert "tokens/s" in one.stderr
    # Two layers, C 2 of width 8, keys and values, float32.
    assert f"cache {2 * 2 * 2 * 8 * 4} bytes per token (float32, absorbed)" in one.stderr

    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("a quick\nover the\nseven\n")
    many = generate(
        *("--checkpoint", run_directory / "checkpoints" / "8", "--prompts", prompts),
        *("--output", out, "--batch_size", 2, "--max_tokens", 12, "--temperature", 0),
    )
    assert many.returncode == 0, many.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["prompt"] for r in records] == ["a quick", "over the", "seven"]
    assert one.stdout.rstrip("\n") == "a quick" + records[0]["text"].rstrip("\n")
    assert all(r["ended_by"] in ("max_tokens", "end_of_document") for r in records)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "x" * 40), "the prompt has 41 tokens"),
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt", "x", "--prompts", "y"), "give either --prompt TEXT or --prompts FILE"),
        (("--prompt", "x", "--top_p", "0"), "top_p=0"),
        (("--prompt", "x", "--cache_dtype", "int9"), "one of <auto|float32|bfloat16|int8>"),
        (("--prompts", "/nowhere.txt"), "--prompts /nowhere.txt cannot be read"),
        (
            ("--prompt", "x", "--seed", "-1"),
            "--seed=-1: -1 is not an integer in the range [0, 4294967295]",
        ),
    ],
)
def test_bad_input_is_one_line(run_directory, arguments, message):
    result = generate("--checkpoint", run_directory, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b\\ud800"}\n', "p.jsonl is not valid Unicode"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ""}\n', "p.jsonl is empty"),
        ("p.txt", b"a\nb\xff\n", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_bad_files_of_prompts_are_one_line(run_directory, tmp_path, name, content, message):
    out = tmp_path / "out.jsonl"
    out.write_text("results of an hour\n")
    (tmp_path / name).write_bytes(content)
    files = ("--prompts", tmp_path / name, "--output", out)
    result = generate("--checkpoint", run_directory, *files)
    assert result.returncode == 2
    assert message in result.stderr
    assert ("prompt 2 of" in result.stderr) == (name == "p.jsonl")
    assert len(result.stderr.strip().splitlines()) == 1
    assert out.read_text() == "results of an hour\n"


@pytest.mark.process
@pytest.mark.slow
def test_more_tokens_than_the_cache_holds(run_directory):
    result = generate("--checkpoint", run_directory, "--prompt", "a quick", "--max_tokens", 10**12)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("a quick")
    assert re.search("ended by (cache|end_of_document)", result.stderr)


@pytest.mark.process
@pytest.mark.slow
def test_a_checkpoint_without_a_tokenizer_or_none_at_all(run_directory, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(run_directory / "checkpoints")
    result = generate("--checkpoint", tmp_path / "run", "--prompt", "x")
    assert result.returncode == 2
    assert "contains no tokenizer" in result.stderr
    result = generate("--checkpoint", tmp_path, "--prompt", "x")
    assert result.returncode == 2
    assert "contains no checkpoints" in result.stderr
