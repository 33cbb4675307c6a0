"""Build tokenizers that are published without tokenizer.json, from vocab.json and merges.txt.

Two classes of transformers are supported, GPT2Tokenizer and Qwen2Tokenizer. Both are byte-level
byte-pair encodings; they differ in how they split text before merging. The tokenizers built here
give the same ids as transformers.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers as hf

from mea_jax.data import end_tokens, tokenizers
from mea_jax.data.bad_input import first_line
from mea_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from mea_jax.errors import UserError, shown

_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
_CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
_SPECIAL = "special_tokens_map.json"
# As in transformers 5.24, models/qwen2/tokenization_qwen2.py.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
# Special tokens of each class, if tokenizer_config.json does not name them.
_DEFAULTS: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
}
_OF_MODELS = {"qwen3": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer"}
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


def read(folder: Path, more: Mapping[str, bytes]) -> Tokenizer:
    """Return the tokenizer in a model's folder, fast or slow.

    `more` are companion files of the tokenizer in addition to those in the folder. Raise
    `UserError` if a file is missing or damaged, or the class is not supported.
    """
    slow = all((folder / name).is_file() for name in (_VOCABULARY, _MERGES))
    if not slow or any((folder / kind.FILE).is_file() for kind in tokenizers.KINDS):
        return tokenizers.from_directory(folder, more)
    companions = tokenizers.companions_of(folder) | dict(more)
    config = _object(companions, _CONFIG, folder)
    kind = config.get("tokenizer_class")
    if kind is None:
        model_type = _object(companions, end_tokens.MODEL_CONFIG, folder).get("model_type")
        kind = _OF_MODELS.get(str(model_type))
    name = str(kind).removesuffix("Fast")
    if name not in _DEFAULTS:
        given = "no tokenizer_class" if kind is None else f"tokenizer_class {shown(kind)}"
        raise UserError(
            f"{folder}: contains no tokenizer.json, and it names {given}, unsupported here (known: "
            f"{', '.join(_DEFAULTS)}): build it with transformers, "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    try:
        model = hf.models.BPE.from_file(str(folder / _VOCABULARY), str(folder / _MERGES))
    except Exception as error:  # of the library's own kinds
        raise UserError(
            f"{folder}: {_VOCABULARY} or {_MERGES} is damaged ({first_line(error)}); fetch both "
            "again"
        ) from error
    tokenizer = _byte_level(model, name, bool(config.get("add_prefix_space")))
    if "added_tokens_decoder" not in config:  # as transformers wrote them before version 4.34
        config = config | _object(companions, _SPECIAL, folder)
        specials = set(_special_tokens(config, name))
        config["added_tokens_decoder"] = {
            i: {"content": text, "special": text in specials}
            for text, i in _object(companions, _ADDED, folder).items()
        }
    _add_tokens(tokenizer, config, name, folder)
    if config.get("add_bos_token"):
        start = _text(config.get("bos_token") or _DEFAULTS[name].get("bos_token"))
        special = [(start, tokenizer.token_to_id(start))]
        tokenizer.post_processor = hf.processors.TemplateProcessing(
            single=f"{start}:0 $A:0", pair=f"{start}:0 $A:0 $B:1", special_tokens=special
        )
    return HuggingFaceTokenizer(tokenizer, str(folder / _VOCABULARY), companions)


def _byte_level(model: hf.models.Model, name: str, prefix_space: bool) -> hf.Tokenizer:
    tokenizer = hf.Tokenizer(model)
    tokenizer.decoder = hf.decoders.ByteLevel()
    if name == "GPT2Tokenizer":
        tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
        return tokenizer
    tokenizer.normalizer = hf.normalizers.NFC()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(QWEN2_SPLIT), "isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
        ]
    )
    return tokenizer


def _add_tokens(
    tokenizer: hf.Tokenizer, config: Mapping[str, Any], name: str, folder: Path
) -> None:
    """Add the tokens that the files name: first those with ids, in order, then special ones.

    Raise `UserError` if a token would get another id than in the file, or a file is damaged.
    """
    try:
        given = {int(i): token for i, token in config["added_tokens_decoder"].items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder}: {_CONFIG} or {_ADDED} is damaged ({error}); fetch both again"
        ) from error
    for i, token in sorted(given.items()):
        text = _text(token)
        flags = token if isinstance(token, dict) else {}
        special = bool(flags.get("special"))
        sides = {side: bool(flags.get(side)) for side in ("lstrip", "rstrip", "single_word")}
        normalized = bool(flags.get("normalized", not special))
        tokenizer.add_tokens([hf.AddedToken(text, special=special, normalized=normalized, **sides)])
        if tokenizer.token_to_id(text) != i:
            raise UserError(
                f"{folder}: the added token {shown(text)} has the id {i}, and the vocabulary would "
                f"give it {tokenizer.token_to_id(text)}: {_VOCABULARY} is not the one of this model"
                "; fetch it again"
            )
    tokenizer.add_special_tokens([text for text in _special_tokens(config, name) if text])


def _special_tokens(config: Mapping[str, Any], name: str) -> Iterator[str]:
    for key in _NAMES:
        yield _text(config.get(key, _DEFAULTS[name].get(key)))
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    yield from (_text(token) for token in more if isinstance(more, list))


def _text(token: Any) -> str:
    """Return the text of a token that is a string or an object with "content"; "" otherwise."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _object(companions: Mapping[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    try:
        tree = json.loads(companions.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / name} is damaged ({first_line(error)}); fetch it again"
        ) from error
    return tree if isinstance(tree, dict) else {}
