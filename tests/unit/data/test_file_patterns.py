"""Tests of the files read from a folder or glob, and of the counts of those passed over."""

import codecs
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mea_jax.config.schema import DataConfig, SourceConfig
from mea_jax.data import prepare, sources
from mea_jax.errors import UserError


def names(path, source="text"):
    return list(sources.open_source(SourceConfig(source, str(path))).units)


def passed_over(path, source="text"):
    return dict(sources.open_source(SourceConfig(source, str(path))).passed_over)


@pytest.fixture
def mix(tmp_path):
    """Write a folder with a file, and a folder outside that tests link; return the first."""
    for name in ("mix/shard1/a.txt", "data/b.txt", "data/deep/c.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "mix"


def test_links_to_folders_are_followed(mix):
    (mix / "shard2").symlink_to(mix.parent / "data")
    (mix / "d.txt").symlink_to(mix / "shard1" / "a.txt")
    expected = ["d.txt", "shard1/a.txt", "shard2/b.txt", "shard2/deep/c.txt"]
    assert names(mix) == expected == names(f"{mix}/**")
    assert passed_over(mix) == passed_over(f"{mix}/**") == {}


def test_loops_end(mix):
    (mix / "shard1" / "up").symlink_to(mix)
    (mix / "self").symlink_to(mix / "self")
    (mix / "shard2").symlink_to(mix.parent / "data")
    (mix.parent / "data" / "back").symlink_to(mix / "shard2")
    expected = ["shard1/a.txt", "shard2/b.txt", "shard2/deep/c.txt"]
    assert names(mix) == expected
    assert passed_over(mix) == {"links to folders that are read already": 2, "broken links": 1}
    assert names(f"{mix}/**") == expected
    assert passed_over(f"{mix}/**")["paths that lead in a loop"] > 0


def test_a_folder_that_two_links_lead_to_is_read_once(mix):
    (mix / "a").symlink_to(mix / "shard1")
    (mix / "b").symlink_to(mix.parent / "data")
    (mix / "c").symlink_to(mix.parent / "data")
    assert names(mix) == ["b/b.txt", "b/deep/c.txt", "shard1/a.txt"]
    assert passed_over(mix) == {"links to folders that are read already": 2}


def test_a_link_as_the_path_itself(mix):
    (mix.parent / "link").symlink_to(mix)
    assert names(mix.parent / "link") == ["shard1/a.txt"]


def test_what_is_passed_over_is_counted(mix, tmp_path):
    for name in ("x.jsonl", ".hidden.jsonl", "x.json", ".git/y.jsonl"):
        (mix / name).parent.mkdir(exist_ok=True)
        (mix / name).write_text(json.dumps({"text": name}) + "\n")
    (mix / "gone.jsonl").symlink_to(mix / "nowhere")
    os.mkfifo(mix / "pipe.jsonl")
    with (mix / "x.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text": "more text"}\n')
    config = DataConfig(
        (SourceConfig("jsonl", str(mix)),), tokenizer="bytes", cache_dir=str(tmp_path / "cache")
    )
    expected = (
        f"data: jsonl:{mix}: 1 file, 55 bytes, 2 documents, 12.50% held out; passed over: "
        "broken links (1), empty documents (1), files with other suffixes (2), "
        "hidden files or folders (2), special files (1)"
    )
    for _ in range(2):  # prepared, then found in the cache
        lines: list[str] = []
        prepare.prepare(config, log=lines.append)
        assert lines[0] == expected


def test_a_source_that_passes_nothing_over_has_no_line_the_second_time(mix, tmp_path):
    config = DataConfig(
        (SourceConfig("text", str(mix)),), tokenizer="bytes", cache_dir=str(tmp_path / "cache")
    )
    for count in (2, 1):
        lines: list[str] = []
        prepare.prepare(config, log=lines.append)
        assert len(lines) == count


def test_a_folder_of_other_files_says_what_it_has(mix):
    with pytest.raises(UserError, match=r"matches no \*\.parquet files \(passed over: files with"):
        names(mix, "parquet")


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, source):
    line = "naïve" if source == "text" else json.dumps({"text": "naïve"})
    path = tmp_path / f"a.{source}"
    path.write_bytes(codecs.BOM_UTF8 + line.encode() + b"\n")
    (document,) = sources.documents(SourceConfig(source, str(path)))
    assert document.text == ("naïve\n" if source == "text" else "naïve")


def test_a_byte_order_mark_of_pythons_own_sources(tmp_path, monkeypatch):
    (tmp_path / "m.py").write_bytes(codecs.BOM_UTF8 + b"x = 1\n")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [d.text for d in sources.documents(SourceConfig())] == ["x = 1\n"]


RECORDS = [
    {"meta": {"text": "one", "in": {"text": "deep one"}}, "a.b": "dot one"},
    {"meta": {"text": "two", "in": {"text": "deep two"}}, "a.b": "dot two"},
]
FIELDS = [("meta.text", ["one", "two"]), ("meta.in.text", ["deep one", "deep two"])]
FIELDS += [("a.b", ["dot one", "dot two"])]


def written(folder, source, records):
    path = folder / f"a.{source}"
    if source == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
@pytest.mark.parametrize(("field", "texts"), FIELDS)
def test_a_field_inside_a_field(tmp_path, source, field, texts):
    path = written(tmp_path, source, RECORDS)
    found = sources.documents(SourceConfig(source, str(path), field=field))
    assert [document.text for document in found] == texts


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_a_name_with_a_dot_goes_first(tmp_path, source):
    records = [
        {"a": {"b": "inside", "c": "other"}, "a.b": "itself", "a.x": {"y.z": "both"}},
    ]
    path = written(tmp_path, source, records)
    for field, text in (("a.b", "itself"), ("a.c", "other"), ("a.x.y.z", "both")):
        (document,) = sources.documents(SourceConfig(source, str(path), field=field))
        assert document.text == text


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
@pytest.mark.parametrize("field", ["meta.body", "text.meta", "a.", ".a", "."])
def test_a_field_that_is_not_there(tmp_path, source, field):
    path = written(tmp_path, source, RECORDS)
    with pytest.raises(UserError, match=r"no (field|column) .* \(it has: a\.b, meta\)"):
        list(sources.documents(SourceConfig(source, str(path), field=field)))


def test_a_null_around_a_field_is_no_string(tmp_path):
    path = written(tmp_path, "parquet", [{"meta": {"text": "one"}}, {"meta": None}])
    with pytest.raises(UserError, match=r"row 1: field 'meta\.text' is of type NoneType"):
        list(sources.documents(SourceConfig("parquet", str(path), field="meta.text")))
