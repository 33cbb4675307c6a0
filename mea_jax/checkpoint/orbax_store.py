"""Make paths that orbax accepts, silence its threads, and verify the stores that it has written."""

import functools
import hashlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import tensorstore as ts

from mea_jax.config.paths import cache_root
from mea_jax.config.schema import DataConfig
from mea_jax.errors import UserError

_PATTERN = set("*?[")  # characters of a glob


@functools.cache  # once per process: each call would wrap the hooks again
def quiet_threads() -> None:
    """Keep orbax's threads and coroutines from printing their own tracebacks after a failure.

    When a write or read fails, orbax closes its event loop while others are running. Each of them
    then prints a traceback, of the closed loop or of its own failure. The first failure is raised.
    """
    hook, unraisable = sys.excepthook, sys.unraisablehook
    known = ("Event loop is closed", "Encountered error while reading array")

    def is_known(value: BaseException | None) -> bool:
        return any(words in str(value) for words in known)

    def quiet_hook(kind, value, trace) -> None:
        if not is_known(value):
            hook(kind, value, trace)

    def quiet_unraisable(args) -> None:
        if not is_known(args.exc_value):
            unraisable(args)

    # The hooks are never restored: after a failure, threads may outlive the run that started them.
    sys.excepthook, sys.unraisablehook = quiet_hook, quiet_unraisable
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="coroutine '.*' was never awaited")


def plain_path(folder: Path) -> Path:
    """Return a path to `folder` without the characters of a glob, for orbax.

    Orbax finds the parts of a checkpoint by a pattern that begins with the path of the checkpoint,
    so it finds none below "runs/sweep[lr=1]". For such a `folder`, return a link to it in the cache
    folder; `folder` need not exist yet. Raise `UserError` if the link cannot be made.
    """
    folder = folder.absolute()
    if not _PATTERN & set(str(folder)):
        return folder
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    link = cache_root(DataConfig()).absolute() / "paths" / name
    reason = "contains one as well"
    if not _PATTERN & set(str(link)):
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(folder, target_is_directory=True)
        except FileExistsError:  # another process was faster
            pass
        except OSError as error:
            reason = f"cannot be written: {error.strerror}"
        if link.is_symlink() and os.readlink(link) == str(folder):
            return link
    raise UserError(
        f"{folder} contains one of the characters * ? [, and the cache folder {link.parent}, where "
        f"a link could avoid them, {reason}: choose a path without them"
    )


def array_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of `tree`, by its name in a store of orbax."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): x.shape for p, x in leaves}


def missing(folder: Path, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Return a message about an array that a store lacks or has in another shape, or None.

    Read the manifest and the metadata of each array in `shapes`, not its values.
    """
    base = {"driver": "file", "path": f"{folder.absolute()}/"}
    try:
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        reads = {name: store.read(f"{name}/.zarray") for name in shapes}
        for name, read in reads.items():
            text = read.result().value
            if not text:
                return f"it lacks the array {name}"
            if (shape := tuple(json.loads(text)["shape"])) != shapes[name]:
                return f"its array {name} has the shape {shape} instead of {shapes[name]}"
    except (ValueError, LookupError, TypeError) as error:  # tensorstore raises ValueError
        return str(error).strip().splitlines()[0]
    return None
