"""The documents of files, part by part: a text for each record, or what is wrong with it."""

import contextlib
import errno
import functools
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from convert.files import shown
from qwen2_jax.json_object import brief
from train.data.files import DataFile

LONGEST_LINE = 256 << 20
"""Bytes of a line of jsonl; a longer one is bad, and is never held in memory whole."""

MAX_BAD_RECORDS = 100
"""Records of a source that may be bad, unless asked otherwise."""

_ARROW_FILE = b"ARROW1\0\0"
"""What Arrow files begin with; a stream follows."""
_ROWS = 512  # of a table that are in memory at a time


class Part(NamedTuple):
    """What one worker reads at a time."""

    files: tuple[DataFile, ...]
    """One; of plain text several."""
    begin: int
    """Of jsonl: lines that begin at a byte from `begin` up to `end`. Of tables: row groups or record batches. Of
    ArrayRecord: records. Unused for plain text."""
    end: int
    """-1: all there is."""
    size: int
    """In bytes, about, of the files."""


class Bad(NamedTuple):
    """A record that cannot be used."""

    path: str
    where: str
    """Such as `line`; empty for a whole file."""
    number: int
    """From 1."""
    why: str
    records: int = 1
    """How many are lost."""

    def __str__(self) -> str:
        place = f", {self.where} {self.number}" if self.where else ""
        return f"{shown(self.path)}{place}: {self.why}"


def plan(files: Sequence[DataFile], field: str, part_size: int) -> list[Part]:
    """Cuts files into parts of about `part_size` bytes, in order.

    Raises:
      ValueError: if a table has no such column, or not of text; if what reads a kind of file is not installed.
      OSError: if a file cannot be opened or read, which says nothing of what is in it.
    """
    parts: list[Part] = []
    texts: list[DataFile] = []
    for file in files:
        if file.kind != "text":
            parts += _text_part(texts)
            parts += _cut(file, _count(file, field), part_size)
            continue
        texts.append(file)
        if sum(text.size for text in texts) >= part_size or len(texts) == 10_000:
            parts += _text_part(texts)
    return parts + _text_part(texts)


def read(part: Part, field: str) -> Iterator[str | Bad]:
    """The documents of a part, and its bad records, in order.

    Raises:
      OSError: if the file cannot be opened or read, which says nothing of what is in it.
    """
    if part.files[0].kind == "text":
        return map(_whole, part.files)
    reader = {"jsonl": _lines, "parquet": _parquet, "arrow": _arrow, "array_record": _array_record}
    return reader[part.files[0].kind](part, field)


def _text_part(texts: list[DataFile]) -> list[Part]:
    part = [Part(tuple(texts), 0, -1, sum(file.size for file in texts))] if texts else []
    texts.clear()
    return part


def _cut(file: DataFile, count: int, part_size: int) -> Iterator[Part]:
    """Into equal parts of `count` units; whole if there are no units to count."""
    if count <= 0:
        yield Part((file,), 0, -1, file.size)
        return
    parts = min(count, max(1, -(-file.size // part_size)))
    for number in range(parts):
        begin, end = (count * k // parts for k in (number, number + 1))
        yield Part((file,), begin, end, file.size // parts)


def _count(file: DataFile, field: str) -> int:
    """Units that a file can be cut into; 0 if it is to be read as one, as one that turns out to be damaged."""
    if file.kind == "jsonl":
        return 0 if file.compression else file.size
    try:
        if file.kind == "array_record":
            with _open_array_record(file) as source:
                return len(source)
        if file.kind == "parquet":
            table = _parquet_file(file)
            _check_column(file, table.schema_arrow, field)
            return table.num_row_groups
        with _open_arrow(file) as reader:
            _check_column(file, reader.schema, field)
            return getattr(reader, "num_record_batches", 0)
    except _damages() as error:
        _check_readable(error, file.path)
        return 0


def _whole(file: DataFile) -> str | Bad:
    try:
        with _open(file) as stream:
            return stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Bad(file.path, "", 0, f"not UTF-8: {error}")
    except (EOFError, zlib.error, OSError) as error:
        if not file.compression or getattr(error, "errno", None):
            raise
        return Bad(file.path, "", 0, f"cannot be decompressed: {error}")


def _lines(part: Part, field: str) -> Iterator[str | Bad]:
    before = None
    for text in _lines_of_part(part, field):
        if isinstance(text, Bad):
            before = _lines_before(part) if before is None else before
            text = text._replace(number=text.number + before)
        yield text


def _lines_before(part: Part) -> int:
    """How many lines of the file precede the part's first. Reads all before it, which only a bad record is worth."""
    if not part.begin:
        return 0
    count, left = 1, part.begin - 1  # one line ends behind: where the part begins in its midst, or on its first byte
    with _open(part.files[0]) as stream:
        while left and (piece := stream.read(min(left, 1 << 20))):
            count += piece.count(b"\n")
            left -= len(piece)
    return count


def _lines_of_part(part: Part, field: str) -> Iterator[str | Bad]:
    file = part.files[0]
    position, number = part.begin, 0
    with _open(file) as stream:
        if part.begin:
            stream.seek(part.begin - 1)
            position += _skip_line(stream) - 1
        while part.end < 0 or position < part.end:
            number += 1
            try:
                line = stream.readline(LONGEST_LINE)
                position += len(line)
                whole = len(line) < LONGEST_LINE or line.endswith(b"\n")
                position += 0 if whole else _skip_line(stream)
            except (EOFError, zlib.error, OSError) as error:
                if not file.compression or getattr(error, "errno", None):
                    raise
                lost = "and how many lines that loses is not known (1 counted)"
                yield Bad(file.path, "line", number, f"from here on it cannot be decompressed, {lost}: {error}")
                return
            if not line:
                return
            if not whole:
                yield Bad(file.path, "line", number, f"longer than {LONGEST_LINE >> 20} MiB")
            elif not line.isspace():
                yield _text_of(line, field, file.path, "line", number)
            else:
                yield ""


def _skip_line(stream: Any) -> int:
    """Reads to the end of the line; how many bytes that were."""
    skipped = 0
    while piece := stream.readline(1 << 20):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _text_of(record: bytes, field: str, path: str, where: str, number: int) -> str | Bad:
    """The text of a JSON object."""
    try:
        value = json.loads(record.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Bad(path, where, number, f"not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return Bad(path, where, number, f"not JSON: {error}")
    if not isinstance(value, dict):
        return Bad(path, where, number, f"not a JSON object but {brief(value, 40)}")
    if field not in value:
        return Bad(path, where, number, f"no field {field!r}, only {brief(list(value))} (--field names one)")
    return _checked(value[field], field, path, where, number)


def _checked(text: Any, field: str, path: str, where: str, number: int) -> str | Bad:
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            return Bad(path, where, number, f"not UTF-8: {error}")
    if not isinstance(text, str):
        return Bad(path, where, number, f"field {field!r} is not text but {brief(text, 40)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Bad(path, where, number, "half of a surrogate pair, which is not Unicode")
    return text


def _parquet(part: Part, field: str) -> Iterator[str | Bad]:
    path = part.files[0].path
    try:
        table = _parquet_file(part.files[0])
        rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    except _damages() as error:
        yield _whole_file(path, "parquet", error)
        return
    for group in range(part.begin, part.end):
        batches = table.iter_batches(_ROWS, row_groups=[group], columns=[field], use_threads=False)

        def known(rows: int = rows[group]) -> tuple[int, bool]:
            return rows, True

        yield from _rows(batches, field, path, f"row group {group + 1}, row", known)


def _arrow(part: Part, field: str) -> Iterator[str | Bad]:
    path = part.files[0].path
    try:
        with _open_arrow(part.files[0]) as reader:
            if part.end < 0:  # a stream, read in order
                yield from _rows(reader, field, path, "row", lambda: _arrow_rows(path, 0, None))
                return
            for number in range(part.begin, part.end):
                batch = (reader.get_batch(n) for n in (number,))
                count = functools.partial(_arrow_rows, path, number, number + 1)
                yield from _rows(batch, field, path, f"record batch {number + 1}, row", count)
    except _damages() as error:
        yield _whole_file(path, "Arrow", error)


def _arrow_rows(path: str, begin: int, end: int | None) -> tuple[int, bool]:
    """Rows of some of the record batches, as the messages around them say, and whether those could all be read.

    Reads none of the columns, so that damage in them does no harm.
    """
    import pyarrow

    counts: list[int] = []
    with pyarrow.memory_map(path) as memory:
        if memory.read(len(_ARROW_FILE)) != _ARROW_FILE:
            memory.seek(0)
        try:
            for message in pyarrow.ipc.MessageReader.open_stream(memory):
                if message.type == "record batch":
                    counts.append(pyarrow.ipc.read_record_batch(message, pyarrow.schema([])).num_rows)
                if len(counts) == end:
                    break
        except _damages() as error:
            _check_readable(error, path)
            return sum(counts[begin:]), False
    return sum(counts[begin:]), True


def _rows(
    batches: Iterable[Any], field: str, path: str, where: str, expected: Callable[[], tuple[int, bool]]
) -> Iterator[str | Bad]:
    """The texts of a column, up to what is damaged.

    Args:
      expected: asked only then: how many rows there are, damaged or not, and whether there are no more for certain.
    """
    number = 0
    try:
        for batch in batches:
            for item in _as_bytes(batch.column(field)):
                number += 1
                yield _checked(item.as_py(), field, path, where, number)
    except _damages() as error:
        _check_readable(error, path)
        rows, certain = expected()
        lost = max(1, rows - number)
        unknown = "" if certain else f", and how many rows that loses is not known ({lost} counted)"
        yield Bad(path, where, number + 1, f"from here on it cannot be read{unknown}: {error}", lost)


def _as_bytes(column: Any) -> Any:
    """A column of text, not decoded, lest one bad text spoil a batch.

    Raises:
      ArrowInvalid: if it is damaged; pyarrow by itself reads wherever damaged offsets point to, and may crash.
    """
    import pyarrow

    column.validate()
    if pyarrow.types.is_dictionary(column.type):
        words = _as_bytes(column.dictionary)
        return pyarrow.DictionaryArray.from_arrays(column.indices, words).dictionary_decode()
    column = column.cast(pyarrow.large_binary())
    column.validate(full=True)
    return column


def _array_record(part: Part, field: str) -> Iterator[str | Bad]:
    path = part.files[0].path
    number = part.begin
    try:
        with _open_array_record(part.files[0]) as source:
            for number in range(part.begin, max(part.end, 0)):
                try:
                    record = source[number]
                except _damages() as error:
                    _check_readable(error, path)
                    yield Bad(path, "record", number + 1, f"cannot be read: {error}")
                else:
                    yield _text_of(record, field, path, "record", number + 1)
            if part.end < 0 and len(source):
                yield Bad(path, "", 0, "left out as a whole, counted as one record: cannot be read as ArrayRecord")
    except _damages() as error:
        yield _whole_file(path, "ArrayRecord", error)


def _whole_file(path: str, kind: str, error: Exception) -> Bad:
    _check_readable(error, path)
    return Bad(path, "", 0, f"left out as a whole, counted as one record: cannot be read as {kind}: {error}")


def _check_readable(error: Exception, path: str) -> None:
    """Raises OSError if it was the system that could not open or read the file, whose content may then be sound."""
    number = getattr(error, "errno", None)
    # array_record says so in words only: "open() failed: Permission denied; opening FILE".
    if type(error) is RuntimeError and (told := re.search(r"\w\(\) failed: ([^;]+)", str(error))):
        number = next((known for known in errno.errorcode if os.strerror(known) == told[1]), None)
    if number:
        raise OSError(number, os.strerror(number), path) from error


def _damages() -> tuple[type[Exception], ...]:
    """What the libraries raise for damaged files; for those that the system cannot read, see `_check_readable`."""
    try:
        import pyarrow
    except ImportError:
        return (RuntimeError, IndexError)
    # UnicodeDecodeError: of names of columns.
    return (pyarrow.ArrowException, OSError, RuntimeError, IndexError, UnicodeDecodeError)


def _open(file: DataFile) -> Any:
    if file.compression == "gzip":
        return gzip.open(file.path)
    if file.compression == "zstd":
        _needs("pyarrow", file)
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(file.path, compression="zstd"))
    return open(file.path, "rb")


def _parquet_file(file: DataFile) -> Any:
    _needs("pyarrow", file)
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file.path)


@contextlib.contextmanager
def _open_arrow(file: DataFile) -> Iterator[Any]:
    """A reader of an Arrow file, or of a stream, which is what Hugging Face's `datasets` writes."""
    _needs("pyarrow", file)
    import pyarrow

    with pyarrow.memory_map(file.path) as memory:
        try:
            reader = pyarrow.ipc.open_file(memory)
        except pyarrow.ArrowInvalid:
            memory.seek(0)
            reader = pyarrow.ipc.open_stream(memory)
        yield reader


@contextlib.contextmanager
def _open_array_record(file: DataFile) -> Iterator[Any]:
    """Grain's random-access source, from where Grain has it too: Grain itself would import JAX."""
    _needs("array_record", file)
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    with ArrayRecordDataSource([file.path]) as source:
        yield source


def _needs(module: str, file: DataFile) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{shown(file.path)} needs {module} to be read; run: pip install 'qwen2-jax[data]'")


def _check_column(file: DataFile, schema: Any, field: str) -> None:
    import pyarrow

    if schema.names.count(field) > 1:
        raise ValueError(f"{shown(file.path)} has {schema.names.count(field)} columns {field!r}; leave one of them")
    if field not in schema.names:
        names = ", ".join(schema.names)
        raise ValueError(f"{shown(file.path)} has no column {field!r}; --field names one, of {names}")
    kind = schema.field(field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    types = pyarrow.types
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(is_kind(kind) for is_kind in texts):
        raise ValueError(f"column {field!r} of {shown(file.path)} is not text but {kind}; --field names another")
