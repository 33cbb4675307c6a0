"""Divide the cache: what each layer keeps of its keys and of its values, at the share asked for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mea_jax.cli import progress
from mea_jax.compress import bits, budgets, methods, rates
from mea_jax.compress.measurements import Measurements
from mea_jax.compress.options import Options
from mea_jax.compress.probe import Sensitivity
from mea_jax.config.schema import ModelConfig, Side


@dataclasses.dataclass(frozen=True)
class Shares:
    """The parts of the cache that each layer keeps.

    Attributes:
      keys, values: the numbers of component heads of each layer.
      bits: the bits of the slots of each layer, as in `ModelConfig.key_bits`; empty without.
      slots: the slots of all layers, as in `ModelConfig.key_slots`; empty if heads are whole.
      sensitivities: those that were measured.
    """

    keys: list[int]
    values: list[int]
    bits: dict[Side, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    slots: dict[Side, str] = dataclasses.field(default_factory=dict)
    sensitivities: list[Sensitivity] = dataclasses.field(default_factory=list)

    @property
    def partial(self) -> bool:
        """True if slots or bits are chosen instead of whole heads."""
        return bool(self.bits or self.slots)

    def target(self, model: ModelConfig, method: str) -> ModelConfig:
        """Return the config of the compressed model."""
        found = methods.target_model(model, method, self.keys, self.values)
        if self.slots:
            return dataclasses.replace(
                found, key_slots=self.slots[Side.KEY], value_slots=self.slots[Side.VALUE]
            )
        if not self.bits:
            return found
        return dataclasses.replace(
            found, key_bits=self.bits[Side.KEY], value_bits=self.bits[Side.VALUE]
        )

    def cache_bytes(self, model: ModelConfig, method: str) -> list[tuple[float, float]]:
        """Return the bytes per position of each layer's keys and values."""
        return budgets.cache_bytes(self.target(model, method))


def kept(model: ModelConfig, options: Options, chosen: list[int]) -> float:
    """Return the number of heads of the `chosen` layers, on average, that `--keep` amounts to.

    Raise `UserError` if it is not possible.
    """
    count = model.n_kv_heads
    if options.method == "bits":
        return float(count)
    if options.budget != "uniform":
        return budgets.heads_kept(options.keep, count)
    if options.method == "frequency" and len(chosen) == model.n_layers:
        return budgets.slots_kept(options.keep, count, model.head_dim)
    return float(budgets.uniform(options.keep, count))


def divide(
    model: ModelConfig,
    options: Options,
    chosen: list[int],
    measurements: Measurements,
    solved: Callable[[int], methods.Solved],
    log: Callable[[str], Any],
) -> Shares:
    """Divide the cache.

    Args:
      model: the resolved config of the original.
      options: those of the compression.
      chosen: the layers to compress.
      measurements: those of the original, calibrated.
      solved: returns a layer's solution with all heads.
      log: logs a line.
    """
    heads, count = kept(model, options, chosen), model.n_kv_heads
    shares = Shares([count] * model.n_layers, [count] * model.n_layers)
    if options.method == "bits":
        return _divide_bits(shares, options, measurements, solved)
    if options.budget == "uniform" and heads != int(heads):
        return _divide_slots(shares, heads, solved)
    if options.budget == "uniform":
        for index in chosen:
            shares.keys[index] = shares.values[index] = int(heads)
        return shares
    found = measurements.sensitivities(chosen)
    if heads < count:
        _allot(shares, found, model, options, heads, log)
    return dataclasses.replace(shares, sensitivities=found)


def _divide_slots(shares: Shares, heads: float, solved: Callable[[int], methods.Solved]) -> Shares:
    """Choose the slots of keys and of values that all layers keep, `heads` heads of each.

    Those are kept whose power, relative to that of all slots of a layer, has the largest mean over
    layers. Keys are chosen in rotary pairs. Slots of each frequency, and values, are ordered by
    power, so the least number of whole components is computed that have them all.
    """
    powers: dict[Side, np.ndarray] = {}
    for index in progress(range(len(shares.keys)), "solving, layers"):
        for side, x_CH in zip(Side, solved(index).variances, strict=True):
            powers[side] = powers.get(side, 0) + x_CH / x_CH.sum()
    width = powers[Side.KEY].shape[1]
    pairs_CF = powers[Side.KEY][:, : width // 2]
    pairs = round(heads * width / 2)  # as many values as features of keys: a cache of one width
    rows = {
        Side.KEY: np.tile(_largest(pairs_CF, pairs), 2),
        Side.VALUE: _largest(powers[Side.VALUE], 2 * pairs),
    }
    least = max(int(np.flatnonzero(row_CH.any(axis=1))[-1]) + 1 for row_CH in rows.values())
    slots = {side: "".join("01"[x] for x in row[:least].ravel()) for side, row in rows.items()}
    whole = [least] * len(shares.keys)
    return dataclasses.replace(shares, keys=whole, values=list(whole), slots=slots)


def _largest(x: np.ndarray, number: int) -> np.ndarray:
    """Return an array of `x`'s shape with 1 at its `number` largest entries and 0 elsewhere."""
    found = np.zeros(x.size, np.int64)
    found[np.argsort(-x, axis=None, kind="stable")[:number]] = 1
    return found.reshape(x.shape)


def _divide_bits(
    shares: Shares,
    options: Options,
    measurements: Measurements,
    solved: Callable[[int], methods.Solved],
) -> Shares:
    """Choose the bits of each slot of all layers."""
    parts = [
        (side, bits.Division(x_CH.ravel()))
        for index in progress(range(len(shares.keys)), "solving, layers")
        for side, x_CH in zip(Side, solved(index).costs, strict=True)
    ]
    divisions, found = [division for _, division in parts], []
    if options.budget == "uniform":
        rows = [bits.divide(one, options.keep, budgets.POSITIONS) for one in divisions]
    elif options.budget == "information":
        losses = [[one.lost(total) for total in one.fitting] for one in divisions]
        rows = rates.divide(divisions, losses, options.keep)
    else:
        found = measurements.sensitivities(list(range(len(shares.keys))))
        pairs = zip(divisions, found, strict=True)
        losses = [rates.predicted(division, one) for division, one in pairs]
        rows = rates.divide(divisions, losses, options.keep)
    own = {
        side: tuple(row for row, part in zip(rows, parts, strict=True) if part[0] == side)
        for side in Side
    }
    return dataclasses.replace(shares, bits=own, sensitivities=found)


def _allot(
    shares: Shares,
    found: list[Sensitivity],
    model: ModelConfig,
    options: Options,
    heads: float,
    log: Callable[[str], Any],
) -> None:
    """Write the best division at the requested bytes into `shares`.

    The requested bytes are those of the uniform division. If a layer's share is not a whole number
    of heads, they are interpolated between the two nearest uniform divisions.
    """
    chosen, count = sorted({s.layer for s in found}), model.n_kv_heads
    by_count = [
        Shares([c] * model.n_layers, [c] * model.n_layers).cache_bytes(model, options.method)
        for c in range(1, count + 1)
    ]
    totals = [sum(sum(row[index]) for index in chosen) for row in by_count]
    below = int(heads)
    part = heads - below  # the fraction of one more head
    total = totals[below - 1]
    total += part * (totals[min(below, count - 1)] - total)
    if part:  # round to the nearest whole head, not down
        total += by_count[0][chosen[0]][1] / 2
    costs = [[int(row[s.layer][s.side == Side.VALUE]) for row in by_count] for s in found]
    losses = [s.losses or s.residuals for s in found]
    for s, option in zip(found, budgets.allot(costs, losses, round(total)), strict=True):
        (shares.keys if s.side == Side.KEY else shares.values)[s.layer] = option + 1
    met = sum(shares.keys[i] + shares.values[i] for i in chosen) / (2 * count * len(chosen))
    if abs(met - options.keep) > budgets.ROUNDING:
        log(
            f"--keep={options.keep:g}: the nearest share that whole key and value heads of "
            f"{len(chosen)} layers reach is {met:.3g}"
        )
