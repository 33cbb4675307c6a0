"""Tests of sources: the documents read, their names, and the errors of malformed input."""

import gzip
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from mea_jax.config.schema import SourceConfig
from mea_jax.data import sources
from mea_jax.data.corpus import Document, content_name, unit_hash
from mea_jax.errors import UserError


def read(source: str, path="", **options) -> list[Document]:
    return list(sources.documents(SourceConfig(source=source, path=str(path), **options)))


def fails(*words: str):
    """Expect a `UserError` of one line that contains all `words` in this order."""
    return pytest.raises(UserError, match=".*".join(re.escape(word) for word in words))


class Notes(tfds.core.GeneratorBasedBuilder):
    """A tiny dataset: two splits of records with a text and a number."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "stars": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"note {i} naïve ☕", "stars": i}


@pytest.fixture
def notes(tmp_path):
    Notes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    return tmp_path


def test_python_stdlib_reads_modules_and_no_tests():
    corpus = sources.open_source(SourceConfig())
    names = list(corpus.units)
    assert {"json/decoder.py", "os.py", "typing.py"} <= set(names)
    assert names == sorted(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    (document,) = corpus.read("json/decoder.py")
    assert document.text == Path(json.decoder.__file__).read_text()


def test_python_stdlib_skips_and_counts_files_that_are_not_utf8(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = sources.open_source(SourceConfig())
    assert [document.name for document in corpus.documents()] == ["a.py"]
    assert corpus.left_out.count == 1


def test_text_reads_a_folder_in_order_of_relative_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("B")
    (tmp_path / "a.md").write_text("A")
    (tmp_path / ".hidden").write_text("no")
    assert read("text", tmp_path) == [
        Document("a.md", "A"),
        Document("sub/b.txt", "B"),
    ]


def test_text_keeps_line_ends_and_reads_one_file_or_a_glob(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"1\r\n2\n")
    (tmp_path / "sub" / "b.rst").write_bytes(b"other")
    expected = "1\r\n2\n"
    assert read("text", tmp_path / "sub" / "a.txt") == [Document("a.txt", expected)]
    assert read("text", tmp_path / "**" / "*.txt") == [Document("sub/a.txt", expected)]


def test_jsonl_names_are_content_hashes_so_copies_share_a_side(tmp_path):
    lines = [{"text": "one"}, {"text": "two"}, {"text": "one", "id": 3}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    documents = read("jsonl", path)
    assert [document.text for document in documents] == ["one", "two", "one"]
    assert documents[0].name == documents[2].name != documents[1].name
    assert [d.text for d in read("jsonl", tmp_path, field="text")] == ["one", "two", "one"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut', ["a.jsonl, line 3", "not JSON"]),
        (b"[1]", ["a.jsonl, line 3", "list"]),
        (b'{"body": "x", "id": 1}', ["a.jsonl, line 3", "no field 'text'", "body, id"]),
        (b'{"text": 7}', ["a.jsonl, line 3", "'text'", "int"]),
        (b'{"text": "\xe9"}', ["a.jsonl, line 3", "byte 10 is not UTF-8"]),
        (b'{"text": "ab\\ud800"}', ["a.jsonl, line 3", "lone surrogate at character 2"]),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with fails(*words):
        read("jsonl", tmp_path)


TEXTS = [f"document {i}, naïve ☕\n" * (1 + i % 5) for i in range(30)]
SHARDS = [TEXTS[:12], TEXTS[12:13], TEXTS[13:]]


def write_shard(path, texts, **options):
    """Write a file of documents, in the format of its suffix."""
    if path.name.endswith(".parquet"):
        table = pa.table({"id": list(range(len(texts))), "text": texts})
        pq.write_table(table, path, **{"row_group_size": 5} | options)
        return
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(lines)


def write_shards(folder, suffix):
    """Write three shards, the last one first, because only names may determine their order."""
    folder.mkdir()
    for i in reversed(range(3)):
        write_shard(folder / f"shard-{i}{suffix}", SHARDS[i])


FORMATS = [
    ("jsonl", ".jsonl"),
    ("jsonl", ".jsonl.gz"),
    ("jsonl", ".jsonl.zst"),
    ("parquet", ".parquet"),
]


@pytest.mark.parametrize(("source", "suffix"), FORMATS)
def test_shards_of_any_format_give_the_same_documents(tmp_path, source, suffix):
    write_shards(tmp_path / "shards", suffix)
    (tmp_path / "shards" / "README.md").write_text("no shard")
    for path in (tmp_path / "shards", tmp_path / "shards" / f"shard-*{suffix}"):
        documents = read(source, path)
        assert [document.text for document in documents] == TEXTS
        assert [document.name for document in documents] == [content_name(t) for t in TEXTS]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_broken_compressed_lines_name_the_file_and_line(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    rng = np.random.default_rng(0)
    write_shard(path, [rng.bytes(3000).hex() for _ in range(100)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=rf"a\{suffix}: broken after line [1-9]\d* .*fetch it again"
    ):
        read("jsonl", path)
    path.write_bytes(b"hello")
    with fails(f"a{suffix}", "broken after line 0"):
        read("jsonl", path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"a{suffix}"):
        read("jsonl", path)


def test_parquet_mistakes(tmp_path):
    path = tmp_path / "a.parquet"
    write_shard(path, TEXTS)
    with fails("a.parquet: no column 'body' (it has: id, text)", "field of the data source"):
        read("parquet", path, field="body")
    with fails("a.parquet, row group 0, row 0", "'id'", "int"):
        read("parquet", path, field="id")
    with fails("matches no files"):
        read("parquet", tmp_path / "*.pq")
    with fails("matches no *.parquet files"):
        (tmp_path / "empty").mkdir()
        read("parquet", tmp_path / "empty")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with fails("a.parquet: cannot be read", "fetch the file again"):
        read("parquet", path)
    write_shard(path, ["fine"] * 6 + [None])
    with fails("a.parquet, row group 1, row 1", "NoneType"):
        read("parquet", path)


def test_a_broken_row_group_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_shard(path, TEXTS, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(3).column(1)
    damaged = bytearray(path.read_bytes())
    start = column.data_page_offset
    damaged[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(damaged)
    with fails("a.parquet, row group 3: cannot be read", "fetch the file again"):
        read("parquet", path)
    corpus = sources.open_source(SourceConfig(source="parquet", path=str(path)))
    assert [d.text for d in itertools.islice(corpus.documents(), 15)] == TEXTS[:15]


@pytest.mark.parametrize("row_group_size", [64, 1024])
def test_parquet_is_never_whole_in_memory(tmp_path, row_group_size):
    """The file is read in batches of rows, even if it is one row group."""
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    texts = [rng.bytes(8192).hex() for _ in range(1024)]  # 16 MB
    options = {"use_dictionary": False, "compression": "none", "write_batch_size": 8}
    write_shard(path, texts, row_group_size=row_group_size, **options)
    documents = sources.documents(SourceConfig(source="parquet", path=str(path)))
    before = pa.total_allocated_bytes()
    assert next(documents).text == texts[0]
    # A batch of at most 256 rows is in memory twice: as read and as text.
    assert pa.total_allocated_bytes() - before < 9 << 20
    assert [document.text for document in documents] == texts[1:]


@pytest.mark.parametrize(("source", "suffix"), [("parquet", ".parquet"), ("jsonl", ".jsonl.zst")])
def test_without_pyarrow(tmp_path, monkeypatch, source, suffix):
    write_shard(tmp_path / f"a{suffix}", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with fails("needs the package pyarrow: pip install 'mea_jax[parquet]'"):
        read(source, tmp_path)


def test_text_that_is_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with fails("a.txt", "byte 3 is not UTF-8"):
        read("text", tmp_path)


def test_missing_and_empty_sources(tmp_path):
    with fails("/missing", "no such file or folder"):
        read("text", tmp_path / "missing")
    with fails("*.txt", "matches no files"):
        read("text", tmp_path / "*.txt")
    with fails("matches no *.jsonl files"):
        read("jsonl", tmp_path)
    (tmp_path / "a.txt").write_text("")
    with fails("contains no text"):
        read("text", tmp_path)
    with fails("needs a path"):
        read("text")
    with fails("takes no path"):
        read("python_stdlib", tmp_path)


def test_unknown_source_suggests_the_nearest():
    with fails("'jsonlines'", "did you mean 'jsonl'?"):
        read("jsonlines")


def test_tfds_reads_a_prepared_split(notes):
    texts = {document.text for document in read("tfds:notes", notes)}
    assert texts == {f"note {i} naïve ☕" for i in range(5)}
    assert len(read("tfds:notes", notes, split="train[:2]")) == 2
    (first, *_) = read("tfds:notes", notes, split="test")
    assert first.name == content_name(first.text)


def test_tfds_mistakes(notes, tmp_path):
    with fails("no field 'body'", "stars, text"):
        read("tfds:notes", notes, field="body")
    with fails("'stars'", "expected a string"):
        read("tfds:notes", notes, field="stars")
    with fails("no split 'tset'", "did you mean 'test'?"):
        read("tfds:notes", notes, split="tset")
    with fails("no dataset 'no_such_dataset'", str(notes), "path", "download_and_prepare()"):
        read("tfds:no_such_dataset", notes)
    with fails("no dataset 'c4/en:3.1.0'", "path of the data source", "docs/data.md"):
        read("tfds:c4/en:3.1.0", tmp_path / "elsewhere")  # the source of configs/mea_1b.py
    with fails("'notes' is not prepared", "download_and_prepare()"):
        read("tfds:notes", tmp_path / "elsewhere")


def test_split_depends_on_the_name_alone_and_has_its_share():
    names = [f"package/module_{i}.py" for i in range(20_000)]
    held_out = {name for name in names if unit_hash(name) < 0.1}
    # Binomial: 2000 with a standard deviation of 42.
    assert abs(len(held_out) - 2000) < 210
    # A larger fraction only adds documents to the held-out side.
    assert held_out < {name for name in names if unit_hash(name) < 0.2}
    assert not any(unit_hash(name) < 0.0 for name in names)
    # A golden value: the split must not change between versions.
    assert unit_hash("json/decoder.py") == 0.11393991729957655


def test_shards_are_a_partition(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.txt").write_text(str(i))
    corpus = sources.open_source(SourceConfig(source="text", path=str(tmp_path)))
    shards = [[d.text for d in corpus.documents(shard, 3)] for shard in range(3)]
    assert sorted(itertools.chain(*shards)) == [str(i) for i in range(7)]
