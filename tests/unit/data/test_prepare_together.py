"""Tests of preparation by several processes: two at the same time, locks, Beam."""

import dataclasses
import errno
import threading
import time

import pytest

from mea_jax.data import prepare as prepare_lib
from mea_jax.data import sources
from mea_jax.data.corpus import unit_hash
from mea_jax.data.windows import builder
from mea_jax.errors import UserError
from tests.unit.data.preparing import FRACTION, entries, prepare, stored


def at_once(config):
    """Prepare in two threads that both find no cache; assert equal results in one folder."""
    both, barrier = [], threading.Barrier(2, timeout=30)
    lock = prepare_lib.integrity.lock

    def together(*args):
        barrier.wait()
        return lock(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_lib.integrity, "lock", together)
        threads = [threading.Thread(target=lambda: both.append(prepare(config))) for _ in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(both) == 2
    assert both[0].sources == both[1].sources
    assert entries(config) == [both[0].directory]


@pytest.fixture
def made(monkeypatch):
    """Return a list, to which each preparation appends how many are active at the same time."""
    calls, make, active = [], prepare_lib._make, []

    def counting(config, corpora, given, directory, *args):
        active.append(directory)
        calls.append(len(active))
        time.sleep(0.2)  # let the other thread start
        result = make(config, corpora, given, directory, *args)
        active.remove(directory)
        return result

    monkeypatch.setattr(prepare_lib, "_make", counting)
    return calls


def test_of_two_at_once_one_works(config, made):
    at_once(config)
    assert made == [1]


def test_two_at_once_without_locks_agree(config, made, monkeypatch):
    """On a file system without locks both prepare the data, in separate folders."""

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(prepare_lib.integrity.fcntl, "flock", refuse)
    at_once(config)
    assert sorted(made) == [1, 2]


def test_a_lock_left_by_a_kill_holds_no_one_up(config):
    prepared = prepare(config)
    root = prepare_lib.cache_root(config)
    (root / f"{prepared.directory.name}.lock").write_text("")
    prepare_lib.shutil.rmtree(prepared.directory)
    assert prepare(config).sources == prepared.sources
    assert entries(config) == [prepared.directory]


def test_beam_without_the_package(config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam.options.pipeline_options", None)
    with pytest.raises(UserError, match="needs the package apache-beam: pip install"):
        prepare(config, beam_runner="DirectRunner")


def test_beam_writes_the_same_tokens(config, monkeypatch):
    pytest.importorskip("apache_beam")
    monkeypatch.setattr(builder, "_SHARD_BYTES", 2000)  # to get several shards
    alone = prepare(config)
    other = dataclasses.replace(config, cache_dir=config.cache_dir + "2")
    beam = prepare(other, beam_runner="DirectRunner")
    assert beam.baselines == alone.baselines
    for split in ("train", "held_out"):
        texts = [stored(prepared, split).split("<|endoftext|>") for prepared in (alone, beam)]
        assert sorted(texts[0]) == sorted(texts[1])
    assert beam.sources[0].train_tokens == alone.sources[0].train_tokens
    assert beam.sources[0].train_windows > alone.sources[0].train_windows  # a partial one per shard


@pytest.mark.parametrize("workers", [1, 3])
def test_beam_tokens_do_not_depend_on_workers(config, monkeypatch, workers):
    """The content and order of the shards depend only on the sizes, not on the workers."""
    pytest.importorskip("apache_beam")
    monkeypatch.setattr(builder, "_SHARD_BYTES", 2000)
    options = ["--direct_running_mode=multi_threading", f"--direct_num_workers={workers}"]
    prepared = prepare(config, beam_runner="DirectRunner", beam_options=options)
    corpus = sources.open_source(config.sources[0])
    shards = min(len(corpus.units), corpus.size // 2000)
    assert shards > 3
    expected = "".join(
        document.text + "<|endoftext|>"
        for shard in range(shards)
        for document in corpus.documents(shard, shards)
        if not unit_hash(document.name) < FRACTION
    )
    assert stored(prepared, "train") == expected
