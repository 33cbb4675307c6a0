"""Tests of a folder's checksums: any damage is found, by the process that reads that part."""

import contextlib
import hashlib
import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_jax.checkpoint import digests

FILES = {
    "state/d/one": b"\x00" * 100,
    "state/d/two": bytes(range(256)),
    "state/manifest": b"m",
    "config/metadata": b'{"a": 1}',
    "empty": b"",
}


@pytest.fixture
def sealed(tmp_path):
    """Write a folder of `FILES` with their checksums and return it."""
    folder = tmp_path / "folder"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    digests.write_checksums(folder)
    return folder


@contextlib.contextmanager
def changed(path, content):
    """Change the content of `path` (None: delete it) until the end of the block."""
    before = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(content, place, bit):
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def test_what_was_sealed_is_whole(sealed, tmp_path):
    assert digests.damage(sealed) is None
    listed = json.loads((sealed / digests.FILE).read_text().partition(" ")[2])["files"]
    assert listed == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in FILES.items()
    }
    moved = shutil.copytree(sealed, tmp_path / "elsewhere")
    assert digests.damage(moved) is None


@pytest.mark.parametrize("name", [*FILES, digests.FILE])
def test_every_change_of_every_file_is_found(sealed, name):
    """Flipped bits of the first and last bytes, other lengths and a missing file are all found."""
    path = sealed / name
    content = path.read_bytes()
    ends = {*range(len(content))[:3], *range(len(content))[-3:]}
    for place in ends:
        for bit in range(8):
            with changed(path, flipped(content, place, bit)):
                assert digests.damage(sealed), (place, bit)
    for length in {0, 1, len(content) // 2, len(content) - 1} & set(range(len(content))):
        with changed(path, content[:length]):
            assert digests.damage(sealed), length
    with changed(path, content + b"x"):
        assert digests.damage(sealed)
    with changed(path, None):
        assert digests.damage(sealed) == f"{name} is missing"
    assert digests.damage(sealed) is None


@settings(max_examples=200)
@given(st.data())
def test_every_bit_of_the_digests_themselves(tmp_path_factory, data):
    """No flipped bit turns the list into another valid one."""
    folder = tmp_path_factory.getbasetemp() / "bits"
    if not folder.exists():
        folder.mkdir()
        (folder / "file").write_bytes(b"content")
        digests.write_checksums(folder)
    path = folder / digests.FILE
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    with changed(path, flipped(content, place, data.draw(st.integers(0, 7)))):
        assert digests.damage(folder) == f"{digests.FILE} is damaged"


def test_words_for_each_damage(sealed):
    one = sealed / "state/d/one"
    with changed(one, b"\x00" * 99):
        assert digests.damage(sealed) == "state/d/one has 99 bytes instead of 100"
    with changed(one, b"\x00" * 99 + b"\x01"):
        assert digests.damage(sealed) == "state/d/one is damaged"
    (sealed / "state" / "more").write_bytes(b"")
    assert digests.damage(sealed) == "state/more does not belong to it"


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_are_refused(sealed, tmp_path, what, outside):
    """Links are refused, even if the content of their target is correct."""
    path = sealed / ("state/d/two" if what == "file" else "state/d")
    target = tmp_path / "target" if outside else sealed / "target"
    path.rename(target)
    path.symlink_to(target)
    assert f"{path.relative_to(sealed)} is a link" in (digests.damage(sealed) or "")
    assert f"{path.relative_to(sealed)} is a link" in (digests.links(sealed) or "")
    with pytest.raises(ValueError, match="is a link"):
        digests.write_checksums(sealed)


def test_a_device_is_refused(sealed):
    os.mkfifo(sealed / "pipe")  # reading it would block forever
    assert "pipe is a link or a device" in (digests.damage(sealed) or "")


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_sharing_finds_the_damage_in_the_part_that_owns_it(sealed, parts):
    """Exactly one part reads each file; all parts read the list of checksums."""
    for name, content in FILES.items():
        if not content:
            continue
        with changed(sealed / name, flipped(content, 0, 0)):
            found = [digests.damage(sealed, part, parts) for part in range(parts)]
        assert sorted(map(str, found)) == sorted([f"{name} is damaged"] + ["None"] * (parts - 1))
        with changed(sealed / name, None):
            found = [digests.damage(sealed, part, parts) for part in range(parts)]
        assert found == [f"{name} is missing"] * parts
    assert [digests.damage(sealed, part, parts) for part in range(parts)] == [None] * parts


@pytest.mark.parametrize(
    "body",
    [
        *("", "{", "null", "[]", "3", "{}", '{"files": null}', '{"files": []}'),
        *('{"files": {"empty": 3}}', '{"files": {"empty": {"size": 0}}}', "[" * 100_000),
    ],
)
def test_malformed_digests_with_a_right_checksum(sealed, body):
    """A malformed list with a correct checksum is reported as damage and raises nothing."""
    checksum = hashlib.sha256(body.encode()).hexdigest()
    (sealed / digests.FILE).write_text(f"{checksum} {body}\n")
    assert digests.damage(sealed) == f"{digests.FILE} is malformed"


def test_names_that_lead_outside(sealed, tmp_path):
    """A file outside of the folder that the list names is not read."""
    (tmp_path / "secret").write_bytes(b"")
    entry = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    body = json.dumps({"files": {"../secret": entry}})
    checksum = hashlib.sha256(body.encode()).hexdigest()
    (sealed / digests.FILE).write_text(f"{checksum} {body}\n")
    assert digests.damage(sealed) == "../secret is missing"


def test_what_cannot_be_read(sealed, tmp_path, monkeypatch):
    """A missing folder, and a disk that fails in the middle of a file, are reported as damage."""
    assert digests.damage(tmp_path / "nothing") == f"{digests.FILE} is missing"
    (tmp_path / "file").write_bytes(b"")
    assert digests.damage(tmp_path / "file") == "Not a directory"

    def fails(*_):
        raise OSError(5, "Input/output error")  # an error that names no file

    monkeypatch.setattr(digests.hashlib, "file_digest", fails)
    assert digests.damage(sealed) == "a file cannot be read: Input/output error"


def test_sealing_again_takes_the_folder_as_it_is(sealed):
    """The previous list of checksums is not listed as a file of the folder."""
    (sealed / "more").write_bytes(b"x")
    digests.write_checksums(sealed)
    assert digests.damage(sealed) is None
