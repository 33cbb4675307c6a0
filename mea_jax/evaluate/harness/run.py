"""Runs tasks of lm-evaluation-harness on one model or two: `python -m mea_jax.evaluate --tasks`."""

import difflib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mea_jax.checkpoint.files import disk_errors, to_json, write_atomically
from mea_jax.errors import UserError
from mea_jax.evaluate.harness import differences
from mea_jax.evaluate.run import environment
from mea_jax.parallel import processes

_BOOTSTRAP = 1000  # draws for the standard error of metrics that are not means
_FEWSHOT_SEED = 1234  # the harness's own default


@dataclass(frozen=True)
class Options:
    """The options of --tasks; `check` validates them before anything is read."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None  # documents per task; below 1: a share of them
    include_path: str | None = None  # a folder with more tasks
    max_length: int | None = None
    batch_tokens: int | None = None
    dtype: str = "auto"
    cache_dtype: str = "auto"
    log_samples: bool = False
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = False
    mesh: str | None = None  # None: all devices, as in training

    def check(self) -> None:
        """Raise `UserError` if an option is out of range."""
        if not self.tasks:
            raise UserError("--tasks is empty: give at least one task, such as hellaswag,piqa")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise UserError("--fewshot_as_multiturn requires --apply_chat_template: add it")
        for name, value, least in (
            ("num_fewshot", self.num_fewshot, 0),
            ("max_length", self.max_length, 2),
            ("batch_tokens", self.batch_tokens, 2),
        ):
            if value is not None and value < least:
                raise UserError(f"--{name}={value} must be {least} or more")
        limit = self.limit
        if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit % 1 == 0)):
            raise UserError(
                f"--limit={limit:g} must be a whole number of documents, 1 or more, or a share of "
                "each task's documents between 0 and 1, such as 0.1"
            )
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise UserError(f"--include_path {self.include_path}: no such folder; give another one")


def require_harness() -> None:
    """Raise `UserError` unless lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError('--tasks needs the package lm-eval: run pip install "mea_jax[eval]"')


def load_tasks(options: Options) -> dict[str, Any]:
    """Load the tasks in the form that `lm_eval.evaluator.evaluate` takes.

    Raise `UserError` for an unknown task, an invalid task file, or data that cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    def matching(manager: Any, name: str) -> list[str]:
        found = manager.match_tasks([name]) if any(c in name for c in "*?[") else [name]
        return [n for n in found if n in manager.task_index]

    # The harness's own thousands of tasks are read only if one of them is named.
    folder = {"include_path": options.include_path}
    alone = options.include_path is not None
    manager = _call_harness(
        "--include_path: cannot read its tasks", TaskManager, **folder, include_defaults=not alone
    )
    if alone and not all(matching(manager, name) for name in options.tasks):
        manager = _call_harness("--include_path: cannot read its tasks", TaskManager, **folder)
    names: list[str] = []
    for name in options.tasks:
        found = matching(manager, name)
        if not found:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            mend = f"did you mean {', '.join(close)}?" if close else "list all: lm-eval ls tasks"
            raise UserError(f"--tasks {name}: no such task; {mend}")
        names += [n for n in found if n not in names]
    objects: list[Any] = []
    for name in names:
        loaded = _call_harness(f"--tasks {name}: cannot load its data", manager.load, [name])
        objects += loaded.get("groups", {}).values() or loaded["tasks"].values()
    whole = _call_harness("--tasks: cannot load them", manager.load, objects)
    for task in whole["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if fixed is None or (options.num_fewshot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=options.num_fewshot or 0)
    return whole


def _call_harness(what: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function of the harness; raise any exception as a `UserError` that begins with `what`.

    The harness reads the user's files and data from the network, and raises many types of
    exceptions if something is wrong with them.
    """
    try:
        return function(*arguments, **named)
    except (KeyboardInterrupt, UserError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{what} ({type(error).__name__}: {lines[0][:200]}); check its files or the network"
        ) from error


def _measure(model: Any, tasks: dict[str, Any], options: Options) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return evaluate(
        lm=model,
        task_dict=tasks,
        limit=options.limit,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=True,
        apply_chat_template=options.apply_chat_template,
        system_instruction=options.system_instruction,
        fewshot_as_multiturn=options.fewshot_as_multiturn,
    )


def _model(path: Path, options: Options) -> Any:
    from mea_jax.evaluate.harness.model import BATCH_TOKENS, HarnessModel

    return HarnessModel(
        str(path),
        max_length=options.max_length,
        dtype=options.dtype,
        cache_dtype=options.cache_dtype,
        batch_tokens=options.batch_tokens or BATCH_TOKENS,
        mesh=options.mesh,
    )


def run(
    options: Options,
    checkpoint: Path,
    baseline: Path | None,
    log: Callable[[str], Any],
    folder: Path | None = None,
) -> dict[str, Any]:
    """Run the tasks on `checkpoint` and, if given, on `baseline`; return the report.

    Its "results" are `differences.rows`, or `differences.differences` with a `baseline`. "models"
    contains the cost of each model. `log` prints a line of progress. With `log_samples`, samples
    are written below `folder`. Raise `UserError` for wrong options, tasks or checkpoints.
    """
    options.check()
    require_harness()
    os.environ["DISABLE_MULTIPROC"] = "1"  # a process with jax's threads must not fork
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = load_tasks(options)
    measured: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    for path in (checkpoint, baseline) if baseline else (checkpoint,):
        model = _model(path, options)
        found = _measure(model, tasks, options)
        took = model.report()
        log(f"{path}: {_speed_line(took)}")
        if options.log_samples and folder is not None:
            role = "baseline" if measured else "checkpoint"
            write_samples(found["samples"], folder / "samples" / role)
        measured.append(found)
        models.append({"checkpoint": str(model.run), "step": model.step, **took})
        del model  # frees its parameters before the next model is loaded
    rows = differences.differences(*measured) if baseline else differences.rows(measured[0])
    where = environment()
    where["versions"]["lm-eval"] = metadata.version("lm-eval")
    return where | {
        "options": {name: getattr(options, name) for name in Options.__dataclass_fields__},
        "models": models,
        "task_versions": measured[0]["versions"],
        "num_fewshot": measured[0]["n-shot"],
        "results": rows,
    }


def write_samples(samples: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Write each task's samples to `folder`/TASK.jsonl, one document and filter per line."""
    from lm_eval.utils import handle_non_serializable

    if not processes.is_first():
        return
    for task, rows in samples.items():
        path = folder / f"{task.replace('/', '_')}.jsonl"
        lines = []
        for row in rows:
            line = {
                "doc_id": row["doc_id"],
                "request": row["arguments"],
                "target": row["target"],
                "response": row["resps"],
                "filter": row["filter"],
                "filtered_response": row["filtered_resps"],
                "metrics": {name: row[name] for name in row["metrics"]},
                "doc": row["doc"],
            }
            plain = json.loads(json.dumps(line, default=handle_non_serializable))
            lines.append(to_json(plain) + "\n")
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(lines))


def _speed_line(took: dict[str, Any]) -> str:
    cut = f"; {took['truncated']:,} truncated at the start" if took["truncated"] else ""
    return (
        f"{took['requests']:,} requests in {took['seconds']:.1f} s, including compilation: "
        f"{took['requests_per_second'] or 0:,.1f} requests/s, "
        f"{took['tokens_per_second'] or 0:,.0f} tokens/s; "
        f"{took['real_share'] or 0:.1%} of the computed tokens are real, "
        f"{took['programs']} programs compiled{cut} (at most {took['max_length']:,} tokens each)"
    )


def write(report: dict[str, Any], folder: Path) -> str:
    """Format the report as a table; on the first process write table.txt and results.json."""
    text = differences.table(report["results"])
    if processes.is_first():
        write_atomically(folder / "results.json", to_json(report, indent=1) + "\n")
        (folder / "table.txt").write_text(text + "\n")
    return text


def paths(checkpoints: Sequence[str], baseline: str | None) -> tuple[Path, Path | None]:
    """Return the paths of the model and the baseline.

    Raise `UserError` unless exactly one checkpoint is given.
    """
    if len(checkpoints) != 1:
        given = "none" if not checkpoints else "several"
        raise UserError(
            f"--tasks takes one --checkpoint ({given} given): give one, and the model to compare "
            "it with as --baseline"
        )
    return Path(checkpoints[0]), None if baseline is None else Path(baseline)
