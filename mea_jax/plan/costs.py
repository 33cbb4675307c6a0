"""Count FLOPs, bytes and collectives of one run of a compiled program, on one device.

Most rules are those of XLA: an operation reads its operands and writes its result once, a fusion
is one operation, a slice counts only its own bytes, and an update in place counts only the update.
Unlike in XLA, loops are multiplied out, and arrays in on-chip memory do not count as bytes. A
Pallas kernel counts its operands once, however often its blocks are read again, and its FLOPs by a
separate rule (`kernel_flops`).
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

from mea_jax.plan.hlo import Array, Computation, Instruction, Program, arrays_of

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
# Operations that move no bytes, including loops, calls and the ends of asynchronous pairs.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "while", "call", "conditional", "async-update", "opt-barrier"),
    *("async-done", "copy-done", "send-done", "recv-done", "add-dependency", "domain"),
}
# Custom calls that only mark places or memory.
_MARKS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollective", "Sharding", "TODO")
_LARGEST_CYCLES = 10**12  # larger estimates mean "unknown"

ByteCounter = Callable[[Sequence[Array]], float]


@dataclasses.dataclass
class Collective:
    """One collective; `nbytes` is the size of its operands or of its results, if larger."""

    kind: str
    nbytes: float
    times: int
    groups: str  # the text that lists the groups of devices
    source: str  # the model's operation that it comes from
    between_slices: bool = False  # through the hosts, over the data-centre network


@dataclasses.dataclass
class Costs:
    """The costs of one device in one run of the program."""

    flops: float = 0.0  # of matrix products, including recomputation
    hbm_bytes: float = 0.0  # read from and written to main memory
    accessed_bytes: float = 0.0  # in any memory, without moves between memories
    cycles: float = 0.0  # the TPU compiler's own estimate, if any
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)  # Pallas calls by name
    kernel_flops: float = 0.0  # their part of `flops`, which `cycles` lacks
    unknown_loops: list[str] = dataclasses.field(default_factory=list)  # counted once


def count(program: Program) -> Costs:
    """Return the costs of a program's entry computation."""
    costs = Costs()
    seen: set[str] = set()
    _walk(program, program[program.entry], 1, costs, seen)
    return costs


def _walk(
    program: Program, computation: Computation, times: int, costs: Costs, seen: set[str]
) -> None:
    for instruction in computation:
        _count_one(program, computation, instruction, times, costs, seen)


def _count_one(program, computation, instruction, times, costs: Costs, seen: set[str]) -> None:
    opcode = instruction.opcode
    if opcode == "while":
        trips = program.trip_count(instruction)
        if trips is None:
            costs.unknown_loops.append(instruction.name)
        body = program[instruction.called("body") or ""]
        _walk(program, body, times * (1 if trips is None else trips), costs, seen)
    elif opcode == "call":
        _walk(program, program[instruction.called("to_apply") or ""], times, costs, seen)
    elif opcode == "conditional":
        # Only one branch runs: count the most expensive one.
        branches = re.findall(r"%([\w.\-]+)", instruction.attributes.split("metadata")[0])
        options = []
        for name in (b for b in branches if b in program.computations):
            options.append(Costs())
            _walk(program, program[name], times, options[-1], seen)
        if options:
            _add(costs, max(options, key=lambda c: (c.flops, c.hbm_bytes)))
    elif opcode == "async-start":
        called = instruction.called("calls")
        if called is not None:
            _walk(program, program[called], times, costs, seen)
    else:
        costs.flops += times * _matrix_flops(program, computation, instruction)
        costs.hbm_bytes += times * _bytes(program, computation, instruction, _main)
        if not opcode.startswith("copy-start"):
            costs.accessed_bytes += times * _bytes(program, computation, instruction, _all)
        if (cycles := instruction.attribute(r'"estimated_cycles":"(\d+)"')) is not None:
            costs.cycles += times * (int(cycles) if int(cycles) < _LARGEST_CYCLES else 0)
        _collectives(program, computation, instruction, times, costs, seen)
        if _is_kernel(instruction):
            name = re.sub(r"[.\d]+$", "", instruction.name)
            costs.kernels[name] = costs.kernels.get(name, 0) + times
            operands = _operands(computation, instruction)
            costs.kernel_flops += times * kernel_flops(name, operands, instruction.arrays)


def _add(costs: Costs, other: Costs) -> None:
    for field in dataclasses.fields(Costs):
        mine, its = getattr(costs, field.name), getattr(other, field.name)
        if isinstance(mine, dict):
            for name, number in its.items():
                mine[name] = mine.get(name, 0) + number
        else:
            setattr(costs, field.name, mine + its)


# -- FLOPs ---------------------------------------------------------------------------------


def _matrix_flops(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Return two FLOPs per multiply-add of matrix products, including those inside fusions."""
    opcode = instruction.opcode
    if opcode == "fusion":
        inner = program[instruction.called("calls") or ""]
        return sum(_matrix_flops(program, inner, i) for i in inner)
    if opcode == "dot":
        return _dot_flops(computation, instruction)
    if opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if _is_kernel(instruction):
        operands = _operands(computation, instruction)
        return kernel_flops(instruction.name, operands, instruction.arrays)
    return 0.0


def _dot_flops(computation: Computation, dot: Instruction) -> float:
    lhs = computation.instructions[dot.operands[0]].arrays[0]
    contracted = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    flops = 2.0 * dot.arrays[0].size
    for dim in filter(None, contracted.split(",")):
        flops *= lhs.dims[int(dim)]
    return flops


def _convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """Return the FLOPs of a convolution, counting only window taps that meet the input.

    The TPU compiler writes every product as a convolution, and batch axes as windows of which only
    one tap is real.
    """
    lhs, rhs = (computation.instructions[name].arrays[0] for name in convolution.operands[:2])
    labels = convolution.attribute(r"dim_labels=([\w>\-]+)") or ""
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", labels)
    out = convolution.arrays[0]
    flops = 2.0 * rhs.dims[rhs_labels.index("i")]  # already per feature group
    flops *= out.dims[out_labels.index("f")] * out.dims[out_labels.index("b")]
    window = convolution.attribute(r"window=\{([^}]*)\}") or ""
    settings = dict(item.split("=") for item in window.split())
    spatial = sorted(c for c in lhs_labels if c.isdigit())
    for i, label in enumerate(spatial):
        flops *= _taps(
            size=lhs.dims[lhs_labels.index(label)],
            taps=rhs.dims[rhs_labels.index(label)],
            outputs=out.dims[out_labels.index(label)],
            stride=_window(settings, "stride", i, 1),
            low=_window(settings, "pad", i, 0),
            spread=_window(settings, "lhs_dilate", i, 1),
            gap=_window(settings, "rhs_dilate", i, 1),
        )
    return flops / int(convolution.attribute(r"batch_group_count=(\d+)") or 1)


def _window(settings: dict[str, str], name: str, axis: int, default: int) -> int:
    """Return one number of a window's settings, such as `size=1x8 pad=0_0x7_7` (the low pad)."""
    if name not in settings:
        return default
    return int(settings[name].split("x")[axis].split("_")[0])


def _taps(size: int, taps: int, outputs: int, stride: int, low: int, spread: int, gap: int) -> int:
    """Return the number of pairs of an output and a tap that read a real input.

    Above 2^16 pairs this is an upper bound.
    """
    total = 0
    for tap in range(taps):
        # Output o reads position o * stride + tap * gap - low of the dilated input.
        for output in range(outputs) if outputs * taps <= 1 << 16 else ():
            place = output * stride + tap * gap - low
            total += 0 <= place <= (size - 1) * spread and place % spread == 0
    return total if outputs * taps <= 1 << 16 else min(outputs * taps, size * taps)


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.attributes


def kernel_flops(name: str, operands: Sequence[Array], results: Sequence[Array]) -> float:
    """Return the FLOPs of one call of the kernel `name`; 0 if the kernel is not known.

    Grouped products (`ragged_dot`): each row is multiplied by one matrix, or its outer product is
    added to one.

    Splash attention, causal: half of all pairs count, also under a window, which the call does not
    tell. Forward takes 2 products per pair. Backward in one kernel takes 5 and leaves a partial dq
    for each block of keys (one axis more than q). Backward in two kernels takes 3 for dq and 4 for
    dk and dv, since both recompute the probabilities.
    """
    floats = [a for a in operands if a.dtype in ("bf16", "f32")]
    if "ragged-dot" in name and len(floats) == 2 and results:
        rows, other = floats
        if len(other.dims) == 3:
            return 2.0 * results[0].size * rows.dims[-1]
        return 2.0 * rows.size * other.dims[-1]
    wide = [a for a in floats if len(a.dims) >= 3]
    if "splash" not in name or len(wide) < 3:
        return 0.0
    q, k, v = wide[:3]
    pairs = q.size // q.dims[-1] * k.dims[-2] / 2
    h, w = q.dims[-1], v.dims[-1]
    if "_dq" in name:
        return 2 * pairs * (2 * h + w)
    if "_dkv" in name:
        fused = any(len(a.dims) > len(q.dims) for a in results)
        return 2 * pairs * ((3 if fused else 2) * h + 2 * w)
    return 2 * pairs * (h + w)


# -- bytes ---------------------------------------------------------------------------------


def _operands(computation: Computation, instruction: Instruction) -> list[Array]:
    return [a for name in instruction.operands for a in computation.instructions[name].arrays]


def _main(arrays: Sequence[Array]) -> float:
    """Return the bytes of the arrays that are in main memory."""
    return sum(a.nbytes for a in arrays if not a.fast)


def _all(arrays: Sequence[Array]) -> float:
    return sum(a.nbytes for a in arrays)


def _bytes(
    program: Program, computation: Computation, instruction: Instruction, weigh: ByteCounter
) -> float:
    """Return the bytes that one run of an instruction reads and writes, counted by `weigh`."""
    opcode = instruction.opcode
    if opcode in _FREE:
        return 0.0
    if opcode == "custom-call" and any(mark in instruction.attributes for mark in _MARKS):
        return 0.0
    first = [computation.instructions[name] for name in instruction.operands]
    if opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
        moved = instruction.arrays[-2:-1] if opcode == "slice-start" else instruction.arrays[:1]
        read = _all(moved) if weigh(first[0].arrays[:1]) else 0.0
        return read + weigh(moved)
    if opcode == "dynamic-update-slice":
        return 2 * weigh(first[1].arrays) if weigh(first[0].arrays) else 0.0
    if opcode in ("send", "recv"):
        return weigh(instruction.arrays[:1])
    if opcode == "copy-start":  # its shape is (destination, source, a semaphore)
        return weigh(instruction.arrays[:2])
    if opcode.endswith("-start"):  # (operands, results, ...)
        return weigh(instruction.arrays)
    if opcode.endswith("-done"):
        return 0.0
    if opcode != "fusion":
        return weigh(_operands(computation, instruction)) + weigh(instruction.arrays)
    inner = program[instruction.called("calls") or ""]
    read = sum(
        _read(program, inner, inner.parameters[i].name, weigh(source.arrays))
        for i, source in enumerate(first)
        if i in inner.parameters
    )
    return read + _written(program, inner, inner.root, instruction.arrays, weigh)


def _read(program: Program, inner: Computation, name: str, total: float) -> float:
    """Return the bytes that a fusion reads of an operand of `total` bytes: all, or its slices."""
    if total == 0:
        return 0.0
    read = 0.0
    for user in inner.users.get(name, []):
        position = user.operands.index(name)
        if user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
            read += user.arrays[0].nbytes
        elif user.opcode == "dynamic-update-slice" and position == 0:
            continue  # updated in place: `_written` counts it
        elif user.opcode == "bitcast":
            read += _read(program, inner, user.name, total)
        elif user.opcode == "fusion":
            nested = program[user.called("calls") or ""]
            if position in nested.parameters:
                read += _read(program, nested, nested.parameters[position].name, total)
        else:
            return total
    return min(read, total)


def _written(
    program: Program,
    inner: Computation,
    root: Instruction,
    arrays: tuple[Array, ...],
    weigh: ByteCounter,
) -> float:
    """Return the bytes that a fusion writes: its result, or the update of a larger array."""
    if root.opcode == "tuple":
        parts = [inner.instructions[name] for name in root.operands]
        if len(parts) == len(arrays):
            return sum(
                _written(program, inner, part, (array,), weigh)
                for part, array in zip(parts, arrays, strict=True)
            )
    if root.opcode in ("bitcast", "copy") and root.operands:
        source = inner.instructions[root.operands[0]]
        if source.opcode == "dynamic-update-slice":
            root = source
    if root.opcode == "fusion":
        nested = program[root.called("calls") or ""]
        return _written(program, nested, nested.root, arrays, weigh)
    if root.opcode == "dynamic-update-slice" and weigh(arrays):
        return inner.instructions[root.operands[1]].arrays[0].nbytes
    return weigh(arrays)


# -- collectives ---------------------------------------------------------------------------


def _collectives(
    program, computation, instruction, times, costs: Costs, seen: set[str], overlapped: bool = False
) -> None:
    """Add an instruction's collectives to `costs`, including those inside fusions.

    A collective that overlaps other work appears in its start, in the fusions between and in its
    end. These share a channel, so each channel is counted once. Collectives that do not overlap are
    counted each time: those that a model calls by name (`shard_map`) share a channel even before
    the TPU's compiler runs.
    """
    if instruction.opcode == "fusion":
        inner = program[instruction.called("calls") or ""]
        for i in inner:
            _collectives(program, inner, i, times, costs, seen, overlapped=True)
        return
    # TPU slices exchange data through the hosts; each chip sends its own share.
    between = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
    if instruction.opcode == "send" and between is not None:
        kind = between.lower().replace("_", "-")
        source = instruction.attribute(r'rendezvous="([^"]*)"') or instruction.name
        nbytes = instruction.arrays[0].nbytes
        costs.collectives.append(Collective(kind, nbytes, times, "", source, True))
        return
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES or instruction.opcode.endswith("-done"):
        return
    channel = instruction.attribute(r"channel_id=(\d+)")
    if channel is not None:
        if channel in seen and (overlapped or instruction.opcode.endswith("-start")):
            return
        seen.add(channel)
    results = instruction.arrays
    if instruction.opcode.endswith("-start"):
        results = arrays_of(instruction.shape)
    moved = max(
        sum(a.nbytes for a in _operands(computation, instruction)),
        sum(a.nbytes for a in results) if kind == instruction.opcode else 0.0,
    )
    if kind == "all-gather" and instruction.opcode.endswith("-start"):
        moved = results[1].nbytes  # (operand, result, ...)
    costs.collectives.append(
        Collective(
            kind=kind,
            nbytes=moved,
            times=times,
            groups=_groups(instruction.attributes),
            source=instruction.attribute(r'op_name="([^"]*)"') or instruction.name,
        )
    )


def _groups(attributes: str) -> str:
    """Return the part of the attributes that lists the groups of devices, as printed."""
    found = re.search(
        r"(replica_groups|source_target_pairs)=(\{\{.*?\}\}|\{\}|mesh\[[^\]]*\](?:[^{]*\{[^}]*\})"
        r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)",
        attributes,
    )
    return found.group(0) if found else ""
