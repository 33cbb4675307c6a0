r"""Profile one model or compare several: cache, loss, retrieval, arithmetic, speed.

python -m mea_jax.evaluate --checkpoint runs/quickstart --out profiles/quickstart
python -m mea_jax.evaluate --checkpoint runs/whole --checkpoint runs/half --out profiles/half

With --tasks, it runs benchmarks of lm-evaluation-harness instead, on one model or two.

python -m mea_jax.evaluate --checkpoint runs/half --baseline runs/whole --tasks hellaswag,piqa \
    --out profiles/tasks
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tqdm
from absl import flags

from mea_jax import cli
from mea_jax.checkpoint.files import make_writable, to_json, write_atomically
from mea_jax.errors import UserError, nearest
from mea_jax.evaluate import figures, run, table
from mea_jax.evaluate.harness import run as harness_run
from mea_jax.evaluate.models import Loaded, check_comparable, load, names
from mea_jax.parallel import processes, sharding

DTYPES = ("auto", "float32", "bfloat16")
CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8")


def log(line: str) -> None:
    """Print a line of progress to stderr, on the first process only."""
    if processes.is_first():
        tqdm.tqdm.write(line, file=sys.stderr)  # above a progress bar, if there is one


def _parts() -> tuple[str, ...]:
    chosen = tuple(part for part in run.PARTS if part in PARTS.value)
    for part in PARTS.value:
        if part not in run.PARTS:
            raise UserError(f"--parts {part}: {nearest(part, run.PARTS)}")
    if not chosen:
        raise UserError(f"--parts is empty: choose from {', '.join(run.PARTS)}")
    return chosen


def _numbers(
    name: str, words: Sequence[str], kind: type, low: float, high: float, what: str
) -> tuple[Any, ...]:
    values = []
    for word in words:
        try:
            value = kind(word)
        except ValueError as error:
            raise UserError(f"--{name} {word}: {what}") from error
        if not (math.isfinite(value) and low <= value <= high):
            raise UserError(f"--{name} {word}: {what}")
        values.append(value)
    if not values:
        raise UserError(f"--{name} is empty: {what}")
    return tuple(dict.fromkeys(values))  # each once


def _options() -> run.Options:
    lengths = contexts = None
    if LENGTHS.value is not None:
        what = "lengths must be multiples of the training window, above 0 and up to 1024"
        lengths = _numbers("lengths", LENGTHS.value, float, 1e-9, 1024, what)
    if CONTEXTS.value is not None:
        what = "contexts must be whole numbers of positions, 1 or more"
        contexts = _numbers("contexts", CONTEXTS.value, int, 1, 2**30, what)
    return run.Options(
        parts=_parts(),
        seed=SEED.value,
        batch_size=BATCH_SIZE.value,
        max_batches=MAX_BATCHES.value or None,
        lengths=lengths,
        depths=_numbers("depths", DEPTHS.value, float, 0, 1, "depths must be in [0, 1]"),
        samples=SAMPLES.value,
        needles=NEEDLES.value,
        contexts=contexts,
        rows=ROWS.value,
        repeats=REPEATS.value,
        prefill=PREFILL.value,
        cache_dtype=None if CACHE_DTYPE.value == "auto" else CACHE_DTYPE.value,
        mesh=MESH.value,
    )


def _folder() -> Path:
    """Create the output folder and check that it is writable, before anything is measured."""
    if not OUT.value:
        raise UserError("no folder for the report given: add --out profiles/mine")
    folder = Path(OUT.value)
    try:
        make_writable(folder)
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be written: {error.strerror}; choose another one"
        ) from error
    return folder


def _given(names: Sequence[str]) -> list[str]:
    """Return the flags of `names` that are given on the command line."""
    return [f"--{name}" for name in names if flags.FLAGS[name].present]


def _check_kind(tasks: bool) -> None:
    """Raise `UserError` for a flag of the profile with --tasks, or one of --tasks without it."""
    if tasks and (others := _given(OF_PROFILE)):
        raise UserError(
            f"--tasks runs the harness, but {others[0]} is for the profile: give one or the other"
        )
    if not tasks and (others := _given(OF_TASKS)):
        raise UserError(f"{others[0]} requires --tasks: add --tasks or remove it")


def tasks_main() -> None:
    """Run the command with --tasks. Raise `UserError` for wrong options, tasks or paths."""
    limit = LIMIT.value
    if limit is not None and limit.is_integer():
        limit = int(limit)
    options = harness_run.Options(
        tasks=tuple(name for name in TASKS.value or () if name),
        num_fewshot=NUM_FEWSHOT.value,
        limit=limit,
        include_path=INCLUDE_PATH.value,
        max_length=MAX_LENGTH.value,
        batch_tokens=BATCH_TOKENS.value,
        dtype=DTYPE.value,
        cache_dtype=CACHE_DTYPE.value,
        log_samples=LOG_SAMPLES.value,
        apply_chat_template=CHAT_TEMPLATE.value,
        system_instruction=SYSTEM.value,
        fewshot_as_multiturn=MULTITURN.value,
        mesh=MESH.value,
    )
    options.check()
    checkpoint, baseline = harness_run.paths(CHECKPOINT.value, BASELINE.value)
    harness_run.require_harness()
    cli.join_processes(dataclasses.asdict(options))
    cli.enable_compilation_cache()
    folder = _folder()
    report = harness_run.run(options, checkpoint, baseline, log, folder)
    try:
        text = harness_run.write(report, folder)
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be written: {error.strerror}; free space or choose another one"
        ) from error
    if processes.is_first():
        samples = f", {folder / 'samples'}" if options.log_samples else ""
        print(f"{text}\n\n{folder / 'results.json'}, {folder / 'table.txt'}{samples}")


def main() -> None:
    """Run the profile, or the tasks of --tasks. Raise `UserError` for wrong options or inputs."""
    _check_kind(TASKS.value is not None)
    if TASKS.value is not None:
        tasks_main()
        return
    options, paths = _options(), [Path(path) for path in CHECKPOINT.value]
    if not paths:
        raise UserError("no checkpoint given: add --checkpoint runs/quickstart")
    called = names(paths)
    cli.enable_compilation_cache()
    mesh = None if options.mesh is None else sharding.requested_mesh(options.mesh, "--mesh")
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        pairs = zip(paths, called, strict=True)
        models = [load(path, name, DTYPE.value, mesh) for path, name in pairs]
        check_comparable(models)
        _profile(models, run.fill_defaults(models, options, log))


def _profile(models: Sequence[Loaded], options: run.Options) -> None:
    folder = _folder()

    def save(report: dict[str, Any]) -> None:
        write_atomically(folder / "report.json", to_json(report, indent=1) + "\n")

    try:
        report = run.profile(models, options, log, save)
        text = table.text(report)
        save(report)
        (folder / "table.txt").write_text(text + "\n")
        pictures = figures.draw(report, folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}; free space "
            "or choose another --out"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "out of memory: give fewer models, a larger --mesh, or smaller --contexts, --lengths, "
            f"--batch_size or --rows; earlier measurements are in {folder / 'report.json'}"
        ) from error
    print(text)
    written = [folder / "report.json", folder / "table.txt", *pictures]
    print("\n" + ", ".join(map(str, written)))


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_multi_string(
        "checkpoint",
        [],
        "run directory or one of its steps; repeat the flag to compare more with the first",
    )
    OUT = flags.DEFINE_string("out", None, "folder for report.json, table.txt and figures")
    PARTS = flags.DEFINE_list("parts", list(run.PARTS), "parts to measure")
    SEED = flags.DEFINE_integer(
        "seed", 0, "seed of the examples", lower_bound=0, upper_bound=2**32 - 1
    )
    SAMPLES = flags.DEFINE_integer(
        "samples", 20, "pass keys per length and depth, problems per kind", lower_bound=1
    )
    LENGTHS = flags.DEFINE_list(
        "lengths", None, "contexts of pass keys in training windows; default 0.5,1,2,4"
    )
    DEPTHS = flags.DEFINE_list(
        "depths", list(map(str, run.DEPTHS)), "depths of the pass keys: 0 beginning, 1 end"
    )
    NEEDLES = flags.DEFINE_integer(
        "needles",
        1,
        "pass keys per context, one of which is asked for",
        lower_bound=1,
        upper_bound=8,
    )
    CONTEXTS = flags.DEFINE_list(
        "contexts", None, "cached positions for speed; default 256,1024,4096,16384"
    )
    ROWS = flags.DEFINE_integer("rows", 1, "sequences per batch for speed", lower_bound=1)
    REPEATS = flags.DEFINE_integer(
        "repeats", 5, "rounds of speed, the models in turn", lower_bound=1
    )
    PREFILL = flags.DEFINE_boolean(
        "prefill", True, "for speed: prefill and time prompts; --noprefill: only decode"
    )
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "held-out windows per batch", lower_bound=1)
    MAX_BATCHES = flags.DEFINE_integer(
        "max_batches", 0, "maximum batches of held-out windows per source; 0: all", lower_bound=0
    )
    MESH = flags.DEFINE_string(
        "mesh",
        None,
        "devices to divide each model over, such as tensor=4 or fsdp=2,tensor=4; default: the "
        "first device, and for --tasks all devices",
    )
    DTYPE = flags.DEFINE_enum("dtype", "auto", DTYPES, "dtype of products")
    CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", "auto", CACHE_DTYPES, "dtype of the cache")
    TASKS = flags.DEFINE_list(
        "tasks", None, "run these lm-evaluation-harness tasks instead of the profile"
    )
    BASELINE = flags.DEFINE_string("baseline", None, "checkpoint to compare with in --tasks")
    INCLUDE_PATH = flags.DEFINE_string("include_path", None, "folder with more tasks for --tasks")
    NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "solved examples; default: each task's")
    LIMIT = flags.DEFINE_float(
        "limit", None, "maximum documents of each task; below 1: this share of them"
    )
    LOG_SAMPLES = flags.DEFINE_boolean(
        "log_samples", False, "for --tasks: write each document's request, answer and metrics"
    )
    CHAT_TEMPLATE = flags.DEFINE_boolean(
        "apply_chat_template", False, "for --tasks: ask each question in the model's chat template"
    )
    SYSTEM = flags.DEFINE_string("system_instruction", None, "system message of --tasks")
    MULTITURN = flags.DEFINE_boolean(
        "fewshot_as_multiturn", False, "for --tasks: solved examples are earlier turns of the chat"
    )
    MAX_LENGTH = flags.DEFINE_integer(
        "max_length",
        None,
        "maximum tokens of a request of --tasks; default: the longest context of the model",
    )
    BATCH_TOKENS = flags.DEFINE_integer(
        "batch_tokens", None, "for --tasks: tokens per batch on each device; default 4096"
    )
    cli.define_process_flags()
    OF_TASKS = ["baseline", "include_path", "num_fewshot", "limit", "max_length", "batch_tokens"]
    OF_TASKS += ["log_samples", "apply_chat_template", "system_instruction"]
    OF_TASKS += ["fewshot_as_multiturn"]
    OF_TASKS += ["distributed", "coordinator", "num_processes", "process_id"]
    OF_PROFILE = ["parts", "seed", "samples", "lengths", "depths", "needles", "contexts", "rows"]
    OF_PROFILE += ["repeats", "prefill", "batch_size", "max_batches"]
    cli.run(main, "stopped; what was measured is in report.json")
