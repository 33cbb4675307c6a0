"""Tests of damaged prepared data: it is found before a run and the error contains the remedy."""

import dataclasses

import numpy as np
import pytest

from mea_jax.config.schema import DataConfig, SourceConfig
from mea_jax.data import prepare as prepare_lib
from mea_jax.data.windows import reader
from mea_jax.errors import UserError


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"file {i}: " + "alpha beta " * (5 + i))
    return DataConfig(
        sources=(SourceConfig(source="text", path=str(folder)),),
        tokenizer="bytes",
        context_length=64,
        held_out_fraction=0.3,
        cache_dir=str(tmp_path / "cache"),
    )


def prepare(config):
    return prepare_lib.prepare(config, log=lambda line: None)


def small_files(directory):
    """Return all files of prepared data except the windows and the list of checksums."""
    return [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and ".array_record" not in path.name and path.name != "checksums.json"
    ]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_every_flipped_bit_of_the_metadata_is_found(config, tokenizer):
    """The error of each flipped bit or truncation is one line and contains the remedy."""
    config = dataclasses.replace(config, tokenizer=tokenizer)
    directory = prepare(config).directory
    paths = small_files(directory)
    assert {path.name.split(".")[0] for path in paths} == {
        "prepared", "tokenizer", "dataset_info", "features",
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for path in paths:
        whole = path.read_bytes()
        broken = [whole[: len(whole) // 2], b""]
        for at in rng.integers(0, 8 * len(whole), 20):
            flipped = bytearray(whole)
            flipped[at // 8] ^= 1 << at % 8
            broken.append(bytes(flipped))
        for content in broken:
            path.write_bytes(content)
            with pytest.raises(UserError) as caught:
                prepare(config)
            assert str(caught.value) == (
                f"{path}: does not match its checksum; remove the folder {directory}, "
                "and the next run prepares it again"
            )
        path.write_bytes(whole)
    assert prepare(config).sources


def test_damaged_checksums(config):
    directory = prepare(config).directory
    path = directory / "checksums.json"
    whole = path.read_text()
    for content in ("", "[1]", "{", whole[:-20], "\xff", whole.replace("features", "festures")):
        path.write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=r"cannot be read .*; remove the folder") as caught:
            prepare(config)
        assert len(str(caught.value).splitlines()) == 1


def open_all(config):
    for source in prepare(config).sources:
        reader.open_windows(source.directory, "train", config.context_length)


def test_metadata_without_checksums_are_damaged_in_one_line(config):
    """Data prepared before checksums existed are accepted, and damage is still one error line."""
    prepared = prepare(config)
    directory = prepared.directory
    (directory / "checksums.json").unlink()
    assert prepare(config).digest == prepared.digest
    for path in small_files(directory):
        whole = path.read_bytes()
        for content in (b"", b"\xff", b"[]", b'{"sources": [1]}', whole[:-30]):
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"remove the folder") as caught:
                open_all(config)
            assert str(directory) in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1
        path.write_bytes(whole)
