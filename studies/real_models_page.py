r"""Write the tables and the figure of the study of a pretrained model from its rows.

    python -m studies.real_models_page --rows docs/studies/real_models \
        --out docs/studies/real_models.md --figure docs/studies/real_models.png

`--rows` takes folders and files of `studies.real_models`. The tables replace what is between the
markers `<!-- NAME -->` and `<!-- end of NAME -->` of the page; its other text stays. The names are
`losses`, `tasks` and `texts`.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors, write_atomically
from mea_jax.errors import UserError
from studies import real_model_rows
from studies.number_formats import FORMATS
from studies.real_model_rows import ORIGINAL, Row
from studies.real_models_figure import draw

_BUDGETS = {
    "uniform": "",
    "information": ", by information",
    "measured": ", measured",
    "residual": ", by residual",
}
_REPAIRS = {
    "none": "",
    "output": ", W_O refitted",
    "layerwise": ", layer-wise repair",
    "blockwise": ", block-wise repair",
    "joint": ", joint repair",
}


def line_of(row: Row) -> str:
    """Return the label of a row's line in the figure: its method, budget and repair."""
    options, kind = row["options"], row["kind"]
    if kind == "control":
        return "control: trained, not compressed"
    if kind == "format":
        form = FORMATS[options["format"]]
        plain = "Hadamard, integers" if form.rotated else "integers in groups"
        return "KIVI" if form.recent else plain
    if kind == ORIGINAL:
        return ORIGINAL
    budget = _BUDGETS.get(options.get("budget", "uniform"), ", measured for repair")
    return options["method"] + budget + _REPAIRS[options.get("repair", "none")]


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Return the original, the control, our methods and the formats, by line and then by size."""
    kinds = (ORIGINAL, "control", "compress", "format")
    methods = ("bits", "aligned", "frequency", "svd")

    def key(row: Row) -> tuple:
        method = row["options"].get("method", "")
        rank = methods.index(method) if method in methods else len(methods)
        line = line_of(row)
        return kinds.index(row["kind"]), rank, len(line), line, -row["kept"], row["name"]

    return sorted(rows, key=key)


def _signed(value: float | None, error: float | None = None, sign: str = "+") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.4f}" + ("" if error is None else f" ±{error:.4f}")


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rest])


def losses_table(rows: Sequence[Row]) -> str:
    """Return the table of losses, with a line for each row."""
    texts = list(rows[0]["texts"])
    head = ["row", "method", "bytes a token", "kept", *texts, "mean increase", "KL"]
    lines = [[*head, "tokens of repair", "seconds"]]
    for row in rows:
        cells = [f"`{row['name']}`", line_of(row), f"{row['bytes']:,.0f}", f"{row['kept']:.1%}"]
        if row["kind"] == ORIGINAL:
            cells += [f"loss {row['texts'][text]['before']:.4f}" for text in texts]
            lines.append([*cells, "", "", "", ""])
            continue
        for text in texts:
            of = row["texts"][text]
            cells.append(_signed(of["increase"], of["error"]))
        cells.append(_signed(row["increase"], row["error"]))
        cells.append(_signed(row["divergence"], row["divergence_error"], ""))
        lines.append([*cells, f"{row['repair_tokens']:,}", f"{row['seconds']:,.0f}"])
    return _table(lines)


def _mean(tasks: Sequence[Row], value: str, error: str) -> tuple[float | None, float | None]:
    """Return the mean over tasks and its error, for independent tasks; None if not all have it."""
    values, errors = ([task.get(key) for task in tasks] for key in (value, error))
    if None in values:
        return None, None
    mean = sum(v for v in values if v is not None) / len(tasks)
    if None in errors:
        return mean, None
    return mean, sum(e**2 for e in errors if e is not None) ** 0.5 / len(tasks)


def _title(task: Row) -> str:
    documents = f", {task['documents']:,}" if task["documents"] else ""
    return f"{task['task']} ({task['metric']}{documents})"


def tasks_table(rows: Sequence[Row]) -> str:
    """Return the table of tasks of the rows that have them; "" if none has."""
    tested = [row for row in rows if row.get("tasks")]
    if not tested:
        return ""
    names = [task["task"] for task in tested[0]["tasks"]]
    kinds = [_title(task) for task in tested[0]["tasks"]]
    lines = [["row", "kept", *kinds, "mean", "difference from the original"]]
    for row in tested:
        found = {task["task"]: task for task in row["tasks"]}
        cells = [f"`{row['name']}`", f"{row['kept']:.1%}"]
        for name in names:
            task = found.get(name, {})
            cells.append(_signed(task.get("value"), task.get("error"), ""))
        cells.append(_signed(*_mean(row["tasks"], "value", "error"), ""))
        cells.append(_signed(*_mean(row["tasks"], "difference", "difference_error")))
        lines.append(cells)
    return _table(lines)


def _cell(text: str) -> str:
    """Return a text of a model as one Markdown cell that shows it literally."""
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;")):
        text = text.replace(char, entity)
    for char in "\\`*_[]$":
        text = text.replace(char, f"&#{ord(char)};")
    return "<br>".join(text.splitlines())


def texts_table(rows: Sequence[Row]) -> str:
    """Return the table of greedy continuations of the rows that have them; "" if none has."""
    told = [row for row in rows if row.get("prompts")]
    if not told:
        return ""
    lines = [["prompt", "row", "continuation"]]
    for number, prompt in enumerate(told[0]["prompts"]):
        for row in told:
            shown = _cell(prompt["prompt"]) if row is told[0] else ""
            text = row["prompts"][number]["text"]
            lines.append([shown, f"`{row['name']}`", _cell(text)])
    return _table(lines)


def sections(rows: Sequence[Row], picture: str) -> dict[str, str]:
    """Return the text between the page's markers, by name; `picture` is the figure's address."""
    shown = ordered(rows)
    alt = "Increase of the loss against the share of the cache's bytes, for all methods"
    losses = f"![{alt}]({picture})\n\n{losses_table(shown)}"
    return {"losses": losses, "tasks": tasks_table(shown), "texts": texts_table(shown)}


def spliced(page: str, found: Mapping[str, str], where: Path) -> str:
    """Return `page` with the text between its markers replaced.

    Raise `UserError`, which names the file `where`, if a marker is missing.
    """
    for name, text in found.items():
        first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, begun, rest = page.partition(first)
        _, ended, tail = rest.partition(last)
        if not (begun and ended):
            raise UserError(f"{where} has no markers {first} and {last}: add both")
        page = head + first + (f"\n\n{text}\n\n" if text else "\n") + last + tail
    return page


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Return the rows of files and folders; raise `UserError` if one cannot be read."""
    found: list[Any] = []
    for path in paths:
        found += real_model_rows.read(path) if path.is_dir() else [real_model_rows.read_json(path)]
    return found


def main() -> None:
    if not ROWS.value:
        raise UserError("--rows is missing: add --rows docs/studies/real_models")
    rows, page, figure = read_rows([*map(Path, ROWS.value)]), Path(OUT.value), Path(FIGURE.value)
    if not page.is_file():
        raise UserError(f"--out {page} does not exist: give a page with markers, which are filled")
    picture = Path(os.path.relpath(figure, page.parent)).as_posix()
    text = spliced(page.read_text(encoding="utf-8"), sections(rows, picture), page)
    draw([(line_of(row), row) for row in ordered(rows)], figure)
    with disk_errors(page):
        write_atomically(page, text)
    print(f"{len(rows)} rows in {page} and {figure}")


if __name__ == "__main__":
    ROWS = flags.DEFINE_list("rows", [], "folders and files of rows")
    OUT = flags.DEFINE_string("out", "docs/studies/real_models.md", "page with markers")
    FIGURE = flags.DEFINE_string("figure", "docs/studies/real_models.png", "file of the figure")
    cli.run(main, "stopped", training=False)
