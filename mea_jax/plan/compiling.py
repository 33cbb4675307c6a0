"""Compile a program ahead of time and read the compiler's reports on it."""

import contextlib
import dataclasses
import functools
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mea_jax.config.schema import ModelConfig, TrainConfig
from mea_jax.errors import UserError
from mea_jax.plan.costs import Costs, count
from mea_jax.plan.hlo import parse
from mea_jax.plan.target import Target


class DoesNotFit(UserError):
    """A program that the compiler refuses: it needs `needed` of `available` bytes of a device."""

    def __init__(self, needed: float, available: float):
        super().__init__(
            f"does not fit: needs {needed / 1e9:.2f} of {available / 1e9:.2f} GB per device, "
            f"{(needed - available) / 1e9:.2f} GB over"
        )
        self.needed, self.available = needed, available


@dataclasses.dataclass
class Compiled:
    """A compiled step. Bytes are per device."""

    config: TrainConfig  # resolved
    mesh: Mesh
    costs: Costs
    compile_seconds: float
    argument_bytes: dict[str, float]  # arguments in memory before it runs, by name
    temporaries: float
    results: float  # except those that reuse the memory of an argument
    peak: float
    parameters: int  # of the full model
    largest: list[str]  # the largest temporaries, as the compiler lists them
    describe: str
    text: str  # of the compiled program


def per_device_bytes(abstract: Any) -> float:
    """Return the bytes per device of a tree of abstract arrays with shardings."""

    def one(x: jax.ShapeDtypeStruct) -> float:
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        return functools.reduce(lambda a, b: a * b, shape, 1) * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(abstract))


def for_cpu_stand_in(model: ModelConfig, target: Target) -> ModelConfig:
    """Return the model as CPU devices compile it in place of other devices.

    If the target is not exact, products are in float32 and the backend is "xla": the compiler for
    CPUs has no plain products in bfloat16, and our own kernels for CPUs would hide what other
    devices run.
    """
    if target.exact:
        return model
    return dataclasses.replace(model, backend="xla", dtype="float32")


def compile_and_measure(
    lowered: Any,
    target: Target,
    *,
    config: TrainConfig,
    mesh: Mesh,
    argument_bytes: dict[str, float],
    params: Any,
    describe: str,
) -> Compiled:
    """Compile a lowered program and return its costs and memory. Raises `DoesNotFit`."""
    executable, text, largest, seconds = _compile(lowered, target)
    memory = executable.memory_analysis()
    # Donated arguments are counted once.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        config=config,
        mesh=mesh,
        costs=count(parse(text)),
        compile_seconds=seconds,
        argument_bytes=argument_bytes,
        temporaries=memory.temp_size_in_bytes,
        results=results,
        peak=memory.argument_size_in_bytes
        + results
        + memory.temp_size_in_bytes
        # The program itself is in the device's memory, too.
        + memory.generated_code_size_in_bytes,
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        largest=largest,
        describe=describe,
        text=text,
    )


_OVER = (
    r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm",
    r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)",
)


def _size(text: str) -> float:
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    return float(text.rstrip("KMGT")) * unit.get(text[-1], 1)


def _compile(lowered: Any, target: Target) -> tuple[Any, str, list[str], float]:
    """Return the executable, its text, its largest temporaries and the seconds to compile it.

    The text comes from the compiler's own dump: jax's reader of programs supports fewer operations
    than libtpu writes (asynchronous updates), and only the dump contains cycle estimates.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(jax.clear_caches)  # plans compile many programs, each once
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            executable = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            for pattern in _OVER:
                if found := re.search(pattern, message):
                    raise DoesNotFit(_size(found.group(1)), _size(found.group(2))) from error
            if "RESOURCE_EXHAUSTED" in message and target.chip is not None:
                raise UserError(
                    f"does not fit: {message.splitlines()[0]}; use more devices or a smaller batch"
                ) from error
            raise
        seconds = time.perf_counter() - began
        for ending in ("after_codegen.txt", "after_optimizations.txt"):
            files = sorted(Path(folder).glob(f"*{ending}"), key=lambda f: f.stat().st_size)
            if files:
                text = files[-1].read_text()
                break
        else:
            text = executable.as_text()
        reports = sorted(
            Path(folder).glob("*memory-usage-report.txt"), key=lambda f: f.stat().st_size
        )
        largest = _largest(reports[-1].read_text()) if reports else []
    return executable, text, largest, seconds


def _largest(report: str, count: int = 6) -> list[str]:
    """Return the first `count` buffers in the compiler's table, as text: size and shape."""
    rows = []
    for line in report.splitlines():
        cells = [cell.strip() for cell in line.split(";")]
        if len(cells) == 5 and "(" in cells[0] and cells[0][0].isdigit():
            rows.append(f"{cells[1]}: {cells[4]}")
    return rows[:count]
