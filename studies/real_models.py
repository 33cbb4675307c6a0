r"""Compress the KV cache of a pretrained model by all methods; measure losses, tasks and texts.

    python -m studies.real_models --config configs/studies/smollm2_cache.py \
        --checkpoint runs/smollm2 --out runs/smollm2_cache \
        --texts web=jsonl:FILE,encyclopedia=jsonl:FILE,web_later=jsonl:FILE,..

Each stage is a command that a user could run (`studies.stages`); `--list` prints them. Each row is
a JSON file in OUT/rows, written as soon as it is known (`studies.real_model_rows`). Finished stages
are not repeated, and a stopped compression continues, so the same command continues after a kill.
All rows share the measurements of the original. Compressed models without tasks are removed once
their row is written. `python -m studies.real_models_page` turns rows into a page.
"""

import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors, write_atomically
from mea_jax.compress.budgets import BUDGETS
from mea_jax.compress.methods import METHODS
from mea_jax.compress.options import Options
from mea_jax.compress.options import check as check_options
from mea_jax.compress.repair import REPAIRS
from mea_jax.data import sources
from mea_jax.errors import UserError, nearest, one_of
from mea_jax.evaluate.run import commit
from studies import real_model_rows as rows
from studies.number_formats import FORMATS
from studies.real_model_rows import ORIGINAL
from studies.stages import Call, FinishedStages, Stage, call, check_keys
from studies.stages import run as run_stages

EXAMPLE = "configs/studies/smollm2_cache.py"
KEYS: dict[str, Any] = {
    "calibration_texts": (list, tuple),
    "held_out_texts": (list, tuple),
    "calibration_tokens": int,
    "measure_tokens": int,
    "held_out_tokens": int,
    "dtype": str,
    "seed": int,
    "rows": dict,
    "order": (list, tuple),
    "tasks": (list, tuple),
    "limit": int,
    "task_rows": (list, tuple),
    "prompts": (list, tuple),
    "new_tokens": int,
}
_CHOICES = {"method": METHODS, "budget": BUDGETS, "repair": REPAIRS}


def kind_of(row: Mapping[str, Any]) -> str:
    """Return the kind of a row of the config: "format", "control" or "compress"."""
    return next((kind for kind in ("format", "control") if kind in row), "compress")


def check(config: Mapping[str, Any]) -> None:
    """Raise `UserError` for a config that is not valid for this study."""
    check_keys(config, KEYS, EXAMPLE)
    for name, row in config["rows"].items():
        _check_row(config, name, row)
    if sorted(config["order"]) != sorted(config["rows"]) or not config["rows"]:
        raise UserError(
            "config.order must name each of config.rows once, and at least one: differing are "
            f"{', '.join(sorted(set(config['order']) ^ set(config['rows']))) or 'repeated names'}"
        )
    for name in config["task_rows"]:
        if name != ORIGINAL and name not in config["rows"]:
            known = nearest(name, [ORIGINAL, *config["rows"]])
            raise UserError(f"config.task_rows names the unknown row {name!r}: {known}")
        if name != ORIGINAL and kind_of(config["rows"][name]) == "format":
            raise UserError(
                f"config.task_rows names {name!r}, a number format, which has no checkpoint to run "
                "tasks on: remove it"
            )


def _check_row(config: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> None:
    where, kind = f"config.rows.{name}", kind_of(row)
    known = rows.OPTIONS if kind == "compress" else (kind,)
    if name == ORIGINAL or "/" in name or " " in name:
        raise UserError(f"{where} is reserved or has a slash or space: choose another name")
    for key in row:
        if key not in known:
            listed = [*rows.OPTIONS, "format", "control"] if kind == "compress" else known
            raise UserError(f"{where} has the unknown key {key!r}: {nearest(key, listed)}")
    if kind == "format":
        one_of(f"{where}.format", row["format"], FORMATS)
    elif kind == "control":
        if not isinstance(row["control"], int) or row["control"] < 1:
            raise UserError(f"{where}.control={row['control']} must be 1 token or more")
    else:
        for key, choices in _CHOICES.items():
            one_of(f"{where}.{key}", row.get(key, getattr(Options, key)), choices)
        try:
            check_options(Options(calibration_tokens=config["calibration_tokens"], **row))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


def texts_of(words: list[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts by name from the words NAME=KIND:PATH of --texts.

    Raise `UserError` unless they are those that the config names.
    """
    found = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            raise UserError(f"--texts {word} must have the form NAME=KIND:PATH, as in a=text:FILE")
        found[name] = text
    wanted = dict.fromkeys((*config["calibration_texts"], *config["held_out_texts"]))
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"--texts lacks {', '.join(missing)}: add {missing[0]}=KIND:PATH")
    if other := [name for name in found if name not in wanted]:
        raise UserError(f"--texts names {other[0]}, which the config does not: remove it")
    return found


@dataclasses.dataclass(frozen=True)
class Study:
    """The stages of a config on one model, and how their results become rows.

    Attributes:
      config: the checked config.
      checkpoint: the run directory of the model.
      out: the folder for all results.
      texts: "KIND:PATH" of each text, by name.
      include_path: a folder with more tasks; "": none.
    """

    config: Mapping[str, Any]
    checkpoint: str
    out: Path
    texts: Mapping[str, str]
    include_path: str = ""

    @property
    def tested(self) -> list[str]:
        """The rows whose tasks and texts are computed; the original is the first."""
        names = dict.fromkeys(self.config["task_rows"])
        return [ORIGINAL, *(name for name in names if name != ORIGINAL)] if names else []

    def model(self, name: str) -> str:
        """Return the run directory of a row."""
        return self.checkpoint if name == ORIGINAL else str(self.out / "models" / name)

    def stages(self) -> Iterator[Stage]:
        """Yield all stages, each after those whose results it reads."""
        for name in self.config["order"]:
            yield self._loss_stage(name)
        dtype = f"--dtype={self.config['dtype']}"
        for name in self.tested:
            words = ["--checkpoint", self.model(name), dtype]
            if self.config["prompts"]:
                file = str(self.out / "prompts" / f"{name}.jsonl")
                more = ["--prompts", str(self.prompts), "--output", file, "--temperature=0"]
                more += [f"--max_tokens={self.config['new_tokens']}"]
                yield Stage(f"prompts of {name}", "mea_jax.generate", (*words, *more))
            if self.config["tasks"]:
                more = ["--tasks", ",".join(self.config["tasks"]), "--log_samples"]
                more += ["--out", str(self.out / "tasks" / name)]
                more += [f"--limit={self.config['limit']}"] if self.config["limit"] else []
                more += ["--include_path", self.include_path] if self.include_path else []
                yield Stage(f"tasks of {name}", "mea_jax.evaluate", (*words, *more))

    def _loss_stage(self, name: str) -> Stage:
        row, shared = self.config["rows"][name], ["--checkpoint", self.checkpoint]
        shared += ["--measurements", str(self.out / "measurements")]
        for key in ("calibration", "held_out"):
            named = ",".join(self.texts[text] for text in self.config[f"{key}_texts"])
            shared += [f"--{key}_source={named}"]
        for key in ("calibration_tokens", "held_out_tokens", "dtype", "seed"):
            shared.append(f"--{key}={self.config[key]}")
        if kind_of(row) == "format":
            words = ["--out", str(self.out / "formats"), f"--formats={row['format']}"]
            return Stage(name, "studies.cache_formats", (*shared, *words))
        words = ["--out", self.model(name)]
        if kind_of(row) == "control":
            words.append(f"--repair_tokens={row['control']}")
            return Stage(name, "studies.control", (*shared, *words))
        words.append(f"--measure_tokens={self.config['measure_tokens']}")
        words += [f"--{key}={value}" for key, value in sorted(row.items())]
        return Stage(
            name,
            "mea_jax.compress",
            (*shared, *words),
            result=self.model(name),
            kept=name in self.tested,
        )

    @property
    def prompts(self) -> Path:
        """The file of prompts."""
        return self.out / "prompts.jsonl"

    def write_prompts(self, done: FinishedStages) -> None:
        """Write the file of prompts, and make the folder of their continuations.

        Raise `UserError` if other prompts were continued already.
        """
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in self.config["prompts"]]
        continued = any(name.startswith("prompts of ") for name in done.commands)
        if continued and self.prompts.read_text() != "".join(lines):
            raise UserError(
                f"config.prompts differs from {self.prompts}, which was continued already: restore "
                "the prompts, or choose another --out"
            )
        with disk_errors(self.out):
            (self.out / "prompts").mkdir(parents=True, exist_ok=True)
            write_atomically(self.prompts, "".join(lines))

    def collect(self, stage: Stage, seconds: float) -> None:
        """Write the results of a stage to its row."""
        folder, (what, _, name) = self.out / "rows", stage.name.rpartition(" of ")
        if what == "prompts":
            found = rows.continuations(self.out / "prompts" / f"{name}.jsonl")
            rows.update(folder, name, {"prompts": found})
        elif what == "tasks":
            tasks = self.out / "tasks"
            base = None if name == ORIGINAL else tasks / ORIGINAL
            scores = rows.scores(tasks / name, base, self.config["tasks"])
            rows.update(folder, name, {"tasks": scores})
        else:
            self._collect_losses(name, seconds)

    def _collect_losses(self, name: str, seconds: float) -> None:
        row, model = self.config["rows"][name], Path(self.model(name))
        file = {
            "compress": model / "compression.json",
            "control": model / "control.json",
            "format": self.out / "formats" / f"{row.get('format')}.json",
        }[kind_of(row)]
        summary = rows.read_json(file)
        names = {
            sources.describe(sources.named(self.texts[text])): text
            for text in self.config["held_out_texts"]
        }
        part = rows.losses(kind_of(row), row, summary, names)
        part |= {"seconds": round(seconds, 1), "commit": commit()}
        new = rows.update(self.out / "rows", name, part)
        first = rows.original(new, summary["cache_bytes_per_token"]["before"])
        rows.update(self.out / "rows", ORIGINAL, first)

    def remove_models(self, done: FinishedStages) -> None:
        """Remove the compressed models that are not read again."""
        for stage in self.stages():
            if stage.result and not stage.kept and done.has(stage):
                shutil.rmtree(stage.result, ignore_errors=True)


def run(study: Study, log: Callable[[str], Any], call: Call = call) -> None:
    """Run the unfinished stages of a study and write their rows.

    `log` logs a line. `call` runs a command and returns its exit status. Raise `UserError` if a
    stage fails, or if `study.out` contains stages with other options.
    """
    done = FinishedStages(study.out)
    study.write_prompts(done)

    def collect(stage: Stage) -> None:
        study.collect(stage, done.seconds(stage))
        study.remove_models(done)

    run_stages(list(study.stages()), done, log, call, collect)
    study.remove_models(done)


def main() -> None:
    config = cli.given_config(CONFIG, EXAMPLE).to_dict()
    if CHECKPOINT.value is None or OUT.value is None:
        raise UserError(
            "--checkpoint or --out is missing: give both, such as --checkpoint runs/smollm2 "
            "--out runs/smollm2_cache"
        )
    check(config)
    texts = texts_of(TEXTS.value, config)
    study = Study(config, CHECKPOINT.value, Path(OUT.value), texts, INCLUDE_PATH.value or "")
    if LIST.value:
        for stage in study.stages():
            print(shlex.join(["python", *stage.command[1:]]))
        return
    run(study, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{len(config['rows']) + 1} rows in {study.out / 'rows'}")


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, EXAMPLE)
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, "run directory of the imported model")
    OUT = flags.DEFINE_string("out", None, "folder for rows, models and measurements")
    TEXTS = flags.DEFINE_list("texts", [], "NAME=KIND:PATH of each text that the config names")
    INCLUDE_PATH = flags.DEFINE_string("include_path", None, "folder with more tasks")
    LIST = flags.DEFINE_bool("list", False, "print the commands without running them")
    flags.declare_key_flag("config")
    cli.run(main, "stopped; run the same command again to continue", training=False)
