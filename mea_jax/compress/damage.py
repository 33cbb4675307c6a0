"""Report the effect of a compression as a table, JSON and a figure."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors
from mea_jax.compress.options import Options
from mea_jax.compress.probe import Sensitivity
from mea_jax.compress.stream import Losses
from mea_jax.config.schema import Side
from mea_jax.ops.statistics import ratio_of_sums

Batches = Sequence[Sequence[float]]  # a value of `Losses`


def summarise(
    options: Options,
    cache: tuple[list[tuple[float, float]], list[tuple[float, float]]],
    rows: list[dict[str, Any]],
    losses: tuple[Losses, Losses],
    sensitivities: list[Sensitivity],
    heads: int,
) -> dict[str, Any]:
    """Return all facts about one compression, as JSON values.

    Args:
      options: the options of the compression.
      cache: bytes per position of each layer's keys and values, before and after.
      rows: a row per layer.
      losses: held-out losses, before and after.
      sensitivities: those that were measured; may be empty.
      heads: the number of composite key/value heads, K.
    """
    before, after = ([sum(layer) for layer in side] for side in cache)
    of_sources = domains(*losses)
    tokens = [sum(n for _, n in batches) for batches in losses[0].values()]
    alike = _overall(list(of_sources.values()), [1.0] * len(of_sources))
    return {
        "options": options.__dict__ | {},
        "versions": {"jax": jax.__version__},
        "kv_heads": heads,
        "cache_bytes_per_token": {"before": round(sum(before), 2), "after": round(sum(after), 2)},
        "cache_kept": sum(after) / sum(before),
        "layers": [
            row | {"bytes_before": round(b, 2), "bytes_after": round(a, 2)}
            for row, b, a in zip(rows, before, after, strict=True)
        ],
        "held_out": {
            **_overall(list(of_sources.values()), tokens),
            **{
                f"mean_{name}": alike[name]
                for name in ("increase", "error", "divergence", "divergence_error")
            },
            "tokens": int(sum(tokens)),
            "domains": of_sources,
        },
        "sensitivities": [s.__dict__ for s in sensitivities],
    }


def domains(before: Losses, after: Losses) -> dict[str, dict[str, float]]:
    """Return the losses, their increase and the divergence of each source of text."""
    return {name: _compared(before[name], after[name]) for name in before}


def _compared(before: Batches, after: Batches) -> dict[str, float]:
    """Return losses, their increase and the divergence, in nats per token.

    The increase and the divergence have standard errors over batches. The increase is paired: each
    batch is compared with itself.
    """
    old_U, tokens_U = np.transpose(before)
    new_U, _, moved_U = np.transpose(after)
    found = {
        "before": ratio_of_sums(old_U, tokens_U)[0],
        "after": ratio_of_sums(new_U, tokens_U)[0],
    }
    found["increase"], found["error"] = ratio_of_sums(new_U - old_U, tokens_U)
    found["divergence"], found["divergence_error"] = ratio_of_sums(moved_U, tokens_U)
    return found


def _overall(domains: Sequence[dict[str, float]], weights: Sequence[float]) -> dict[str, float]:
    """Return the weighted mean over `domains` of each of `_compared`'s values.

    The domains are fixed, not a sample, so differences between them do not add to the errors.
    """
    share = np.array(weights) / sum(weights)
    found = {}
    for name in domains[0]:
        of = share * np.array([d[name] for d in domains])
        found[name] = float(np.linalg.norm(of) if "error" in name else of.sum())
    return found


def table(summary: dict[str, Any]) -> str:
    """Return the table that the command prints at its end."""
    k = summary["kv_heads"]
    repaired = any("repair" in row for row in summary["layers"])
    head = f"{'layer':>5}  {'keys':>7}  {'values':>7}  {'lost of keys':>12}  {'of values':>9}"
    head += f"  {'bytes/token':>15}  {'sharper':>7}" + (f"  {'repair':>16}" if repaired else "")
    lines = [head]
    for row in summary["layers"]:
        size = f"{row['bytes_before']:.0f} > {row['bytes_after']:.0f}"
        kept = [f"{row[side]:.3g}/{k}" for side in ("keys", "values")]
        if "key_bits" in row:
            kept = [f"{row[f'{side}_bits']:.2f} bit" for side in Side]
        line = f"{row['layer']:5d}  {kept[0]:>7}  {kept[1]:>7}"
        line += f"  {row['key_residual']:12.2%}  {row['value_residual']:9.2%}  {size:>15}"
        line += f"  {row.get('temperature', 1.0):7.2f}"
        if "repair" in row:
            line += f"  {row['repair'][0]:7.4f} > {row['repair'][1]:6.4f}"
        lines.append(line)
    cache, loss = summary["cache_bytes_per_token"], summary["held_out"]
    lines += [
        "",
        f"cache        {cache['before']:,.0f} > {cache['after']:,.0f} bytes per token, "
        f"{summary['cache_kept']:.1%} kept (--keep={summary['options']['keep']:g})",
        "",
        f"{'held-out loss (nats per token)':<36}  before   after  {'increase':<16}  divergence",
    ]
    for name, d in [*loss["domains"].items(), ("all", loss)]:
        short = name if len(name) <= 36 else "..." + name[-33:]
        line = f"{short:<36}  {d['before']:6.4f}  {d['after']:6.4f}"
        for value, error in (
            (f"{d['increase']:+.4f}", "error"),
            (f"{d['divergence']:.4f}", "divergence_error"),
        ):
            known = math.isfinite(d[error])
            line += "  " + (f"{value} ±{d[error]:.4f}" if known else value).ljust(16)
        lines.append(line.rstrip())
    if trained := summary.get("joint"):
        was, now = (
            np.mean([d["increase"] for d in trained[when].values()]) for when in ("before", "after")
        )
        lines.append(
            f"joint repair {trained['tokens']:,} tokens, {trained['seconds']:,.0f} s: "
            f"{was:+.4f} > {now:+.4f} nats, mean of the sources"
            + ("" if trained["kept"] else "; left out, as the divergence did not fall")
        )
    unseen = sum(row["unseen"] for row in summary["layers"])
    if unseen:
        lines.append(
            f"{unseen} directions of keys and values do not occur in the calibration text; their "
            "moments count as 0"
        )
    return "\n".join(lines)


# Increases of the loss in nats per token, and what to make of them: rules of thumb.
_VERDICTS = (
    (0.005, "close to the original"),
    (0.02, "a small loss; check the tasks that matter with evaluate --tasks"),
    (0.1, "a clear loss; use it only where memory matters more"),
    (math.inf, "a damaged model; do not use it as it is"),
)


def verdict(summary: dict[str, Any]) -> str:
    """Return what the increase of the held-out loss means, in words, and what may lower it."""
    loss, options = summary["held_out"], summary["options"]
    domains = loss["domains"]
    worst = max(domains, key=lambda name: domains[name]["increase"])
    increase, error = domains[worst]["increase"], domains[worst]["error"]
    text = f"{increase:+.4f} nats" + (f" on {Path(worst).name}" if len(domains) > 1 else "")
    if math.isfinite(error) and abs(increase) < 2 * error and 2 * error < 0.02:
        return f"{text}: no loss that {int(loss['tokens']):,} tokens can show"
    words = next(words for bound, words in _VERDICTS if increase < bound)
    advice = []
    if increase >= _VERDICTS[0][0] and summary["cache_kept"] < 1:
        if options["repair"] == "none":
            advice.append("--repair layerwise")
        if options["budget"] == "uniform":
            best = "information" if options["method"] == "bits" else "measured"
            advice.append(f"--budget {best}")
        advice.append("a larger --keep")
        advice.append("training it further (configs/recover.py)")
    return f"{text}: {words}" + (f". May help: {', '.join(advice)}" if advice else "")


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw heads kept per layer, the cost of each layer alone, and the loss, into the file `path`.

    Raise `UserError` if the disk is full or `path` is not writable.
    """
    plt = cli.pyplot()
    rows, heads = summary["layers"], summary["kv_heads"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    left, middle, right = axes
    places = range(len(rows))
    packed = "key_bits" in rows[0]
    kept = {side: [r[f"{side}_bits" if packed else f"{side}s"] for r in rows] for side in Side}
    most = 16 if packed else heads
    left.bar([i - 0.2 for i in places], kept[Side.KEY], 0.4, label="keys")
    left.bar([i + 0.2 for i in places], kept[Side.VALUE], 0.4, label="values")
    left.axhline(most, color="grey", linewidth=0.8, linestyle=":")
    what = ("bits per slot", "Bits of 16") if packed else ("heads in the cache", "Heads kept of")
    left.set(xlabel="layer", ylabel=what[0], title=what[1] if packed else f"{what[1]} {heads}")
    left.set_ylim(0, most * 1.15)
    left.legend(loc="upper right", ncols=2, frameon=False)
    measured = [s for s in summary["sensitivities"] if s["losses"]]
    half = max(heads // 2, 1)
    for side, marker in ((Side.KEY, "o"), (Side.VALUE, "s")):
        if measured:
            mine = [s for s in measured if s["side"] == side]
            xs, ys = [s["layer"] for s in mine], [s["losses"][half - 1] for s in mine]
        else:
            xs, ys = list(places), [r[f"{side}_residual"] for r in rows]
        middle.plot(xs, [max(y, 1e-6) for y in ys], marker=marker, label=f"{side}s")
    middle.set_yscale("log")
    if measured:
        title, label = f"Alone, at {half} of {heads} heads", "divergence of predictions (nats)"
    else:
        title, label = "Share of energy lost", "of keys' or values' energy"
    middle.set(xlabel="layer", ylabel=label, title=title)
    middle.legend(frameon=False)
    for name, d in summary["held_out"]["domains"].items():
        right.plot(
            [1.0, summary["cache_kept"]], [0, d["increase"]], marker="o", label=Path(name).name
        )
    right.invert_xaxis()
    right.set(
        xlabel="share of the cache kept",
        ylabel="increase of held-out loss (nats)",
        title="Loss against cache",
    )
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{summary['options']['method']}, {summary['options']['budget']} budgets, "
        f"repair {summary['options']['repair']}: {summary['held_out']['increase']:+.4f} nats at "
        f"{summary['cache_kept']:.1%} of the cache"
    )
    with disk_errors(path):
        figure.savefig(path, dpi=130)
    plt.close(figure)
