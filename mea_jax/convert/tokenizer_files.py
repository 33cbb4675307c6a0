"""Write the tokenizer of a run directory as the files that transformers reads."""

import json
from pathlib import Path
from typing import Any

import tokenizers as hf

from mea_jax.data import end_tokens, tokenizers
from mea_jax.data.tokenizers import BytesTokenizer, SentencePieceTokenizer, Tokenizer

_CONFIG, _GENERATION = "tokenizer_config.json", "generation_config.json"


def kept_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """Return ids and lengths for config.json: of the imported model, or of our own tokenizer.

    `context_length` is the window that the model was trained on here, which may be longer than that
    of the imported model.
    """
    if (published := tokenizer.companions.get(end_tokens.MODEL_CONFIG)) is not None:
        own = json.loads(published)
    else:
        own = {"bos_token_id": tokenizer.start, "eos_token_id": tokenizer.separator}
    longest = own.get("max_position_embeddings")
    longest = max(longest, context_length) if type(longest) is int else context_length
    return own | {"max_position_embeddings": longest}


def write(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """Write the tokenizer with its companion files or, if it was made here, with new ones.

    Raise `OSError` if the disk refuses.
    """
    published = end_tokens.MODEL_CONFIG in tokenizer.companions
    file, content = tokenizer.FILE, tokenizer.content
    if isinstance(tokenizer, BytesTokenizer):
        file, content = "tokenizer.json", of_bytes().to_str().encode()
    if file == "tokenizer.json" and not tokenizer.companions:
        content = with_start(content, tokenizer.start)
    (folder / file).write_bytes(content)
    for name, kept in tokenizer.companions.items():
        if name != end_tokens.MODEL_CONFIG:
            (folder / name).write_bytes(kept)
    if published:
        return
    kind = "LlamaTokenizer" if isinstance(tokenizer, SentencePieceTokenizer) else None
    config = {
        "tokenizer_class": kind or "PreTrainedTokenizerFast",
        "bos_token": _text(tokenizer, tokenizer.start),
        "eos_token": _text(tokenizer, tokenizer.separator),
        "add_bos_token": True,  # for a SentencePiece model; a tokenizer.json has its own template
        "add_eos_token": False,
        "split_special_tokens": True,  # text that spells out a special token stays text, as here
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # `generate` refuses others
        "model_max_length": context_length,
    }
    generation = {"bos_token_id": tokenizer.start, "eos_token_id": tokenizer.separator}
    for name, tree in ((_CONFIG, config), (_GENERATION, generation)):
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps(tree, indent=2) + "\n")


def _text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a special token."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return "</s>" if token == tokenizer.separator else "<s>"
    return tokenizer.decode([token])


def with_start(content: bytes, start: int) -> bytes:
    """Return a tokenizer.json that puts the token `start` before each text, and nothing else.

    Return `content` unchanged if it does so already.
    """
    tokenizer = hf.Tokenizer.from_str(content.decode())
    text = tokenizer.encode("a", add_special_tokens=False).ids
    found = tokenizer.encode("a").ids
    if found == [start, *text]:
        return content
    token = tokenizer.id_to_token(start)
    template: Any = hf.processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, start)]
    )
    if tokenizer.post_processor is not None and found == text:  # it only moves offsets
        template = hf.processors.Sequence([tokenizer.post_processor, template])
    tokenizer.post_processor = template
    return tokenizer.to_str().encode()


def of_bytes() -> hf.Tokenizer:
    """Return our bytes tokenizer as one of the tokenizers library, with the same ids."""
    letters = _letters()
    vocabulary = {letter: byte for byte, letter in enumerate(letters)}
    tokenizer = hf.Tokenizer(hf.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.SEPARATOR])
    return tokenizer


def _letters() -> list[str]:
    """Return the character of each byte: itself if it is printable, otherwise one from 256 on.

    This is the table of GPT-2's encoder (github.com/openai/gpt-2, src/encoder.py).
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printed)]
    table = {byte: chr(byte) for byte in printed}
    return [(table | {byte: chr(256 + i) for i, byte in enumerate(hidden)})[b] for b in range(256)]
