"""Everything that a set of runs says about learning rates, as one tree of JSON values."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from mea_jax.errors import UserError
from mea_jax.study.laws import gains, optimum, robustness, sizes, tokens
from mea_jax.study.laws.intervals import LEVEL
from mea_jax.study.laws.results import Result


def fit_all(
    results: Iterable[Result],
    *,
    baseline: str | None = None,
    initial_loss: float | None = None,
    skip: float = tokens.SKIP,
    seed: int = 0,
) -> dict[str, Any]:
    """All fits of learning-rate studies.

    The same results give the same numbers, in any order.

    Args:
      results: as `parse` or `read` gives them.
      baseline: the variant that others are compared with; None: "mha", or the first one.
      initial_loss: nats, for the sensitivity, where no curve begins at 0 tokens.
      skip: the share of the horizon left out of the loss in tokens, from the start.
      seed: of the bootstraps.

    Returns:
      "settings", "runs" (counts), and a list of records for each of "loss_in_tokens", "optimum",
      "law", "sensitivity", "stability" and "gain". A record is that dataclass with lists for
      tuples; an estimate is {"value", "low", "high"}; "reason" says why a record has no number.

    Raises:
      UserError: there are no results, or none of the baseline; `skip` or `initial_loss` is out of
        range.
    """
    found = sorted(
        results, key=lambda r: (r.variant, r.parameters, r.size, r.tokens, r.learning_rate, r.seed)
    )
    if not found:
        raise UserError("no runs to fit: give a file with one finished run a line")
    if not 0 <= skip < 1:
        raise UserError(f"skip={skip} must lie in [0, 1): a share of the horizon")
    if initial_loss is not None and not 0 < initial_loss < float("inf"):
        raise UserError(f"initial_loss={initial_loss} must be a finite number above 0, in nats")
    settings = {
        "level": LEVEL,
        "skip": skip,
        "held_out": tokens.HELD_OUT,
        "tolerance": tokens.TOLERANCE,
        "window": optimum.WINDOW,
        "near": sizes.NEAR,
        "bootstraps": sizes.BOOTSTRAPS,
        "seed": seed,
        "spike_margin": robustness.SPIKE_MARGIN,
        "spike_points": robustness.SPIKE_POINTS,
    }
    fits: dict[str, Sequence[Any]] = {
        "loss_in_tokens": tokens.fit_tokens(found, skip),
        "optimum": optimum.fit_optima(found),
        "law": sizes.fit_laws(found, seed),
        "sensitivity": robustness.fit_sensitivity(found, initial_loss),
        "stability": robustness.fit_stability(found),
        "gain": gains.fit_gains(found, baseline),
    }
    return {
        "settings": settings,
        "runs": {
            "finished": sum(not run.diverged for run in found),
            "diverged": sum(run.diverged for run in found),
        },
        **{name: [_json(dataclasses.asdict(fit)) for fit in some] for name, some in fits.items()},
    }


def _json(value: Any) -> Any:
    """Lists for tuples."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return value
