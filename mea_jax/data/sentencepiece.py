"""Tokenizers of the sentencepiece library, an optional extra."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mea_jax.data import end_tokens
from mea_jax.data.tokenizer import (
    NONE,
    Tokenizer,
    check_usable,
    decode_known,
    library_errors,
    no_end_error,
    read_bytes,
)
from mea_jax.errors import UserError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, such as those of Llama 2, Gemma and Mistral."""

    FILE = "tokenizer.model"

    def __init__(self, model: bytes, where: str, companions: Mapping[str, bytes] = NONE):
        try:
            import sentencepiece  # an optional extra
        except ImportError as error:
            raise UserError(
                f"{where}: reading it needs the package sentencepiece: "
                "pip install 'mea_jax[sentencepiece]'"
            ) from error
        self._where, self.companions = where, companions
        self.content = model
        with library_errors(f"{where}: truncated, or not a SentencePiece model"):
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.vocab_size()
        self.separator = self._processor.eos_id()
        if self.separator < 0:
            found = end_tokens.separator_of(companions, self.vocabulary, self.vocab_size)
            if found is None:
                raise no_end_error(where, "its model has no eos")
            self.separator = found
        begin = self._processor.bos_id()
        self.start = begin if begin >= 0 else self.separator

    @property
    def separator_is_named(self) -> bool:
        return self._processor.eos_id() < 0

    @functools.cached_property
    def vocabulary(self) -> Mapping[str, int]:
        return {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}

    @property
    def template_prefix(self) -> tuple[int, ...]:
        """The begin token, unless the model's tokenizer_config.json switches it off."""
        begin = self._processor.bos_id()
        return (begin,) if begin >= 0 and end_tokens.adds_start(self.companions) else ()

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a rendered chat: special tokens by their ids, text between them.

        As in transformers, only text at the beginning gets the model's dummy prefix.
        """
        ids: list[int] = []
        for i, part in enumerate(self._special_pattern.split(text)):
            if part and i % 2:
                ids.append(self._processor.piece_to_id(part))
            elif part:
                ids += self._encode_plain(part, first=not ids)
        return ids

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """A pattern of one group that matches the special tokens, longest first."""
        control = filter(self._processor.is_control, range(self.vocab_size))
        texts = sorted(map(self._processor.id_to_piece, control), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, filter(None, texts))) or '(?!)'})")

    def _encode_plain(self, text: str, first: bool) -> list[int]:
        if first:
            return self.encode_batch([text])[0]
        # The dummy prefix goes to a first character, which is then taken off.
        mark = "\n"
        with_mark, alone = self._processor.encode([mark + text, mark])
        return with_mark[len(alone) :]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with library_errors(f"{self._where}: cannot encode text"):
            return self._processor.encode(texts)

    def decode(self, ids: Sequence[int]) -> str:
        with library_errors(f"{self._where}: cannot decode"):
            return decode_known(ids, self.vocab_size, self._processor.decode)

    @classmethod
    def read(cls, path: Path, companions: Mapping[str, bytes] = NONE) -> "SentencePieceTokenizer":
        return check_usable(cls(read_bytes(path), str(path), companions), path)
