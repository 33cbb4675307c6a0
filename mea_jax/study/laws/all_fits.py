"""Compute all learning-rate fits of a set of runs, as one tree of JSON values."""

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
    """Compute all fits of a learning-rate study.

    The numbers do not depend on the order of the results.

    Args:
      results: the runs, as returned by `parse`.
      baseline: the variant that others are compared with; None means "mha" if it has runs, and the
        first variant in alphabetical order otherwise.
      initial_loss: the loss at initialisation in nats, for the sensitivity; used where no curve
        begins at 0 tokens.
      skip: the share of the horizon, from its start, that the fit of the loss in tokens ignores.
      seed: the seed of the bootstraps.

    Returns:
      "settings", "runs" (counts), and a list of records for each of "loss_in_tokens", "optimum",
      "law", "sensitivity", "stability" and "gain". A record is the fit's dataclass with tuples as
      lists; an estimate is {"value", "low", "high"}; "reason" is why a record has no number.

    Raises:
      UserError: if there are no results, or none of the baseline, or if `skip` or `initial_loss` is
        out of range.
    """
    found = sorted(
        results, key=lambda r: (r.variant, r.parameters, r.size, r.tokens, r.learning_rate, r.seed)
    )
    if not found:
        raise UserError("no runs to fit: choose a file with one finished run per line")
    if not 0 <= skip < 1:
        raise UserError(f"skip={skip} is not a share of the horizon: it must be in [0, 1)")
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
    """Return `value` with its tuples, at any depth, as lists."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return value
