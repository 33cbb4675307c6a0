"""Sources of records with a text field: JSON lines, Parquet files, datasets prepared by TFDS."""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

from mea_jax.config.schema import SourceConfig
from mea_jax.data.bad_input import BadInputError, LeftOut, first_line, summarize_names
from mea_jax.data.corpus import (
    Corpus,
    Document,
    FileCorpus,
    content_name,
    decode,
    field_path,
    text_field,
    without_mark,
)
from mea_jax.data.file_patterns import find_files
from mea_jax.errors import UserError, nearest

_TFDS_UNIT = 4096  # records per unit of a TFDS source
_PARQUET_ROWS = 256  # rows in memory at a time
_LINE_LIMIT = 256 << 20  # bytes of a line; a file without line ends is not JSON lines


def _pyarrow(what: str) -> Any:
    """Return the package pyarrow, or raise `UserError` that `what` needs this optional extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{what} needs the package pyarrow: pip install 'mea_jax[parquet]'"
        ) from error
    return pyarrow


class JsonlCorpus(FileCorpus):
    """A source of JSON lines: each line is an object with the text of a document in one field.

    Files whose names end in .gz or .zst are decompressed while they are read.
    """

    def __init__(self, source: SourceConfig, left_out: LeftOut):
        suffixes = (".jsonl", ".jsonl.gz", ".jsonl.zst")
        root, names, passed_over = find_files(source, suffixes)
        super().__init__(source, left_out, root, names)
        self.passed_over = passed_over

    def read(self, unit: str) -> Iterator[Document]:
        path, number = self.root / unit, 0
        try:
            with self._open(unit) as stream:
                for number, line in enumerate(_lines(stream), start=1):
                    try:
                        text = self._text(line, f"{path}, line {number}")
                    except BadInputError as error:
                        self.left_out.add(error)
                        continue
                    if text is not None:
                        yield Document(content_name(text), text)
        except (OSError, EOFError, zlib.error) as error:
            if unit.endswith((".gz", ".zst")) and not getattr(error, "errno", None):
                raise BadInputError(
                    f"{path}: broken after line {number} ({first_line(error)}); it is truncated or "
                    f"not a {unit[unit.rindex('.') :]} file: fetch it again"
                ) from error
            reason = getattr(error, "strerror", None) or error
            raise BadInputError(
                f"{path}: cannot be read: {reason}; check that it exists and is readable"
            ) from error

    def _open(self, unit: str) -> io.BufferedIOBase:
        path = self.root / unit
        if unit.endswith(".gz"):
            return gzip.open(path, "rb")
        if unit.endswith(".zst"):
            stream = _pyarrow(f"reading {path}").input_stream(str(path), compression="zstd")
            return io.BufferedReader(stream, 1 << 16)
        return open(path, "rb")

    def _text(self, line: bytes | None, where: str) -> str | None:
        """Return the text of a line, or None if the line is empty."""
        if line is None:
            raise BadInputError(f"{where}: longer than {_LINE_LIMIT >> 20} MiB; shorten it")
        if not line.strip():
            return None
        try:
            record = json.loads(decode(without_mark(line), where))
        except json.JSONDecodeError as error:
            raise BadInputError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); "
                "each line must be one JSON object"
            ) from error
        except ValueError as error:  # Python does not read integers of more than 4300 digits
            raise BadInputError(
                f"{where}: an integer has too many digits; write it as a string"
            ) from error
        except RecursionError as error:
            raise BadInputError(f"{where}: nested too deeply; reduce its nesting") from error
        if not isinstance(record, dict):
            raise BadInputError(
                f"{where}: a JSON {type(record).__name__}; each line must be one JSON object"
            )
        return text_field(record, self.source.field, where)


def _lines(stream: io.BufferedIOBase) -> Iterator[bytes | None]:
    """Yield the lines of `stream`, or None for a line of more than `_LINE_LIMIT` bytes."""
    while line := stream.readline(_LINE_LIMIT):
        if len(line) < _LINE_LIMIT or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_LINE_LIMIT)
        yield None


class ParquetCorpus(FileCorpus):
    """A source of Parquet files: each row has the text of a document in one column.

    Only that column, or one field of it, is read, `_PARQUET_ROWS` rows at a time: a file is never
    loaded into memory completely.
    """

    def __init__(self, source: SourceConfig, left_out: LeftOut):
        _pyarrow("source 'parquet'")
        root, names, passed_over = find_files(source, (".parquet",))
        super().__init__(source, left_out, root, names)
        self.passed_over = passed_over

    def read(self, unit: str) -> Iterator[Document]:
        pyarrow, path, field = _pyarrow("source 'parquet'"), self.root / unit, self.source.field
        with _parquet_errors(f"{path}"):
            # Without these options pyarrow loads an entire row group, of any size, into memory.
            file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        with file:
            with _parquet_errors(f"{path}"):
                columns, groups = _columns(file.schema_arrow), file.num_row_groups
            names = field_path(field, columns, _fields)
            if names is None:
                raise BadInputError(
                    f"{path}: no column {field!r} (it has: {summarize_names(columns)}); "
                    "set the field of the data source"
                )
            for group in range(groups):
                try:
                    yield from self._read_group(file, names, group, f"{path}, row group {group}")
                except BadInputError as error:
                    self.left_out.add(error)

    def _read_group(
        self, file: Any, names: list[str], group: int, where: str
    ) -> Iterator[Document]:
        row = 0
        with _parquet_errors(where):
            for batch in file.iter_batches(
                _PARQUET_ROWS, row_groups=[group], columns=[".".join(names)], use_threads=False
            ):
                for value in _values(_column(batch, names)):
                    try:
                        field = self.source.field
                        text = text_field({field: value}, field, f"{where}, row {row}")
                    except BadInputError as error:
                        self.left_out.add(error)
                    else:
                        yield Document(content_name(text), text)
                    row += 1


def _columns(fields: Any) -> dict[str, Any]:
    """Return the types of a schema's columns, or of a struct's fields, by their names."""
    return {field.name: field.type for field in fields}


def _fields(kind: Any) -> dict[str, Any] | None:
    """Return the fields inside a column's type, or None if it is not a struct."""
    return _columns(kind) if _pyarrow("source 'parquet'").types.is_struct(kind) else None


def _column(batch: Any, names: list[str]) -> Any:
    """Return the column `names[0]` of `batch`, or the field inside it that `names` lead to."""
    column = batch.column(batch.schema.get_field_index(names[0]))
    if len(names) == 1:
        return column
    from pyarrow import compute  # its `struct_field` returns null if a struct is null

    return compute.struct_field(column, names[1:])


def _values(column: Any) -> list[Any]:
    """Return the column as Python objects; as bytes if one of its strings is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        binary = _pyarrow("source 'parquet'").large_binary()
        return column.cast(binary).to_pylist()


@contextlib.contextmanager
def _parquet_errors(where: str) -> Iterator[None]:
    pyarrow = _pyarrow("source 'parquet'")
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        reason = first_line(error).rstrip(".")
        raise BadInputError(f"{where}: cannot be read ({reason}): fetch the file again") from error


class TfdsCorpus(Corpus):
    """A dataset that TFDS has prepared in a format with random access."""

    kind = "record"

    def __init__(self, source: SourceConfig, left_out: LeftOut):
        super().__init__(source, left_out)
        # Imported here because it takes a second and the other sources do not need it.
        import tensorflow_datasets as tfds

        name = source.source.removeprefix("tfds:")
        data_dir = source.path or None
        where = f" data_dir={data_dir!r}," if data_dir else ""
        remedy = (
            "set the path of the data source to the folder that it was prepared in, or import its "
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
        except ValueError as error:  # a name that TFDS cannot parse
            raise UserError(
                f"{source.source!r} names no TFDS dataset: use tfds:<name>, tfds:<name>/<config> "
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
                f"TFDS dataset {name!r} is prepared in a format without random access: convert it "
                "(this needs TensorFlow) with tfds convert_format --dataset_version_dir="
                f"{self._builder.data_path} --out_file_format=array_record --out_dir=<new folder>"
            ) from error
        total = len(self._records)
        self.units = [
            range(start, min(start + _TFDS_UNIT, total)) for start in range(0, total, _TFDS_UNIT)
        ]
        self.size = splits[split].num_bytes * total // splits[split].num_examples

    @property
    def amount(self) -> int:
        return len(self._records)

    def identity(self) -> Any:
        info = self._builder.info
        return [info.full_name, self.source.split, self.source.field, len(self._records), self.size]

    def read(self, unit: range) -> Iterator[Document]:
        for index in unit:
            where = f"{self._builder.info.full_name}, {self.source.split} record {index}"
            try:
                text = text_field(self._record(index, where), self.source.field, where)
            except BadInputError as error:
                self.left_out.add(error)
            else:
                yield Document(content_name(text), text)

    def _record(self, index: int, where: str) -> dict[str, Any]:
        try:
            return self._records[index]
        # ArrayRecord raises RuntimeError for a broken or missing file. TFDS's decoders raise many
        # kinds of exceptions for a broken record.
        except Exception as error:
            raise BadInputError(
                f"{where}: cannot be read ({first_line(error)}): prepare the dataset again"
            ) from error
