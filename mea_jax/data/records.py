"""Records with a field of text: JSON lines, Parquet files, datasets prepared by TFDS."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

from mea_jax.config import SourceConfig
from mea_jax.data.corpus import (
    Corpus,
    Document,
    FileCorpus,
    content_name,
    decode,
    find_files,
    text_field,
)
from mea_jax.errors import UserError, nearest

_TFDS_UNIT = 4096  # records per unit of a TFDS source
_PARQUET_ROWS = 256  # rows in memory at a time


def _pyarrow(what: str) -> Any:
    """The package pyarrow, an optional extra that `what` needs. Raises `UserError`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{what} needs the package pyarrow: pip install 'mea_jax[parquet]'"
        ) from error
    return pyarrow


class JsonlCorpus(FileCorpus):
    """Each line is a JSON object, one of its fields the text of a document.

    Files whose names end in .gz or .zst are decompressed as they are read.
    """

    def __init__(self, source: SourceConfig):
        super().__init__(source, *find_files(source, (".jsonl", ".jsonl.gz", ".jsonl.zst")))

    def read(self, unit: str) -> Iterator[Document]:
        path, number = self.root / unit, 0
        try:
            with self._open(unit) as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        text = self._text(line, f"{path}, line {number}")
                        yield Document(content_name(text), text)
        except (OSError, EOFError, zlib.error) as error:
            if unit.endswith((".gz", ".zst")) and not getattr(error, "errno", None):
                raise UserError(
                    f"{path}: broken beyond line {number} ({error}); it was cut short or is no "
                    f"{unit[unit.rindex('.') :]} file: fetch it again"
                ) from error
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be read: {reason}") from error

    def _open(self, unit: str) -> io.BufferedIOBase:
        path = self.root / unit
        if unit.endswith(".gz"):
            return gzip.open(path, "rb")
        if unit.endswith(".zst"):
            stream = _pyarrow(f"reading {path}").input_stream(str(path), compression="zstd")
            return io.BufferedReader(stream, 1 << 16)
        return open(path, "rb")

    def _text(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(decode(line, where))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); "
                "each line must be one JSON object"
            ) from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON {type(record).__name__}, expected an object")
        return text_field(record, self.source.field, where)


class ParquetCorpus(FileCorpus):
    """Rows of Parquet files, one of their columns the text of a document.

    Only that column is read, some rows at a time: a file is never whole in memory.
    """

    def __init__(self, source: SourceConfig):
        _pyarrow("source 'parquet'")
        super().__init__(source, *find_files(source, (".parquet",)))

    def read(self, unit: str) -> Iterator[Document]:
        pyarrow, path, field = _pyarrow("source 'parquet'"), self.root / unit, self.source.field
        where = str(path)
        try:
            # Read piece by piece: otherwise a row group, of whatever size, is fetched at once.
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                names = file.schema_arrow.names
                if field not in names:
                    raise UserError(
                        f"{path}: no column {field!r} (it has: {', '.join(names)}); "
                        "set the field of the data source"
                    )
                for group in range(file.num_row_groups):
                    where, row = f"{path}, row group {group}", 0
                    for batch in file.iter_batches(
                        _PARQUET_ROWS, row_groups=[group], columns=[field], use_threads=False
                    ):
                        for value in batch.column(0).to_pylist():
                            text = text_field({field: value}, field, f"{where}, row {row}")
                            yield Document(content_name(text), text)
                            row += 1
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: text that is not UTF-8 ({error})") from error
        except (OSError, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"{where}: cannot be read ({reason}): fetch the file again") from error


class TfdsCorpus(Corpus):
    """Records of a dataset that TFDS has prepared in a format with random access."""

    def __init__(self, source: SourceConfig):
        super().__init__(source)
        # Imported here: it takes a second, and the other sources do without.
        import tensorflow_datasets as tfds

        name = source.source.removeprefix("tfds:")
        data_dir = source.path or None
        where = f" data_dir={data_dir!r}," if data_dir else ""
        remedy = (
            "give the folder that it was prepared in as the path of the data source, or import its "
            f"builder and run tfds.builder({name!r},{where} file_format='array_record')"
            ".download_and_prepare() in Python first (docs/data.md, also for other forms of it)"
        )
        try:
            self._builder = tfds.builder(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError as error:
            raise UserError(
                f"TFDS finds no dataset {name!r} in "
                f"{data_dir or tfds.core.constants.DATA_DIR}: {remedy}"
            ) from error
        except ValueError as error:  # not a name that TFDS can read
            raise UserError(
                f"{source.source!r} names no TFDS dataset: write tfds:<name>, tfds:<name>/<config> "
                "or tfds:<name>/<config>:<version>"
            ) from error
        if not self._builder.is_prepared():
            raise UserError(f"TFDS dataset {name!r} is not prepared here: {remedy}")
        splits = self._builder.info.splits
        split = source.split.partition("[")[0]  # "train" of "train[:10%]"
        if split not in splits:
            raise UserError(
                f"TFDS dataset {name!r} has no split {source.split!r}; "
                + nearest(source.split, splits)
            )
        try:
            self._records = self._builder.as_data_source(split=source.split)
        except NotImplementedError as error:
            raise UserError(
                f"TFDS dataset {name!r} is prepared in a format without random access: convert it, "
                "where TensorFlow is installed, with tfds convert_format --dataset_version_dir="
                f"{self._builder.data_path} --out_file_format=array_record --out_dir=<new folder>"
            ) from error
        total = len(self._records)
        self.units = [
            range(start, min(start + _TFDS_UNIT, total)) for start in range(0, total, _TFDS_UNIT)
        ]
        self.size = splits[split].num_bytes * total // splits[split].num_examples

    def identity(self) -> Any:
        info = self._builder.info
        return [info.full_name, self.source.split, self.source.field, len(self._records), self.size]

    def read(self, unit: range) -> Iterator[Document]:
        for index in unit:
            where = f"{self._builder.info.full_name}, {self.source.split} record {index}"
            text = text_field(self._records[index], self.source.field, where)
            yield Document(content_name(text), text)
