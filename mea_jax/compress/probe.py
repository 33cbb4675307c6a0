"""Measure the cost to the model when only the keys or the values of one layer are compressed.

The cost is the divergence of the changed model's predictions from the original's. In expectation
over the original's own predictions it equals the increase of the loss. The increase has a several
times larger standard error, because it depends on the actual next tokens, and would hide
differences of a thousandth of a nat between two divisions of the cache.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mea_jax.cli import progress
from mea_jax.compress import layer as layers
from mea_jax.compress import repair
from mea_jax.compress.keys import Keys
from mea_jax.compress.layer import Heads
from mea_jax.compress.methods import (
    SHARPENED,
    rebuilt_keys,
    solve_keys,
    solve_values,
    target_model,
)
from mea_jax.compress.moments import Moments
from mea_jax.compress.stream import Stream, compared_sums, run_block
from mea_jax.compress.values import Values
from mea_jax.config.schema import ModelConfig, Side
from mea_jax.model.layer_spec import LayerSpec, layer_specs, plain_specs

Tree = dict[str, Any]
_SOLVERS: dict[Side, Any] = {Side.KEY: solve_keys, Side.VALUE: solve_values}
TRIED = 40  # repair steps before a changed layer is measured, with --budget repaired


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The losses from compressing one layer's keys or values, alone.

    They are those of C = 1 .. K heads, or of the bits a slot in `rates.POINTS`.

    Attributes:
      layer: index of the layer.
      side: keys or values.
      residuals: the lost shares of the (weighted) energy.
      losses: KL(original || changed) of predictions, in nats per token; empty if not measured.
    """

    layer: int
    side: Side
    residuals: list[float]
    losses: list[float]


def plain_layer(heads: Heads, tree: Tree) -> Tree:
    """Return a layer's parameters for its spec in `plain_specs`, without mixing matrices."""
    dropped = ("key_mixing", "value_mixing")
    attention = {name: leaf for name, leaf in tree["attention"].items() if name not in dropped}
    layers.put_heads(attention, "key", heads.key_DKH)
    layers.put_heads(attention, "value", heads.value_DKH)
    return layers.as_float32(tree | {"attention": attention})


def residuals(method: str, heads: Heads, moments: Moments, index: int) -> list[Sensitivity]:
    """Return the sensitivities of layer `index`, for C = 1 .. K, without measuring losses."""
    counts = range(1, heads.key_DKH.shape[1] + 1)
    keys = [solve_keys(method, heads, moments, c).residual for c in counts]
    values = [solve_values(method, heads, moments, c).residual for c in counts]
    return [Sensitivity(index, Side.KEY, keys, []), Sensitivity(index, Side.VALUE, values, [])]


class SensitivityProbe:
    """The complete model on the mesh, with windows of text on which each change is measured."""

    def __init__(
        self,
        model: ModelConfig,
        top: Tree,
        trees: list[Tree],
        stream: Stream,
        repairing: Stream | None = None,
    ):
        """Place the model on the mesh and compute the last residuals of `stream`.

        Args:
          model: the resolved config.
          top: parameters outside the layers.
          trees: the layers' parameters for `plain_specs`.
          stream: text on which changes are measured, already embedded.
          repairing: text on which each changed layer is first repaired, already embedded; None
            means no repair.
        """
        self.model, self.specs = model, plain_specs(model)
        self.stream, self.repairing = stream, repairing
        self.top = stream.place(top)
        self.trees = [stream.place(tree) for tree in trees]
        self.batches = [stream.put(batch) for batch in stream.batches]
        self._read()
        with jax.set_mesh(stream.mesh):
            self.last = [self._rest(x, batch, 0) for x, batch in self._windows()]

    def _read(self) -> None:
        self.residuals = [self.stream.residual(i, self.model) for i in range(len(self.stream))]

    def _windows(self) -> Iterator[tuple[jax.Array, Any]]:
        return zip(self.residuals, self.batches, strict=True)

    def _rest(self, x_BTD: jax.Array, batch: Any, first: int) -> jax.Array:
        """Return the last residual, given the one before layer `first`."""
        for index in range(first, len(self.trees)):
            x_BTD = run_block(self.specs[index], self.trees[index], x_BTD, batch, index)
        return x_BTD

    def moved(self, spec: LayerSpec, tree: Tree, index: int) -> float:
        """Return KL(original || changed), nats per token, with `tree` as the next layer.

        `index` is the layer's number, or that of its row in `spec.model.bits`.
        """
        moved, tokens, done = 0.0, 0.0, self.stream.done
        with jax.set_mesh(self.stream.mesh):
            for (x_BTD, batch), original_BTD in zip(self._windows(), self.last, strict=True):
                x_BTD = self._rest(run_block(spec, tree, x_BTD, batch, index), batch, done + 1)
                sums = compared_sums(self.model, self.top, x_BTD, original_BTD, batch)
                moved, tokens = moved + float(sums[2]), tokens + float(sums[1])
        return moved / tokens

    def advance(self) -> None:
        """Move all streams past the next layer."""
        tree = self.trees[self.stream.done]
        for stream in filter(None, (self.repairing, self.stream)):
            stream.advance(self.specs[stream.done], tree)
        self._read()

    def sensitivity(self, method: str, heads: Heads, moments: Moments) -> list[Sensitivity]:
        """Measure the next layer's keys and values at C = 1 .. K heads; C = K counts as no loss."""
        count, index = heads.key_DKH.shape[1], self.stream.done
        tree, found = self.trees[index], []
        scale, text = layers.input_scale(tree), self.repairing or self.stream
        self.original = repair.OriginalLayer(self.specs[index], tree["attention"], scale, text)
        whole = {side: solve(method, heads, moments, count) for side, solve in _SOLVERS.items()}
        for side, solve in _SOLVERS.items():
            lost, worse = [], []
            for c in progress(range(1, count), f"layer {index}, {side}s"):
                solved = whole | {side: solve(method, heads, moments, c)}
                counts = (c, count) if side == Side.KEY else (count, c)
                spec, tree = self._changed(
                    method, heads, solved[Side.KEY], solved[Side.VALUE], side, counts
                )
                worse.append(self.moved(spec, tree, index))
                lost.append(solved[side].residual)
            found.append(Sensitivity(index, side, [*lost, 0.0], [*worse, 0.0]))
        return found

    def _changed(self, method: str, heads: Heads, keys, values, side: Side, counts):
        """Return the spec and parameters of the next layer with its keys or values compressed.

        Without repair, rebuilt composite heads replace the original ones, so that all candidates
        share one compiled program. With repair, the layer is the actual compressed layer.
        """
        tree, own = self.trees[self.stream.done], self.specs[self.stream.done]
        sharpen = side == Side.KEY and method in SHARPENED
        if self.repairing is None:
            rebuilt = (
                rebuilt_keys(heads, keys) if side == Side.KEY else values.rebuilt(heads.value_DKH)
            )
            attention = dict(tree["attention"])
            layers.put_heads(attention, side.value, np.asarray(rebuilt, np.float32))
            if sharpen:
                found = repair.temperature(self.original, (own, attention))
                attention = repair.sharpened(attention, found)
            return own, tree | {"attention": self.stream.place(attention)}
        one = dataclasses.replace(own.model, n_layers=1)
        target = target_model(one, method, [counts[0]], [counts[1]])
        spec = layer_specs(target)[0]
        attention = assemble(heads, keys, values, jax.device_get(tree["attention"]))
        if sharpen:
            found = repair.temperature(self.original, (spec, attention))
            attention = repair.sharpened(attention, found)
        attention = repair.reconstruct(self.original, (spec, attention), TRIED, "trying")
        return spec, tree | {"attention": self.stream.place(attention)}


def assemble(heads: Heads, keys: Keys, values: Values, attention: Tree) -> Tree:
    """Return a layer's attention parameters with compressed keys and values, in float32."""
    kept = {n: v for n, v in attention.items() if n not in ("key_mixing", "value_mixing")}
    kept = layers.with_keys(heads, keys, kept)
    return layers.as_float32(layers.with_values(heads, values, kept))
