"""Write a plan as a table, as JSON and as a picture of the roofline."""

import json
from pathlib import Path
from typing import Any

import jax

from mea_jax import cli
from mea_jax.cli import si, table
from mea_jax.plan.compiling import Compiled
from mea_jax.plan.roofline import Roofline, model_flops
from mea_jax.plan.target import Target

_SPARE = 0.05  # share of memory to keep free, since allocators fragment


def fits(compiled: Compiled, target: Target) -> bool | None:
    """Return whether the peak fits in the chip's memory; None if the chip is not known."""
    return None if target.chip is None else compiled.peak <= target.chip.memory


def summary(
    compiled: Compiled, target: Target, roof: Roofline, step: str, tokens: int, chips: int
) -> dict[str, Any]:
    """Return a plan as JSON values; `tokens` are those of one step over `chips` devices."""
    costs, chip = compiled.costs, target.chip
    result: dict[str, Any] = {
        "step": step,
        "topology": target.name,
        "exact": target.exact,
        "devices": chips,
        "mesh": dict(compiled.mesh.shape),
        "compiled": compiled.describe,
        "remat": compiled.config.model.remat,
        "accumulate": compiled.config.accumulate,
        "compile_seconds": round(compiled.compile_seconds, 1),
        "parameters": compiled.parameters,
        "bytes_per_device": compiled.argument_bytes
        | {"temporaries": compiled.temporaries, "peak": compiled.peak},
        "largest_temporaries": compiled.largest,
        "tokens_per_step": tokens,
        "flops_per_device": costs.flops,
        "hbm_bytes_per_device": costs.hbm_bytes,
        "bytes_accessed_per_device": costs.accessed_bytes,
        "collectives": [vars(row) for row in roof.traffic],
        "collective_bytes_per_device": sum(row.wire_bytes for row in roof.traffic),
        "pallas_calls": costs.kernels,
        "loops_counted_once": costs.unknown_loops,
        "jax": jax.__version__,
    }
    if chip is not None and roof.step is not None:
        useful = model_flops(compiled.config) / chips if step == "train" else None
        result |= {
            "chip": chip.name,
            "memory_per_device": chip.memory,
            "fits": fits(compiled, target),
            "seconds": roof.parts | {"compute_by_cycles": roof.estimated},
            "binds": roof.binding,
            "step_seconds": roof.step,
            "tokens_per_second": tokens / roof.step,
        }
        if useful is not None:
            result["mfu_upper_bound"] = useful / chip.flops / roof.step
            total = compiled.config.steps * roof.step
            result["days"] = total / 86400
            result["chip_hours"] = total * chips / 3600
    return result


def in_bytes(count: float) -> str:
    """Format bytes as MB, GB or TB."""
    if count >= 1e12:
        return f"{count / 1e12:.2f} TB"
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def in_time(seconds: float) -> str:
    """Format seconds as s or ms."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def in_long(seconds: float) -> str:
    """Format the seconds of a run as days, hours or seconds."""
    if seconds >= 86400:
        return f"{seconds / 86400:.2f} days"
    return f"{seconds / 3600:.2f} hours" if seconds >= 3600 else f"{seconds:.1f} s"


def text(plan: dict[str, Any]) -> str:
    """Return the table of a plan, and notes on it."""
    argument_bytes = dict(plan["bytes_per_device"])
    peak = argument_bytes.pop("peak")
    rows = [
        ("step", f"{plan['step']}, {plan['tokens_per_step']:,} tokens"),
        ("machine", machine(plan)),
        ("compiled", f"{plan['compiled']} in {plan['compile_seconds']:.0f} s"),
        ("parameters", f"{si(plan['parameters'])}"),
        ("memory per device", f"{in_bytes(peak)}" + _of_memory(plan, peak)),
        *((f"  {name}", in_bytes(size)) for name, size in argument_bytes.items()),
        ("work per device", f"{si(plan['flops_per_device'], 'FLOP')} of products"),
        ("  bytes accessed", in_bytes(plan["bytes_accessed_per_device"])),
        ("  HBM traffic", in_bytes(plan["hbm_bytes_per_device"])),
    ]
    if plan["step"] == "train":
        rows[2] = (
            "compiled",
            f"{rows[2][1]}; remat {plan['remat']}, accumulate {plan['accumulate']}",
        )
    for row in seen(plan["collectives"]):
        took = f", {in_time(row['seconds'])}" if row["seconds"] is not None else ""
        over = where(row)
        rows.append(
            (
                f"  {row['kind']}",
                f"{in_bytes(row['wire_bytes'])} over {over}{took}, {row['calls']}x",
            )
        )
    if "seconds" in plan:
        rows.append(("time per step", _roof(plan)))
        for name, seconds in plan["seconds"].items():
            if seconds is not None and name != "compute_by_cycles":
                share = f"{seconds / plan['step_seconds']:.0%}"
                mark = "  <- binds" if name == plan["binds"] else ""
                rows.append((f"  {name}", f"{in_time(seconds)}, {share}{mark}"))
        if plan["seconds"]["compute_by_cycles"] is not None:
            cycles = plan["seconds"]["compute_by_cycles"]
            guess = f"{in_time(cycles)} of compute, including vector work"
            rows.append(("  compiler's estimate", guess))
        rows.append(("at most", f"{plan['tokens_per_second']:,.0f} tokens/s" + _mfu(plan)))
    if "days" in plan:
        long = in_long(86400 * plan["days"])
        rows.append(("the entire run", f"at least {long}, {plan['chip_hours']:,.1f} chip-hours"))
    return table(rows) + notes(plan)


def machine(plan: dict[str, Any]) -> str:
    """Return the devices and the mesh as text."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    return f"{plan['topology']}: {plan['devices']} devices, mesh {mesh or 'of one device'}"


def seen(collectives: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the collectives that send at least 100 kB per device."""
    return [row for row in collectives if row["wire_bytes"] >= 1e5]


def where(row: dict[str, Any]) -> str:
    """Return the axes that a collective runs over, as text."""
    return "the network between slices" if row["between_slices"] else row["axes"]


def notes(plan: dict[str, Any]) -> str:
    """Return notes on the numbers of a plan, as further lines."""
    note = "" if plan["exact"] else _INEXACT
    if plan["loops_counted_once"]:
        note += f"\nloops of unknown length, counted once: {plan['loops_counted_once']}"
    return note


_INEXACT = (
    "\ncompiled for CPU devices in place of GPUs: products and collectives are the real ones, in "
    "float32;\nmemory and HBM traffic are approximate, and attention is not cuDNN's."
)


def _of_memory(plan: dict[str, Any], peak: float) -> str:
    if "memory_per_device" not in plan:
        return ""
    memory = plan["memory_per_device"]
    share = 1 - peak / memory
    if share < 0:
        return f" of {in_bytes(memory)}, {in_bytes(peak - memory)} over"
    tight = "" if share >= _SPARE else f"; keep at least {_spare()} free"
    return f" of {in_bytes(memory)}, {share:.0%} free{tight}"


def _spare() -> str:
    return f"{_SPARE:.0%}"


def _roof(plan: dict[str, Any]) -> str:
    return f"at least {in_time(plan['step_seconds'])}, if everything overlaps"


def _mfu(plan: dict[str, Any]) -> str:
    return f", MFU {plan['mfu_upper_bound']:.1%}" if "mfu_upper_bound" in plan else ""


def write(plan: Any, path: Path) -> None:
    """Write a plan as JSON and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan, indent=1) + "\n")


def picture(plans: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot one group of bars per plan: the time of compute, HBM and links, each alone.

    The longest bar binds.
    """
    plt = cli.pyplot()
    names = list(plans)
    parts = [
        p for p in ("compute", "HBM", "ICI", "DCN") if any(p in plans[n]["seconds"] for n in names)
    ]
    colours = {"compute": "#4878a8", "HBM": "#e49444", "ICI": "#6a9f58", "DCN": "#a87c9f"}
    height = 0.9 + len(names) * (0.28 * len(parts) + 0.25)
    figure, axes = plt.subplots(figsize=(7.5, height), layout="constrained")
    width = 0.8 / len(parts)
    for j, part in enumerate(parts):
        seconds = [plans[name]["seconds"].get(part) or 0.0 for name in names]
        places = [i + (j - (len(parts) - 1) / 2) * width for i in range(len(names))]
        bars = axes.barh(places, seconds, 0.9 * width, label=part, color=colours[part])
        labels = [
            in_time(s) + (" binds" if plans[n]["binds"] == part else "")
            for n, s in zip(names, seconds, strict=True)
        ]
        axes.bar_label(bars, labels=labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(right=1.25 * max(plans[n]["step_seconds"] for n in names))
    axes.set(xlabel="seconds of one step, each resource alone", title="Which resource binds")
    axes.legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
