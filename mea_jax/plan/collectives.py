"""Find the mesh axes that a collective runs over, and the time its bytes take on the links.

Times assume the usual ring algorithms at the full rate of the links. They are lower bounds, since
latency is left out. A ring of n devices sends (n - 1)/n of the result to gather it, the same share
of the operand to reduce and scatter it, and twice that to reduce it everywhere. In an all-to-all
each byte travels to its own destination: over n/4 links of a ring on average, n/3 of a line.
"""

import re
from collections.abc import Sequence

import numpy as np

from mea_jax.plan.chips import Chip
from mea_jax.plan.costs import Collective


def groups_of(text: str, devices: int) -> list[list[int]]:
    """Return the groups of logical device numbers from the text of a collective's attribute.

    Four notations are supported: `{{0,1},{2,3}}` (also of pairs), `{}` (all devices),
    `[2,4]<=[4,2]T(1,0)` (a reshaped, transposed count) and `mesh['a'=2,'b'=4] {'b'}` (axes of a
    mesh laid out in order).
    """
    if "mesh[" in text:
        axes = re.findall(r"'(\w+)'=(\d+)", text)
        names, sizes = [a for a, _ in axes], [int(n) for _, n in axes]
        wanted = re.findall(r"'(\w+)'", text.split("]", 1)[1])
        order = np.arange(int(np.prod(sizes))).reshape(sizes)
        rest = [i for i, name in enumerate(names) if name not in wanted]
        inner = [names.index(name) for name in wanted]
        size = int(np.prod([sizes[i] for i in inner]))
        return order.transpose(rest + inner).reshape(-1, size).tolist()
    if found := re.search(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, counted = ([int(n) for n in found.group(i).split(",")] for i in (1, 2))
        order = np.arange(int(np.prod(counted))).reshape(counted)
        if found.group(3):
            order = order.transpose([int(n) for n in found.group(3).split(",")])
        return order.reshape(shape[0], -1).tolist()
    groups = [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", text)]
    return groups or [list(range(devices))]


def axes_of(groups: Sequence[Sequence[int]], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which a group's devices differ, in the mesh's order."""
    sizes = list(mesh_shape.values())
    names = list(mesh_shape)
    moving: set[str] = set()
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), sizes))
        moving |= {n for n, row in zip(names, places, strict=True) if len(set(row.tolist())) > 1}
    return tuple(name for name in names if name in moving)


def wire_bytes(collective: Collective, group: int) -> float:
    """Return the bytes that each device sends in all runs of a collective among `group` devices."""
    share = (group - 1) / group
    factor = {
        "all-reduce": 2 * share,
        "all-to-all": share,
        "collective-permute": 1.0,
        "collective-broadcast": 1.0,
    }.get(collective.kind, share)
    return factor * collective.nbytes * collective.times


def slices_of(devices: Sequence) -> int:
    """Return the number of slices that the devices form."""
    return len({getattr(d, "slice_index", None) or 0 for d in devices})


def seconds(collective: Collective, group: Sequence[int], devices: Sequence, chip: Chip) -> float:
    """Return the seconds that all runs of a collective take on the wires at full rate.

    `group` is one of its groups, as indices into `devices`. On a torus the links of each axis that
    the group spans count: in both directions if the axis is a ring, otherwise in one.
    """
    if len(group) < 2:
        return 0.0
    sent = wire_bytes(collective, len(group))
    members = [devices[i] for i in group]
    if not chip.torus:
        return sent / chip.link
    coordinates = np.asarray([d.coords for d in members])
    every = np.asarray([d.coords for d in devices])
    rate = hops = 0.0
    for axis in range(coordinates.shape[1]):
        if len(set(coordinates[:, axis].tolist())) > 1:
            size = len(set(every[:, axis].tolist()))
            ring = size % chip.wraps_at == 0
            rate += chip.link * (2 if ring else 1)
            hops += size / (4 if ring else 3)
    if collective.kind == "all-to-all":
        sent *= max(hops, 1.0)
    return sent / (rate or chip.link)
