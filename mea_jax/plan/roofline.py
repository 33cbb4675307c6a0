"""Turn counts into times: the time that each resource would take alone, and which one binds.

    time = max(compute, memory, links)

All three are assumed to overlap fully, so the time is a lower bound and its MFU an upper bound.
Compute is the FLOPs of products at the peak rate, including recomputation. Data sheets give no peak
rate for vector work, so the TPU compiler's own estimate of cycles is reported, too.
"""

import dataclasses

from mea_jax.config.schema import TrainConfig
from mea_jax.model import flops
from mea_jax.plan.collectives import axes_of, groups_of, seconds, slices_of, wire_bytes
from mea_jax.plan.compiling import Compiled
from mea_jax.plan.target import Target


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind over the same mesh axes, in one step, on one device."""

    kind: str
    axes: str
    calls: int
    nbytes: float  # of the arrays
    wire_bytes: float  # sent by the device
    seconds: float | None  # None if the links' rates are not known
    between_slices: bool


@dataclasses.dataclass
class Roofline:
    """Seconds of one step; None where the chip's data sheet is not known."""

    traffic: list[Traffic]
    compute: float | None
    estimated: float | None  # by the compiler's cycles, plus Pallas kernels at the peak rate
    memory: float | None
    links: float | None
    network: float | None

    @property
    def parts(self) -> dict[str, float]:
        """The known times, by name."""
        named = {
            "compute": self.compute,
            "HBM": self.memory,
            "ICI": self.links,
            "DCN": self.network,
        }
        return {name: time for name, time in named.items() if time is not None}

    @property
    def binding(self) -> str | None:
        return max(self.parts, key=lambda name: self.parts[name]) if self.parts else None

    @property
    def step(self) -> float | None:
        """Seconds of a step if everything overlaps."""
        return max(self.parts.values()) if self.parts else None


def traffic_of(compiled: Compiled, target: Target) -> list[Traffic]:
    """Return the step's collectives, summed by kind and mesh axes, the largest first."""
    devices = list(compiled.mesh.devices.flat)
    total: dict[tuple[str, str], Traffic] = {}
    known = 0.0 if target.chip else None
    for collective in compiled.costs.collectives:
        if collective.between_slices:
            # The program's bytes are already the share of each chip.
            group = list(range(slices_of(devices)))
            axes = "slices"
        else:
            groups = groups_of(collective.groups, len(devices))
            if all(len(g) < 2 for g in groups):
                continue
            group = groups[0]
            # For pairs, check all of them: one pair may not cross an axis that another crosses.
            pairs = collective.kind == "collective-permute"
            moving = axes_of(groups if pairs else [group], dict(compiled.mesh.shape))
            axes = " x ".join(moving) or "none"
        key = (collective.kind, axes)
        new = Traffic(*key, 0, 0.0, 0.0, known, collective.between_slices)
        row = total.setdefault(key, new)
        row.calls += collective.times
        row.nbytes += collective.nbytes * collective.times
        sent = wire_bytes(collective, len(group))
        row.wire_bytes += sent
        if row.seconds is None or target.chip is None:
            continue
        if collective.between_slices:
            row.seconds += sent / target.chip.network
        else:
            row.seconds += seconds(collective, group, devices, target.chip)
    return sorted(total.values(), key=lambda row: -row.wire_bytes)


def roofline(compiled: Compiled, target: Target) -> Roofline:
    """Return the times of one step of a compiled program."""
    traffic, chip, costs = traffic_of(compiled, target), target.chip, compiled.costs
    if chip is None:
        return Roofline(traffic, None, None, None, None, None)
    estimated = None
    if chip.clock and costs.cycles:
        estimated = costs.cycles / chip.clock + costs.kernel_flops / chip.flops
    between = [row.seconds or 0.0 for row in traffic if row.between_slices]
    return Roofline(
        traffic=traffic,
        compute=costs.flops / chip.flops,
        estimated=estimated,
        memory=costs.hbm_bytes / chip.hbm,
        links=sum(row.seconds or 0.0 for row in traffic if not row.between_slices),
        network=sum(between) if between else None,
    )


def model_flops(config: TrainConfig) -> float:
    """Return the useful FLOPs of a training step over all devices, as `model.flops` counts them."""
    length = config.data.context_length
    return flops.step_flops(config.model, length, config.batch_size * length)
