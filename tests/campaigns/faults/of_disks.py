"""Faults of disks: full or read-only disks, and damaged files of checkpoints."""

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.campaigns.faults.runs import (
    SLOW,
    Failed,
    Scratch,
    expect,
    expect_same,
    reference,
    small_disk,
    steps_of,
    until,
)


def _on_small_disk(
    trial: Scratch, disk: Path, break_disk: Callable[[Path], None], mend: Callable[[Path], object]
) -> None:
    """Run with all or part of the run directory on `disk`; break it, repair it and resume."""
    wanted = reference(trial, "plain")
    with small_disk(disk, 12 << 20):
        process = trial.start(SLOW)
        until(lambda: list(trial.workdir.glob("checkpoints/*")), process)
        time.sleep(trial.rng.uniform(0, 0.8))
        break_disk(disk)
        status, words = process.wait(), process.said()
        expect(status == 2, f"exit status {status}, not 2: {words[-600:]}")
        lines = [line for line in words.splitlines() if line.startswith("error: ")]
        expect(len(lines) == 1, f"not exactly one error line: {words[-600:]}")
        mend(disk)
        trial.run()
        expect_same(trial, wanted)


def disk_full(trial: Scratch) -> None:
    """Fill the disk during a run; after space is freed, the run resumes."""

    def fill(disk: Path) -> None:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)

    disk = trial.path / "disk"
    trial.workdir = disk / "run"
    _on_small_disk(trial, disk, fill, lambda disk: (disk / "filler").unlink())


def read_only(trial: Scratch) -> None:
    """Make the checkpoints' file system read-only during a run, then writable again."""

    def remount(how: str) -> Callable[[Path], None]:
        def call(disk: Path) -> None:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:  # fails while a file there is being written
                command = ["mount", "-o", f"remount,{how}", str(disk)]
                if subprocess.run(command, capture_output=True).returncode == 0:
                    return
            raise Failed("the file system could not be remounted")

        return call

    trial.workdir.mkdir()
    _on_small_disk(trial, trial.workdir / "checkpoints", remount("ro"), remount("rw"))


def _damage(trial: Scratch, change: Callable[[Path], None]) -> None:
    """Kill a run, change a file of its newest checkpoint, and resume from the one before."""
    wanted = reference(trial, "plain")
    process = trial.start(SLOW)
    until(lambda: (trial.workdir / "checkpoints" / "30").exists(), process)
    process.kill()
    process.wait()
    newest, before = sorted(map(int, steps_of(trial.workdir)))[-1:-3:-1]
    folder = trial.workdir / "checkpoints" / str(newest)
    file = trial.rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    change(file)
    damaged = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    words = trial.run()
    for words_expected in (
        f"the checkpoint of step {newest} is damaged",
        f"falling back to the checkpoint of step {before}",
        f"resuming from step {before} ",
    ):
        expect(words_expected in words, f"not printed: {words_expected}: {words[-800:]}")
    aside = trial.workdir / "damaged" / str(newest)
    now = {p.relative_to(aside): p.read_bytes() for p in aside.rglob("*") if p.is_file()}
    expect(now == damaged, "the damaged checkpoint was not kept as it was")
    expect_same(trial, wanted)


def truncated(trial: Scratch) -> None:
    """Cut a file of the newest checkpoint short."""

    def change(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: trial.rng.randrange(len(content))])

    _damage(trial, change)


def flipped(trial: Scratch) -> None:
    """Flip one bit of a file of the newest checkpoint."""

    def change(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[trial.rng.randrange(len(content))] ^= 1 << trial.rng.randrange(8)
        file.write_bytes(content)

    _damage(trial, change)


def missing(trial: Scratch) -> None:
    """Remove a file of the newest checkpoint."""
    _damage(trial, lambda file: file.unlink())
