"""Fit the learning-rate laws to a study's rows: `python -m mea_jax.study fit --store DIR`.

Prints a table of every kind of fit, with the reason where there is no fit, and writes `fit.json`
next to the rows.
"""

from pathlib import Path
from typing import Any

from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors, write_json
from mea_jax.errors import UserError
from mea_jax.study import laws
from mea_jax.study.store import Row, Store

Estimate = dict[str, float | None] | None


def fit_store(folder: Path, baseline: str | None = None) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of the store in `folder` and all fits to them.

    Raise `UserError` if the store has no rows, or none of the variant `baseline`, or a row is
    malformed.
    """
    rows = Store(folder).rows()
    if not rows:
        raise UserError(f"{folder} has no rows: run python -m mea_jax.study run --out {folder}")
    return rows, laws.fit_all(laws.parse(rows, f"{folder / 'rows.jsonl'}, row"), baseline=baseline)


def words(estimate: Estimate, form: str = ".3g") -> str:
    """Format an estimate as "0.0021 (0.0019 to 0.0024)", as "0.0021" without interval, or "-"."""
    if estimate is None:
        return "-"
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    assert value is not None
    if low is None or high is None:
        return format(value, form)
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _gain_words(gain: dict[str, Any]) -> list[str]:
    if gain["loss"] is None:
        return ["-", "0", "-", "-", "-", gain["reason"]]
    return [
        f"{gain['learning_rate']:.3g}",
        str(gain["seeds"]),
        f"{gain['loss']:.4f}",
        "-" if gain["spread"] is None else f"{gain['spread']:.4f}",
        words(gain["gain"], "+.4f"),
        gain["reason"] or ("at the edge of its grid" if gain["at_edge"] else ""),
    ]


def _in_tokens(found: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table rows of the loss in tokens, sorted by variant and size.

    Each law that fits has a row. Learning rates without a law share one if variant, size and reason
    are the same.
    """
    rows = []
    none: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for f in found:
        if f["reason"]:
            what = f["reason"].split(": ")
            short = what[0] if len(what) == 1 else f"{what[0]}: {what[-1]}"
            none.setdefault((f["variant"], f["size"], short), []).append(f)
        else:
            law = [words(f["alpha"]), words(f["floor"]), f"{f['held_out_error']:.2%}", ""]
            rows.append([f["variant"], f["size"], f"{f['learning_rate']:.3g}", *law])
    for (variant, size, reason), some in none.items():
        peaks = ", ".join(f"{f['learning_rate']:.3g}" for f in some)
        errors = [f["held_out_error"] for f in some if f["held_out_error"] is not None]
        error = f"{min(errors):.2%} to {max(errors):.2%}" if errors else "-"
        rows.append([variant, size, peaks, "-", "-", error, reason])
    return sorted(rows, key=lambda row: row[:2])


def tables(fits: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the title and the Markdown table of each kind of fit."""
    level = f"{fits['settings']['level']:.0%} intervals"
    optima = [
        [f["variant"], f["size"], f"{f['tokens']:,}", words(f["learning_rate"]),
         "-" if f["loss"] is None else f"{f['loss']:.4f}", f["reason"] or ""]
        for f in fits["optimum"]
    ]  # fmt: skip
    robust = {(f["variant"], f["size"], f["tokens"]): f for f in fits["stability"]}
    sensitivities = []
    for f in fits["sensitivity"]:
        stable = robust[f["variant"], f["size"], f["tokens"]]
        rate = "-" if stable["learning_rate"] is None else f"{stable['learning_rate']:.3g}"
        why = "; ".join(filter(None, (f["reason"], stable["reason"], stable["note"])))
        name = [f["variant"], f["size"], f"{f['tokens']:,}"]
        sensitivities.append([*name, words(f["value"]), rate, why])
    over_sizes = [
        [f["variant"], str(f["runs"]), words(f["parameters_exponent"]), words(f["tokens_exponent"]),
         f["reason"] or ""]
        for f in fits["law"]
    ]  # fmt: skip
    gains = [[g["variant"], g["size"], f"{g['tokens']:,}", *_gain_words(g)] for g in fits["gain"]]
    cell = ["variant", "size", "tokens"]
    baseline = fits["gain"][0]["baseline"]
    columns = ["peak", "seeds", "loss", "std over seeds", f"better than {baseline} by", ""]
    return [
        (
            f"Each variant at its own best learning rate of the grid ({level})",
            markdown([*cell, *columns], gains),
        ),
        (f"Best learning rate ({level})", markdown([*cell, "peak", "loss there", ""], optima)),
        (
            f"Robustness ({level})",
            markdown([*cell, "sensitivity, nats", "largest stable peak", ""], sensitivities),
        ),
        (
            "Loss in tokens, L = (D_c / D)^alpha + L_0",
            markdown(
                ["variant", "size", "peak", "alpha", "L_0", "held-out error", ""],
                _in_tokens(fits["loss_in_tokens"]),
            ),
        ),
        (
            "Best learning rate over sizes, log lr = a + b log N + c log D",
            markdown(["variant", "runs", "b", "c", ""], over_sizes),
        ),
    ]


def main() -> None:
    """Run the command `fit` with its flags."""
    if not STORE.value:
        raise UserError("no store given: add --store runs/lr_study")
    folder = Path(STORE.value)
    _, fits = fit_store(folder, BASELINE.value)
    with disk_errors(folder):
        write_json(folder / "fit.json", fits)
    for title, table in tables(fits):
        print(f"## {title}\n\n{table}\n")
    print(f"{fits['runs']['finished']} runs, {fits['runs']['diverged']} diverged; all numbers in "
          f"{folder / 'fit.json'}")  # fmt: skip


if __name__ == "__main__":
    STORE = flags.DEFINE_string("store", None, "directory that contains rows.jsonl")
    BASELINE = flags.DEFINE_string("baseline", None, "variant to compare with (default: mha)")
    cli.run(main, "stopped")
