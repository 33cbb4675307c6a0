"""Scores a model on finding pass keys, by context length and the key's depth in the context."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mea_jax.config.schema import ModelConfig
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.errors import UserError
from mea_jax.evaluate import scoring, tasks
from mea_jax.evaluate.tasks import Example

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_STREAM = 2  # random stream, separate from those of other tasks
_ROOM = 16  # tokens of a context reserved for the answer: five digits in any tokenizer


def shortest_context(tokenizer: Tokenizer, needles: int = 1) -> int:
    """Return the approximate number of tokens of the shortest context for pass keys."""
    size = tasks.shortest_passkey(needles)
    text = tasks.passkey(np.random.default_rng(0), size=size, depth=0.0, needles=needles).prompt
    return len(tokenizer.encode_batch([text])[0]) + _ROOM + 4 * needles


def passkey_examples(
    tokenizer: Tokenizer,
    length: int,
    depths: Sequence[float] = DEPTHS,
    samples: int = 20,
    seed: int = 0,
    needles: int = 1,
) -> list[Example]:
    """Draw `samples` pass keys for each depth in turn, in contexts of `length` tokens with answer.

    The result depends on the arguments only. Raise `UserError` if `length` is too short.
    """

    def measure(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer.encode_batch(list(texts))]

    examples = []
    for at, depth in enumerate(depths):
        for sample in range(samples):
            rng = np.random.default_rng([seed, _STREAM, length, at, sample])
            try:
                example = tasks.passkey(
                    rng, size=length - _ROOM - 1, depth=depth, needles=needles, measure=measure
                )
            except ValueError as error:
                raise UserError(
                    f"length={length} is too short for pass keys: {error} and {_ROOM + 1} more "
                    "tokens; choose a longer context"
                ) from error
            examples.append(example)
    return examples


def retrieval(
    model: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    samples: int = 20,
    seed: int = 0,
    needles: int = 1,
    cache_dtype: str | None = None,
    mesh: Mesh | None = None,
    log: Callable[[str], Any] = lambda line: None,
) -> list[dict[str, Any]]:
    """Score the retrieval of hidden pass keys for each of `lengths` x `depths`.

    Args:
      model: need not be resolved; the attention kernel is chosen for each length.
      params: training parameters.
      tokenizer: the model's.
      lengths: tokens of complete contexts, prompt and answer; may exceed the training window.
      depths: 0 at the beginning of the context, 1 just before the question.
      samples: examples per length and depth.
      seed: of the examples, which are the same for every model with this tokenizer.
      needles: keys per context, each with a different name; the question is about one of them.
      cache_dtype: of keys and values; None for the model's compute dtype.
      mesh: the mesh of `jax.set_mesh`, on which `params` are placed; None for one device.
      log: prints a line of progress per length.

    Returns:
      Rows {"length", "depth", "samples", "exact", "nats", "nats_error"}: the share of keys that
      greedy decoding writes correctly, and the mean nats of a complete answer (a blind guess: log
      90,000 = 11.4).

    Raises:
      UserError: a length is too short for the question, or longer than the model's positions.
    """
    rows = []
    for length in lengths:
        examples = passkey_examples(tokenizer, length, depths, samples, seed, needles)
        scores = scoring.score_through_cache(
            model, params, tokenizer, examples, length, cache_dtype, mesh
        )
        for at, depth in enumerate(depths):
            cell = scoring.select(scores, range(at * samples, (at + 1) * samples))
            rows.append({"length": length, "depth": depth, **scoring.summary(cell)})
        whole = scoring.summary(scores)
        log(f"{length:,} tokens: {whole['exact']:.0%} right, {whole['nats']:.2f} nats per answer")
    return rows
