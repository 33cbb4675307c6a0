"""Faults of contents: data that cannot be read, gradients and losses that go wrong."""

import shutil
import time
from pathlib import Path

from tests.campaigns.faults.runs import (
    EVERY,
    SLOW,
    STEPS,
    Scratch,
    events,
    expect,
    expect_same,
    order,
    reference,
    until,
)


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*array_record*") if "train" in path.name)


def data_stop(trial: Scratch) -> None:
    """A shard of the prepared data is damaged: named, exit status 2; mended, and on."""
    wanted = reference(trial, "plain")
    cache = trial.path / "cache"
    flags = (f"--config.data.cache_dir={cache}",)
    process = trial.start(SLOW, flags=flags)
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
    trial.run(flags=flags)
    expect_same(trial, wanted)


def data_skip(trial: Scratch) -> None:
    """Windows that cannot be read are left out where the config says so, and counted."""
    wanted = reference(trial, "plain")
    cache = trial.path / "cache"
    flags = (f"--config.data.cache_dir={cache}", "--config.data.bad_input=skip")
    process = trial.start(SLOW, flags=flags)
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
    words = trial.run(flags=flags)
    left_out = events(trial.workdir, "empty_windows")
    expect(bool(left_out), f"nothing was left out: {words[-600:]}")
    changed = tuple(row["step"] for row in left_out)
    kept, plain = (order(path, changed) for path in (trial.order, wanted / "order.jsonl"))
    expect(kept == plain, "windows that can be read came in another order")


def nan(trial: Scratch) -> None:
    """A gradient that is not a number: as if the host had taken the state over that step."""
    step = trial.rng.randrange(2, STEPS)
    wanted = reference(trial, f"passed_over_{step}", f"nan={step}", f"passed_over={step}")
    fault = f"nan={step}"
    if trial.rng.random() < 0.5:  # and killed at some time after it
        process = trial.start(SLOW, fault)
        target = min(step + 5, STEPS)
        until(lambda: (trial.workdir / "checkpoints" / str(target // 5 * 5)).exists(), process)
        process.kill()
        process.wait()
    words = trial.run(fault)
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
        process = trial.start(SLOW, fault, flags=rewinding)
        time.sleep(trial.rng.uniform(2, 8))
        process.kill()
        process.wait()
    else:  # killed when a checkpoint after the rewind is there
        process = trial.start(SLOW, fault, flags=rewinding)
        until(lambda: events(trial.workdir, "rewind"), process)
        later = trial.workdir / "checkpoints" / str(first // EVERY * EVERY + 2 * EVERY)
        until(later.exists, process)
        process.kill()
        process.wait()
    words = trial.run(fault, flags=rewinding)
    found = events(trial.workdir, "rewind")
    expect(
        [row["left_out"] for row in found] == [[first - 1, first + 4]],
        f"rewinds: {found}: {words[-600:]}",
    )
    expect_same(trial, wanted)
