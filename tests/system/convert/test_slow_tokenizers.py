"""Import of tokenizers in vocab.json and merges.txt, and of tokens that the model lacks."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from mea_jax.checkpoint.layerwise import StoredModel
from mea_jax.convert import slow_tokenizers
from mea_jax.convert.exporting import export_model
from mea_jax.convert.importing import import_model
from mea_jax.data import tokenizers
from mea_jax.errors import UserError
from tests.helpers import assert_one_error
from tests.system.convert import small_models

TEXTS = [
    "def f(x):\n\treturn 'naïve 東京 \U0001f642'  # \x00\x7f\xa0\xad",
    "It's 12345, they'LL go;  two  spaces \r\n\r\n and e\u0301 (NFC) ",
    "",
    " a",
]
ADDED: dict[str, dict[str, bool]] = {
    "<|endoftext|>": {"special": True, "normalized": False},
    "<|im_start|>": {"special": True, "normalized": False},
    "<|im_end|>": {"special": True, "normalized": False},
    "<tool>": {"special": False, "normalized": False},
}


def slow(folder, added=ADDED, **config):
    """Write vocab.json and merges.txt of trained byte pairs, and tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    trained = hf.Tokenizer(hf.models.BPE())
    trained.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(["they'll return two spaces and def f(x) 12345"] * 9, trainer)
    trained.model.save(str(folder))
    first = trained.get_vocab_size()
    sides = {"lstrip": False, "rstrip": False, "single_word": False}
    numbered = {
        str(first + i): {"content": text, **sides, **flags}
        for i, (text, flags) in enumerate(added.items())
    }
    tree = {"added_tokens_decoder": numbered} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(tree))
    return folder


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    },
    "gpt2": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"},
    "a space before": {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True},
    "a start token": {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "bos_token": "<|im_start|>",
    },
    "a new pad token": {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "[PAD]"},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_ids_are_those_of_transformers(kind, tmp_path):
    folder = slow(tmp_path / "model", **CONFIGS[kind])
    ours = slow_tokenizers.read(folder, {})
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours.vocabulary == theirs.get_vocab()
    found = theirs(TEXTS, add_special_tokens=False)["input_ids"]
    assert ours.encode_batch(TEXTS) == found
    assert [ours.decode(ids) for ids in found] == [
        theirs.decode(ids, clean_up_tokenization_spaces=False) for ids in found
    ]
    assert theirs.eos_token_id in ours.stops
    assert theirs("")["input_ids"] == ([ours.start] if kind == "a start token" else [])
    saved = tmp_path / "saved"
    saved.mkdir()
    ours.save(saved)
    again = tokenizers.from_directory(saved)
    assert (again.encode_batch(TEXTS), again.stops) == (found, ours.stops)


def test_tokens_of_the_old_file_have_their_ids(tmp_path):
    """The old file is added_tokens.json; transformers now writes tokenizer_config.json instead."""
    folder = slow(tmp_path, tokenizer_class="Qwen2Tokenizer")
    config = json.dumps({"tokenizer_class": "Qwen2Tokenizer"})
    (folder / "tokenizer_config.json").write_text(config)
    first = max(json.loads((folder / "vocab.json").read_text()).values()) + 1
    added = {"<|im_end|>": first + 2, "<|endoftext|>": first, "<tool>": first + 1}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    special = {"eos_token": "<|im_end|>", "pad_token": {"content": "[PAD]", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    ours, theirs = slow_tokenizers.read(folder, {}), AutoTokenizer.from_pretrained(folder)
    assert ours.vocabulary == theirs.get_vocab()
    assert ours.vocabulary["[PAD]"] == first + 3
    assert ours.encode_batch(["a <tool> b"])[0] == theirs("a <tool> b")["input_ids"]
    assert ours.separator == first
    (folder / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": first + 5}))
    with pytest.raises(UserError, match=rf"'<\|endoftext\|>' has the id {first + 5}.*give it"):
        slow_tokenizers.read(folder, {})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"tokenizer_class": "CodeGenTokenizer"}, "names tokenizer_class 'CodeGenTokenizer'"),
        ({}, "no tokenizer.json, and it names no tokenizer_class"),
    ],
)
def test_other_classes_are_refused_with_the_way_out(config, words, tmp_path):
    folder = slow(tmp_path, **config)
    with pytest.raises(UserError, match=words) as caught:
        slow_tokenizers.read(folder, {})
    way = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    assert way in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_damaged_files_are_named(name, tmp_path):
    folder = slow(tmp_path, tokenizer_class="Qwen2Tokenizer")
    content = (folder / name).read_text()
    (folder / name).write_text(content[: len(content) // 2] + "{")
    with pytest.raises(UserError, match=f"{name}.* is damaged"):
        slow_tokenizers.read(folder, {})


# -- tokens beyond the embedding -----------------------------------------------------------------


@pytest.fixture(params=["llama", "llama tied"])
def model(request, tmp_path):
    """Save a model with an embedding row for each of the 264 ids of its tokenizer."""
    model = small_models.make(request.param, num_hidden_layers=1, vocab_size=264)
    return small_models.save(model, tmp_path / "model")


def add(folder, count, special=True):
    tokenizer = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = ["[PAD]", *(f"<{i}>" for i in range(1, count))]
    tokenizer.add_special_tokens(words) if special else tokenizer.add_tokens(words)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("count", [1, 64])
def test_tokens_without_a_row_get_the_mean_of_the_others(count, model, in_process, tmp_path):
    add(model, count)
    run = tmp_path / "run"
    status, out, _ = in_process("mea_jax.convert", "from_hf", "--model", model, "--out", run)
    assert status == 0
    rows = "1 row is new" if count == 1 else "64 rows are new"
    assert f"{264 + count} tokens, of which {rows}: the tokenizer has [PAD]" in out
    stored = StoredModel(run, print)
    assert stored.config.model.vocab_size == 264 + count
    theirs, top = load_file(model / "model.safetensors"), stored.top()
    pairs = [("model.embed_tokens.weight", np.asarray(top["embedding"]))]
    if "head" in top:
        pairs.append(("lm_head.weight", np.asarray(top["head"]).T))
    for name, ours in pairs:
        np.testing.assert_array_equal(ours[:264], theirs[name])
        mean = theirs[name].mean(axis=0)
        np.testing.assert_allclose(ours[264:], np.tile(mean, (count, 1)), rtol=0, atol=1e-6)
    export_model(run, tmp_path / "back", print)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (
        back["vocab_size"] == 264 + count == len(AutoTokenizer.from_pretrained(tmp_path / "back"))
    )


@pytest.mark.parametrize("kind", ["65 tokens", "a merge"])
def test_more_than_a_few_added_tokens_are_another_models(kind, model, in_process, tmp_path):
    if kind == "a merge":
        shutil.copyfile(model / "tokenizer.json", tmp_path / "kept.json")
        tokenizers.train_bpe(iter(["any text that has words enough for merges"] * 3), 265).save(
            model
        )
    else:
        add(model, 65)
    found = in_process("mea_jax.convert", "from_hf", "--model", model, "--out", tmp_path / "run")
    assert_one_error(*found[::2], "tokenizer does not match", "vocab_size=264")


def test_a_model_with_a_slow_tokenizer_is_imported(tmp_path):
    """Its export contains a tokenizer.json in addition to the original files."""
    made = small_models.make("llama", num_hidden_layers=1, vocab_size=300)
    folder = small_models.save(made, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    slow(folder, tokenizer_class="Qwen2Tokenizer")
    theirs = AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    import_model(folder, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "back", print)
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(TEXTS)["input_ids"] == theirs
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert (tmp_path / "back" / "merges.txt").read_bytes() == (folder / "merges.txt").read_bytes()
