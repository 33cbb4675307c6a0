"""Formats the report as a table for the terminal: one row per measure, one column per model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]


def short(source: str) -> str:
    """Strip the path from a source's name: "jsonl:texts/en.jsonl" becomes "en.jsonl"."""
    return source.split(":", 1)[1].rstrip("/").rsplit("/", 1)[-1] if ":" in source else source


def text(report: Report) -> str:
    """Return the complete table, with losses and speeds also relative to the first model."""
    models = report["models"]
    rows: list[list[str]] = [["", *(model["name"] for model in models)]]

    def add(title: str, values: Sequence[str]) -> None:
        rows.append([title, *values])

    first = models[0]
    add("parameters", [f"{m['parameters']:,}" for m in models])
    size = first["cache"]["bytes_per_token"]
    add(
        "cache bytes per token",
        [f"{m['cache']['bytes_per_token']:,.0f}" for m in models[:1]]
        + [
            f"{m['cache']['bytes_per_token']:,.0f} ({m['cache']['bytes_per_token'] / size:.3g}x)"
            for m in models[1:]
        ],
    )
    add("  stored as", [f"{m['cache']['dtype']}, {m['cache']['forms']}" for m in models])
    if "loss" in first:
        add("held-out loss, nats per token", [""] * len(models))
        for name in first["loss"]:
            add(f"  {short(name)}", _against([m["loss"][name] for m in models], "loss"))
        add("bits per byte", [_number(m["loss"]["all"]["bits_per_byte"], ".4f") for m in models])
    if "positions" in first:
        add("loss by tokens of context", [""] * len(models))
        for i, bucket in enumerate(first["positions"]["all"]):
            cells = [m["positions"]["all"][i] for m in models]
            add(f"  {bucket['from']:,} to {bucket['to']:,}", _against(cells, "loss"))
    if "passkey" in first:
        add("pass keys right (nats per answer)", [""] * len(models))
        for length in dict.fromkeys(row["length"] for row in first["passkey"]):
            chosen = [[r for r in m["passkey"] if r["length"] == length] for m in models]
            add(f"  {length:,} tokens", [_answers(some) for some in chosen])
    if "arithmetic" in first:
        add("sums right (nats per answer)", [""] * len(models))
        for digits in dict.fromkeys(row["digits"] for row in first["arithmetic"]):
            chosen = [[r for r in m["arithmetic"] if r["digits"] == digits] for m in models]
            add(f"  {digits} digit{'s' if digits > 1 else ''}", [_answers(some) for some in chosen])
    if "speed" in first:
        of_rows = first["speed"][0]["rows"]
        batch = f", {of_rows} sequences" if of_rows > 1 else ""
        add(f"decoding, tokens/s{batch}", [""] * len(models))
        for i, row in enumerate(first["speed"]):
            cells = [m["speed"][i] for m in models]
            values = [f"{c['tokens_per_second']['median']:,.1f}" for c in cells]
            add(f"  {row['context']:,} positions", _times(values, cells, "over_first"))
        timed = first["speed"] if "prefill_seconds" in first["speed"][0] else []
        if timed:
            add(f"prefill, seconds{batch}", [""] * len(models))
        for i, row in enumerate(timed):
            cells = [m["speed"][i] for m in models]
            values = [f"{c['prefill_seconds']['median']:.3f}" for c in cells]
            add(f"  {row['context']:,} tokens", _times(values, cells, "prefill_over_first"))
    return _aligned(rows)


def _number(value: float | None, how: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, how)


def _against(cells: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Return the first value, and the others' increases over it, each with its standard error."""

    def with_error(value: str, error: float) -> str:
        return f"{value} ±{error:.4f}" if math.isfinite(error) else value

    if not math.isfinite(cells[0][key]):  # a bucket without a token
        return [""] * len(cells)
    return [
        with_error(f"{cells[0][key]:.4f}", cells[0]["error"]),
        *(with_error(f"{c['increase']:+.4f}", c["increase_error"]) for c in cells[1:]),
    ]


def _times(values: Sequence[str], cells: Sequence[Mapping[str, Any]], ratio: str) -> list[str]:
    others = zip(values[1:], cells[1:], strict=True)
    return [values[0], *(f"{value} ({cell[ratio]['median']:.2f}x)" for value, cell in others)]


def _answers(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the share of right answers and mean nats over rows, weighted by their samples."""
    samples = sum(row["samples"] for row in rows)
    exact = sum(row["samples"] * row["exact"] for row in rows) / samples
    nats = sum(row["samples"] * row["nats"] for row in rows) / samples
    return f"{exact:.0%} ({nats:.2f})"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
