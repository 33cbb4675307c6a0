"""What each layer's keys and values cost the whole model when they alone are compressed."""

import dataclasses
from typing import Any

import jax
import numpy as np

from mea_jax.compress import layer as layers
from mea_jax.compress.layer import Heads
from mea_jax.compress.methods import rebuilt_keys, solve_keys, solve_values
from mea_jax.compress.moments import Moments
from mea_jax.compress.sweep import Spec, Stream, loss_sums, progress, run_block
from mea_jax.config import ModelConfig

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """One layer's keys or values: what is lost with C = 1 .. K heads.

    Attributes:
      layer, which: of the model; "key" or "value".
      residuals: share of the (weighted) energy that is lost.
      losses: increase of the loss in nats per token; empty where it was not measured.
    """

    layer: int
    which: str
    residuals: list[float]
    losses: list[float]


def plain_spec(model: ModelConfig) -> Spec:
    """The same function as `model`'s attention with composite heads as its only heads."""
    plain = dataclasses.replace(
        model,
        hlc="none",
        hlc_order="before",
        key_mixing="heads",
        value_mixing="heads",
        key_components=None,
        value_components=None,
    )
    return Spec(plain, model.n_kv_heads, model.n_kv_heads)


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

    def __init__(self, model: ModelConfig, top: Tree, trees: list[Tree], stream: Stream):
        """`trees` are the layers' parameters for `plain_spec`; `stream` is embedded already."""
        self.spec, self.stream = plain_spec(model), stream
        self.top = stream.place(top)
        self.trees = [stream.place(tree) for tree in trees]
        self.batches = [stream.put(batch) for batch in stream.batches]
        self.residuals = [stream.residual(i, model) for i in range(len(stream))]
        self.done = 0
        self.base = self._loss(self.trees[0])

    def _loss(self, tree: Tree) -> float:
        """Nats per token with `tree` in the place of the next layer."""
        nll = tokens = 0.0
        with jax.set_mesh(self.stream.mesh):
            for x_BTD, batch in zip(self.residuals, self.batches, strict=True):
                for index, params in enumerate([tree, *self.trees[self.done + 1 :]], self.done):
                    x_BTD = run_block(self.spec, params, x_BTD, batch, index)
                sums = loss_sums(self.spec.model, self.top, x_BTD, batch)
                nll, tokens = nll + float(sums[0]), tokens + float(sums[1])
        return nll / tokens

    def advance(self) -> None:
        """To the next layer."""
        with jax.set_mesh(self.stream.mesh):
            self.residuals = [
                run_block(self.spec, self.trees[self.done], x_BTD, batch, self.done)
                for x_BTD, batch in zip(self.residuals, self.batches, strict=True)
            ]
        self.done += 1

    def sensitivity(self, method: str, heads: Heads, moments: Moments) -> list[Sensitivity]:
        """Of the next layer's keys and values at 1 .. K heads; K heads lose nothing."""
        count, index = heads.key_DKH.shape[1], self.done
        found = []
        tree = jax.tree.map(lambda x: x, self.trees[index])
        for which in ("key", "value"):
            lost, worse = [], []
            for c in progress(range(1, count), f"layer {index}, {which}s"):
                if which == "key":
                    keys = solve_keys(method, heads, moments, c)
                    kernel, residual = rebuilt_keys(heads, keys), keys.residual
                else:
                    values = solve_values(method, heads, moments, c)
                    kernel, residual = values.rebuilt(heads.value_DKH), values.residual
                changed = self.stream.place(np.asarray(kernel, np.float32))
                attention = tree["attention"] | {which: changed}
                worse.append(self._loss(tree | {"attention": attention}) - self.base)
                lost.append(residual)
            found.append(Sensitivity(index, which, [*lost, 0.0], [*worse, 0.0]))
        return found
