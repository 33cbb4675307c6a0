"""Code that all commands share: flags, one-line errors, the compilation cache."""

import errno
import functools
import io
import math
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tqdm
from absl import app, flags, logging
from jax._src import xla_bridge  # for the reasons of a fallback to the CPU
from ml_collections import config_dict, config_flags

from mea_jax.config.parse import from_config_dict
from mea_jax.config.paths import cache_root
from mea_jax.config.schema import DataConfig, TrainConfig, flatten
from mea_jax.config.shipped import find_shipped, is_shipped
from mea_jax.errors import UserError, fail, nearest
from mea_jax.parallel import preemption, processes
from mea_jax.parallel.host import accelerator_attached, keep_freed_memory
from mea_jax.parallel.preemption import Preempted

T = TypeVar("T")

_OVERRIDE = re.compile(r"--?(config\.[\w.\[\]]+)")
# jax's message, without the advice at its end. The reason comes from the platform, such as
# "ABORTED: The TPU is already in use by process with pid 1. Not attempting to load libtpu.so in
# this process." from libtpu.
_NO_BACKEND = re.compile(
    r"Unable to initialize backend '(\w+)': (.*?)\.?( \([^()]*\))?$", re.DOTALL
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_HELD = re.compile("already in use|resource busy", re.IGNORECASE)


def define_config_flag():
    """Define `--config file.py[:arg]` with `--config.key=value` overrides; return its holder."""
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "config file with an optional variant, such as configs/quickstart.py:mha, or the name of "
        "an installed one, such as quickstart:mha; "
        "--config.key=value overrides one of its keys (all keys: mea_jax/config/schema.py)",
    )


def given_config(flag, example: str) -> config_dict.ConfigDict:
    """Return the value of a config flag; raise `UserError` if it is missing or unreadable."""
    if flag.value is None:
        raise UserError(f"no config given: add --config {example}")
    try:
        flag.value.to_dict()
    except OSError as error:  # ml_collections returns an object that raises when it is read
        path = getattr(flags.FLAGS["config"], "config_filename", "").split(":")[0]
        reason = str(error).strip().splitlines()[-1].strip()
        hint = (
            f"; use --config {Path(path).stem} for the installed one"
            if is_shipped(path)
            else "; check the path"
        )
        raise UserError(f"config file {path} cannot be read: {reason}{hint}") from error
    return flag.value


def parse_config(flag) -> TrainConfig:
    """Return the config of a `define_config_flag`; raise `UserError` if it is not valid."""
    return from_config_dict(given_config(flag, "configs/quickstart.py"))


def define_process_flags() -> None:
    """Define the flags of a distributed run, which `join_processes` reads."""
    flags.DEFINE_bool(
        "distributed", False, "join the other processes of a TPU pod, Slurm job or other cluster"
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, on machines without a cluster"
    )
    flags.DEFINE_integer("num_processes", None, "with --coordinator: number of processes")
    flags.DEFINE_integer("process_id", None, "with --coordinator: index of this process, from 0")
    flags.DEFINE_float("startup_timeout", 300.0, "seconds to wait for all processes")


def join_processes(same: dict[str, Any]) -> None:
    """Join the other processes of a distributed run; check that all have the `same` config.

    Raises `UserError` for flags that do not belong together, and as `processes.start` and
    `processes.check_same` do.
    """
    values = flags.FLAGS
    given = {n: getattr(values, n) for n in ("coordinator", "num_processes", "process_id")}
    timeout = values.startup_timeout
    if timeout <= 0:
        raise UserError(f"--startup_timeout {timeout:g} must be positive")
    if all(value is None for value in given.values()):
        if values.distributed:
            processes.start(timeout=timeout)
            processes.check_same(same, timeout)
        return
    if missing := [f"--{name}" for name, value in given.items() if value is None]:
        raise UserError(
            "--coordinator, --num_processes and --process_id belong together: add "
            + " and ".join(missing)
        )
    count, index = values.num_processes, values.process_id
    if count < 1:
        raise UserError(f"--num_processes {count} must be 1 or more")
    if not 0 <= index < count:
        raise UserError(
            f"--process_id {index} must be from 0 to {count - 1} with --num_processes {count}"
        )
    processes.start(coordinator=values.coordinator, count=count, index=index, timeout=timeout)
    processes.check_same(same, timeout)


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless jax's own cache directory is set.

    Raises `UserError` if another process holds the TPU.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_root(DataConfig()) / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    _check_fallback()


def _check_fallback() -> None:
    """Raise `UserError` if jax runs on the CPU only because another process holds the TPU.

    jax itself logs this only at level INFO.
    """
    jax.devices()
    reason = xla_bridge._backend_errors.get("tpu", "")
    if not getattr(jax.config, "jax_platforms", None) and _HELD.search(reason):
        raise UserError(_held_by_another("tpu", reason))


def _held_by_another(platform: str, reason: str) -> str:
    return (
        f"another process holds the {platform.upper()} ({reason}): wait until it ends, stop it, or "
        "set JAX_PLATFORMS=cpu"
    )


def no_devices(error: BaseException) -> str | None:
    """Return the message if jax failed to start a device platform, otherwise None."""
    asked = getattr(jax.config, "jax_platforms", None)
    if isinstance(error, RuntimeError) and (match := _NO_BACKEND.match(str(error))):
        platform, reason = match[1], " ".join(match[2].split())
        if _HELD.search(reason):
            return _held_by_another(platform, reason)
    elif isinstance(error, AssertionError) and asked:
        frames = traceback.extract_tb(error.__traceback__)
        if not frames or not frames[-1].filename.endswith("xla_bridge.py"):
            return None
        reason = "jax found no such device"
    else:
        return None
    wanted = f"JAX_PLATFORMS={asked}" if asked else f"the {platform} platform of jax"
    return (
        f"{wanted} cannot be used on this machine: {reason}; install jax for your accelerator "
        "(pip install 'jax[tpu]' or 'jax[cuda13]'), or set JAX_PLATFORMS=cpu"
    )


def _check_overrides(argv: Sequence[str]) -> None:
    """Raise `UserError` for a `--config.key` that is not an option or has no --config."""
    known = [f"config.{key}" for key in flatten(TrainConfig().to_dict())]
    overrides = [match[1] for argument in argv if (match := _OVERRIDE.match(argument))]
    for override in overrides:
        key = override.split("[")[0]
        if key not in known:
            raise UserError(f"unknown config key {key}: {nearest(key, known)}")
    if overrides and not any(re.match(r"--?config(=|$)", argument) for argument in argv):
        raise UserError(
            f"--{overrides[0]} overrides a key of a config, but no config is given: add --config "
            "quickstart, or a config file"
        )


def _last_overrides(argv: Sequence[str]) -> list[str]:
    """Return `argv` with only the last value of each `--config.key`.

    ml_collections concatenates the values of a key that holds a tuple. Here the last value wins,
    as for all other flags.
    """
    kept: list[str] = []
    seen = set()
    end = argv.index("--") if "--" in argv else len(argv)
    values: list[str] = []  # of the preceding flag, because the loop runs backwards
    for argument in reversed(argv[:end]):
        match = _OVERRIDE.fullmatch(argument.partition("=")[0])
        if match is None and not argument.startswith("-"):
            values.insert(0, argument)
            continue
        if match is None or match[1] not in seen:
            kept[:0] = [argument, *values]
        elif "=" in argument:  # its value is not one of `values`
            kept[:0] = values
        else:
            kept[:0] = values[1:]
        if match is not None:
            seen.add(match[1])
        values = []
    return [*values, *kept, *argv[end:]]


def _config_file_error(message: str, argv: Sequence[str]) -> str:
    """Return a config file's exception as one line, with the nearest key if one is misspelt."""
    if match := re.match(r"(?:Attribute|Key)Error: \W*(\w+)", message):
        for argument in argv:  # ml_collections' error for an override of a missing key
            key = argument.lstrip("-").split("=")[0]
            if key.startswith("config.") and match[1] in re.split(r"[.\[\]]", key):
                near = re.search(r'Did you mean "(\w+)"', message)
                mend = f"did you mean {near[1]!r}?" if near else "correct the name, or the file"
                return f"--{key}: the config has no {match[1]!r} there: {mend}"
    if match := re.search(r'Key "(\w+)" does not exist', message):
        names = {part for key in flatten(TrainConfig().to_dict()) for part in key.split(".")}
        return f"the config file sets the unknown key {match[1]!r}: {nearest(match[1], names)}"
    return f"the config file fails, correct it: {message}"


def _parse_flags(argv: Sequence[str], training: bool) -> list[str]:
    """Parse flags with absl; print an error in a flag, config file or key as one line and exit."""
    try:
        if training:
            _check_overrides(argv)
        return flags.FLAGS(find_shipped(_last_overrides(argv)))
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        fail(f"unknown flag --{name}: {nearest(name, flags.FLAGS)}")
    except UserError as error:
        fail(error)
    except flags.Error as error:
        if "Error whilst parsing config file" in str(error):  # with the file's full traceback
            fail(_config_file_error(str(error).strip().splitlines()[-1], argv))
        fail(error)
    except Exception as error:  # any error of the user's config file
        fail(_config_file_error(f"{type(error).__name__}: {error}", argv))


def _discard_output() -> None:
    """Discard the rest of stdout, so that Python's shutdown does not fail to write it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _output_problem(error: Exception) -> str | None:
    """Return the message if `error` comes from a full or broken stdout, otherwise None.

    An error of stdout names no file. Commands themselves handle errors that name a file.
    """
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in _FULL:
        return None
    _discard_output()
    return f"the output cannot be written: {error.strerror}; free space, or redirect it"


def outside_problem(error: Exception) -> str | None:
    """Return the message if the machine, not a bug, caused `error`, otherwise None."""
    return no_devices(error) or _output_problem(error)


def run(
    main: Callable[[], None],
    interrupted: str = "stopped; the same command resumes from the last checkpoint",
    training: bool = True,
) -> None:
    """Run a command: parse flags, and print a `UserError` as one line with exit status 2.

    `interrupted` is the message after Ctrl-C. Set `training` if --config is a `TrainConfig`. In a
    distributed run, an error in one process ends all processes.
    """

    def wrapped(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: write options as --flags, see --help")
        logging.set_verbosity(logging.WARNING)  # libraries log each of their steps at INFO
        preemption.resend_ignored()
        if not accelerator_attached():
            keep_freed_memory()  # before jax starts threads, which would keep freed memory
        if sys.stdout is None:  # closed by the parent process
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        if isinstance(sys.stdout, io.TextIOWrapper):
            # The encoding may lack characters of the output.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            main()
            sys.stdout.flush()
            processes.finish()
        except UserError as error:
            processes.end(2, f"error: {' '.join(str(error).split())}")
        except Preempted as error:
            processes.end(preemption.EXIT_STATUS, str(error), by_signal=True)
        except BrokenPipeError:  # the reader of the output has exited, as `head` does
            _discard_output()
            if processes.is_distributed():
                processes.end(141, "error: the reader of the output has exited")
            sys.exit(141)
        except KeyboardInterrupt:
            processes.end(130, f"\n{interrupted}", by_signal=True)
        except Exception as error:
            if (problem := outside_problem(error)) is not None:
                processes.end(2, f"error: {problem}")
            if not processes.is_distributed():
                raise
            reason = str(error).strip().partition("\n")[0]
            if processes.lost_another(error):
                processes.end(
                    1,
                    f"error: the connection to another process was lost ({reason}): see its log "
                    f"for the cause; {processes.AGAIN}",
                )
            processes.end(1, f"{traceback.format_exc()}error: {type(error).__name__}: {reason}")

    app.run(wrapped, flags_parser=functools.partial(_parse_flags, training=training))


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Return `items` with a progress bar and ETA on stderr, which is shown on terminals only."""
    return tqdm.tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True, disable=None)


def pyplot() -> Any:
    """Return matplotlib.pyplot, imported on first use, with a backend that only writes files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def run_subcommand(package: str, commands: Sequence[str], about: str | None) -> None:
    """Run the module of `mea_jax.<package>` that the first argument names.

    Without an argument, or with --help, print `about` and the commands. An unknown command is a
    one-line error. The module defines its own flags; nothing else of the package is imported.
    """
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(about)
        print(f"commands: {', '.join(commands)}")
        sys.exit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
    command = sys.argv.pop(1)
    if command not in commands:
        fail(f"{package} {command}: {nearest(command, commands)}")
    runpy.run_module(f"mea_jax.{package}.{command}", run_name="__main__", alter_sys=True)


def table(rows: list[tuple[str, str]]) -> str:
    """Return rows as two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def si(value: float, unit: str = "") -> str:
    """Format a number with an SI prefix: 1234567 -> "1.23 M"."""
    if not math.isfinite(value) or value < 1000:
        return f"{value:.3g} {unit}".strip()
    prefixes = ("k", "M", "G", "T", "P", "E")
    power = min(int(math.log10(value) // 3), len(prefixes))
    return f"{value / 1000**power:.3g} {prefixes[power - 1]}{unit}"
