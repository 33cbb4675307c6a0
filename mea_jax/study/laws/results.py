"""Parse the rows of finished and diverged runs, the input of the fits of learning-rate studies.

A row is a JSON object, one per line:

    {"variant": "mea", "learning_rate": 1e-3, "size": "6m", "parameters": 5900000,
     "tokens": 50000000, "seed": 0, "loss": 2.31, "diverged": false,
     "curve": [[0, 7.62], [1000000, 4.4], ..]}

`curve` is optional, and other keys (a commit, a command) are ignored.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from mea_jax.errors import UserError, shown

Key = TypeVar("Key", bound=tuple[Any, ...] | float | str)
_KEYS = (
    "variant",
    "learning_rate",
    "size",
    "parameters",
    "tokens",
    "seed",
    "loss",
    "diverged",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
      variant: the name of the architecture.
      learning_rate: the peak learning rate.
      size: the name of a model shape; within a variant it has one number of parameters.
      parameters: N, the number of parameters without embeddings.
      tokens: D, the horizon, the number of training tokens that was planned.
      seed: the seed of the initialisation and of the data.
      loss: the held-out loss at the end, nats per token. None if it is not finite or not known,
        which is allowed for a diverged run only.
      diverged: whether the run had a spike that it did not recover from.
      curve: (tokens, held-out loss) in order; a point at 0 tokens is the loss at initialisation.
    """

    variant: str
    learning_rate: float
    size: str
    parameters: int
    tokens: int
    seed: int
    loss: float | None
    diverged: bool
    curve: tuple[tuple[int, float], ...] = ()

    @classmethod
    def from_row(cls, row: Any, where: str = "row") -> "Result":
        """Parse one row; raise `UserError`, which begins with `where`, if it is malformed."""
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: {shown(row)} is not a JSON object: write one run per line")
        missing = [key for key in _KEYS if key not in row]
        if missing:
            raise UserError(f"{where}: no {', '.join(missing)}: a row needs {', '.join(_KEYS)}")
        diverged = row["diverged"]
        if not isinstance(diverged, bool):
            raise UserError(f"{where}: diverged={shown(diverged)} must be true or false")
        tokens = _whole(row, "tokens", 1, where)
        return cls(
            variant=_word(row, "variant", where),
            learning_rate=_positive(row["learning_rate"], f"{where}: learning_rate"),
            size=_word(row, "size", where),
            parameters=_whole(row, "parameters", 1, where),
            tokens=tokens,
            seed=_whole(row, "seed", 0, where),
            loss=_loss(row["loss"], diverged, f"{where}: loss"),
            diverged=diverged,
            curve=_curve(row.get("curve"), tokens, diverged, f"{where}: curve"),
        )


def parse(rows: Iterable[Any], where: str = "row") -> list[Result]:
    """Parse all rows and return them in an order that does not depend on the order of `rows`.

    Raises:
      UserError: if a row is malformed, if two rows are the same run, or if a size of a variant has
        two numbers of parameters. The message has `where` and the number of the row, from 1.
    """
    found: dict[tuple, tuple[str, Result]] = {}
    sizes: dict[tuple[str, str], tuple[str, int]] = {}
    for number, row in enumerate(rows, start=1):
        place = f"{where} {number}"
        result = Result.from_row(row, place)
        run = (result.variant, result.size, result.tokens, result.learning_rate, result.seed)
        if run in found:
            raise UserError(f"{place}: the same run as {found[run][0]}: remove one of them")
        found[run] = (place, result)
        first, count = sizes.setdefault(run[:2], (place, result.parameters))
        if count != result.parameters:
            raise UserError(
                f"{place}: parameters={result.parameters}, but size {result.size} of "
                f"{result.variant} has {count} in {first}: rename one of the sizes"
            )
    return [found[run][1] for run in sorted(found)]


def grouped(
    results: Iterable[Result], key: Callable[[Result], Key]
) -> list[tuple[Key, list[Result]]]:
    """Group results by key and return (key, results) pairs in the order of the keys."""
    found: dict[Key, list[Result]] = defaultdict(list)
    for result in results:
        found[key(result)].append(result)
    return [(which, found[which]) for which in sorted(found)]


def finished(results: Sequence[Result]) -> dict[float, list[Result]]:
    """Return the runs of each learning rate at which no seed diverged, smallest rate first.

    Seeds that survive a learning rate at which others diverge are lucky. Their mean underestimates
    the loss at that rate, so they are left out too.
    """
    by_rate = grouped(results, lambda result: result.learning_rate)
    return {rate: runs for rate, runs in by_rate if not any(run.diverged for run in runs)}


def _word(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key}={shown(value)} must be a non-empty string")
    return value


def _whole(row: Mapping[str, Any], key: str, least: int, where: str) -> int:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{where}: {key}={shown(value)} must be an integer of at least {least}")
    if value > 2**63:
        raise UserError(f"{where}: {key}={shown(value)} is too large: must be at most 2^63")
    return value


def _number(value: Any) -> float:
    """Convert `value` to a float; return nan if it is not a number or an integer out of range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _positive(value: Any, what: str) -> float:
    number = _number(value)
    if not 0 < number < math.inf:
        raise UserError(f"{what}={shown(value)} must be a finite number above 0")
    return number


def _loss(value: Any, diverged: bool, what: str) -> float | None:
    if diverged and (value is None or (isinstance(value, float) and not math.isfinite(value))):
        return None
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{what}={shown(value)} without diverged=true: set it, or remove the row")
    return _positive(value, what)


def _curve(value: Any, tokens: int, diverged: bool, what: str) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise UserError(f"{what}={shown(value)} must be a list of [tokens, loss] pairs")
    found: list[tuple[int, float]] = []
    last = -1
    for number, point in enumerate(value, start=1):
        place = f"{what}, point {number}"
        if not isinstance(point, list | tuple) or len(point) != 2:
            raise UserError(f"{place}: {shown(point)} must be [tokens, loss]")
        at = _whole({"tokens": point[0]}, "tokens", 0, place)
        if not last < at <= tokens:
            raise UserError(
                f"{place}: tokens={at} must be above the point before, at most the run's {tokens}"
            )
        last = at
        loss = _loss(point[1], diverged, f"{place}: loss")
        if loss is not None:
            found.append((at, loss))
    return tuple(found)
