"""Changed tokenizer files: each works, or gives one line that names the file.

An `Example` is the name and the bytes of a valid tokenizer file with changes: to its bytes, or to
values in its JSON or its protocol buffer.
"""

import copy
import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers as hf
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from mea_jax.data import tokenizers
from mea_jax.errors import UserError

from .mutation import mutated

LONGEST_LINE = 1000  # characters of a message; its longest part is the path
TEXTS = [
    "",
    "the cat sat on the mat",
    "def f(x):\r\n\treturn x + 12345  # it's naïve\n\n",
    "東京 \U0001f642 \0 \u200b\ufeff\uffff e\u0301",
    tokenizers.SEPARATOR + " <unk></s>",
    "x" * 2000,
]
_PROTOCOL: Any = sentencepiece_model_pb2  # creates its classes when it is imported
_LINES = ["the cat sat on the mat", "a dog ran home; naïve", "def f(x): return x + 1"]


@dataclasses.dataclass(frozen=True)
class Example:
    """A file `name` that contains `content`."""

    name: str  # "tokenizer.json", "tokenizer.model" or "tokenizer.bytes.json"
    content: bytes


@functools.cache
def _json_files() -> list[bytes]:
    """Return a tokenizer.json for each kind of model of Hugging Face's library."""
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "</s>", "the", "cat", "##s", "a"])}
    scores = [(token, -float(i)) for i, token in enumerate(vocabulary)]
    models = [
        hf.models.WordPiece(vocabulary, unk_token="[UNK]"),
        hf.models.WordLevel(vocabulary, unk_token="[UNK]"),
        hf.models.Unigram(scores, unk_id=0, byte_fallback=False),
    ]
    files = [tokenizers.train_bpe(iter(_LINES * 10), 280).content]
    for model in models:
        tokenizer = hf.Tokenizer(model)
        tokenizer.normalizer = hf.normalizers.Sequence(
            [hf.normalizers.NFC(), hf.normalizers.Replace("q", "k"), hf.normalizers.Strip()]
        )
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
        tokenizer.decoder = hf.decoders.WordPiece()
        tokenizer.enable_truncation(8, stride=2)
        tokenizer.enable_padding()
        files.append(tokenizer.to_str().encode())
    return files


@functools.cache
def _models() -> list[bytes]:
    """Return SentencePiece models of a few hundred bytes."""
    options: list[dict[str, Any]] = [
        {"vocab_size": 40},
        {"vocab_size": 60, "model_type": "bpe"},
        {"vocab_size": 40, "model_type": "char"},
        {"vocab_size": 300, "byte_fallback": True},
    ]
    files = []
    for option in options:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_LINES * 10),
            model_writer=model,
            hard_vocab_limit=False,
            normalization_rule_name="identity",  # its table would be nearly all of the file
            minloglevel=9,
            **option,
        )
        files.append(model.getvalue())
    return files


_ODD: Any = st.sampled_from(
    [None, True, False, -1, 0, 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**70, 1.5, -1e300, 1e-320]
    + ["", "a", "\ud800", "x" * 5000, "</s>", "(", "(a+)+$", "BPE", "Unigram", "AAAA"]
    + ["ABQAAAEAAAACAAAA", [], {}, [[]], ["a b"], [["a", "b"]], [["a", 0.0]], {"a": 0}]
) | st.sampled_from(
    [
        {"type": "FixedLength", "length": 0},
        {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
        {"type": "Precompiled", "precompiled_charsmap": "ABQAAAEAAAACAAAA"},
        {"type": "Strip", "content": " ", "start": 2**40, "stop": 2**40},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Removed", "invert": True},
        {"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True},
        {"type": "ByteFallback"},
        {"type": "Prepend", "prepend": "x" * 1000},
    ]
)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return all (container, key) of a JSON tree; of long containers only the first and last 6."""
    if not isinstance(tree, dict | list):
        return []
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    keys = keys if len(keys) <= 12 else keys[:6] + keys[-6:]
    return [place for key in keys for place in [(tree, key), *_places(tree[key])]]


@st.composite
def _changed_json(draw, whole: bytes) -> bytes:
    """Remove, replace or increment some values of a JSON tree, or copy others over them."""
    tree = json.loads(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(tree)
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(("remove", "odd", "odd", "near", "other")))
        if kind == "remove":
            del container[key]
        elif kind == "odd":
            container[key] = copy.deepcopy(draw(_ODD))
        elif kind == "near" and isinstance(container[key], int):
            container[key] += draw(st.sampled_from((-1, 1, 2**20, 2**31)))
        else:
            other, place = draw(st.sampled_from(places))
            container[key] = copy.deepcopy(other[place])
    return json.dumps(tree).encode()


@st.composite
def _changed_model(draw, whole: bytes) -> bytes:
    """Set fields of the protocol buffer to other values of their types, or remove pieces."""
    model = _PROTOCOL.ModelProto.FromString(whole)
    for _ in range(draw(st.integers(1, 3))):
        part = draw(
            st.sampled_from(
                [model.trainer_spec, model.normalizer_spec, model.denormalizer_spec]
                + [*model.pieces[:6], *model.pieces[-3:]] * 2
            )
        )
        field = draw(st.sampled_from(list(part.DESCRIPTOR.fields)))
        value: Any = {
            field.CPPTYPE_STRING: draw(st.sampled_from(("", "a", "</s>", "▁the", "<0x41>", "\0"))),
            field.CPPTYPE_FLOAT: draw(
                st.sampled_from((0.0, float("nan"), float("inf"), -float("inf"), 3e38, -1e-40))
            ),
            field.CPPTYPE_INT32: draw(st.sampled_from((-1, 0, 1, 5, 2**31 - 1, -(2**31)))),
            field.CPPTYPE_UINT64: draw(st.sampled_from((0, 2**40, 2**64 - 1))),
            field.CPPTYPE_BOOL: draw(st.booleans()),
        }.get(field.cpp_type)
        if field.cpp_type == field.CPPTYPE_ENUM:
            value = draw(st.sampled_from([v.number for v in field.enum_type.values]))
        if field.type == field.TYPE_BYTES:
            value = draw(st.binary(max_size=40))
        if isinstance(getattr(part, field.name), int | float | str | bytes | bool):
            setattr(part, field.name, value)
        else:
            part.ClearField(field.name)
    if draw(st.integers(0, 3)) == 0:
        start = draw(st.integers(0, len(model.pieces)))
        del model.pieces[start : start + draw(st.integers(1, 300))]
    return model.SerializeToString()


@st.composite
def _examples(draw) -> Example:
    kind = draw(st.sampled_from(("json", "json", "json", "model", "model", "bytes")))
    if kind == "bytes":
        whole = tokenizers.BytesTokenizer.content
        content = draw(_changed_json(whole) | mutated(whole) | st.binary(max_size=60))
        return Example(tokenizers.BytesTokenizer.FILE, content)
    if kind == "model":
        whole = draw(st.sampled_from(_models()))
        content = draw(_changed_model(whole) | mutated(whole) | st.just(whole))
        return Example(tokenizers.SentencePieceTokenizer.FILE, content)
    whole = draw(st.sampled_from(_json_files()))
    content = draw(_changed_json(whole) | _changed_json(whole) | mutated(whole))
    return Example(tokenizers.HuggingFaceTokenizer.FILE, content)


STRATEGY = _examples()


def check(example: Example, folder: Path) -> str:
    """Load the file, and encode and decode with the tokenizer.

    Returns:
      "works", or "refused: one line".

    Raises:
      AssertionError: the tokenizer or the message is wrong.
      BaseException: any other error than a `UserError`, such as a panic of a library.
    """
    path = folder / example.name
    path.write_bytes(example.content)
    try:
        tokenizer = tokenizers.load(str(path))
    except UserError as error:
        message = str(error)
        assert str(path) in message, message
        assert len(message.splitlines()) == 1, message
        assert len(message) <= LONGEST_LINE, message
        message.encode()
        return "refused: one line"
    finally:
        path.unlink()
    assert 0 <= tokenizer.separator < tokenizer.vocab_size <= 2**31
    for ids in tokenizer.encode_batch(TEXTS):
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        tokenizer.decode(ids).encode()
    outside = [-1, tokenizer.vocab_size, tokenizer.vocab_size - 1, tokenizer.separator, 0]
    tokenizer.decode(outside).encode()
    return "works"
