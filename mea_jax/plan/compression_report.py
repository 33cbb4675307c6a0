"""The plan of a compression for people and programs: a column a program, and the sum of stages."""

import functools
from collections.abc import Callable
from typing import Any

from mea_jax.cli import si, table
from mea_jax.compress.options import Options
from mea_jax.config.schema import TrainConfig
from mea_jax.plan import output
from mea_jax.plan.compiling import Compiled
from mea_jax.plan.compression import Work, layer_bytes, measuring_bytes, work_of
from mea_jax.plan.output import in_bytes, in_long, in_time
from mea_jax.plan.roofline import roofline
from mea_jax.plan.target import Target


def summary(
    programs: dict[str, Compiled], config: TrainConfig, target: Target, options: Options
) -> dict[str, Any]:
    """All of the plan as JSON values; `programs` of the resolved `config`."""
    work, first = work_of(config, target, options), next(iter(programs.values()))
    plans = {
        name: output.summary(
            compiled, target, roofline(compiled, target), name, work.tokens, compiled.mesh.size
        )
        for name, compiled in programs.items()
    }
    size, nbytes = layer_bytes(config)
    return {
        "step": "compress",
        "topology": target.name,
        "exact": target.exact,
        "devices": first.mesh.size,
        "mesh": dict(first.mesh.shape),
        "compiled": first.describe,
        "compile_seconds": sum(plan["compile_seconds"] for plan in plans.values()),
        "keep": options.keep,
        "method": options.method,
        "parameters": first.parameters,
        "layers": work.layers,
        "layer_parameters": size,
        "layer_bytes_per_device": nbytes,
        "measured_budget_bytes_per_device": measuring_bytes(config),
        "tokens_per_step": work.tokens,
        "windows_per_batch": work.windows,
        "calibration_batches": work.text,
        "repair_batches": work.repair_text,
        "held_out_batches": work.held_out,
        "repair_steps": work.repair_steps,
        "disk_bytes": work.disk,
        "loops_counted_once": [n for p in plans.values() for n in p["loops_counted_once"]],
        "programs": plans,
        "stages": [_stage(work, stage, plans) for stage in work.stages],
    }


def _stage(work: Work, stage: Any, plans: dict[str, dict[str, Any]]) -> dict[str, Any]:
    row = {
        "name": stage.name,
        "optional": stage.optional,
        "runs": stage.runs,
        "disk_bytes_moved": work.moved(stage),
    }
    if all("step_seconds" in plans[name] for name in stage.runs):
        row["seconds"] = sum(n * plans[name]["step_seconds"] for name, n in stage.runs.items())
        row["seconds_by_cycles"] = sum(n * _guess(plans[name]) for name, n in stage.runs.items())
    return row


def _guess(plan: dict[str, Any]) -> float:
    """Seconds of a run, vector work included where the compiler says it."""
    return max(plan["step_seconds"], plan["seconds"]["compute_by_cycles"] or 0.0)


def text(plan: dict[str, Any]) -> str:
    """The tables that a person reads."""
    length = plan["tokens_per_step"] // plan["windows_per_batch"]
    rows = [
        (
            "step",
            f"compress, {plan['layers']} layers, one at a time, {plan['keep']:g} of the cache",
        ),
        ("machine", output.machine(plan)),
        ("compiled", f"{plan['compiled']} in {plan['compile_seconds']:.0f} s"),
        ("parameters", si(plan["parameters"])),
        (f"  each of {plan['layers']} layers", _layer(plan)),
        ("a batch", f"{plan['windows_per_batch']} windows of {length:,} tokens"),
        ("  to calibrate on", _batches(plan, plan["calibration_batches"])),
        ("  held out", f"{_batches(plan, plan['held_out_batches'])}, if there are as many"),
        ("waits on disk", f"{in_bytes(plan['disk_bytes'])} of residuals at most"),
    ]
    tables = (table(rows), _grid(_costs(plan["programs"])), _grid(_runs(plan)))
    return "\n\n".join(tables) + _APART + output.notes(plan)


def _layer(plan: dict[str, Any]) -> str:
    words = f"{si(plan['layer_parameters'])}, {in_bytes(plan['layer_bytes_per_device'])} a device"
    whole = in_bytes(plan["measured_budget_bytes_per_device"])
    return f"{words}; all of them, for --budget measured, {whole}"


def _batches(plan: dict[str, Any], count: int) -> str:
    words = "1 batch" if count == 1 else f"{count} batches"
    return f"{words}, {count * plan['tokens_per_step']:,} tokens"


def _costs(plans: dict[str, dict[str, Any]]) -> list[list[str]]:
    """What each program takes in one run, on one device; a column each."""
    rows: list[list[str]] = [["one run, one device", *plans]]

    def add(label: str, cell: Callable[[dict[str, Any]], str]) -> None:
        cells = [cell(plan) for plan in plans.values()]
        if any(cells):
            rows.append([label, *cells])

    def add_parts(of: str, shown: Callable[[float], str], least: float = 0.0) -> None:
        names = dict.fromkeys(name for plan in plans.values() for name in plan.get(of, {}))
        for name in sorted((n for n in names if n != "peak"), key=_LAST.count):
            cell = functools.partial(_part, of=of, name=name, shown=shown, least=least)
            add("  " + _LABELS.get(name, name), cell)

    add("memory", lambda p: in_bytes(p["bytes_per_device"]["peak"]))
    add("  free", _free)
    add_parts("bytes_per_device", in_bytes, _SMALL)
    add("products", lambda p: si(p["flops_per_device"], "FLOP"))
    add("bytes accessed", lambda p: in_bytes(p["bytes_accessed_per_device"]))
    add("HBM traffic", lambda p: in_bytes(p["hbm_bytes_per_device"]))
    keys = {(r["kind"], output.where(r)) for p in plans.values() for r in p["collectives"]}
    for kind, over in sorted(keys):
        add(f"{kind} over {over}", functools.partial(_sent, key=(kind, over)))
    if any("seconds" in p for p in plans.values()):
        add("time, at least", lambda p: in_time(p["step_seconds"]))
        add("  binds", lambda p: p["binds"])
        add_parts("seconds", in_time)
    return rows


_SMALL = 1e4  # bytes that are not worth a cell
_LAST = ("results", "temporaries")  # of what lies on a device
_LABELS = {"compute_by_cycles": "compiler's guess"}


def _part(
    plan: dict[str, Any], of: str, name: str, shown: Callable[[float], str], least: float
) -> str:
    return _some(plan.get(of, {}).get(name), shown, least)


def _some(value: float | None, shown: Callable[[float], str], least: float) -> str:
    return "" if value is None or value < least else shown(value)


def _free(plan: dict[str, Any]) -> str:
    if "memory_per_device" not in plan:
        return ""
    return f"{1 - plan['bytes_per_device']['peak'] / plan['memory_per_device']:.0%}"


def _sent(plan: dict[str, Any], key: tuple[str, str]) -> str:
    rows = [r for r in plan["collectives"] if (r["kind"], output.where(r)) == key]
    return _some(sum(r["wire_bytes"] for r in rows), in_bytes, _SMALL)


def _runs(plan: dict[str, Any]) -> list[list[str]]:
    """How often each stage runs each program and what that takes, with and without repair."""
    names, stages = list(plan["programs"]), plan["stages"]
    rows = [["runs, all layers", *names, "at least", "guess", "residuals moved"]]
    for stage in stages:
        counts = [f"{stage['runs'][n]:,}" if n in stage["runs"] else "" for n in names]
        mark = " *" if stage["optional"] else ""
        rows.append([f"  {stage['name']}{mark}", *counts, *_takes([stage])])
    usual = [stage for stage in stages if not stage["optional"]]
    for label, some in (("in all", usual), ("  with repair *", stages)):
        rows.append([label, *("" for _ in names), *_takes(some)])
    return rows


def _takes(stages: list[dict[str, Any]]) -> list[str]:
    """Time at least, by the compiler's guess, and bytes of residuals; no times of unknown chips."""
    moved = in_bytes(sum(stage["disk_bytes_moved"] for stage in stages))
    if not all("seconds" in stage for stage in stages):
        return ["", "", moved]
    keys = ("seconds", "seconds_by_cycles")
    times = (sum(stage[key] for stage in stages) for key in keys)
    return [*(in_long(s) if s >= 60 else in_time(s) for s in times), moved]


def _grid(rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: list[str]) -> str:
        cells = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        return f"  {row[0]:<{widths[0]}}  {'  '.join(cells)}".rstrip()

    return "\n".join(map(line, rows))


_APART = (
    "\n* only with --repair layerwise. Residuals move between devices and disk: that, the reading"
    "\n  and writing of checkpoints, and the host, which solves for each layer, come on top."
)
