"""Sources: what is read, under which names, and what each malformed input says."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mea_jax.config import SourceConfig
from mea_jax.data import sources
from mea_jax.errors import UserError


def read(source: str, path="", **options) -> list[sources.Document]:
    return list(sources.documents(SourceConfig(source=source, path=str(path), **options)))


def fails(*words: str):
    """Expects a `UserError` of one line that has all `words`."""
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
    assert corpus.skipped == 1


def test_text_reads_a_folder_in_order_of_relative_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("B")
    (tmp_path / "a.md").write_text("A")
    (tmp_path / ".hidden").write_text("no")
    assert read("text", tmp_path) == [
        sources.Document("a.md", "A"),
        sources.Document("sub/b.txt", "B"),
    ]


def test_text_keeps_line_ends_and_reads_one_file_or_a_glob(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"1\r\n2\n")
    (tmp_path / "sub" / "b.rst").write_bytes(b"other")
    expected = "1\r\n2\n"
    assert read("text", tmp_path / "sub" / "a.txt") == [sources.Document("a.txt", expected)]
    assert read("text", tmp_path / "**" / "*.txt") == [sources.Document("sub/a.txt", expected)]


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
    with fails("holds no text"):
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
    assert first.name == sources.content_name(first.text)


def test_tfds_mistakes(notes, tmp_path):
    with fails("no field 'body'", "stars, text"):
        read("tfds:notes", notes, field="body")
    with fails("'stars'", "expected a string"):
        read("tfds:notes", notes, field="stars")
    with fails("no split 'tset'", "did you mean 'test'?"):
        read("tfds:notes", notes, split="tset")
    with fails("no dataset 'no_such_dataset'", "download_and_prepare()"):
        read("tfds:no_such_dataset", notes)
    with fails("'notes' is not prepared", "download_and_prepare()"):
        read("tfds:notes", tmp_path / "elsewhere")


def test_split_depends_on_the_name_alone_and_has_its_share():
    names = [f"package/module_{i}.py" for i in range(20_000)]
    held_out = {name for name in names if sources.is_held_out(name, 0.1)}
    # Binomial: 2000 with a standard deviation of 42.
    assert abs(len(held_out) - 2000) < 210
    # A larger fraction only adds documents to the held-out side.
    assert held_out < {name for name in names if sources.is_held_out(name, 0.2)}
    assert not any(sources.is_held_out(name, 0.0) for name in names)
    # Golden, computed once: the split must not move between versions of this code.
    assert sources.unit_hash("json/decoder.py") == 0.11393991729957655


def test_shards_are_a_partition(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.txt").write_text(str(i))
    corpus = sources.open_source(SourceConfig(source="text", path=str(tmp_path)))
    shards = [[d.text for d in corpus.documents(shard, 3)] for shard in range(3)]
    assert sorted(itertools.chain(*shards)) == [str(i) for i in range(7)]
