"""Tests of the held-out split: by document names if that gives the share, otherwise by cuts."""

import dataclasses
import itertools
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mea_jax.config.schema import DataConfig, SourceConfig, TrainConfig
from mea_jax.data import packing, prepare, sources, split
from mea_jax.data.corpus import Document, unit_hash
from mea_jax.data.windows import reader
from mea_jax.errors import UserError


@pytest.fixture
def prepared(tmp_path):
    """Return a function that prepares sources and returns the prepared data and logged lines."""

    def run(*specs, fraction=0.03, **options):
        options = {"tokenizer": "bytes", "context_length": 64, **options}
        config = DataConfig(
            specs, held_out_fraction=fraction, cache_dir=str(tmp_path / "cache"), **options
        )
        lines: list[str] = []
        return prepare.prepare(config, log=lines.append), lines

    return run


def files(folder, texts):
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text)
    return SourceConfig("text", str(folder))


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig("jsonl", str(path))


def numbered(count, lines):
    """Return `count` documents of numbered lines of 10 bytes."""
    return ["".join(f"{d:04d}{i:05d}\n" for i in range(lines)) for d in range(count)]


def stored(prepared, side, index=0):
    windows = reader.open_windows(prepared.sources[index].directory, side, 64)
    targets = [packing.fields(**w)["targets"][w["segment_ids"] > 0] for w in windows]
    return prepared.tokenizer.decode(np.concatenate(targets).tolist()).split("<|endoftext|>")[:-1]


def share(prepared):
    held_out = sum(part.held_out_bytes for part in prepared.sources)
    return held_out / (held_out + sum(part.train_bytes for part in prepared.sources))


def test_the_last_part_of_one_file_is_held_out(prepared, tmp_path):
    (text,) = numbered(1, 1000)
    found, lines = prepared(files(tmp_path / "one", [text]))
    assert stored(found, "train") == [text[:9700]]
    assert stored(found, "held_out") == [text[9700:]]
    assert lines[0].endswith("1 file, 10,000 bytes, 1 document, 3.00% held out")


def test_a_few_documents_none_of_which_falls_to_held_out_by_name(prepared, tmp_path):
    texts = numbered(60, 20)
    fraction = 0.03
    candidates = ([f"{batch}-{i}" for i in range(60)] for batch in itertools.count())
    names = next(some for some in candidates if min(map(unit_hash, some)) >= fraction)
    (tmp_path / "few").mkdir()
    for name, text in zip(names, texts, strict=True):
        (tmp_path / "few" / name).write_text(text)
    found, _ = prepared(SourceConfig("text", str(tmp_path / "few")))
    held_out = stored(found, "held_out")
    assert set(held_out) < set(texts)  # not cut, because they are short
    assert fraction <= share(found) <= fraction + 1 / 60
    assert sorted(held_out + stored(found, "train")) == texts


@pytest.mark.parametrize("number", range(8))  # the long line has another hash each time
def test_one_document_that_is_most_of_the_text(prepared, tmp_path, number):
    long = f"{number:09d}\n" + numbered(1, 20000)[0]
    texts = [*numbered(30, 10), long]
    found, _ = prepared(jsonl(tmp_path / "a.jsonl", texts))
    assert 0.028 < share(found) < 0.035
    held_out = [text for text in stored(found, "held_out") if text not in texts]
    (rest,) = [text for text in stored(found, "train") if text not in texts]
    assert rest + held_out[0] == long
    assert len(held_out) == 1


def test_books_are_each_cut(prepared, tmp_path):
    texts = numbered(5, 1000)
    found, _ = prepared(files(tmp_path / "books", texts), fraction=0.1)
    assert stored(found, "train") == [text[:9000] for text in texts]
    assert stored(found, "held_out") == [text[9000:] for text in texts]


def test_many_documents_are_split_by_their_names(prepared, tmp_path):
    texts = numbered(300, 3)
    found, _ = prepared(jsonl(tmp_path / "a.jsonl", texts), fraction=0.1)
    expected = [
        d.text
        for d in sources.documents(SourceConfig("jsonl", str(tmp_path / "a.jsonl")))
        if unit_hash(d.name) < 0.1
    ]
    assert stored(found, "held_out") == expected
    assert not found.directory.name.endswith("-shares")


def test_pythons_own_sources_are_split_by_their_names():
    corpus = sources.open_source(SourceConfig())
    assert split.decide(DataConfig(), corpus) == split.Split(0.03, 0.03)


def test_the_share_is_near_whatever_the_sizes():
    rng = np.random.default_rng(0)
    for sizes in (rng.integers(1, 100, 40), rng.pareto(0.5, 40) * 10 + 1):
        hashes = rng.random(40)
        how = split._decide(sizes.astype(int), hashes, 0.1)
        train, held_out = 0, 0
        for size, number in zip(sizes.astype(int).tolist(), hashes.tolist(), strict=True):
            if how.longest is not None and size > how.longest:
                held_out, train = held_out + 0.1 * size, train + 0.9 * size
            elif number < how.threshold:
                held_out += size
            else:
                train += size
        assert 0.025 <= held_out / (held_out + train) <= 0.4


@pytest.mark.parametrize("copies", [2, 50])
def test_copies_of_one_line_are_all_cut(prepared, tmp_path, copies):
    found, _ = prepared(jsonl(tmp_path / "a.jsonl", ["0123456789" * 10] * copies), fraction=0.1)
    assert stored(found, "held_out") == ["0123456789"] * copies


@pytest.mark.parametrize("text", ["ab", "a" * 30, "x\n" * 9])
def test_the_least_text_there_is(prepared, tmp_path, text):
    found, _ = prepared(files(tmp_path / "one", [text]))
    assert stored(found, "train")[0] + stored(found, "held_out")[0] == text


def test_too_little_text_is_said(prepared, tmp_path):
    found, lines = prepared(files(tmp_path / "one", ["a"]))
    assert found.sources[0].held_out_windows == 0
    assert lines[-1] == (
        "data: no held-out text (there is too little text), so no held-out loss is measured"
    )


def test_a_fraction_of_zero_is_said(prepared, tmp_path):
    spec = files(tmp_path / "f", numbered(3, 9))
    for _ in range(2):  # prepared, then found in the cache
        found, lines = prepared(spec, fraction=0.0)
        assert found.sources[0].held_out_windows == 0
        assert "held_out_fraction is 0" in lines[-1]


def test_a_source_named_as_held_out(prepared, tmp_path):
    train, (held_out,) = numbered(4, 30), numbered(1, 50)
    specs = files(tmp_path / "train", train), files(tmp_path / "val", [held_out + "end"])
    found, _ = prepared(specs[0], dataclasses.replace(specs[1], held_out=True))
    assert stored(found, "train") == train
    assert stored(found, "held_out", index=1) == [held_out + "end"]
    assert [part.held_out_windows > 0 for part in found.sources] == [False, True]
    assert [part.train_windows > 0 for part in found.sources] == [True, False]
    from mea_jax.data.pipeline import held_out_batches, train_batches

    batches = train_batches(found, seed=0, batch_size=2, threads=0, prefetch=0)
    assert next(batches)["inputs"].shape == (2, 64)
    assert len(list(held_out_batches(found, batch_size=100))) == 1
    other, _ = prepared(*specs)
    assert other.directory != found.directory


def older(found):
    """Change prepared data to the format of an older version and return them."""
    content = json.loads((found.directory / "prepared.json").read_text())
    del content["splits"], content["inputs"]
    (found.directory / "prepared.json").write_text(json.dumps(content))
    (found.directory / "checksums.json").unlink()
    return found


def test_data_of_an_older_version_without_held_out_text_are_prepared_again(
    prepared, tmp_path, monkeypatch
):
    spec = files(tmp_path / "one", numbered(1, 1000))
    with monkeypatch.context() as patch:
        patch.setattr(split, "decide", lambda *_: split.Split(0.03, 0.03))
        old = older(prepared(spec)[0])
        assert old.sources[0].held_out_windows == 0
    for _ in range(2):  # prepared, then found in the cache
        new, _ = prepared(spec)
        assert new.directory.name == f"{old.directory.name}-shares"
        assert new.sources[0].held_out_bytes == 300


def test_balanced_data_of_an_older_version_are_taken(prepared, tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", numbered(300, 3))
    old = older(prepared(spec, fraction=0.1)[0])
    new, _ = prepared(spec, fraction=0.1)
    assert (new.directory, new.digest) == (old.directory, old.digest)


def test_the_tokenizer_learns_nothing_of_the_part_that_is_cut_off(prepared, tmp_path):
    text = "openword " * 970 + "secretword " * 24
    found, _ = prepared(files(tmp_path / "one", [text]), tokenizer="bpe:280")
    vocabulary = json.loads(found.tokenizer.content)["model"]["vocab"]
    assert "openword" in vocabulary
    assert not any("sec" in token for token in vocabulary)


def test_corpora_that_are_too_large_to_measure_are_not_read(tmp_path, monkeypatch):
    corpus = sources.open_source(jsonl(tmp_path / "a.jsonl", numbered(3, 3)))
    monkeypatch.setattr(split, "MEASURED", 10)
    monkeypatch.setattr(split.sources, "documents", lambda *_: pytest.fail("read"))
    assert split.decide(DataConfig(), corpus) == split.Split(0.03, 0.03)


def test_a_cut_is_at_the_start_of_a_line_if_one_is_near():
    text = "line one\n" * 100
    train, held_out = split.Split(0.1, 0.0, 10).parts(Document("a", text))
    assert train + held_out == text
    assert held_out.startswith("line one\n")
    assert 80 <= len(held_out) <= 140
    train, held_out = split.Split(0.1, 0.0, 10).parts(Document("a", "a" * 1000))
    assert (len(train), len(held_out)) == (900, 100)


def test_every_document_held_out_is_refused(prepared, tmp_path):
    with pytest.raises(UserError, match=r"every document is held out.*held_out_fraction"):
        prepared(files(tmp_path / "f", numbered(3, 9)), fraction=1.0)


def test_commands_that_need_held_out_text_fail_before_they_read_any(monkeypatch):
    from mea_jax.compress import calibration
    from mea_jax.compress.options import Options
    from mea_jax.evaluate import run as evaluate_run

    for module in (calibration, evaluate_run):
        monkeypatch.setattr(module, "prepare", lambda *_, **__: pytest.fail("read"))
    config = TrainConfig(data=DataConfig(held_out_fraction=0.0))
    run: Any = types.SimpleNamespace(config=config, run=Path("runs/x"), digest="", tokenizer=None)
    with pytest.raises(UserError, match=r"runs/x: its data have no held-out text.*fraction=0\.0"):
        calibration.CalibrationTexts(run, Options(), print)
    with pytest.raises(UserError, match=r"data of runs/x have no held-out text.*--parts"):
        evaluate_run.held_out_text(run, print)


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "contains no text"), ('{"body": "x"}\n', r"no field 'text' \(it has: body\)")],
)
def test_an_import_reads_the_first_document_of_its_text(tmp_path, content, words):
    from mea_jax.convert import importing

    (tmp_path / "a.jsonl").write_text(content)
    source: Any = types.SimpleNamespace(config={"max_position_embeddings": 64}, where="config.json")
    with pytest.raises(UserError, match=rf"--text jsonl:.*{words}"):
        importing.run_config(source, tmp_path / "out", 32, f"jsonl:{tmp_path / 'a.jsonl'}")
