"""Parse compiled programs from XLA's text format (HLO).

XLA's own totals count the body of a loop once, however often it runs. Training steps consist of
loops: over layers, over parts of a batch, over chunks of the loss. So this module parses the text,
and costs.py multiplies loops out.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")


def _item_bytes(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits.group()) / 8 if bits else 0


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape; `fast` if it is in on-chip memory, not in the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool

    @property
    def size(self) -> int:
        return functools.reduce(lambda a, b: a * b, self.dims, 1)

    @property
    def nbytes(self) -> float:
        return self.size * _item_bytes(self.dtype)


def arrays_of(shape: str) -> tuple[Array, ...]:
    """Return the arrays of a printed shape: one, or those of a tuple, flattened."""
    return tuple(
        Array(
            dtype,
            tuple(int(d) for d in dims.split(",") if d),
            # Memory spaces: unmarked or S(0) is main memory, S(5) is host memory.
            bool(re.search(r"S\([1-46-9]\)|S\(1\d\)", layout or "")),
        )
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      arguments: the text between the parentheses of the operation.
      attributes: the text after the parentheses.
      root: whether the computation returns this instruction's result.
    """

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(_NAME.findall(self.arguments))

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        return arrays_of(self.shape)

    def called(self, attribute: str) -> str | None:
        """Return the computation that `attribute` (calls, body, to_apply, ...) names, or None."""
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    def attribute(self, pattern: str) -> str | None:
        """Return the first group of a pattern in the attributes, or None."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass
class Computation:
    """A computation: instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self if i.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by number."""
        return {int(i.arguments): i for i in self if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each name."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users


@dataclasses.dataclass
class Program:
    """A module: its computations and the name of its entry computation."""

    computations: dict[str, Computation]
    entry: str

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    def trip_count(self, loop: Instruction) -> int | None:
        """Return the number of iterations of a `while`; None if the text does not contain it.

        The compiler or the model states the number, or the loop's condition compares a counter with
        a constant. Loops of `lax.scan` and `lax.map` do the latter and count from 0 in steps of 1.
        """
        if (known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"')) is not None:
            return int(known)
        if (counted := self._compared_with(loop)) is not None:
            return counted
        # Extra rounds of a device's experts under uneven load, as estimated in model/experts.py.
        said = loop.attribute(r'op_name="[^"]*about_(\d+)_rounds')
        return None if said is None else int(said)

    def _compared_with(self, loop: Instruction) -> int | None:
        """Return the constant that limits a loop's counter, or None."""
        condition = self[loop.called("condition") or ""]
        compared = condition.root
        while compared.opcode in ("fusion", "bitcast", "copy"):
            if compared.opcode != "fusion":
                compared = condition.instructions[compared.operands[0]]
                continue
            constants = [
                int(i.arguments)
                for name in compared.operands
                if (i := condition.instructions[name]).opcode == "constant"
            ]
            inner = self[compared.called("calls") or ""].root
            less = inner.opcode == "compare" and "direction=LT" in inner.attributes
            return constants[0] if less and len(constants) == 1 else None
        if compared.opcode != "compare" or "direction=LT" not in compared.attributes:
            return None
        limit = condition.instructions[compared.operands[1]]
        return int(limit.arguments) if limit.opcode == "constant" else None


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += text[i] == "("
        depth -= text[i] == ")"
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _parse_line(line: str) -> Instruction | None:
    text = line.strip()
    root = text.startswith("ROOT ")
    name, separator, rest = text.removeprefix("ROOT ").partition(" = ")
    if not separator or not name.startswith("%"):
        return None
    tuple_shape = rest.startswith("(")
    end = _closing(rest, 0) + 1 if tuple_shape else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(
        name=name[1:],
        shape=shape,
        opcode=rest[:opening],
        arguments=rest[opening + 1 : closing],
        attributes=rest[closing + 1 :],
        root=root,
    )


def parse(text: str) -> Program:
    """Parse a module's text. Raises `ValueError` if it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = Computation(header.group(2))
            computations[current.name] = current
            entry = current.name if header.group(1) else entry
        elif line == "}":
            current = None
        elif current is not None and (instruction := _parse_line(line)) is not None:
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the text is not a compiled program: it has no entry computation")
    return Program(computations, entry)
