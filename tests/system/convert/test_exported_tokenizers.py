"""Exported tokenizers give the ids that mea_jax.generate feeds its model."""

import io
import json
from typing import Any

import pytest
import tokenizers as hf
from transformers import AutoTokenizer

from mea_jax.convert import tokenizer_files
from mea_jax.data import tokenizers
from mea_jax.generate.run import encode

TEXTS = [
    "def f(x):\n\treturn 'naïve 東京 \U0001f642'  # \x00\x7f\xa0\xad",
    " a",
    "  two  spaces, then a space ",
    f"one{tokenizers.SEPARATOR}two",
]


def trained() -> hf.Tokenizer:
    """Train byte pairs as `config.data.tokenizer = "bpe:300"` does."""
    words = ["hello world, def f(x): return x, two spaces"] * 50
    return hf.Tokenizer.from_str(tokenizers.train_bpe(iter(words), 300).content.decode())


def template(single: str, *tokens: str) -> hf.Tokenizer:
    """Return the trained tokenizer with the template `single`, which uses `tokens`."""
    made = trained()
    made.add_special_tokens(list(tokens))
    ids = [(token, made.token_to_id(token)) for token in tokens]
    made.post_processor = hf.processors.TemplateProcessing(single=single, special_tokens=ids)
    return made


def with_offsets() -> hf.Tokenizer:
    """Return the trained tokenizer with a processor that adds no token, such as GPT-2's."""
    made = trained()
    made.post_processor = hf.processors.ByteLevel(trim_offsets=True)
    return made


HUGGING_FACE = {
    "trained here": trained,
    "a processor that adds nothing": with_offsets,
    "a start token": lambda: template("<s> $A", "<s>"),
    "a start and an end token": lambda: template("<s> $A </s>", "<s>", "</s>"),
}


def fed(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids that mea_jax.generate feeds its model."""
    return encode(tokenizer, texts, "{}")


def exported(tokenizer: tokenizers.Tokenizer, folder) -> Any:
    tokenizer_files.write(tokenizer, folder, 64)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["bytes", *HUGGING_FACE])
def test_each_text_begins_with_the_start_token(kind, tmp_path):
    """This includes texts that spell out a special token, which is not parsed as one."""
    ours: tokenizers.Tokenizer = tokenizers.BytesTokenizer()
    if kind != "bytes":
        ours = tokenizers.HuggingFaceTokenizer(HUGGING_FACE[kind](), kind)
    theirs = exported(ours, tmp_path)
    assert theirs(TEXTS)["input_ids"] == fed(ours, TEXTS)
    assert theirs("")["input_ids"] == [ours.start]
    assert theirs.bos_token_id == ours.start
    assert set(theirs(TEXTS)) == {"input_ids", "attention_mask"}, "arguments of generate()"
    assert theirs.eos_token_id == ours.separator
    assert [theirs.decode(ids[1:]) for ids in theirs(TEXTS)["input_ids"]] == TEXTS
    assert theirs(TEXTS[1], add_special_tokens=False)["input_ids"] == fed(ours, TEXTS)[1][1:]
    theirs.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(TEXTS)["input_ids"] == fed(ours, TEXTS)


def test_a_processor_that_only_moves_offsets_stays(tmp_path):
    theirs = exported(tokenizers.HuggingFaceTokenizer(with_offsets(), "offsets"), tmp_path)
    found = theirs("hello world", return_offsets_mapping=True)["offset_mapping"]
    assert found == [(0, 0), *with_offsets().encode("hello world").offsets]
    assert found[1:] != trained().encode("hello world").offsets


@pytest.mark.parametrize("begin", [1, -1], ids=["a begin token", "none"])
def test_sentencepiece_texts_begin_with_the_start_token(begin, tmp_path):
    """Without a begin token, the end token begins a document."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, def f(x): return x, two spaces"] * 50),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        bos_id=begin,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    ours = tokenizers.SentencePieceTokenizer(model.getvalue(), "here")
    theirs, texts = exported(ours, tmp_path), [TEXTS[0], TEXTS[3]]
    assert theirs(texts)["input_ids"] == fed(ours, texts)
    assert theirs(texts[0])["input_ids"][0] == (begin if begin >= 0 else 2)


def test_a_tokenizer_that_came_with_files_is_left_as_it_came(tmp_path):
    """Its files stay as published, although mea_jax.generate feeds the start token first."""
    config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}).encode()
    ours = tokenizers.HuggingFaceTokenizer(trained(), "published")
    ours.companions = {"tokenizer_config.json": config}
    theirs = exported(ours, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == ours.content
    assert (tmp_path / "tokenizer_config.json").read_bytes() == config
    assert theirs("hello")["input_ids"] == fed(ours, ["hello"])[0][1:]
