"""What each layer's keys and values cost the whole model when they alone are compressed.

The cost is the divergence of the changed model's predictions from the original's. In expectation
over the original's own predictions that equals the increase of the loss, whose standard error is
several times as large, because it depends on which token came: it would hide differences of a
thousandth of a nat between two divisions.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mea_jax.compress import layer as layers
from mea_jax.compress import repair
from mea_jax.compress.keys import Keys
from mea_jax.compress.layer import Heads
from mea_jax.compress.methods import (
    SHARPENED,
    Latent,
    rebuilt_keys,
    solve_keys,
    solve_values,
    target_model,
)
from mea_jax.compress.moments import Moments
from mea_jax.compress.stream import Stream, compared_sums, progress, run_block
from mea_jax.compress.values import Values
from mea_jax.config.schema import ModelConfig
from mea_jax.model.layer_spec import LayerSpec, layer_specs, plain_spec

Tree = dict[str, Any]
_SOLVERS: dict[str, Any] = {"key": solve_keys, "value": solve_values}
_PROBE = 40  # steps of repair before a layer is tried, for budgets of a model to be repaired


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """One layer's keys or values: what is lost with C = 1 .. K heads.

    Attributes:
      layer, which: of the model; "key" or "value".
      residuals: share of the (weighted) energy that is lost.
      losses: KL(original || changed) of predictions, nats per token; empty where not measured.
    """

    layer: int
    which: str
    residuals: list[float]
    losses: list[float]


def plain_layer(heads: Heads, tree: Tree) -> Tree:
    """A layer's parameters for `plain_spec`."""
    dropped = ("key_mixing", "value_mixing")
    attention = {name: leaf for name, leaf in tree["attention"].items() if name not in dropped}
    attention |= {"key": heads.key_DKH, "value": heads.value_DKH}
    return layers.as_float32(tree | {"attention": attention})


def residuals(method: str, heads: Heads, moments: Moments, index: int) -> list[Sensitivity]:
    """Of one layer, without measuring losses."""
    counts = range(1, heads.key_DKH.shape[1] + 1)
    keys = [solve_keys(method, heads, moments, c).residual for c in counts]
    values = [solve_values(method, heads, moments, c).residual for c in counts]
    return [Sensitivity(index, "key", keys, []), Sensitivity(index, "value", values, [])]


class Measurer:
    """The model on the mesh as a whole, and windows of text that each change is tried on."""

    def __init__(
        self,
        model: ModelConfig,
        top: Tree,
        trees: list[Tree],
        stream: Stream,
        repairing: Stream | None = None,
    ):
        """`trees` are the layers' parameters for `plain_spec`; the streams are embedded already.
        With `repairing` what is tried is repaired first, on that text."""
        self.model, self.spec, self.stream, self.repairing = (
            model,
            plain_spec(model),
            stream,
            repairing,
        )
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
        """The last residual, from the one before layer `first`."""
        for index in range(first, len(self.trees)):
            x_BTD = run_block(self.spec, self.trees[index], x_BTD, batch, index)
        return x_BTD

    def _moved(self, spec: LayerSpec, tree: Tree) -> float:
        """Nats per token by which predictions move with `tree` in the place of the next layer."""
        moved, tokens, done = 0.0, 0.0, self.stream.done
        with jax.set_mesh(self.stream.mesh):
            for (x_BTD, batch), original_BTD in zip(self._windows(), self.last, strict=True):
                x_BTD = self._rest(run_block(spec, tree, x_BTD, batch, done), batch, done + 1)
                sums = compared_sums(self.spec.model, self.top, x_BTD, original_BTD, batch)
                moved, tokens = moved + float(sums[2]), tokens + float(sums[1])
        return moved / tokens

    def advance(self) -> None:
        """To the next layer."""
        tree = self.trees[self.stream.done]
        for stream in filter(None, (self.repairing, self.stream)):
            stream.advance(self.spec, tree)
        self._read()

    def sensitivity(self, method: str, heads: Heads, moments: Moments) -> list[Sensitivity]:
        """Of the next layer's keys and values at 1 .. K heads; K heads lose nothing."""
        count, index = heads.key_DKH.shape[1], self.stream.done
        tree, found = self.trees[index], []
        scale, text = tree["attention_norm"]["scale"], self.repairing or self.stream
        self.original = repair.Original(self.spec, tree["attention"], scale, text)
        whole = {which: solve(method, heads, moments, count) for which, solve in _SOLVERS.items()}
        for which, solve in _SOLVERS.items():
            lost, worse = [], []
            for c in progress(range(1, count), f"layer {index}, {which}s"):
                solved = whole | {which: solve(method, heads, moments, c)}
                counts = (c, count) if which == "key" else (count, c)
                spec, tree = self._changed(
                    method, heads, solved["key"], solved["value"], which, counts
                )
                worse.append(self._moved(spec, tree))
                lost.append(solved[which].residual)
            found.append(Sensitivity(index, which, [*lost, 0.0], [*worse, 0.0]))
        return found

    def _changed(self, method: str, heads: Heads, keys, values, which: str, counts):
        """The next layer with its keys or values compressed: in place of the originals, so that one
        program serves all; or, to be repaired, as the compressed layer it would become."""
        tree = self.trees[self.stream.done]
        sharpen = which == "key" and method in SHARPENED
        if self.repairing is None:
            rebuilt = (
                rebuilt_keys(heads, keys) if which == "key" else values.rebuilt(heads.value_DKH)
            )
            attention = tree["attention"] | {which: np.asarray(rebuilt, np.float32)}
            if sharpen:
                found = repair.temperature(self.original, (self.spec, attention))
                attention = repair.sharpened(attention, found)
            return self.spec, tree | {"attention": self.stream.place(attention)}
        target = target_model(self.spec.model, method, [counts[0]], [counts[1]])
        spec = layer_specs(target)[0]
        attention = assemble(heads, keys, values, jax.device_get(tree["attention"]))
        if sharpen:
            found = repair.temperature(self.original, (spec, attention))
            attention = repair.sharpened(attention, found)
        attention = repair.reconstruct(self.original, (spec, attention), _PROBE, "trying")
        return spec, tree | {"attention": self.stream.place(attention)}


def assemble(heads: Heads, keys: Keys | Latent, values: Values, attention: Tree) -> Tree:
    """A layer's attention, with parameters `attention`, from its compressed keys and values."""
    kept = {n: v for n, v in attention.items() if n not in ("key_mixing", "value_mixing")}
    if isinstance(keys, Latent):
        kept["key"] = rebuilt_keys(heads, keys)
    else:
        kept = layers.with_keys(heads, keys, kept)
    return layers.as_float32(layers.with_values(heads, values, kept))
