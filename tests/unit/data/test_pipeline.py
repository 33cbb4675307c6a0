"""Tests of the pipeline: batch i depends only on (seed, i, batch size), not on who reads it."""

import collections
import dataclasses
import itertools
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_jax.config.schema import DataConfig, SourceConfig
from mea_jax.data import pipeline, prepare
from mea_jax.data.bad_input import OPTION
from mea_jax.data.windows import reader
from mea_jax.errors import UserError

LENGTH = 16
BATCH = 8


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepare two sources of weights 3 and 1, which their letters distinguish."""
    folder = tmp_path_factory.mktemp("pipeline")
    for letter in "ab":
        (folder / letter).mkdir()
        for i in range(40):
            text = f"{letter * 3}{i:02d}" * (2 + i % 7)
            (folder / letter / f"{letter}{i}.txt").write_text(text)
    config = DataConfig(
        sources=(
            SourceConfig(source="text", path=str(folder / "a"), weight=3.0),
            SourceConfig(source="text", path=str(folder / "b"), weight=1.0),
        ),
        tokenizer="bytes",
        context_length=LENGTH,
        held_out_fraction=0.25,
        cache_dir=str(folder / "cache"),
    )
    return prepare.prepare(config, log=lambda line: None)


def train(prepared, count, **options):
    options = {"seed": 0, "batch_size": BATCH, **options}
    return list(itertools.islice(pipeline.train_batches(prepared, **options), count))


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def join(shares):
    return {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}


def test_shapes_and_dtypes(prepared):
    (batch,) = train(prepared, 1)
    assert set(batch) == {"inputs", "targets", "segment_ids", "positions"}
    for array in batch.values():
        assert array.shape == (BATCH, LENGTH)
        assert array.dtype == np.int32


def test_batches_hold_stored_windows(prepared):
    windows = {
        window["tokens"].tobytes()
        for source in prepared.sources
        for window in reader.open_windows(source.directory, "train", prepared.context_length)
    }
    for batch in train(prepared, 5):
        tokens = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
        full = (batch["segment_ids"] > 0).all(axis=1)
        assert all(row.tobytes() in windows for row in tokens[full])


@pytest.mark.parametrize("start", [1, 7, 100])
def test_any_start_step_gives_the_same_batches(prepared, start):
    for a, b in zip(
        train(prepared, start + 3)[start:], train(prepared, 3, start_step=start), strict=True
    ):
        same(a, b)


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 3, "prefetch": 5}])
def test_prefetch_does_not_change_batches(prepared, options):
    for a, b in zip(train(prepared, 20), train(prepared, 20, **options), strict=True):
        same(a, b)


@pytest.mark.parametrize("rows", [[0], [3, 4, 5], [7, 0, 2], [1, 1]])
def test_rows_are_those_of_the_whole_batch(prepared, rows):
    """A process can read any rows in any order."""
    whole = train(prepared, 4, start_step=3)
    for batch, part in zip(whole, train(prepared, 4, start_step=3, rows=rows), strict=True):
        same({name: x[rows] for name, x in batch.items()}, part)


def test_only_the_rows_asked_for_are_read(prepared, monkeypatch):
    reads = []
    open_windows = reader.open_windows

    class Counting:
        def __init__(self, windows):
            self.windows = windows

        def __len__(self):
            return len(self.windows)

        def __getitem__(self, index):
            reads.append(index)
            return self.windows[index]

    monkeypatch.setattr(reader, "open_windows", lambda *args: Counting(open_windows(*args)))
    # Start at a late step, to test that earlier batches are not read either.
    options = {"start_step": 1000, "rows": [2, 3], "threads": 0}
    train(prepared, 3, **options)
    assert len(reads) == 3 * 2
    reads.clear()
    list(pipeline.held_out_batches(prepared, batch_size=4, rows=[0]))
    total = sum(source.held_out_windows for source in prepared.sources)
    assert len(reads) == -(-total // 4)


def test_seeds_and_epochs_differ(prepared):
    def order(seed, start):
        return [
            batch["inputs"].tobytes() for batch in train(prepared, 4, seed=seed, start_step=start)
        ]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, start)) for seed in (0, 1) for start in (0, 40)}) == 4


def letter(row):
    """Return the source of a window's inputs, "a" or "b"."""
    text = bytes(token for token in row if token < 256)
    return "a" if b"a" in text else "b"


def test_mixture_has_the_weights(prepared):
    letters = collections.Counter(
        letter(row) for batch in train(prepared, 50) for row in batch["inputs"]
    )
    # Sources are interleaved in exact proportion, not drawn at random.
    assert letters == {"a": 300, "b": 100}


def test_an_epoch_holds_each_window_once(prepared):
    windows = prepared.sources[1].train_windows
    batches = train(prepared, -(-4 * windows // BATCH) + 1)
    rows = [row.tobytes() for batch in batches for row in batch["inputs"] if letter(row) == "b"]
    first, second = rows[:windows], rows[windows : 2 * windows]
    stored = [
        np.where(window["segment_ids"] > 0, window["tokens"][:-1], 0).astype(np.int32).tobytes()
        for window in reader.open_windows(
            prepared.sources[1].directory, "train", prepared.context_length
        )
    ]
    assert collections.Counter(first) == collections.Counter(stored)
    assert first != second[: len(first)]


def test_a_source_of_weight_zero_is_not_read(prepared):
    a, b = prepared.sources
    only_a = dataclasses.replace(prepared, sources=(a, dataclasses.replace(b, weight=0.0)))
    assert {letter(row) for batch in train(only_a, 10) for row in batch["inputs"]} == {"a"}
    none = dataclasses.replace(prepared, sources=(dataclasses.replace(b, weight=0.0),))
    with pytest.raises(UserError, match="no source has a positive weight"):
        train(none, 1)


def held_out(prepared, **options):
    return list(pipeline.held_out_batches(prepared, **{"batch_size": BATCH, **options}))


def test_held_out_reads_every_window_once_and_pads_with_zeros(prepared):
    batches = held_out(prepared)
    total = sum(source.held_out_windows for source in prepared.sources)
    assert total % BATCH, "the fixture should leave a partial batch"
    assert [batch["inputs"].shape for batch in batches] == [(BATCH, LENGTH)] * -(-total // BATCH)
    joined = join(batches)
    assert all((array[total:] == 0).all() for array in joined.values())
    real = (joined["segment_ids"] > 0).sum()
    assert real == sum(source.held_out_tokens for source in prepared.sources)


def test_held_out_sample_is_spread_and_fixed(prepared):
    everything = join(held_out(prepared))["inputs"]
    total = sum(source.held_out_windows for source in prepared.sources)
    sample = held_out(prepared, max_batches=2)
    assert len(sample) == 2
    for a, b in zip(sample, held_out(prepared, max_batches=2), strict=True):
        same(a, b)
    index = [np.nonzero((everything == row).all(axis=1))[0] for row in join(sample)["inputs"]]
    # Evenly spread: the n-th of 16 is at n / 16 of all windows.
    expected = [n * total // 16 for n in range(16)]
    assert all(e in found for e, found in zip(expected, index, strict=True))
    for a, b in zip(held_out(prepared, max_batches=10**6), held_out(prepared), strict=True):
        same(a, b)


@pytest.mark.parametrize("options", [{}, {"max_batches": 1}])
def test_held_out_rows_are_those_of_the_whole_batch(prepared, options):
    whole = held_out(prepared, **options)
    for batch, part in zip(whole, held_out(prepared, rows=[6, 7, 1], **options), strict=True):
        same({name: x[[6, 7, 1]] for name, x in batch.items()}, part)


@given(step=st.integers(0, 60), numbers=st.sets(st.integers(0, 50)), joined=st.booleans())
@settings(max_examples=200)
def test_batch_number_is_the_nth_that_is_not_left_out(step, numbers, joined):
    left_out: list[tuple[int, int]] = []
    for n in sorted(numbers):
        if joined and left_out and left_out[-1][1] == n - 1:
            left_out[-1] = (left_out[-1][0], n)
        else:  # neighbors may also be separate intervals
            left_out.append((n, n))
    rest = [n for n in range(200) if n not in numbers]
    assert pipeline.batch_number(step, left_out) == rest[step]


def test_batches_left_out_are_never_read(prepared):
    whole = train(prepared, 12)
    left_out = [(1, 2), (5, 5)]
    expected = [whole[n] for n in (0, 3, 4, 6, 7, 8, 9, 10, 11)]
    for start in (0, 1, 4):
        found = train(prepared, 9 - start, start_step=start, left_out=left_out)
        for a, b in zip(found, expected[start:], strict=True):
            same(a, b)


def shard(prepared, split="train"):
    """Return the file of the first source's windows; each split has one."""
    (path,) = prepared.sources[0].directory.rglob(f"*-{split}.array_record-*")
    return path


def flip_in_a_window(path):
    """Flip a bit in a window: windows are a few hundred bytes each, from the start of the file."""
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": flip_in_a_window,
}


@pytest.fixture
def copied(prepared, tmp_path):
    """Return a copy of `prepared` with separate files."""
    directory = tmp_path / prepared.directory.name
    shutil.copytree(prepared.directory, directory)
    parts = [
        dataclasses.replace(part, directory=directory / part.directory.name)
        for part in prepared.sources
    ]
    return dataclasses.replace(prepared, directory=directory, sources=tuple(parts))


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_window_ends_the_run_with_its_name(copied, damage, threads):
    path = shard(copied)
    DAMAGE[damage](path)
    remedy = f"remove the folder {copied.directory}, and the next run prepares it again"
    with pytest.raises(UserError) as caught:
        train(copied, 40, threads=threads, prefetch=threads)
    message = str(caught.value)
    assert re.match(rf"{re.escape(str(path))}: window \d+ cannot be read \(.+\); ", message)
    assert message.endswith(f"{remedy}; or leave such windows out with {OPTION}")


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_window_is_padding_and_all_others_stay(prepared, copied, damage, threads):
    DAMAGE[damage](shard(copied))
    options = {"threads": threads, "prefetch": threads}
    whole = train(prepared, 40, **options)
    found = train(copied, 40, skip_bad=True, **options)
    padded = 0
    for a, b in zip(whole, found, strict=True):
        assert {name: x.shape for name, x in a.items()} == {name: x.shape for name, x in b.items()}
        gone = (b["segment_ids"] == 0).all(axis=1)
        padded += gone.sum()
        assert not any(x[gone].any() for x in b.values())
        same({n: x[~gone] for n, x in a.items()}, {n: x[~gone] for n, x in b.items()})
    # Three of four rows come from the first source. A damaged window occurs once per epoch.
    everything = 40 * BATCH * 3 // 4
    assert padded == everything if damage != "one bit" else 0 < padded < everything / 20


def test_damaged_held_out_windows(prepared, copied):
    shard(copied, "held_out").unlink()
    with pytest.raises(UserError, match=r"held_out.*window 0 cannot be read .*No such file"):
        held_out(copied)
    padded = 0
    for a, b in zip(held_out(prepared), held_out(copied, skip_bad=True), strict=True):
        gone = (b["segment_ids"] == 0).all(axis=1)
        padded += gone.sum() - (a["segment_ids"] == 0).all(axis=1).sum()
        same({n: x[~gone] for n, x in a.items()}, {n: x[~gone] for n, x in b.items()})
    assert padded == prepared.sources[0].held_out_windows
