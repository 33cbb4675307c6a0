"""The tokens that end a text, as named by the files of a published model.

Four files may name them: by id (generation_config.json, config.json) or by text
(tokenizer_config.json, special_tokens_map.json). The files need not agree: a chat model's tokenizer
often names only the end of a turn, while its generation config also names the end of a text.
"""

import json
from collections.abc import Mapping
from typing import Any

MODEL_CONFIG = "model_config.json"  # published as "config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
_IDS = (GENERATION, MODEL_CONFIG)
_TEXTS = (TOKENIZER_CONFIG, SPECIAL_TOKENS)

# Tokens that end a document in published vocabularies, in order of preference.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>")
# Tokens that end a turn. A model that names one of them as its end was made for conversations; its
# pretraining documents ended with one of `END_TOKENS` if the vocabulary has one.
_TURNS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end|>", "<end_of_turn>")


def named_ends(
    companions: Mapping[str, bytes], vocabulary: Mapping[str, int], size: int
) -> dict[str, tuple[int, ...]]:
    """Return the ids that each file names as ends, by file name.

    Args:
      companions: contents of files by name. Files that are not JSON name no ends.
      vocabulary: ids by token.
      size: the number of ids. Ids out of range are left out.
    """
    found = {}
    for name in (*_IDS, *_TEXTS):
        tree = read_object(companions.get(name, b""))
        given = tree.get("eos_token_id" if name in _IDS else "eos_token")
        values = given if isinstance(given, list) else [given]
        ids = values if name in _IDS else [vocabulary.get(text_of(value)) for value in values]
        found[name] = tuple(i for i in ids if type(i) is int and 0 <= i < size)
    return found


def separator_of(
    companions: Mapping[str, bytes], vocabulary: Mapping[str, int], size: int
) -> int | None:
    """Return the id that ends a document, or None if the files and the vocabulary name none.

    The tokenizer's own files or the model's config name this id. A token of `END_TOKENS` in the
    vocabulary takes precedence if one of the files names it, or if the files name only ends of
    turns. Arguments as in `named_ends`.
    """
    ends = named_ends(companions, vocabulary, size)
    known = known_separator(vocabulary)
    if any(known in ids for ids in ends.values()):
        return known
    named = [i for name in (*_TEXTS, MODEL_CONFIG) for i in ends[name]]
    turns = {vocabulary[token] for token in _TURNS if token in vocabulary}
    documents = [i for i in named if i not in turns]
    return next(iter([*documents, *([] if known is None else [known]), *named]), None)


def prefix_of(companions: Mapping[str, bytes], vocabulary: Mapping[str, int]) -> int | None:
    """Return the id that lm-evaluation-harness puts before a text without context, or None.

    That is the begin token that the tokenizer's files name, although the tokenizer itself may not
    put it before texts, or else the end token.
    """
    for key in ("bos_token", "eos_token"):
        for name in _TEXTS:
            token = text_of(read_object(companions.get(name, b"")).get(key))
            if token in vocabulary:
                return vocabulary[token]
    return None


def known_separator(vocabulary: Mapping[str, int]) -> int | None:
    """Return the id of the first of `END_TOKENS` in a vocabulary, or None if it has none."""
    return next((vocabulary[token] for token in END_TOKENS if token in vocabulary), None)


def context_of(companions: Mapping[str, bytes]) -> int:
    """Return the `max_position_embeddings` of a published model's config.json, 0 without one."""
    found = read_object(companions.get(MODEL_CONFIG, b"")).get("max_position_embeddings")
    return found if type(found) is int and found > 0 else 0


def adds_start(companions: Mapping[str, bytes]) -> bool:
    """Return whether a SentencePiece tokenizer puts its begin token before a text."""
    return read_object(companions.get(TOKENIZER_CONFIG, b"")).get("add_bos_token") is not False


def read_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object in a file's content, {} if it contains none."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def text_of(value: Any) -> str:
    """Return the text of a token, given as a string or as an object with "content"."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""
