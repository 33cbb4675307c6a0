"""Scores a model on additions and subtractions of one to three digits, after solved examples."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mea_jax.config.schema import ModelConfig
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.evaluate import scoring, tasks
from mea_jax.evaluate.tasks import Example

DIGITS = (1, 2, 3)
_STREAM = 1  # random stream, separate from those of other tasks


def arithmetic_examples(
    operation: str, digits: int, samples: int = 32, seed: int = 0, shots: int = 4
) -> list[Example]:
    """Draw `samples` different problems of one kind, each after `shots` solved ones.

    The result depends on the arguments only. It has fewer problems if no more exist, which happens
    with one digit.
    """
    which = tasks.OPERATIONS.index(operation)
    found: dict[str, Example] = {}
    for sample in range(20 * samples):
        rng = np.random.default_rng([seed, _STREAM, which, digits, sample])
        example = tasks.arithmetic(rng, operation=operation, digits=digits, shots=shots)
        found.setdefault(example.prompt.rsplit("\n", 1)[-1], example)
        if len(found) == samples:
            break
    return list(found.values())


def arithmetic(
    model: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    *,
    samples: int = 32,
    seed: int = 0,
    shots: int = 4,
    cache_dtype: str | None = None,
    mesh: Mesh | None = None,
    log: Callable[[str], Any] = lambda line: None,
) -> list[dict[str, Any]]:
    """Score additions and subtractions of one to three digits; arguments as for `retrieval`.

    Returns:
      Rows {"operation", "digits", "samples", "exact", "nats", "nats_error"}, as for `retrieval`.
    """
    kinds = [(operation, digits) for operation in tasks.OPERATIONS for digits in DIGITS]
    groups = [arithmetic_examples(*kind, samples, seed, shots) for kind in kinds]
    examples = [example for group in groups for example in group]
    longest = max(len(e.prompt) + len(e.answer) for e in scoring.encode(tokenizer, examples))
    length = -(-(longest + scoring.MARGIN + 1) // 16) * 16
    scores = scoring.score_through_cache(
        model, params, tokenizer, examples, length, cache_dtype, mesh
    )
    rows, first = [], 0
    for (operation, digits), group in zip(kinds, groups, strict=True):
        cell = scoring.select(scores, range(first, first + len(group)))
        rows.append({"operation": operation, "digits": digits, **scoring.summary(cell)})
        first += len(group)
    whole = scoring.summary(scores)
    log(f"arithmetic: {whole['exact']:.0%} right, {whole['nats']:.2f} nats per answer")
    return rows
