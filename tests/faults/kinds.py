"""The faults: each a function of a trial's `Scratch` that raises `Failed` if the run does not end
as a run without the fault, or as the documented exception."""

import contextlib
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from faults.runs import (
    EVERY,
    STEPS,
    Failed,
    Process,
    Scratch,
    events,
    expect,
    expect_same,
    free_address,
    order,
    small_disk,
    until,
)

Fault = Callable[[Scratch], None]
_references = threading.Lock()  # trials that run at the same time share them
_SLOW = "wait=0.01"  # so that moments inside the loop are as likely as those before it


def reference(trial: Scratch, name: str, *faults: str, flags: tuple[str, ...] = ()) -> Path:
    """A run without the fault, made once for the campaign."""
    path = trial.campaign / "references" / name
    with _references:
        if path.exists():
            return path
        scratch = path.with_name(f"{name}.incomplete")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        run, order = scratch / "run", scratch / "order.jsonl"
        trial.run(*faults, flags=flags, workdir=run, order=order, guarded=True)
        scratch.rename(path)
    return path


def _finish(trial: Scratch, *faults: str, flags: tuple[str, ...] = ()) -> str:
    """The same command again, to the end."""
    return trial.run(*faults, flags=flags)


# -- killed ---------------------------------------------------------------------------------


def kill(trial: Scratch, kills: int = 1) -> None:
    """SIGKILL at a random moment between the start and the end of a process."""
    wanted = reference(trial, "plain")
    for _ in range(kills):
        process = trial.start(_SLOW)
        time.sleep(trial.rng.uniform(0, 8))
        process.kill()
        process.wait()
    _finish(trial)
    expect_same(trial, wanted)


def kill_in_save(trial: Scratch) -> None:
    """SIGKILL while a checkpoint is written, or just after."""
    wanted = reference(trial, "plain")
    process = trial.start(_SLOW)
    step = trial.rng.randrange(EVERY, STEPS, EVERY)
    folder = trial.workdir / "checkpoints"
    until(lambda: list(folder.glob(f"{step}*")), process)
    time.sleep(trial.rng.uniform(0, 0.15))
    process.kill()
    process.wait()
    _finish(trial)
    expect_same(trial, wanted)


def term(trial: Scratch) -> None:
    """SIGTERM at a random moment: saved, exit status 75, and on from that very step."""
    wanted = reference(trial, "plain")
    process = trial.start("wait=0.03")
    until(lambda: (trial.workdir / "metrics.jsonl").exists(), process)
    time.sleep(trial.rng.uniform(0.2, 1.5))
    process.kill(signal.SIGTERM)
    status = process.wait()
    expect(status == 75, f"exit status {status}, not 75: {process.said()[-600:]}")
    stopped = re.search(rf"stopped by SIGTERM after step (\d+) of {STEPS}", process.said())
    if stopped is None:
        raise Failed(f"no word of the step: {process.said()[-600:]}")
    words = _finish(trial)
    expect(f"resuming from step {stopped[1]} " in words, f"resumed elsewhere: {words[-600:]}")
    expect_same(trial, wanted)


# -- the disk -------------------------------------------------------------------------------


def _on_small_disk(
    trial: Scratch, disk: Path, break_disk: Callable[[Path], None], mend: Callable[[Path], object]
) -> None:
    """A run with `disk` under it, or under a part of it, that breaks and is mended."""
    wanted = reference(trial, "plain")
    with small_disk(disk, 12 << 20):
        process = trial.start(_SLOW)
        until(lambda: list(trial.workdir.glob("checkpoints/*")), process)
        time.sleep(trial.rng.uniform(0, 0.8))
        break_disk(disk)
        status, words = process.wait(), process.said()
        expect(status == 2, f"exit status {status}, not 2: {words[-600:]}")
        lines = [line for line in words.splitlines() if line.startswith("error: ")]
        expect(len(lines) == 1, f"not one clear line: {words[-600:]}")
        mend(disk)
        _finish(trial)
        expect_same(trial, wanted)


def disk_full(trial: Scratch) -> None:
    """The disk fills up during a run; space is made, and the run goes on."""

    def fill(disk: Path) -> None:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)

    disk = trial.path / "disk"
    trial.workdir = disk / "run"
    _on_small_disk(trial, disk, fill, lambda disk: (disk / "filler").unlink())


def read_only(trial: Scratch) -> None:
    """The file system of the checkpoints becomes read-only during a run, and writable again."""

    def remount(how: str) -> Callable[[Path], None]:
        def call(disk: Path) -> None:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:  # refused while a file there is being written
                command = ["mount", "-o", f"remount,{how}", str(disk)]
                if subprocess.run(command, capture_output=True).returncode == 0:
                    return
            raise Failed("the file system could not be remounted")

        return call

    trial.workdir.mkdir()
    _on_small_disk(trial, trial.workdir / "checkpoints", remount("ro"), remount("rw"))


# -- damaged checkpoints --------------------------------------------------------------------


def _damage(trial: Scratch, change: Callable[[Path], None]) -> None:
    """Cut a run, change a file of its newest checkpoint, go on."""
    wanted = reference(trial, "plain")
    process = trial.start(_SLOW)
    until(lambda: (trial.workdir / "checkpoints" / "30").exists(), process)
    process.kill()
    process.wait()
    newest, before = sorted(map(int, _steps(trial)))[-1:-3:-1]
    folder = trial.workdir / "checkpoints" / str(newest)
    file = trial.rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    change(file)
    damaged = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    words = _finish(trial)
    for words_expected in (
        f"the checkpoint of step {newest} is damaged",
        f"falling back to the checkpoint of step {before}",
        f"resuming from step {before} ",
    ):
        expect(words_expected in words, f"not said: {words_expected}: {words[-800:]}")
    aside = trial.workdir / "damaged" / str(newest)
    now = {p.relative_to(aside): p.read_bytes() for p in aside.rglob("*") if p.is_file()}
    expect(now == damaged, "the damaged checkpoint was not kept as it was")
    expect_same(trial, wanted)


def _steps(trial: Scratch) -> list[str]:
    folder = trial.workdir / "checkpoints"
    return [path.name for path in folder.iterdir() if path.name.isdigit()]


def truncated(trial: Scratch) -> None:
    """A file of the newest checkpoint is cut short."""

    def change(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: trial.rng.randrange(len(content))])

    _damage(trial, change)


def flipped(trial: Scratch) -> None:
    """One bit of a file of the newest checkpoint is wrong."""

    def change(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[trial.rng.randrange(len(content))] ^= 1 << trial.rng.randrange(8)
        file.write_bytes(content)

    _damage(trial, change)


def missing(trial: Scratch) -> None:
    """A file of the newest checkpoint is not there."""
    _damage(trial, lambda file: file.unlink())


# -- several processes ----------------------------------------------------------------------


def second(trial: Scratch) -> None:
    """A second process is started on the run directory: it refuses, the first goes on."""
    wanted = reference(trial, "plain")
    process = trial.start("wait=0.1")
    until(lambda: (trial.workdir / "metrics.jsonl").exists(), process)
    words = trial.run(status=2, order=trial.path / "other.jsonl")
    expect(f"process {process.popen.pid} on " in words, f"not named: {words[-600:]}")
    expect(process.running, "the first process has ended")
    expect(process.wait() == 0, f"the first process failed: {process.said()[-600:]}")
    expect_same(trial, wanted)


def _start_hosts(trial: Scratch, run: Path, record: Path, *words: str) -> list[Process]:
    """Four processes of one run on one machine; `words` are faults and flags."""
    address = free_address()
    return [
        trial.start(
            *(word for word in words if not word.startswith("--")),
            flags=(
                *("--config.mesh.data=2", "--config.mesh.fsdp=2", "--coordinator", address),
                *("--num_processes", "4", "--process_id", str(index), "--startup_timeout", "120"),
                *(word for word in words if word.startswith("--")),
            ),
            workdir=run,
            order=record.with_suffix(f".{index}"),
        )
        for index in range(4)
    ]


def _finish_hosts(trial: Scratch) -> None:
    """Four processes go on to the end, which must be that of four without a fault."""
    wanted = trial.campaign / "references" / "hosts"
    with _references:
        if not wanted.exists():
            wanted.mkdir(parents=True)
            for process in _start_hosts(trial, wanted / "run", wanted / "order"):
                expect(process.wait() == 0, f"the reference failed: {process.said()[-600:]}")
            (wanted / "order.0").rename(wanted / "order.jsonl")
    for process in _start_hosts(trial, trial.workdir, trial.order):
        expect(process.wait() == 0, f"no restart: {process.said()[-600:]}")
    trial.order = trial.order.with_suffix(".0")
    expect_same(trial, wanted)


def host(trial: Scratch) -> None:
    """One of four hosts is killed: the others end with a line, all start again and go on."""
    processes = _start_hosts(trial, trial.workdir, trial.order, _SLOW)
    until(lambda: (trial.workdir / "checkpoints" / "10").exists(), processes[0], 120)
    time.sleep(trial.rng.uniform(0, 1))
    victim = trial.rng.randrange(4)
    processes[victim].kill()
    for index, process in enumerate(processes):
        status = process.wait(60)
        if index != victim:
            expect(status != 0 and "error: " in process.said(), f"no line: {process.said()[-600:]}")
    _finish_hosts(trial)


def host_term(trial: Scratch) -> None:
    """SIGTERM for one of four hosts, which save by the first one's clock: all save and end."""
    timed = ("--config.checkpoint.every=0", "--config.checkpoint.minutes=0.01")
    processes = _start_hosts(trial, trial.workdir, trial.order, "wait=0.05", *timed)
    until(lambda: list(trial.workdir.glob("checkpoints/[0-9]*")), processes[0], 120)
    time.sleep(trial.rng.uniform(0, 1))
    processes[trial.rng.randrange(4)].kill(signal.SIGTERM)
    found = [(process.wait(60), process.said()) for process in processes]
    expect(all(status == 75 for status, _ in found), f"not all ended with 75: {found}"[:2000])
    stopped = re.search(rf"stopped by SIGTERM after step (\d+) of {STEPS}", found[0][1])
    if stopped is None:
        raise Failed(f"no word of the step: {found[0][1][-600:]}")
    expect(stopped[1] in _steps(trial), f"step {stopped[1]} is not saved: {_steps(trial)}")
    _finish_hosts(trial)


# -- data -----------------------------------------------------------------------------------


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*array_record*") if "train" in path.name)


def data_stop(trial: Scratch) -> None:
    """A shard of the prepared data is damaged: named, exit status 2; mended, and on."""
    wanted = reference(trial, "plain")
    cache = trial.path / "cache"
    flags = (f"--config.data.cache_dir={cache}",)
    process = trial.start(_SLOW, flags=flags)
    until(lambda: (trial.workdir / "checkpoints" / "10").exists(), process)
    process.kill()
    process.wait()
    (shard,) = _shards(cache)
    content = shard.read_bytes()
    if trial.rng.random() < 0.5:
        shard.unlink()
    else:  # windows in the middle of it
        middle = len(content) // 2
        noise = bytes(trial.rng.randrange(256) for _ in range(middle // 2))
        shard.write_bytes(content[:middle] + noise + content[middle + len(noise) :])
    words = trial.run(status=2, flags=flags)
    expect(str(shard.parent) in words, f"the shard is not named: {words[-600:]}")
    shutil.rmtree(cache)  # as the line says
    _finish(trial, flags=flags)
    expect_same(trial, wanted)


def data_skip(trial: Scratch) -> None:
    """Windows that cannot be read are left out where the config says so, and counted."""
    wanted = reference(trial, "plain")
    cache = trial.path / "cache"
    flags = (f"--config.data.cache_dir={cache}", "--config.data.bad_input=skip")
    process = trial.start(_SLOW, flags=flags)
    until(lambda: (trial.workdir / "checkpoints" / "10").exists(), process)
    process.kill()
    process.wait()
    (shard,) = _shards(cache)
    content = bytearray(shard.read_bytes())
    # Where the file is not only filled up with zeros.
    places = [at for at in range(64, len(content) - 64, 16) if all(content[at - 32 : at + 32 : 8])]
    for at in trial.rng.sample(places, 3):
        content[at] ^= 1 << trial.rng.randrange(8)
    shard.write_bytes(content)
    words = _finish(trial, flags=flags)
    left_out = events(trial.workdir, "empty_windows")
    expect(bool(left_out), f"nothing was left out: {words[-600:]}")
    changed = tuple(row["step"] for row in left_out)
    kept, plain = (order(path, changed) for path in (trial.order, wanted / "order.jsonl"))
    expect(kept == plain, "windows that can be read came in another order")


# -- the numbers ----------------------------------------------------------------------------


def nan(trial: Scratch) -> None:
    """A gradient that is not a number: as if the host had taken the state over that step."""
    step = trial.rng.randrange(2, STEPS)
    wanted = reference(trial, f"passed_over_{step}", f"nan={step}", f"passed_over={step}")
    fault = f"nan={step}"
    if trial.rng.random() < 0.5:  # and killed at some time after it
        process = trial.start(_SLOW, fault)
        target = min(step + 5, STEPS)
        until(lambda: (trial.workdir / "checkpoints" / str(target // 5 * 5)).exists(), process)
        process.kill()
        process.wait()
    words = _finish(trial, fault)
    found = [row["step"] for row in events(trial.workdir, "skipped_update")]
    expect(found == [step], f"updates left out: {found}, not {[step]}: {words[-600:]}")
    expect_same(trial, wanted)


def nan_limit(trial: Scratch) -> None:
    """One more than the updates that may be left out: the run stops and says so."""
    first = trial.rng.randrange(10, 40)
    faults = [f"nan={first + 2 * i}" for i in range(4)]
    words = trial.run(*faults, flags=("--config.guards.max_skipped=3",), status=2)
    expect(f"at step {first + 6}" in words and "max_skipped=3" in words, words[-600:])
    trial.run(*faults, flags=("--config.guards.max_skipped=4",))
    expect(len(events(trial.workdir, "skipped_update")) == 4, "not all four are counted")


def spike(trial: Scratch) -> None:
    """Noise among the batches: back to the checkpoint before, and on without them."""
    first = trial.rng.randrange(25, 45)
    rewinding = ("--config.guards.rewind=True",)
    fault = f"garbage={first}-{first + 4}"
    # The update before the first high loss is left out too: it may be its cause.
    wanted = reference(
        trial, f"without_{first}", f"without={first - 1}-{first + 4}", flags=rewinding
    )
    if trial.rng.random() < 0.5:  # killed before, during or after the rewind
        process = trial.start(_SLOW, fault, flags=rewinding)
        time.sleep(trial.rng.uniform(2, 8))
        process.kill()
        process.wait()
    else:  # killed when a checkpoint after the rewind is there
        process = trial.start(_SLOW, fault, flags=rewinding)
        until(lambda: events(trial.workdir, "rewind"), process)
        later = trial.workdir / "checkpoints" / str(first // EVERY * EVERY + 2 * EVERY)
        until(later.exists, process)
        process.kill()
        process.wait()
    words = _finish(trial, fault, flags=rewinding)
    found = events(trial.workdir, "rewind")
    expect(
        [row["left_out"] for row in found] == [[first - 1, first + 4]],
        f"rewinds: {found}: {words[-600:]}",
    )
    expect_same(trial, wanted)


KINDS: dict[str, Fault] = {
    name.__name__: name
    for name in (
        *(kill, kill_in_save, term, disk_full, read_only, truncated, flipped, missing),
        *(second, host, host_term, data_stop, data_skip, nan, nan_limit, spike),
    )
}
# Which faults must show that a guard is gone.
SHOWN_BY = {
    "digests": ("flipped",),
    "lock": ("second",),
    "cleaning": ("kill_in_save",),
    "skipping": ("nan",),
    "skip_limit": ("nan_limit",),
    "spikes": ("spike",),
    "position": ("spike",),
    "sigterm": ("term",),
    "metrics": ("term",),
}
