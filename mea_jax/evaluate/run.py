"""Measures the parts of the report, in order, on one or several models."""

import dataclasses
import datetime
import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import mea_jax
from mea_jax.data import split
from mea_jax.data.prepare import Prepared, prepare
from mea_jax.data.tokenizers import bpe_size
from mea_jax.errors import UserError
from mea_jax.evaluate import speed
from mea_jax.evaluate.arithmetic import arithmetic
from mea_jax.evaluate.models import Loaded
from mea_jax.evaluate.retrieval import DEPTHS, retrieval, shortest_context
from mea_jax.evaluate.token_losses import ALL, Losses, domain_losses

PARTS = ("loss", "positions", "passkey", "arithmetic", "speed")
LENGTHS = (0.5, 1.0, 2.0, 4.0)  # multiples of the training window
CONTEXTS = (256, 1024, 4096, 16384)
LogFn = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a profile; None if the default depends on the models."""

    parts: tuple[str, ...] = PARTS
    seed: int = 0  # of the tasks
    batch_size: int = 8  # held-out windows per batch
    max_batches: int | None = None  # of each source; None: every held-out window
    lengths: tuple[float, ...] | None = None  # of pass-key contexts, in windows; None: `LENGTHS`
    depths: tuple[float, ...] = DEPTHS
    samples: int = 20  # per length and depth of pass keys, and per kind of arithmetic
    needles: int = 1  # keys per context
    contexts: tuple[int, ...] | None = None  # of speed; None: `CONTEXTS`
    rows: int = 1  # sequences per batch, of speed
    repeats: int = 5  # rounds of speed
    prefill: bool = True  # whether speed prefills and times prompts
    cache_dtype: str | None = None  # None: the compute dtype
    mesh: str | None = None  # None: the first device


def commit() -> str | None:
    """Return the short name of the code's commit, or None if it has no git history."""
    command = ["git", "-C", str(Path(mea_jax.__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    """Return command, date, versions, commit and machine, as needed to reproduce a report."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "tokenizers")
    return {
        "command": sys.argv,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "mea_jax": mea_jax.__version__,
            "commit": commit(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "machine": {
            "platform": platform.platform(),
            "device": device.device_kind,
            "devices_seen": len(jax.devices()),
            "cores": os.cpu_count(),
        },
    }


def held_out_text(first: Loaded, log: LogFn) -> Prepared:
    """Prepare the windows of a checkpoint's own data config, tokenized with its own tokenizer.

    Raise `UserError` if there is no held-out text, or its texts are not on this machine.
    """
    remedy = (
        "; run in the directory that the paths of the training texts are relative to, or leave out "
        "what needs them: --parts passkey,arithmetic,speed"
    )
    config = first.config.data
    none = UserError(
        f"the data of {first.run} have no held-out text (held_out_fraction is "
        f"{config.held_out_fraction}): leave out loss and positions with --parts"
    )
    if not split.has_held_out(config):  # before anything is read
        raise none
    if not bpe_size(config.tokenizer):  # a file that may have moved; the run has a copy
        config = dataclasses.replace(config, tokenizer=str(first.run / "tokenizer"))
    try:
        prepared = prepare(config, first.config.model.vocab_size, log=log)
        if prepared.tokenizer.content != first.tokenizer.content:
            log("texts differ from those of training: they yield a different tokenizer")
            config = dataclasses.replace(config, tokenizer=str(first.run / "tokenizer"))
            prepared = prepare(config, first.config.model.vocab_size, log=log)
    except UserError as error:
        raise UserError(f"the texts of {first.run} cannot be read: {error}{remedy}") from error
    if not sum(source.held_out_windows for source in prepared.sources):
        raise none
    return prepared


def fill_defaults(models: Sequence[Loaded], options: Options, log: LogFn) -> Options:
    """Fill in the defaults of `options`, except those that a model does not support.

    Report the defaults that are left out through `log`. Raise `UserError` if a model does not
    support an option that is given.
    """
    limits = [limit for model in models if (limit := model.model.longest_context()) is not None]
    limit, window = min(limits, default=None), models[0].config.data.context_length
    too_long = f"is longer than the {limit} positions of a model"
    if "positions" in options.parts or "loss" in options.parts:
        _check_length(window, limit, f"config.data.context_length={window} {too_long}")

    lengths = options.lengths
    if "passkey" in options.parts:
        shortest = shortest_context(models[0].tokenizer, options.needles)
        fitting = tuple(
            x for x in LENGTHS if round(x * window) >= shortest and fits(round(x * window), limit)
        )
        for x in lengths or ():
            _check_length(
                round(x * window), limit, f"--lengths {x:g}: {round(x * window)} {too_long}"
            )
            if round(x * window) < shortest:
                raise UserError(
                    f"--lengths {x:g} is {round(x * window)} tokens, but a pass key with its "
                    f"question takes {shortest}: choose longer ones"
                )
        if lengths is None and len(fitting) < len(LENGTHS):
            log(f"pass keys: of {LENGTHS} windows of {window} tokens, only {fitting} fit")
        lengths = fitting if lengths is None else lengths
        if not lengths:
            raise UserError(
                f"no default context for pass keys fits (a question takes {shortest} tokens): give "
                "--lengths in training windows, or leave passkey out of --parts"
            )
    contexts = options.contexts
    if "speed" in options.parts:
        for context in contexts or ():
            _check_length(context, limit, f"--contexts {context} {too_long}")
        if contexts is None:
            contexts = tuple(c for c in CONTEXTS if fits(c, limit)) or (limit or window,)
            if len(contexts) < len(CONTEXTS):
                log(f"speed: of {CONTEXTS} positions, only {contexts}: a model has {limit}")
    return dataclasses.replace(options, lengths=lengths, contexts=contexts)


def fits(length: int, limit: int | None) -> bool:
    """Return whether `length` is at most `limit`; None means no limit."""
    return limit is None or length <= limit


def _check_length(length: int, limit: int | None, message: str) -> None:
    if not fits(length, limit):
        raise UserError(f"{message}; choose a shorter one")


def losses_report(losses: dict[str, Losses], base: dict[str, Losses]) -> dict[str, Any]:
    """Return a model's losses by source, and their increases over the first model's."""
    report = {}
    for name, source in losses.items():
        more, error = source.increase(base[name])
        report[name] = {
            "loss": source.loss,
            "error": source.error,
            "bits_per_byte": source.bits_per_byte,
            "increase": more,
            "increase_error": error,
            "documents": source.documents,
            "tokens": source.tokens,
        }
    return report


def positions_report(losses: dict[str, Losses], base: dict[str, Losses]) -> dict[str, Any]:
    """Return losses by source and position, and their increases over the first model's."""
    report = {}
    for name, source in losses.items():
        rows, more = source.by_position(), source.by_position(base[name])
        report[name] = [
            {
                "from": source.edges[i],
                "to": source.edges[i + 1] - 1,
                "loss": loss,
                "error": error,
                "increase": more[i][0],
                "increase_error": more[i][1],
                "tokens": int(source.tokens_UP[:, i].sum()),
            }
            for i, (loss, error) in enumerate(rows)
        ]
    return report


def _log_with_prefix(log: Callable[[str], Any], before: str, line: str) -> None:
    log(f"{before}{line}")


def profile(
    models: Sequence[Loaded],
    options: Options,
    log: LogFn = lambda line: None,
    save: Callable[[dict[str, Any]], Any] = lambda report: None,
) -> dict[str, Any]:
    """Measure `options.parts` of all models; return the contents of report.json.

    Args:
      models: comparable ones (`models.check_comparable`) on the same mesh, if any, which must be
        that of `jax.set_mesh`; increases are over the first.
      options: from `fill_defaults`.
      log: prints a line of progress.
      save: is called with the report so far after each part.

    Raises:
      UserError: held-out text cannot be read.
    """
    window, mesh = models[0].config.data.context_length, models[0].mesh
    report: dict[str, Any] = {
        **environment(),
        "seed": options.seed,
        "options": dataclasses.asdict(options),
        "window": window,
        "data": None,
        "models": [_description(model, window, options.cache_dtype) for model in models],
    }
    rows = dict(zip([model.name for model in models], report["models"], strict=True))
    if "loss" in options.parts or "positions" in options.parts:
        prepared = held_out_text(models[0], log)
        report["data"] = _data(prepared)
        base: dict[str, Losses] | None = None
        for model in models:
            began = time.perf_counter()
            losses = domain_losses(
                model.resolved(window),
                model.params,
                prepared,
                batch_size=options.batch_size,
                max_batches=options.max_batches,
                skip_bad=models[0].config.data.bad_input == "skip",
                progress=model.name,
                mesh=mesh,
            )
            base = base or losses
            if "loss" in options.parts:
                rows[model.name]["loss"] = losses_report(losses, base)
            if "positions" in options.parts:
                rows[model.name]["positions"] = positions_report(losses, base)
            took = time.perf_counter() - began
            log(f"{model.name}: held-out loss {losses[ALL].loss:.4f} nats per token ({took:.0f} s)")
        save(report)
    common: dict[str, Any] = {
        "seed": options.seed,
        "samples": options.samples,
        "cache_dtype": options.cache_dtype,
        "mesh": mesh,
    }
    for model in models:
        if "passkey" not in options.parts:
            break
        rows[model.name]["passkey"] = retrieval(
            model.model,
            model.params,
            model.tokenizer,
            lengths=[round(x * window) for x in options.lengths or ()],
            depths=options.depths,
            needles=options.needles,
            log=functools.partial(_log_with_prefix, log, f"{model.name}: pass keys, "),
            **common,
        )
        save(report)
    for model in models:
        if "arithmetic" not in options.parts:
            break
        rows[model.name]["arithmetic"] = arithmetic(
            model.model,
            model.params,
            model.tokenizer,
            log=functools.partial(_log_with_prefix, log, f"{model.name}: "),
            **common,
        )
        save(report)
    if "speed" in options.parts:
        found = speed.speeds(
            {model.name: (model.model, model.params) for model in models},
            contexts=options.contexts or (),
            rows=options.rows,
            repeats=options.repeats,
            cache_dtype=options.cache_dtype,
            prefill=options.prefill,
            mesh=mesh,
            log=log,
        )
        for name, speeds in found.items():
            rows[name]["speed"] = speeds
        save(report)
    return report


def _description(model: Loaded, window: int, cache_dtype: str | None) -> dict[str, Any]:
    """Return a model's entry in the report before anything is measured."""
    generator = model.generator(window, cache_dtype)
    return {
        "name": model.name,
        "checkpoint": str(model.run),
        "step": model.step,
        "parameters": sum(x.size for x in jax.tree.leaves(model.params)),
        "dtype": generator.served.model.dtype,
        "cache": {
            "bytes_per_token": generator.cache_bytes_per_token(),
            "dtype": str(generator.cache_dtype),
            "forms": generator.served.describe(),
        },
    }


def _data(prepared: Prepared) -> dict[str, Any]:
    return {
        "digest": prepared.digest,
        "window": prepared.context_length,
        "sources": [
            {
                "name": source.name,
                "held_out_documents": source.held_out_documents,
                "held_out_tokens": source.held_out_tokens,
                "held_out_bytes": source.held_out_bytes,
            }
            for source in prepared.sources
        ],
    }
