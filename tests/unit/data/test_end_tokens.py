"""Tests of end tokens, which several files of a published model can name."""

import json
from pathlib import Path

import pytest
import tokenizers as hf

from mea_jax.config.schema import DataConfig
from mea_jax.data import prepare, tokenizers
from mea_jax.errors import UserError

DEEPSEEK = "<\uff5cend\u2581of\u2581sentence\uff5c>"
WORDS = ["a", "<|endoftext|>", "<|im_end|>", "<|stop|>", DEEPSEEK]


@pytest.mark.parametrize(
    ("words", "files", "separator", "stops"),
    [
        # No file: the known name.
        (WORDS, {}, "<|endoftext|>", []),
        # SmolLM2: the end of a turn stops generation; documents end as in pretraining.
        (WORDS, {"model_config": {"eos_token_id": 2}}, "<|endoftext|>", ["<|im_end|>"]),
        (WORDS, {"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|endoftext|>", ["<|im_end|>"]),
        (
            WORDS,
            {"special_tokens_map": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}},
            "<|endoftext|>",
            ["<|im_end|>"],
        ),
        # The union, as in Qwen3.
        (
            WORDS,
            {
                "generation_config": {"eos_token_id": [2, 1]},
                "model_config": {"eos_token_id": 3},
                "tokenizer_config": {"eos_token": "<|im_end|>"},
            },
            "<|endoftext|>",
            ["<|im_end|>", "<|stop|>"],
        ),
        # The files contradict the list of known names.
        (WORDS, {"tokenizer_config": {"eos_token": "<|stop|>"}}, "<|stop|>", []),
        # No known name.
        (["a", DEEPSEEK], {"model_config": {"eos_token_id": 1}}, DEEPSEEK, []),
        (["a", DEEPSEEK], {"tokenizer_config": {"eos_token": {"content": WORDS[4]}}}, DEEPSEEK, []),
        # Only the end of a turn.
        (["a", "<|eot_id|>"], {"model_config": {"eos_token_id": 1}}, "<|eot_id|>", []),
        # Ids out of range or of other types, missing tokens, files that are not a JSON object.
        (
            WORDS,
            {
                "model_config": {"eos_token_id": [99, -1, "2", None, True]},
                "tokenizer_config": {"eos_token": "<nowhere>"},
                "special_tokens_map": [],
            },
            "<|endoftext|>",
            [],
        ),
    ],
)
def test_ends_are_what_the_files_of_a_model_name(words, files, separator, stops, tmp_path):
    hf.Tokenizer(hf.models.BPE({word: i for i, word in enumerate(words)}, [])).save(
        str(tmp_path / "tokenizer.json")
    )
    for name, tree in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    tokenizer = tokenizers.from_directory(tmp_path)
    assert tokenizer.separator == words.index(separator)
    assert set(tokenizer.stops) == {words.index(word) for word in (separator, *stops)}
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    assert tokenizers.from_directory(saved).stops == tokenizer.stops


def test_no_end_token_is_no_reason_to_add_one(tmp_path):
    """The error names the file that must contain the end token: the vocabulary cannot change."""
    hf.Tokenizer(hf.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no end token.*eos_token in .*tokenizer_config") as caught:
        tokenizers.from_directory(tmp_path)
    assert "add one" not in str(caught.value)


def test_another_separator_gives_other_windows(tmp_path):
    """The name of prepared data depends on the id of the token that ends documents."""
    folders: list[Path] = []
    bpe = tokenizers.train_bpe(iter(["the quick brown fox"]), 264)
    for end in (None, "<|stop|>", DEEPSEEK):
        folders.append(tmp_path / str(len(folders)))
        folders[-1].mkdir()
        model = hf.Tokenizer.from_str(bpe.content.decode())
        model.add_special_tokens(["<|stop|>", DEEPSEEK])
        model.save(str(folders[-1] / "tokenizer.json"))
        if end is not None:
            config = json.dumps({"eos_token": end})
            (folders[-1] / "tokenizer_config.json").write_text(config)
    data = DataConfig(tokenizer="any", context_length=8)
    names = {prepare._fingerprint(data, [], tokenizers.load(str(path))) for path in folders}
    assert len(names) == 3
