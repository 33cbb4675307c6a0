"""Faults of contents: data that cannot be read, gradients that are not finite, loss spikes."""

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
    """Damage a shard of the data: the run names it and exits with 2; with new data it resumes."""
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
    else:  # overwrite windows in its middle
        middle = len(content) // 2
        noise = bytes(trial.rng.randrange(256) for _ in range(middle // 2))
        shard.write_bytes(content[:middle] + noise + content[middle + len(noise) :])
    words = trial.run(status=2, flags=flags)
    expect(str(shard.parent) in words, f"the shard is not named: {words[-600:]}")
    shutil.rmtree(cache)  # as the message advises
    trial.run(flags=flags)
    expect_same(trial, wanted)


def data_skip(trial: Scratch) -> None:
    """Damage windows with bad_input=skip: they are left out and counted; the others stay equal."""
    wanted = reference(trial, "plain")
    cache = trial.path / "cache"
    flags = (f"--config.data.cache_dir={cache}", "--config.data.bad_input=skip")
    process = trial.start(SLOW, flags=flags)
    until(lambda: (trial.workdir / "checkpoints" / "10").exists(), process)
    process.kill()
    process.wait()
    (shard,) = _shards(cache)
    content = bytearray(shard.read_bytes())
    # Only places outside of padding with zeros.
    places = [at for at in range(64, len(content) - 64, 16) if all(content[at - 32 : at + 32 : 8])]
    for at in trial.rng.sample(places, 3):
        content[at] ^= 1 << trial.rng.randrange(8)
    shard.write_bytes(content)
    words = trial.run(flags=flags)
    left_out = events(trial.workdir, "empty_windows")
    expect(bool(left_out), f"nothing was left out: {words[-600:]}")
    changed = tuple(row["step"] for row in left_out)
    kept, plain = (order(path, changed) for path in (trial.order, wanted / "order.jsonl"))
    expect(kept == plain, "the order of the readable windows changed")


def nan(trial: Scratch) -> None:
    """Make a gradient nan: the run equals one whose host skips the update of that step."""
    step = trial.rng.randrange(2, STEPS)
    wanted = reference(trial, f"passed_over_{step}", f"nan={step}", f"passed_over={step}")
    fault = f"nan={step}"
    if trial.rng.random() < 0.5:  # killed some time after that step
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
    """Leave out one update more than allowed: the run stops and names the step and the limit."""
    first = trial.rng.randrange(10, 40)
    faults = [f"nan={first + 2 * i}" for i in range(4)]
    words = trial.run(*faults, flags=("--config.guards.max_skipped=3",), status=2)
    expect(f"at step {first + 6}" in words and "max_skipped=3" in words, words[-600:])
    trial.run(*faults, flags=("--config.guards.max_skipped=4",))
    expect(len(events(trial.workdir, "skipped_update")) == 4, "not all four updates are counted")


def spike(trial: Scratch) -> None:
    """Replace batches by noise: the run rewinds to an earlier checkpoint and leaves them out."""
    first = trial.rng.randrange(25, 45)
    rewinding = ("--config.guards.rewind=True",)
    fault = f"garbage={first}-{first + 4}"
    # The update before the first high loss is left out too, because it may be the cause.
    wanted = reference(
        trial, f"without_{first}", f"without={first - 1}-{first + 4}", flags=rewinding
    )
    if trial.rng.random() < 0.5:  # killed before, during or after the rewind
        process = trial.start(SLOW, fault, flags=rewinding)
        time.sleep(trial.rng.uniform(2, 8))
        process.kill()
        process.wait()
    else:  # killed when the first checkpoint after the rewind exists
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
