"""Run the paper's protocol on a pretrained model: import, compress, recover, evaluate, report.

    python -m studies.halve --config configs/studies/qwen3_halve.py --model FOLDER

Each stage is a command that a user could run (`studies.stages`). Finished stages are not repeated,
so the same command continues after a kill. `report.md` and `report.json` are written to `--out`.
"""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from mea_jax import cli
from mea_jax.checkpoint.files import disk_errors, write_atomically, write_json
from mea_jax.config.schema import flatten
from mea_jax.errors import UserError
from studies import halve_table
from studies.stages import Call, FinishedStages, Stage, call, check_keys
from studies.stages import run as run_stages

ORIGINAL, CONTROL, RECOVERED = "original", "control", "_recovered"
KEYS: dict[str, Any] = {
    "name": str,
    "text": str,
    "context_length": int,
    "dtype": str,
    "keep": float,
    "compressions": dict,
    "compress": dict,
    "recover": dict,
    "recipe": str,
    "contexts": (list, tuple),
    "tasks": (list, tuple),
    "harness": dict,
}


def check(config: Mapping[str, Any]) -> None:
    """Raise `UserError` for a config that is not valid for this study."""
    check_keys(config, KEYS, "configs/studies/qwen3_halve.py")
    if not config["compressions"]:
        raise UserError("config.compressions is empty: add at least one compression")
    for name in config["compressions"]:
        if name in (ORIGINAL, CONTROL) or name.endswith(RECOVERED) or "/" in name:
            raise UserError(
                f"config.compressions.{name} is a reserved name or contains a slash: choose "
                "another name"
            )
    if not 0 < config["keep"] <= 1:
        raise UserError(
            f"config.keep={config['keep']} must be in (0, 1]: set the share of the cache to keep"
        )


def stages(config: Mapping[str, Any], model: str, out: Path) -> Iterator[Stage]:
    """Yield all stages, each after those whose results it reads."""
    original = out / ORIGINAL
    words = ["from_hf", "--model", model, "--out", str(original), "--text", config["text"]]
    words += ["--dtype", config["dtype"], "--context_length", str(config["context_length"])]
    yield Stage(ORIGINAL, "mea_jax.convert", tuple(words))
    names = tuple(config["compressions"])
    for name in names:
        options = config["compress"] | config["compressions"][name] | {"keep": config["keep"]}
        words = ["--checkpoint", str(original), "--out", str(out / name)]
        words += ["--measurements", str(out / "measurements")]
        words += [f"--{key}={value}" for key, value in sorted(options.items())]
        yield Stage(name, "mea_jax.compress", tuple(words), result=str(out / name))
    trained: tuple[str, ...] = ()
    if config["recover"].get("steps"):
        trained = (CONTROL, *(name + RECOVERED for name in names))
    for name in trained:
        source = original if name == CONTROL else out / name.removesuffix(RECOVERED)
        words = ["--config", f"{config['recipe']}:{source}", "--workdir", str(out / name)]
        words += [f"--config.{key}={value}" for key, value in flatten(config["recover"]).items()]
        yield Stage(name, "mea_jax.train", tuple(words))
    for name in (*names, *trained):
        words = ["--checkpoint", str(original), "--checkpoint", str(out / name)]
        words += ["--out", str(out / "profiles" / name), "--parts", "loss"]
        if config["contexts"] and name in names:
            words[-1] += ",speed"
            words += ["--contexts", ",".join(map(str, config["contexts"]))]
        yield Stage(f"profile of {name}", "mea_jax.evaluate", tuple(words))
    for name in (*names, *trained) if config["tasks"] else ():
        words = ["--checkpoint", str(out / name), "--baseline", str(original)]
        words += ["--tasks", ",".join(config["tasks"]), "--out", str(out / "tasks" / name)]
        words += _harness(config["harness"])
        yield Stage(f"tasks of {name}", "mea_jax.evaluate", tuple(words))


def _harness(options: Mapping[str, Any]) -> list[str]:
    none = {"include_path": "", "limit": 0, "num_fewshot": -1}
    return [f"--{k}={v}" for k, v in sorted(options.items()) if v != none.get(k)]


def run(
    config: Mapping[str, Any],
    model: str,
    out: Path,
    log: Callable[[str], Any],
    call: Call = call,
) -> str:
    """Run the unfinished stages, write the report, and return its Markdown.

    `log` logs a line. `call` runs a command and returns its exit status. Raise `UserError` if the
    config is not valid, a stage fails, or `out` contains stages with other options.
    """
    check(config)
    done, todo = FinishedStages(out), list(stages(config, model, out))
    run_stages(todo, done, log, call)
    trained = [stage.name for stage in todo if stage.module == "mea_jax.train"]
    report = halve_table.collect(out, list(config["compressions"]), trained)
    text = halve_table.markdown(report, config)
    with disk_errors(out):
        write_json(out / "report.json", report)
        write_atomically(out / "report.md", text)
    return text


def main() -> None:
    config = cli.given_config(CONFIG, "configs/studies/qwen3_halve.py").to_dict()
    if not MODEL.value:
        raise UserError("--model is missing: add --model FOLDER, or a model's name on the hub")
    out = Path(OUT.value or Path("runs") / config["name"])
    if LIST.value:
        check(config)
        for stage in stages(config, MODEL.value, out):
            print(shlex.join(["python", *stage.command[1:]]))
        return
    text = run(config, MODEL.value, out, lambda line: print(line, file=sys.stderr, flush=True))
    print(text)
    print(f"{out / 'report.md'} and report.json")


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "configs/studies/qwen3_halve.py")
    MODEL = flags.DEFINE_string(
        "model", None, "folder of a transformers model, or its name on the hub"
    )
    OUT = flags.DEFINE_string("out", None, "folder for all results; default: runs/<config.name>")
    LIST = flags.DEFINE_bool("list", False, "print the commands without running them")
    flags.declare_key_flag("config")
    cli.run(main, "stopped; run the same command again to continue", training=False)
