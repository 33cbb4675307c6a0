"""Score a model's answers, generated through its KV cache as in serving.

Letters: E examples, A tokens of an answer, P tokens of a prompt.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mea_jax.cli import progress
from mea_jax.config.schema import ModelConfig
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.evaluate.tasks import Example
from mea_jax.generate import decode
from mea_jax.generate.generator import Decoding, Generator, continuation
from mea_jax.ops.resolve import resolve_on
from mea_jax.parallel import sharding

_TOKENS = 1 << 16  # cache positions of a batch, over all rows
MARGIN = 2  # tokens generated past an answer's length, so that a longer number counts as wrong
_NUMBER = re.compile(r"\s*(-?\d+)")


@dataclass(frozen=True)
class Encoded:
    """An example as tokens; the prompt starts with the begin token, as documents in training do."""

    prompt: list[int]
    answer: list[int]
    text: str  # of the answer


@dataclass(frozen=True)
class Scores:
    """The scores of the examples, in order."""

    exact_E: np.ndarray  # bool: greedy decoding writes the right number
    nats_E: np.ndarray  # float64: negative log-likelihood of the answer, summed over its tokens


class Answerer(Protocol):
    """The interface of a model that `score` uses."""

    def generate(self, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        """Generate at most `count` greedy tokens after each prompt."""
        ...

    def nats(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> np.ndarray:
        """Return the negative log-likelihood in nats of each answer after its prompt, (E,)."""
        ...


def encode(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Encoded]:
    """Encode examples; an answer's tokens are those that it adds to the prompt's.

    If the tokenizer merges tokens across the two, the answer is encoded separately, because that is
    what a model can write after the prompt.
    """
    prompts = tokenizer.encode_batch([e.prompt for e in examples])
    wholes = tokenizer.encode_batch([e.prompt + e.answer for e in examples])
    alone = tokenizer.encode_batch([e.answer for e in examples])
    return [
        Encoded(
            [tokenizer.start, *prompt],
            whole[len(prompt) :] if whole[: len(prompt)] == prompt else single,
            example.answer,
        )
        for example, prompt, whole, single in zip(examples, prompts, wholes, alone, strict=True)
    ]


def number(text: str) -> str | None:
    """Return the integer at the beginning of `text`, after any white space, or None."""
    found = _NUMBER.match(text)
    return found[1] if found else None


def score(tokenizer: Tokenizer, examples: Sequence[Encoded], answerer: Answerer) -> Scores:
    """Return both scores of all examples."""
    prompts, answers = [e.prompt for e in examples], [e.answer for e in examples]
    count = max(map(len, answers)) + MARGIN
    new = answerer.generate(prompts, count)
    written = [continuation(tokenizer, e.prompt, t) for e, t in zip(examples, new, strict=True)]
    exact = [number(w) == number(e.text) for w, e in zip(written, examples, strict=True)]
    return Scores(np.array(exact, bool), answerer.nats(prompts, answers))


def _answer_nll(served, length, dtype, params, tokens_BP, lengths_B, answers_BA) -> jax.Array:
    """Return the nats of each answer token by teacher forcing, one step at a time, (B, A)."""
    cache = decode.empty_cache(served, tokens_BP.shape[0], length, dtype)
    positions_BP = jnp.broadcast_to(jnp.arange(tokens_BP.shape[1])[None], tokens_BP.shape)
    segments_BP = (positions_BP < lengths_B[:, None]).astype(jnp.int32)
    first = decode.prefill(served, params, cache, tokens_BP, segments_BP, positions_BP)

    def one(carry, answer_B):
        logits_BV, cache = carry
        right_B = jnp.take_along_axis(logits_BV, answer_B[:, None], axis=1)[:, 0]
        nll_B = jax.nn.logsumexp(logits_BV, axis=1) - right_B
        return decode.step(served, params, cache, answer_B), nll_B

    _, nll_AB = jax.lax.scan(one, first, answers_BA.T)
    return nll_AB.T


class CachedAnswerer:
    """An `Answerer` that serves a model from its KV cache.

    Each call compiles one shape for all of its batches. `rows` is the maximum batch size.
    """

    def __init__(self, generator: Generator, rows: int):
        self.generator, self.rows = generator, rows
        static = (generator.served, generator.length, generator.cache_dtype)
        out = None if generator.mesh is None else sharding.replicated(generator.mesh)
        self._nll: Any = jax.jit(functools.partial(_answer_nll, *static), out_shardings=out)

    def _batches(self, total: int) -> list[list[int]]:
        """Return example indices in batches of equal size, padded with the last index."""
        batches, multiple = -(-total // self.rows), self.generator.row_multiple
        size = -(-total // (batches * multiple)) * multiple
        return [
            [min(i, total - 1) for i in range(b * size, (b + 1) * size)] for b in range(batches)
        ]

    def generate(self, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        new: dict[int, list[int]] = {}
        length = self.generator.length
        for batch in progress(self._batches(len(prompts)), f"answers at {length:,} positions"):
            tokens = self.generator.run([prompts[i] for i in batch], Decoding(count))
            new |= dict(zip(batch, tokens, strict=True))
        return [new[i] for i in range(len(prompts))]

    def nats(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> np.ndarray:
        width, longest = max(map(len, answers)), max(map(len, prompts))
        nats, length = np.zeros(len(prompts)), self.generator.length
        for batch in progress(self._batches(len(prompts)), f"likelihoods at {length:,} positions"):
            tokens_BP = np.zeros((len(batch), longest), np.int32)
            answers_BA = np.zeros((len(batch), width), np.int32)
            for row, i in enumerate(batch):
                tokens_BP[row, : len(prompts[i])] = prompts[i]
                answers_BA[row, : len(answers[i])] = answers[i]
            lengths_B = np.array([len(prompts[i]) for i in batch], np.int32)
            arrays = map(self.generator.place, (tokens_BP, lengths_B, answers_BA))
            nll_BA = np.asarray(self._nll(self.generator.params, *arrays), np.float64)
            for row, i in enumerate(batch):
                nats[i] = nll_BA[row, : len(answers[i])].sum()
        return nats


def summary(scores: Scores) -> dict[str, Any]:
    """Return {"samples", "exact": share, "nats": mean per answer, "nats_error": its error}."""
    count = len(scores.nats_E)
    error = float(scores.nats_E.std(ddof=1) / count**0.5) if count > 1 else float("nan")
    return {
        "samples": count,
        "exact": float(scores.exact_E.mean()),
        "nats": float(scores.nats_E.mean()),
        "nats_error": error,
    }


def select(scores: Scores, chosen: Sequence[int]) -> Scores:
    """Return the scores of the chosen examples."""
    where = np.asarray(chosen, int)
    return Scores(scores.exact_E[where], scores.nats_E[where])


def score_through_cache(
    model: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    length: int,
    cache_dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Scores:
    """Score a model that is served from a cache of `length` positions.

    The attention kernel is chosen for that length. `mesh` is that of `jax.set_mesh`, on which
    `params` are placed, or None. Raise `UserError` if the model lacks that many positions, or an
    example does not fit.
    """
    resolved = resolve_on(dataclasses.replace(model, attention_kernel="auto"), mesh, length)
    generator = Generator(resolved, params, length=length, cache_dtype=cache_dtype, mesh=mesh)
    served = CachedAnswerer(generator, max(1, _TOKENS // length))
    return score(tokenizer, encode(tokenizer, examples), served)
