"""Encode the harness's requests: texts, and pairs of a context and a continuation."""

from collections.abc import Sequence

from mea_jax.data.tokenizers import Tokenizer


class RequestEncoder:
    """A tokenizer that encodes as `lm_eval.api.model.TemplateLM` does, in batches.

    Attributes:
      tokenizer: the tokenizer of the model.
      before: the ids before each context: the begin token, or none.
      empty: the id that stands for an empty context.
      in_chat: whether texts are chats, in which special tokens are written as text.
    """

    def __init__(self, tokenizer: Tokenizer, before: list[int], empty: int):
        self.tokenizer, self.before, self.empty = tokenizer, before, empty
        self.in_chat = False

    def encode(self, texts: Sequence[str], begin: bool) -> list[list[int]]:
        """Return the token ids of texts, with `begin` after the ids `before`."""
        before = self.before if begin else []
        if self.in_chat:  # special tokens are written in the text, a start perhaps among them
            encoded = map(self.tokenizer.encode_marked, texts)
            return [ids if ids[: len(before)] == before else before + ids for ids in encoded]
        return [before + ids for ids in self.tokenizer.encode_batch(list(texts))]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Encode contexts and continuations as `TemplateLM` splits them, in one batch.

        White space at the end of a context moves to the continuation. An empty context becomes the
        begin token. A continuation is encoded separately if it adds no token to its context.
        """
        moved = []
        for context, continuation in pairs:
            kept = context.rstrip()
            if kept or not context:
                moved.append((kept, context[len(kept) :] + continuation))
            else:  # only white space
                moved.append(("", context + continuation))
        contexts = list(dict.fromkeys(context for context, _ in moved))
        encoded = dict(zip(contexts, self.encode(contexts, begin=True), strict=True))
        wholes = self.encode([context + new for context, new in moved], begin=True)
        found = []
        for (context, new), whole in zip(moved, wholes, strict=True):
            if context:
                first = encoded[context]
                rest = whole[len(first) :]
                if not rest and new:
                    rest = self.encode([new], begin=False)[0]
            else:
                first, rest = [self.empty], whole[len(self.before) :]
            found.append((first, rest))
        return found
