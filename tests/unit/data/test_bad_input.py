"""Tests of unreadable input, which is either an error that names it or left out and counted."""

import dataclasses
import errno
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from mea_jax.config.schema import DataConfig, SourceConfig
from mea_jax.data import bad_input, records, sources
from mea_jax.data import prepare as prepare_lib
from mea_jax.data.bad_input import OPTION, LeftOut
from mea_jax.data.corpus import FileCorpus
from mea_jax.data.windows import writing
from mea_jax.errors import UserError

# The digest of GOOD from before input could be left out; checkpoints contain such digests.
DIGEST = "11c22d4a95e6d4d0595792132a819919"
GOOD = [f"document {i}, " + "la " * (3 + i % 5) for i in range(40)]
BAD_LINES = [
    b'{"text": "cut',
    b'{"body": "x"}',
    b'{"text": 7}',
    b'{"text": "\xe9"}',
    b'{"text": "\\ud800"}',
    b'{"text": "x", "n": ' + b"1" * 5000 + b"}",
    b'{"text": ' + b"[" * 100_000,
]


def both_ways(source, path):
    """Return the texts and `LeftOut` with bad input left out, and the error otherwise."""
    spec = SourceConfig(source=source, path=str(path))
    left_out = LeftOut(allowed=True)
    texts = [document.text for document in sources.documents(spec, left_out)]
    with pytest.raises(UserError) as caught:
        list(sources.documents(spec))
    assert str(caught.value).endswith(f"or leave such input out with {OPTION}")
    return texts, left_out, str(caught.value)


def config_of(tmp_path, path, source="jsonl", **options):
    return DataConfig(
        sources=(SourceConfig(source=source, path=str(path)),),
        context_length=32,
        held_out_fraction=0.3,
        cache_dir=str(tmp_path / "cache"),
        **{"tokenizer": "bytes", "bad_input": "skip"} | options,
    )


def prepare(config):
    """Prepare the data; return them and the logged lines."""
    lines: list[str] = []
    return prepare_lib.prepare(config, log=lines.append), lines


def good_line(text):
    return json.dumps({"text": text}).encode()


@pytest.fixture
def mixed(tmp_path):
    """Write a file of good lines with bad lines between them; return its path."""
    lines = [good_line(text) for text in GOOD]
    for i, line in enumerate(BAD_LINES):
        lines.insert(5 * i, line)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_bad_lines_are_left_out_and_the_first_is_the_error(mixed):
    texts, left_out, error = both_ways("jsonl", mixed)
    assert texts == GOOD
    assert left_out.count == len(BAD_LINES)
    assert error.startswith(left_out.lines[0])
    places = [f"{mixed}, line {5 * i + 1}" for i in range(len(BAD_LINES))]
    assert [line[: len(p) + 1] for line, p in zip(left_out.lines, places, strict=True)] == [
        f"{place}:" for place in places
    ]


def test_a_line_too_long_for_memory_is_bad_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_LINE_LIMIT", 100)
    exact = good_line("x" * (99 - len(good_line(""))))
    lines = [exact, good_line("x" * 1000), good_line("next")]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    texts, left_out, _ = both_ways("jsonl", tmp_path)
    assert [len(text) for text in texts] == [99 - len(good_line("")), 4]
    assert left_out.count == 1
    assert "line 2: longer than" in left_out.lines[0]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_the_rest_of_a_broken_compressed_file_is_one_piece(tmp_path, suffix):
    rng = np.random.default_rng(0)
    texts = [rng.bytes(3000).hex() for _ in range(100)]
    for name in "ab":
        # The suffix determines the compression.
        with pa.output_stream(str(tmp_path / f"{name}{suffix}")) as file:
            file.write(b"".join(good_line(name + text) + b"\n" for text in texts))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(path.read_bytes()[:150_000])
    found, left_out, error = both_ways("jsonl", tmp_path)
    kept = [text for text in found if text[0] == "a"]
    assert 10 < len(kept) < 60
    assert kept == ["a" + text for text in texts[: len(kept)]]
    assert found[len(kept) :] == ["b" + text for text in texts]
    assert left_out.count == 1
    assert f"a{suffix}: broken after line {len(kept)}" in error


def test_text_files_that_cannot_be_read_are_left_out(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    bad_name = os.fsdecode(b"x\xff.txt")
    (tmp_path / bad_name).write_text("fine, but for its name")
    whole = FileCorpus._bytes
    with monkeypatch.context() as patch:
        # Removing permissions has no effect for root.
        patch.setattr(FileCorpus, "_bytes", lambda self, name: whole(self, name.replace("c", "?")))
        texts, left_out, _ = both_ways("text", tmp_path)
    assert texts == ["a.txt", "d.txt"]
    assert [line.removeprefix(str(tmp_path)) for line in left_out.lines] == [
        "/x\\udcff.txt: the file's name is not UTF-8; rename it",
        "/b.txt: byte 3 is not UTF-8; convert the file, for example with iconv",
        f"/?.txt: cannot be read: {os.strerror(errno.ENOENT)}; "
        "check that it exists and is readable",
    ]


@pytest.mark.parametrize("source", ["jsonl", "parquet", "text"])
@pytest.mark.parametrize("when", ["before it is opened", "after"])
def test_a_file_that_vanishes_after_the_listing_is_left_out(tmp_path, source, when):
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        path = folder / f"{i}.{source}"
        if source == "parquet":
            pq.write_table(pa.table({"text": GOOD[i::3]}), path)
        else:
            path.write_bytes(b"\n".join(map(good_line, GOOD[i::3])))
    spec = SourceConfig(source=source, path=str(folder))
    left_out = LeftOut(allowed=True)
    if when == "after":
        corpus = sources.open_source(spec, left_out)
        (folder / f"1.{source}").unlink()
    else:
        names = [f"{i}.{source}" for i in range(3)]
        (folder / f"1.{source}").unlink()
        corpus = sources.open_source(spec, left_out)
        assert isinstance(corpus, FileCorpus)
        FileCorpus.__init__(corpus, spec, left_out, folder, names)
    assert len(list(corpus.documents())) == (2 if source == "text" else len(GOOD[::3] + GOOD[2::3]))
    assert left_out.count == 1
    assert f"1.{source}: cannot be read" in left_out.lines[0]


def test_a_shard_that_vanishes_while_preparing_is_counted(tmp_path, monkeypatch):
    """The vanished file is counted, although the windows are written from a new listing."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_bytes(b"\n".join(map(good_line, GOOD[i::3])))
    write = writing.write

    def late(*args):
        (folder / "1.jsonl").unlink(missing_ok=True)
        return write(*args)

    monkeypatch.setattr(writing, "write", late)
    prepared, lines = prepare(config_of(tmp_path, folder))
    assert prepared.sources[0].skipped == 1
    assert "1.jsonl: cannot be read" in lines[0]
    (folder / "1.jsonl").write_bytes(good_line("again"))
    with pytest.raises(UserError, match=r"1\.jsonl: cannot be read.*bad_input=skip"):
        prepare(config_of(tmp_path, folder, bad_input="stop"))


def test_bad_rows_and_row_groups_are_left_out(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": GOOD}), path, row_group_size=5, use_dictionary=False, compression="none"
    )
    column = pq.ParquetFile(path).metadata.row_group(3).column(0)
    damaged = bytearray(path.read_bytes())
    start, size = column.data_page_offset, column.total_compressed_size
    damaged[start : start + size] = b"\xff" * size
    at = damaged.index(GOOD[22].encode())
    damaged[at] = 0xFF  # no longer UTF-8, row 2 of row group 4
    path.write_bytes(damaged)
    pq.write_table(pa.table({"text": ["fine", None]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and no more")
    texts, left_out, _ = both_ways("parquet", tmp_path)
    assert texts == GOOD[:15] + GOOD[20:22] + GOOD[23:] + ["fine"]
    words = [
        "a.parquet, row group 3: cannot be read",
        "a.parquet, row group 4, row 2: byte 0 is not UTF-8",
        "b.parquet, row group 0, row 1: field 'text' is of type NoneType",
        "c.parquet: no column 'text' (it has: body)",
        "d.parquet: cannot be read",
    ]
    assert left_out.count == len(words)
    assert all(word in line for word, line in zip(words, left_out.lines, strict=True))


class Shards(tfds.core.GeneratorBasedBuilder):
    """A tiny dataset."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": ((i, {"text": f"{text} " * 200}) for i, text in enumerate(GOOD))}

    def _generate_examples(self):
        return {}


def test_broken_records_of_tfds_are_left_out(tmp_path):
    Shards(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    (path,) = tmp_path.rglob("*.array_record-*")
    content = bytearray(path.read_bytes())
    content[content.index(b"document 7,".replace(b"7", b"17")) + 20] ^= 1
    path.write_bytes(content)
    spec = SourceConfig(source="tfds:shards", path=str(tmp_path))
    left_out = LeftOut(allowed=True)
    texts = [document.text for document in sources.documents(spec, left_out)]
    assert texts == [f"{text} " * 200 for i, text in enumerate(GOOD) if i != 17]
    assert left_out.count == 1
    with pytest.raises(UserError, match=r"train record 17: cannot be read.*bad_input=skip"):
        list(sources.documents(spec))


def test_a_mistake_that_is_not_the_inputs_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    spec = SourceConfig(source="jsonl", path=str(tmp_path))
    with pytest.raises(UserError, match="needs the package pyarrow"):
        list(sources.documents(spec, LeftOut(allowed=True)))


def test_nothing_but_bad_input_holds_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(BAD_LINES))
    expected = rf"contains no text.*left out {len(BAD_LINES)}, .*, line 1:"
    with pytest.raises(UserError, match=expected):
        prepare(config_of(tmp_path, path))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_prepared_without_bad_lines_is_prepared_as_if_there_were_none(tmp_path, mixed, tokenizer):
    """Every pass over the input leaves out the same lines, and each is counted once."""
    prepared, lines = prepare(config_of(tmp_path, mixed, tokenizer=tokenizer))
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(map(good_line, GOOD)))
    good, _ = prepare(config_of(tmp_path, tmp_path / "good.jsonl", tokenizer=tokenizer))
    (part,), (expected,) = prepared.sources, good.sources
    assert part.skipped == len(BAD_LINES)
    assert (
        dataclasses.replace(part, skipped=0, name=expected.name, directory=expected.directory)
        == expected
    )
    assert prepared.tokenizer.content == good.tokenizer.content
    assert prepared.baselines == good.baselines
    if tokenizer != "bytes":
        assert lines.pop(0).startswith(f"data: training the tokenizer {tokenizer} on ")
    assert [f"data: left out {mixed}, line {5 * i + 1}:" in lines[i] for i in range(5)] == [
        True
    ] * 5
    assert lines[5] == f"data: and {len(BAD_LINES) - 5} more left out"
    assert lines[-1].endswith(
        f"; left out {len(BAD_LINES)} lines, rows or files that cannot be read"
    )
    assert f"unreadable lines, rows or files ({len(BAD_LINES)})" in lines[6]  # of the source
    assert len(lines) == 8
    stored = json.loads((prepared.directory / "prepared.json").read_text())
    assert len(stored["left_out"][0]) == len(BAD_LINES)
    again, lines = prepare(config_of(tmp_path, mixed, tokenizer=tokenizer))
    assert again.sources == prepared.sources
    assert len(lines) == 2, "left-out lines are logged again"  # of the source and of the total


def test_data_with_gaps_are_not_taken_where_none_may_be(tmp_path, mixed):
    prepare(config_of(tmp_path, mixed))
    with pytest.raises(UserError, match=r"line 1: not JSON.*bad_input=skip"):
        prepare(config_of(tmp_path, mixed, bad_input="stop"))


@pytest.mark.parametrize("first", ["stop", "skip"])
def test_data_without_gaps_serve_both(tmp_path, first):
    """A run with damaged windows can therefore switch to leaving them out."""
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(map(good_line, GOOD)))
    both = [
        prepare(config_of(tmp_path, tmp_path / "a.jsonl", bad_input=option))[0]
        for option in (first, "skip", "stop")
    ]
    assert len({prepared.directory for prepared in both}) == 1
    assert {prepared.digest for prepared in both} == {DIGEST}


def test_messages_are_one_line_that_can_be_printed(tmp_path):
    keys = {"a\nb": 1, "\ud800": 2, "\x1b[31m": 3, **{f"k{i}" * 50: i for i in range(1000)}}
    (tmp_path / "a.jsonl").write_bytes(good_line("x") + b"\n" + json.dumps(keys).encode())
    _, left_out, _ = both_ways("jsonl", tmp_path)
    (line,) = left_out.lines
    assert line.isprintable()
    assert "and 993 more" in line
    assert len(line) < 500 + len(str(tmp_path))


def test_few_messages_are_kept_of_many(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(good_line("x") + b"\nbad" * 1000)
    _, left_out, _ = both_ways("jsonl", tmp_path)
    assert (left_out.count, len(left_out.lines)) == (1000, bad_input.KEPT)
