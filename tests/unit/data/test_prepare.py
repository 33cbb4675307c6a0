"""Tests of preparation: atomic, once per set of options, with correct counts."""

import dataclasses
import errno
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers as hf

from mea_jax.config.schema import SourceConfig
from mea_jax.convert import tokenizer_files
from mea_jax.data import packing, sources
from mea_jax.data import prepare as prepare_lib
from mea_jax.data.corpus import unit_hash
from mea_jax.data.windows import reader, writing
from mea_jax.errors import UserError
from tests.unit.data.preparing import FRACTION, documents, entries, prepare, stored


def test_windows_hold_exactly_the_documents_of_each_side(config):
    prepared = prepare(config)
    for split, held_out in (("train", False), ("held_out", True)):
        expected = "".join(text + "<|endoftext|>" for text in documents(config, held_out))
        assert stored(prepared, split) == expected


def test_documents_between_a_beginning_and_an_end(config, tmp_path):
    """Each document is enclosed in both tokens if the tokenizer has both, as Llama 3's has."""
    model = tokenizer_files.of_bytes()  # ids 0 to 255, and 256, the end
    model.add_special_tokens(["<s>"])
    model.post_processor = hf.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 257)]
    )
    model.save(str(tmp_path / "tokenizer.json"))
    prepared = prepare(dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json")))
    for split, held_out in (("train", False), ("held_out", True)):
        expected = "".join(text + "<|endoftext|><s>" for text in documents(config, held_out))
        assert stored(prepared, split) == expected
    first = reader.open_windows(prepared.sources[0].directory, "train", 64)[0]
    assert first["tokens"][0] == 257


def test_counts(config):
    (source,) = prepare(config).sources
    train, held_out = documents(config, False), documents(config, True)
    assert source.train_documents == len(train)
    assert source.held_out_documents == len(held_out) > 0
    assert source.train_bytes == sum(len(text.encode()) for text in train)
    assert source.held_out_bytes == sum(len(text.encode()) for text in held_out)
    assert source.train_tokens == source.train_bytes + len(train)  # bytes and separators
    assert source.held_out_windows == -(-source.held_out_tokens // 64)
    positions = (source.train_windows + source.held_out_windows) * 64
    tokens = source.train_tokens + source.held_out_tokens
    assert source.waste == pytest.approx(1 - tokens / positions)


def test_baselines_compress_document_by_document(config):
    baselines = prepare(config).baselines
    held_out = [text.encode() for text in documents(config, True)]
    assert baselines["gzip_bytes"] == sum(len(gzip.compress(text, 9)) for text in held_out)
    xz = [lzma.compress(text, preset=9 | lzma.PRESET_EXTREME) for text in held_out]
    assert baselines["xz_bytes"] == sum(map(len, xz))


def test_no_baselines_of_much_text(config, monkeypatch):
    monkeypatch.setattr(prepare_lib, "_BASELINE_LIMIT", 100)
    assert prepare(config).baselines is None


def test_second_call_reads_no_documents(config, monkeypatch):
    first = prepare(config)

    def read(self, unit):
        raise AssertionError("documents read again")

    monkeypatch.setattr(sources._TextCorpus, "read", read)
    second = prepare(config)
    assert second.sources == first.sources
    assert second.baselines == first.baselines


def test_a_weight_is_not_part_of_the_cache(config):
    first = prepare(config)
    heavy = dataclasses.replace(config.sources[0], weight=3.0)
    second = prepare(dataclasses.replace(config, sources=(heavy,)))
    assert second.directory == first.directory
    assert [source.weight for source in (*first.sources, *second.sources)] == [1.0, 3.0]


def test_options_and_files_that_change_windows_change_the_cache(config, tmp_path):
    directories = {prepare(config).directory}
    for change in ({"context_length": 32}, {"tokenizer": "bpe:300"}, {"held_out_fraction": 0.4}):
        directories.add(prepare(dataclasses.replace(config, **change)).directory)
    (tmp_path / "text" / "99.txt").write_text("one more")
    directories.add(prepare(config).directory)
    assert len(directories) == 5


def test_bpe_is_trained_on_the_training_side_only(config, tmp_path):
    held_out = {
        document.name
        for document in sources.documents(config.sources[0])
        if unit_hash(document.name) < FRACTION
    }
    for path in (tmp_path / "text").iterdir():
        path.write_text(("secretword " if path.name in held_out else "openword ") * 50)
    prepared = prepare(dataclasses.replace(config, tokenizer="bpe:300"))
    vocabulary = json.loads(prepared.tokenizer.content)["model"]["vocab"]
    assert "openword" in vocabulary
    assert not any("secret" in token for token in vocabulary)


def test_bpe_learns_from_a_sample_of_much_text(config, monkeypatch):
    whole = prepare(dataclasses.replace(config, tokenizer="bpe:300")).tokenizer
    monkeypatch.setattr(prepare_lib.tokenizer_training, "_BPE_SAMPLE", 3000)
    other = dataclasses.replace(config, tokenizer="bpe:300", cache_dir=config.cache_dir + "2")
    sample = prepare(other).tokenizer
    assert sample.content != whole.content
    again = dataclasses.replace(other, cache_dir=config.cache_dir + "3")
    assert prepare(again).tokenizer.content == sample.content


@pytest.mark.parametrize("where", ["windows", "baselines"])
def test_an_interrupted_preparation_leaves_nothing(config, monkeypatch, where):
    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if where == "windows":
            patch.setattr(packing, "_cut", killed)
        else:
            patch.setattr(prepare_lib.tokenizer_training, "baselines", killed)
        with pytest.raises(Killed):
            prepare(config)
    assert entries(config) == []
    assert prepare(config).sources[0].train_windows > 0


def test_what_a_kill_leaves_is_not_taken_for_whole(config, monkeypatch):
    # SIGKILL runs no cleanup: the scratch folder stays, complete except for its last file.
    with monkeypatch.context() as patch:
        patch.setattr(prepare_lib.shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(prepare_lib, "_rename", lambda scratch, final: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config)
    (left,) = entries(config)
    assert "incomplete" in left.name
    prepared = prepare(config)
    assert prepared.directory != left
    assert stored(prepared, "held_out")


def test_tokenizer_larger_than_the_vocabulary(config):
    for spec, size in (("bytes", 257), ("bpe:300", 300)):
        with pytest.raises(UserError, match=rf"has {size} tokens.* only 100.*vocab_size={size}"):
            prepare(dataclasses.replace(config, tokenizer=spec), 100)
        assert prepare(dataclasses.replace(config, tokenizer=spec), size).sources


def test_cache_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    broken = dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache: .*--config\.data\.cache_dir.*MEA_JAX_CACHE"):
        prepare(broken)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # The error of ArrayRecord on a full disk, shortened.
        RuntimeError("write() failed: No space left on device; writing /x/y; at byte 3137536"),
    ],
)
def test_full_disk(config, monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr(writing, "write", full)
    with pytest.raises(UserError, match=r"cache: No space left on device; .*cache_dir"):
        prepare(config)
    assert entries(config) == []


def test_other_runtime_errors_are_ours(config, monkeypatch):
    def defect(*args):
        raise RuntimeError("a defect")

    monkeypatch.setattr(writing, "write", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        prepare(config)


def test_cache_folder_from_the_environment(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MEA_JAX_CACHE", str(tmp_path / "elsewhere"))
    prepared = prepare(dataclasses.replace(config, cache_dir=""))
    assert prepared.directory.parent == tmp_path / "elsewhere"


def test_bad_input_comes_out_as_its_own_error_and_leaves_nothing(config, tmp_path):
    (tmp_path / "text" / "zz.txt").write_bytes(b"ok \xff")
    with pytest.raises(UserError, match=r"zz\.txt: byte 3 is not UTF-8"):
        prepare(config)
    assert entries(config) == []


def test_splits_without_documents(config):
    (source,) = prepare(dataclasses.replace(config, held_out_fraction=0.0)).sources
    assert (source.held_out_windows, source.held_out_bytes) == (0, 0)
    assert source.train_documents == 30
    with pytest.raises(UserError, match=r"every document is held out.*held_out_fraction"):
        prepare(dataclasses.replace(config, held_out_fraction=1.0))


def test_summary_line(config):
    lines: list[str] = []
    prepared = prepare_lib.prepare(config, log=lines.append)
    read, line = lines
    (source,) = prepared.sources
    size = source.train_bytes + source.held_out_bytes
    assert read == (
        f"data: text:{config.sources[0].path}: 30 files, {size:,} bytes, 30 documents, "
        f"{source.held_out_bytes / size:.2%} held out"
    )
    assert f"{prepared.sources[0].train_windows:,} training" in line
    assert str(prepared.directory) in line
    assert "left out" not in line


def test_summary_tells_of_skipped_files(config, tmp_path, monkeypatch):
    folder = tmp_path / "python"
    folder.mkdir()
    for i in range(20):
        (folder / f"m{i}.py").write_text(f"x = {i}\n")
    (folder / "latin.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(folder))
    lines: list[str] = []
    stdlib = dataclasses.replace(config, sources=(SourceConfig(),))
    prepared = prepare_lib.prepare(stdlib, log=lines.append)
    assert prepared.sources[0].skipped == 1
    assert "left out 1 lines, rows or files" in lines[-1]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_files_of_any_format_give_the_same_windows(config, tmp_path, tokenizer):
    """JSON lines, compressed JSON lines and Parquet of the same documents give equal tokens."""
    texts = [document.text for document in sources.documents(config.sources[0])]
    shards = [texts[:11], texts[11:12], texts[12:]]
    found = []
    for source, suffix in (("jsonl", ".jsonl"), ("jsonl", ".jsonl.gz"), ("parquet", ".parquet")):
        folder = tmp_path / suffix
        folder.mkdir()
        for i, shard in enumerate(shards):
            path = folder / f"{i}{suffix}"
            lines = "".join(json.dumps({"body": text}) + "\n" for text in shard).encode()
            if source == "parquet":
                pq.write_table(pa.table({"body": shard}), path, row_group_size=4)
            else:
                path.write_bytes(gzip.compress(lines) if suffix == ".jsonl.gz" else lines)
        spec = SourceConfig(source=source, path=str(folder / f"*{suffix}"), field="body")
        changed = dataclasses.replace(config, sources=(spec,), tokenizer=tokenizer)
        found.append(prepare(changed))
    assert len({prepared.directory for prepared in found}) == 3
    assert len({prepared.digest for prepared in found}) == 1
    for split in ("train", "held_out"):
        windows = [
            [
                (window["tokens"].tobytes(), window["segment_ids"].tobytes())
                for window in reader.open_windows(
                    prepared.sources[0].directory, split, prepared.context_length
                )
            ]
            for prepared in found
        ]
        assert windows[0] == windows[1] == windows[2]
        assert len(windows[0]) > 3


def test_progress_is_reported(config):
    """Each pass over the documents reports progress, for which other processes wait."""
    sizes: list[int] = []
    prepare(dataclasses.replace(config, tokenizer="bpe:300"), on_progress=sizes.append)
    total = sum(len(text.encode()) for held in (True, False) for text in documents(config, held))
    assert sum(sizes) == 4 * total  # the tokenizer, both splits, the compressors
