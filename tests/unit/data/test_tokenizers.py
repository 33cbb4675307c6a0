"""Tests of tokenizers: lossless, deterministic, with clear errors for malformed files."""

import io
import json

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_jax.data import end_tokens, tokenizers
from mea_jax.errors import UserError

TEXTS = [
    "def f(x):\n    return x + 1  # it's the 12345th\n\n\nclass A:\n\tpass\n",
    "The quick brown fox didn't jump over 3.14159 lazy dogs; naïve café, 東京, 🙂.\r\n",
] * 20
BPE = tokenizers.train_bpe(iter(TEXTS), 348)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("tokenizer", [tokenizers.BytesTokenizer(), BPE])
@given(text=ANY_TEXT | st.sampled_from(TEXTS) | st.text(" \t\r\n'aA1é<|endoftext|>", max_size=40))
@settings(deadline=None, max_examples=150)
def test_any_text_comes_back(tokenizer, text):
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.separator not in ids


@pytest.mark.parametrize("tokenizer", [tokenizers.BytesTokenizer(), BPE])
def test_text_that_spells_the_separator_is_ordinary_text(tokenizer):
    text = f"a{tokenizers.SEPARATOR}b"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.separator]) == tokenizers.SEPARATOR


@pytest.mark.parametrize("tokenizer", [tokenizers.BytesTokenizer(), BPE])
def test_decode_never_raises(tokenizer):
    (ids,) = tokenizer.encode_batch(["東"])
    assert "\ufffd" in tokenizer.decode(ids[:1])
    (a, b) = tokenizer.encode_batch(["ab", "cd"])
    outside = [*a, tokenizer.vocab_size, -1, *b]
    assert tokenizer.decode(outside) == "ab\ufffd\ufffdcd"


def test_bpe_merges_common_words_within_pre_tokens():
    everything = tokenizers.train_bpe(iter(TEXTS), 2000)  # until no pair is left to merge
    vocabulary = set(hf.Tokenizer.from_str(everything.content.decode()).get_vocab())
    assert "Ġreturn" in vocabulary  # a word with its leading space
    assert "):ĊĠĠĠ" in vocabulary  # signs, line end, and indentation except its last space
    assert not any(token.isdigit() and len(token) > 3 for token in vocabulary)


def test_bpe_training_is_deterministic():
    assert tokenizers.train_bpe(iter(TEXTS), 348).content == BPE.content


def test_bpe_size():
    assert BPE.vocab_size == 348
    assert tokenizers.train_bpe(iter(["ab"]), 400).vocab_size <= 258


@pytest.mark.parametrize("tokenizer", [tokenizers.BytesTokenizer(), BPE])
def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (file,) = tmp_path.iterdir()
    for other in (tokenizers.from_directory(tmp_path), tokenizers.load(str(file))):
        assert type(other) is type(tokenizer)
        assert other.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
        assert (other.vocab_size, other.separator) == (tokenizer.vocab_size, tokenizer.separator)


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("the cat sat on the mat\n" * 50 + "a dog ran home\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    tokenizer = tokenizers.load(str(tmp_path / "spm.model"))
    (ids,) = tokenizer.encode_batch(["the dog sat"])
    assert tokenizer.decode(ids) == "the dog sat"
    assert tokenizer.decode([*ids, 10**6]) == "the dog sat\ufffd"
    assert tokenizer.separator == 2
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = tokenizers.from_directory(tmp_path / "saved")
    assert again.encode_batch(["the dog"]) == tokenizer.encode_batch(["the dog"])

    (tmp_path / "cut.model").write_bytes((tmp_path / "spm.model").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut\.model: truncated"):
        tokenizers.load(str(tmp_path / "cut.model"))


def test_sentencepiece_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    (tmp_path / "a.model").write_bytes(b"")
    with pytest.raises(UserError, match="needs the package sentencepiece: pip install"):
        tokenizers.load(str(tmp_path / "a.model"))


def test_end_tokens_of_published_models_are_found(tmp_path):
    for end in ("<|end_of_text|>", "</s>", "<|im_end|>", "<eos>"):
        model = hf.Tokenizer(hf.models.BPE({"a": 0, "b": 1}, []))
        model.add_special_tokens(["<pad>", end])
        model.save(str(tmp_path / "tokenizer.json"))
        tokenizer = tokenizers.from_directory(tmp_path)
        assert (tokenizer.separator, tokenizer.vocab_size) == (3, 4)


def test_truncation_and_post_processors_in_the_file_are_not_applied(tmp_path):
    model = hf.Tokenizer.from_str(BPE.content.decode())
    model.enable_truncation(3)
    model.enable_padding(length=50)
    model.post_processor = hf.processors.TemplateProcessing(
        single=f"{tokenizers.SEPARATOR} $A", special_tokens=[(tokenizers.SEPARATOR, BPE.separator)]
    )
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.from_directory(tmp_path)
    assert tokenizer.encode_batch(TEXTS) == BPE.encode_batch(TEXTS)


def test_malformed_files(tmp_path):
    no_end = hf.Tokenizer(hf.models.BPE({"a": 0}, []))
    no_end.save(str(tmp_path / "no_end.json"))
    with pytest.raises(UserError, match=r"no_end\.json: has no end token.*<\|endoftext\|>"):
        tokenizers.load(str(tmp_path / "no_end.json"))
    (tmp_path / "cut.json").write_bytes(BPE.content[:200])
    with pytest.raises(UserError, match=r"cut\.json: truncated"):
        tokenizers.load(str(tmp_path / "cut.json"))
    path = tmp_path / tokenizers.BytesTokenizer.FILE
    path.write_text("{")
    with pytest.raises(UserError, match=r"bytes\.json: truncated"):
        tokenizers.load(str(path))
    path.write_text(json.dumps({"kind": "bytes", "vocab_size": 99}))
    with pytest.raises(UserError, match="not a bytes tokenizer"):
        tokenizers.load(str(path))
    with pytest.raises(UserError, match=r"missing\.json: no such file"):
        tokenizers.load(str(tmp_path / "missing.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"contains no tokenizer; add .*tokenizer\.model"):
        tokenizers.load(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="'gpt2' is not a tokenizer: set it to 'bytes', 'bpe"):
        tokenizers.load("gpt2")


def test_bpe_specs():
    assert tokenizers.bpe_size("bpe:2048") == 2048
    assert tokenizers.bpe_size("bytes") is None
    for spec in ("bpe", "bpe:", "bpe:many", "bpe:256", "bpe:-5"):
        with pytest.raises(UserError, match="size must be at least 257"):
            tokenizers.bpe_size(spec)


def changed(path, change):
    """Write the trained tokenizer with its JSON changed by `change`; return its path."""
    tree = json.loads(BPE.content)
    change(tree)
    path.write_text(json.dumps(tree))
    return str(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # The library panics, which is not an `Exception`: here on reading, below on encoding.
        (
            lambda tree: tree.update(
                normalizer={"type": "Precompiled", "precompiled_charsmap": "ABQAAAEAAAACAAAA"}
            ),
            "truncated, or not a Hugging Face tokenizer",
        ),
        (
            lambda tree: tree.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
            "cannot encode text",
        ),
        # The library would list all two billion smaller ids.
        (lambda tree: tree["model"]["vocab"].update(the=2**31), "has ids up to 2147483648"),
        (lambda tree: tree["model"]["vocab"].update(the=-1), "truncated, or not a Hugging Face"),
        (
            lambda tree: tree["model"]["vocab"].update(the=BPE.separator),
            r"another token has the id of the end token '<\|endoftext\|>'",
        ),
    ],
)
def test_what_the_library_does_not_foresee_is_one_line(tmp_path, change, words):
    path = changed(tmp_path / "odd.json", change)
    with pytest.raises(UserError, match=f"odd.json: {words}") as caught:
        tokenizers.load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_pieces_that_are_not_utf8(tmp_path):
    """SentencePiece loads such a model and fails only when it decodes the piece."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the naïve cat"] * 50),
        model_writer=model,
        hard_vocab_limit=False,
        vocab_size=30,
        minloglevel=9,
    )
    (tmp_path / "a.model").write_bytes(model.getvalue().replace("ï".encode(), b"\xc3\xc3"))
    with pytest.raises(UserError, match=r"a\.model: cannot decode .*utf-8"):
        tokenizers.load(str(tmp_path / "a.model"))


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A </s>", None])
def test_documents_begin_as_the_files_own_template_says(template, tmp_path):
    model = hf.Tokenizer(hf.models.BPE({"a": 0, "b": 1}, []))
    model.add_special_tokens(["<s>", "</s>"])
    if template is not None:
        special = [(word, model.token_to_id(word)) for word in template.split() if "s>" in word]
        model.post_processor = hf.processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.from_directory(tmp_path)
    assert tokenizer.separator == 3
    assert tokenizer.start == (2 if template and template.startswith("<s>") else 3)
    assert tokenizer.encode_batch(["ab"]) == [[0, 1]], "packing adds both tokens, not encoding"


def test_ids_that_end_a_text(tmp_path):
    BPE.save(tmp_path)
    assert tokenizers.from_directory(tmp_path).stops == (BPE.separator,)
    for content, stops in (
        ('{"eos_token_id": [7, 5]}', (BPE.separator, 7, 5)),
        ('{"eos_token_id": 9}', (BPE.separator, 9)),
        ('{"eos_token_id": [null, -1, "a", 100000, true]}', (BPE.separator,)),
        ("[", (BPE.separator,)),
    ):
        (tmp_path / "generation_config.json").write_text(content)
        assert tokenizers.from_directory(tmp_path).stops == stops


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, 1),
        ({"bos_token": None, "eos_token": {"content": "</s>"}}, 2),
        ({"bos_token": "<unknown>", "eos_token": "</s>"}, 2),
        ({}, None),
    ],
)
def test_what_the_harness_puts_before_a_text_without_context(named, expected):
    """The begin token that is named, as SmolLM2's, even if the tokenizer adds none; or the end."""
    files = {end_tokens.TOKENIZER_CONFIG: json.dumps(named).encode()}
    assert end_tokens.prefix_of(files, {"<s>": 1, "</s>": 2}) == expected
