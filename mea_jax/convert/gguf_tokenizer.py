"""Build the tokenizer of a GGUF file, with its special tokens and chat template.

Two kinds are supported: "gpt2", a byte-level byte-pair encoding, which becomes a tokenizer.json,
and "llama", a SentencePiece model, which becomes a tokenizer.model. Of a byte-level encoding the
file names the rule that splits text before merging (`PRE_TOKENIZERS`), but does not contain it.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers as hf

from mea_jax.convert.slow_tokenizers import QWEN2_SPLIT
from mea_jax.data.bad_input import first_line
from mea_jax.data.end_tokens import GENERATION, MODEL_CONFIG, TOKENIZER_CONFIG
from mea_jax.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from mea_jax.errors import UserError, nearest, shown

_CONTROL, _USER_DEFINED, _UNKNOWN, _BYTE = 3, 4, 2, 6  # token types, as in SentencePiece
_LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _regex(pattern: str) -> Any:
    return hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> Any:
    return hf.pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits() -> Any:
    return hf.pre_tokenizers.Sequence([hf.pre_tokenizers.Digits(individual_digits=True), _gpt2()])


# By the file's tokenizer.ggml.pre; the rules are those of each model's published tokenizer.json.
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _gpt2,
    "smollm": _digits,
    "qwen2": lambda: _regex(QWEN2_SPLIT),
    "deepseek-r1-qwen": lambda: _regex(QWEN2_SPLIT),
    "llama-bpe": lambda: _regex(_LLAMA3_SPLIT),
    "llama3": lambda: _regex(_LLAMA3_SPLIT),
    "llama-v3": lambda: _regex(_LLAMA3_SPLIT),
    "smaug-bpe": lambda: _regex(_LLAMA3_SPLIT),
}
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # merges whole words first, and begins texts with bos


def read(path: Path, fields: Mapping[str, Any], config: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a GGUF file.

    Args:
      path: the file, for messages.
      fields: its metadata.
      config: the config.json of its model.

    Raises:
      UserError: the tokenizer is damaged or of an unsupported kind.
    """
    kind = fields.get("tokenizer.ggml.model")
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(str(kind))
    if build is None:
        raise UserError(f"{path}: the tokenizer {shown(kind)} is not supported; known: gpt2, llama")
    tokens = fields.get("tokenizer.ggml.tokens")
    types = fields.get("tokenizer.ggml.token_type") or []
    if not isinstance(tokens, list) or len(types) not in (0, len(tokens)):
        raise UserError(
            f"{path}: tokenizer.ggml.tokens and token_type do not match; fetch it again"
        )
    types = types or [1] * len(tokens)
    try:
        return build(path, fields, tokens, types, _companions(fields, tokens, config))
    except UserError:
        raise
    except Exception as error:  # of the libraries' own kinds
        raise UserError(
            f"{path}: its tokenizer is damaged ({first_line(error)}); fetch it again"
        ) from error


def _special(fields: Mapping[str, Any], name: str) -> int | None:
    found = fields.get(f"tokenizer.ggml.{name}_token_id")
    return found if isinstance(found, int) else None


def _adds_start(fields: Mapping[str, Any]) -> bool:
    """Return whether texts begin with the begin token; the default is llama.cpp's."""
    default = fields.get("tokenizer.ggml.model") == "llama"
    default = default or fields.get("tokenizer.ggml.pre") in _LLAMA3
    return bool(fields.get("tokenizer.ggml.add_bos_token", default))


def _companions(
    fields: Mapping[str, Any], tokens: Sequence[str], config: Mapping[str, Any]
) -> dict[str, bytes]:
    """Return the files that transformers saves with a tokenizer, by name."""
    words: dict[str, Any] = {"model_max_length": config["max_position_embeddings"]}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        token = _special(fields, key)
        if token is not None and token < len(tokens):
            words[f"{name}_token"] = tokens[token]
    words["add_bos_token"] = _adds_start(fields)
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        words["chat_template"] = template
    ends = [_special(fields, name) for name in ("eos", "eot", "eom")]
    generation: dict[str, Any] = {"eos_token_id": sorted({i for i in ends if i is not None})}
    if (start := _special(fields, "bos")) is not None:
        generation["bos_token_id"] = start
    trees = {MODEL_CONFIG: dict(config), TOKENIZER_CONFIG: words, GENERATION: generation}
    return {name: json.dumps(tree, indent=2).encode() for name, tree in trees.items()}


def _byte_level(
    path: Path,
    fields: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    companions: Mapping[str, bytes],
) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: the pre-tokenizer {shown(pre)} is not supported; "
            f"{nearest(str(pre), PRE_TOKENIZERS)}; or convert the model's safetensors with from_hf"
        )
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = hf.Tokenizer(
        hf.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _LLAMA3)
    )
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = hf.decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = hf.normalizers.NFC()
    for kind in (_CONTROL, _USER_DEFINED):
        special = kind == _CONTROL
        tokenizer.add_tokens(
            [
                hf.AddedToken(token, special=special, normalized=False)
                for token, found in zip(tokens, types, strict=True)
                if found == kind
            ]
        )
    start = _special(fields, "bos")
    if start is not None and _adds_start(fields):
        token = tokens[start]
        tokenizer.post_processor = hf.processors.TemplateProcessing(
            single=f"{token}:0 $A:0",
            pair=f"{token}:0 $A:0 {token}:1 $B:1",
            special_tokens=[(token, start)],
        )
    # Through bytes: what is saved is what was checked.
    content = tokenizer.to_str().encode()
    return HuggingFaceTokenizer(hf.Tokenizer.from_str(content.decode()), str(path), companions)


def _sentencepiece(
    path: Path,
    fields: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    companions: Mapping[str, bytes],
) -> Tokenizer:
    """Build a SentencePiece model of kind BPE, whose scores order the merges."""
    try:
        proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        raise UserError(
            f"{path}: its SentencePiece tokenizer needs the package sentencepiece: "
            "pip install 'mea_jax[sentencepiece]'"
        ) from error
    model = proto.ModelProto()
    scores = fields["tokenizer.ggml.scores"]
    for token, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = proto.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = _BYTE in types
    trainer.unk_id = types.index(_UNKNOWN)
    for name, key in (("bos_id", "bos"), ("eos_id", "eos"), ("pad_id", "padding")):
        special = _special(fields, key)
        setattr(trainer, name, -1 if special is None else special)
        if special is not None and name != "pad_id":
            setattr(trainer, name.replace("_id", "_piece"), tokens[special])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = bool(
        fields.get("tokenizer.ggml.remove_extra_whitespaces", False)
    )
    normalizer.escape_whitespaces = True
    return SentencePieceTokenizer(model.SerializeToString(), str(path), companions)
