"""Write output folders completely or not at all."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mea_jax.checkpoint.files import disk_errors
from mea_jax.errors import UserError

_MARK = ".unfinished"  # marks a work folder as ours


@contextlib.contextmanager
def atomic_folder(out: Path, option: str = "--out") -> Iterator[Path]:
    """Yield the work folder `<out>.part`, and rename the folder `result` in it to `out` at the end.

    The files of a conversion that was killed are removed: it starts from the beginning. Raise
    `UserError` if `out` exists, the disk refuses, or another process is writing it.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{option} {out} exists: choose another, or remove it")
    part = out.with_name(f"{out.name}.part")
    if part.exists() and any(part.iterdir()) and not (part / _MARK).exists():
        raise UserError(f"{part} is in the way: choose another {option}, or remove it")
    with contextlib.ExitStack() as stack:
        with disk_errors(part):
            part.mkdir(parents=True, exist_ok=True)
            mark = stack.enter_context((part / _MARK).open("a"))
        _claim(mark, out, option)
        for path in part.iterdir():
            if path.name != _MARK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        result = part / "result"
        with disk_errors(part):
            result.mkdir()
        try:
            yield part
        except UserError:
            shutil.rmtree(part, ignore_errors=True)  # another attempt would fail as well
            raise
        with disk_errors(out):
            result.rename(out)
            shutil.rmtree(part)


def _claim(mark: IO[str], out: Path, option: str) -> None:
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another process is writing {option} {out}: wait for it, or choose another"
        ) from error
    except OSError:  # a file system without locks
        pass


def check_space(folder: Path, needed: int) -> None:
    """Raise `UserError` if the disk of `folder` has fewer than `needed` bytes free.

    A memory-mapped file cannot report a full disk.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder.parent} has {free / 2**30:.1f} GiB free, the conversion needs "
            f"{needed / 2**30:.1f} GiB: free space, or choose another --out"
        )
