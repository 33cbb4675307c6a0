"""Measure the cost to the model when the keys or the values of one layer are cached in few bits."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mea_jax.cli import progress
from mea_jax.compress import bits
from mea_jax.compress.methods import Solved, target_model
from mea_jax.compress.probe import Sensitivity, SensitivityProbe, assemble
from mea_jax.config.schema import Side
from mea_jax.model.layer_spec import LayerSpec, layer_specs

Tree = dict[str, Any]


class BitsProbe:
    """A `SensitivityProbe` whose layers are rounded as packed slots are.

    `solved` are all layers, and `points` the numbers of bits of a slot, on average, to measure at.
    The bits of all layers at all points are one table that each layer indexes, so that equal layers
    share one compiled program.
    """

    def __init__(self, probe: SensitivityProbe, solved: Sequence[Solved], points: Sequence[int]):
        self.probe, self.solved, self.points = probe, solved, points
        self.tables: dict[Side, tuple[str, ...]] = {}
        for place, side in enumerate(Side):
            divisions = [bits.Division(layer.costs[place].ravel()) for layer in solved]
            self.tables[side] = tuple(
                division.row(point * len(division.weights_X))
                for division in divisions
                for point in points
            )

    def _spec(self, index: int, side: Side, count: int) -> LayerSpec:
        one = dataclasses.replace(self.probe.specs[index].model, n_layers=1)
        spec = layer_specs(target_model(one, "bits", [count], [count]))[0]
        rows: dict[str, Any] = {f"{side}_bits": self.tables[side]}
        return dataclasses.replace(spec, model=dataclasses.replace(spec.model, **rows))

    def sensitivity(self) -> list[Sensitivity]:
        """Measure the keys and the values of the probe's next layer at all points."""
        index, place_tree = self.probe.stream.done, self.probe.stream.place
        layer, tree, found = self.solved[index], self.probe.trees[index], []
        own = jax.device_get(tree["attention"])
        attention = assemble(layer.heads, layer.keys, layer.values, own)
        for place, side in enumerate(Side):
            lost, worse, x_CH = [], [], layer.variances[place]
            spec = self._spec(index, side, x_CH.shape[0])
            for number, _ in enumerate(progress(self.points, f"layer {index}, {side}s")):
                row = index * len(self.points) + number
                own_X = np.asarray([int(digit) for digit in self.tables[side][row]])
                steps_CH = np.float32(bits.steps(x_CH.ravel(), own_X).reshape(x_CH.shape))
                changed = attention | {f"{side}_steps": steps_CH}
                worse.append(self.probe.moved(spec, tree | {"attention": place_tree(changed)}, row))
                cost_X = layer.costs[place].ravel()
                lost.append(float(cost_X @ np.asarray(bits.DISTORTIONS)[own_X]))
            found.append(Sensitivity(index, side, lost, worse))
        return found
