"""What every command shares: the config flag, one-line errors, where compiled code is kept."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from mea_jax.config import TrainConfig, from_config_dict
from mea_jax.errors import UserError, fail, nearest


def define_config_flag():
    """`--config file.py[:arg]` with `--config.key=value` overrides."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file, with an optional argument: configs/quickstart.py:mha"
    )


def parse_config(flag) -> TrainConfig:
    """The validated config of a `define_config_flag`. Raises `UserError`."""
    if flag.value is None:
        raise UserError("no config given: add --config configs/quickstart.py")
    return from_config_dict(flag.value)


def cache_root() -> Path:
    """Where prepared data and compiled programs are kept: $MEA_JAX_CACHE or ~/.cache/mea_jax."""
    return Path(os.environ.get("MEA_JAX_CACHE") or Path.home() / ".cache" / "mea_jax")


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless jax was told where (or not) to keep them."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, its errors as one line: a flag, a config file or a config key is wrong."""
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        if name.startswith("config."):
            fail(_unknown_key(name))
        fail(f"unknown flag --{name}: {nearest(name, flags.FLAGS)}")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        fail(error)
    except (OSError, ImportError, SyntaxError, UserError) as error:
        fail(f"the config file cannot be read: {error}")


def _unknown_key(name: str) -> str:
    from mea_jax.config import TrainConfig, flatten

    known = [f"config.{key}" for key in flatten(TrainConfig().to_dict())]
    return f"unknown config key {name}: {nearest(name, known)}"


def run(main: Callable[[], None]) -> None:
    """Runs a command: flags parsed, a `UserError` printed as one line with exit status 2."""

    def wrapped(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: every option is a --flag; see --help")
        logging.set_verbosity(logging.WARNING)  # libraries report each of their steps at INFO
        try:
            main()
        except UserError as error:
            fail(error)

    app.run(wrapped, flags_parser=_parse_flags)
