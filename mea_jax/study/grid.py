"""Define a grid of runs: variants x sizes x horizons, and in each cell learning rates x seeds.

The runs of one cell have one shape and one schedule. They differ only in the peak learning rate and
the seed, so they can train in one program (`mea_jax.study.vmapped`).
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from mea_jax.config.parse import from_dict
from mea_jax.config.schema import TrainConfig, default_config, flatten
from mea_jax.errors import UserError, nearest
from mea_jax.model import flops
from mea_jax.model.params import abstract_params

AXES = ("horizons", "learning_rates", "seeds")
_KEYS = ("name", "base", "variants", "sizes", "per_size", "at_once", "spikes", *AXES)
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True, order=True)
class Member:
    """The seed and the peak learning rate, which distinguish a run from the others of its cell."""

    seed: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of one shape and horizon; `config` is theirs except for the fields of `Member`."""

    variant: str
    size: str
    config: TrainConfig
    members: tuple[Member, ...]

    @property
    def steps(self) -> int:
        return self.config.steps

    def __str__(self) -> str:
        return f"{self.variant}, size {self.size}, {self.steps} steps"

    def parameters(self) -> int:
        """Return N, the number of parameters without embeddings, as laws over sizes count it."""
        model = dataclasses.replace(self.config.model, backend="xla", dtype="float32")
        counted = flatten(abstract_params(model))
        outside = ("embedding", "position_embedding", "head")
        return sum(x.size for name, x in counted.items() if name not in outside)

    def tokens(self) -> int:
        """Return D, the number of training tokens of each run."""
        return self.steps * self.config.batch_size * self.config.data.context_length

    def work(self) -> float:
        """Return the FLOPs of one run."""
        config, length = self.config, self.config.data.context_length
        return self.steps * flops.step_flops(config.model, length, config.batch_size * length)


@dataclasses.dataclass(frozen=True)
class Grid:
    """All cells of a study.

    Attributes:
      at_once: the largest number of runs in one program; 0 means all runs of a cell.
      spikes: the margin (nats), steps and smoothing (steps) that define a spike.
      identity: everything that rows depend on except the axes: the base config, the changes that
        each variant and size makes to it, and the definition of a spike.
    """

    name: str
    cells: tuple[Cell, ...]
    at_once: int
    spikes: tuple[float, int, int]
    fingerprint: Tree

    def chunks(self) -> Iterator[tuple[Cell, tuple[Member, ...]]]:
        """Yield the runs of each program, as a cell and some of its members."""
        for cell in self.cells:
            count = self.at_once or len(cell.members)
            for first in range(0, len(cell.members), count):
                yield cell, cell.members[first : first + count]


def default_study() -> config_dict.ConfigDict:
    """Return an empty study with the default training config as its base."""
    return config_dict.ConfigDict(
        {
            "name": "study",
            "base": default_config(),
            "variants": {},  # name -> changes to the base
            "sizes": {},
            "horizons": (),  # steps
            "learning_rates": (),
            "seeds": (0,),
            "per_size": {},  # size -> its own axes, such as {"seeds": (0,)}
            "at_once": 0,
            "spikes": {"margin": 0.5, "steps": 20, "smoothing": 10},
        }
    )


def _changed(base: Tree, changes: Mapping[str, Any], where: str) -> Tree:
    """Return a copy of `base` with nested `changes`; raise `UserError` for an unknown key."""
    result = copy.deepcopy(base)
    for name, value in flatten(dict(changes)).items():
        *path, last = name.split(".")
        place = result
        for key in path:
            place = place.get(key, {}) if isinstance(place, dict) else {}
        if last not in place:
            raise UserError(f"{where}: unknown config key {name}: {nearest(last, place)}")
        place[last] = value
    return result


def _axis(tree: Tree, size: str, name: str, kind: type) -> tuple:
    values = tree["per_size"].get(size, {}).get(name, tree[name])
    where = f"config.{name}" + (
        f" of size {size}" if name in tree["per_size"].get(size, {}) else ""
    )
    if not isinstance(values, list | tuple) or not values:
        raise UserError(f"{where} must be a list of at least one value, not {values!r}")
    found = []
    for value in values:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (kind is float and isinstance(value, float))):
            raise UserError(f"{where} contains {value!r}: use numbers of type {kind.__name__}")
        found.append(kind(value))
    if len(set(found)) < len(found):
        raise UserError(f"{where} contains a value twice: remove the duplicate in {values}")
    return tuple(found)


def grid_of(config: config_dict.ConfigDict) -> Grid:
    """Return the validated grid of a study config; raise `UserError` with the cell at fault."""
    tree = config.to_dict()
    for key in tree:
        if key not in _KEYS:
            raise UserError(f"unknown config key config.{key}: {nearest(key, _KEYS)}")
    for key in ("variants", "sizes"):
        if not tree[key]:
            raise UserError(f"config.{key} is empty: add at least one entry")
    for size, axes in tree["per_size"].items():
        if size not in tree["sizes"] or any(name not in AXES for name in axes):
            known = f"sizes {', '.join(tree['sizes'])} and axes {', '.join(AXES)}"
            raise UserError(f"config.per_size.{size}: unknown size or axis: choose from {known}")
    base = tree["base"]
    cells = []
    for size, of_size in tree["sizes"].items():
        sized = _changed(base, of_size, f"config.sizes.{size}")
        members = tuple(
            Member(seed, rate)
            for seed in _axis(tree, size, "seeds", int)
            for rate in _axis(tree, size, "learning_rates", float)
        )
        for steps in _axis(tree, size, "horizons", int):
            for variant, changes in tree["variants"].items():
                changed = _changed(sized, changes, f"config.variants.{variant}")
                changed["steps"] = steps
                cells.append(_cell(variant, size, changed, members))
    spikes = tree["spikes"]
    fingerprint = {name: tree[name] for name in ("base", "variants", "sizes", "spikes")}
    limits = (float(spikes["margin"]), int(spikes["steps"]), int(spikes["smoothing"]))
    return Grid(tree["name"], tuple(cells), int(tree["at_once"]), limits, fingerprint)


def _cell(variant: str, size: str, tree: Tree, members: tuple[Member, ...]) -> Cell:
    for member in members:
        tree["seed"], tree["optimizer"]["learning_rate"] = member.seed, member.learning_rate
        try:
            config = from_dict(tree)
        except UserError as error:
            raise UserError(
                f"cell {variant}, size {size}, {tree['steps']} steps: {error}"
            ) from error
    if config.start.checkpoint or config.mesh.tensor > 1 or config.mesh.sequence > 1:
        raise UserError(
            f"cell {variant}, size {size}: runs of a study start from initialisation and are not "
            "sharded by tensor or sequence: remove the changes to base.start and base.mesh"
        )
    return Cell(variant, size, config, members)
