"""Every kind of file gives its documents, however it is cut into parts, and names what is wrong in it."""

import errno
import gzip
import json
import os
import resource

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from train.data.files import find_files
from train.data.readers import Bad, plan, read

TEXTS = [f"text {n} é世\n" * (n % 5 + 1) for n in range(40)]


def write_jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts))


def write_gzip(path):
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\r\n" for text in TEXTS).encode()))


def write_zstd(path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(lines)


def table(kind=None):
    return pyarrow.table({"id": list(range(len(TEXTS))), "text": pyarrow.array(TEXTS, kind)})


def write_parquet(path, kind=None):
    pyarrow.parquet.write_table(table(kind), path, row_group_size=7)


def write_categories(path):
    write_parquet(path, pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))


def write_arrow_file(path):
    with pyarrow.ipc.new_file(str(path), table().schema) as writer:
        writer.write_table(table(), max_chunksize=7)


def write_arrow_stream(path):
    with pyarrow.ipc.new_stream(str(path), table().schema) as writer:
        writer.write_table(table(), max_chunksize=7)


def write_array_record(path):
    writer = ArrayRecordWriter(str(path), "group_size:3")
    for text in TEXTS:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gzip,
    "a.jsonl.zst": write_zstd,
    "a.parquet": write_parquet,
    "categories.parquet": write_categories,
    "a.arrow": write_arrow_file,
    "stream.arrow": write_arrow_stream,
    "a.array_record": write_array_record,
}


def documents(path, part_size=1 << 30, field="text"):
    parts = plan(find_files([str(path)]), field, part_size)
    return [text for part in parts for text in read(part, field)]


@pytest.mark.parametrize("name", WRITERS)
def test_documents_of_any_cut(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    assert documents(path) == TEXTS
    for part_size in (1, 100, path.stat().st_size // 2):
        # Parts of jsonl that no line begins in are there, and empty.
        assert documents(path, part_size) == TEXTS


def test_parts_are_about_as_long_as_asked(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("x" * 1000)
    parts = plan(find_files([str(tmp_path)]), "text", 500)
    assert sum(part.size for part in parts) == pytest.approx(
        sum(f.stat().st_size for f in tmp_path.iterdir()), rel=0.01
    )
    assert all(part.size <= 500 for part in parts[:-1]) and parts[-1].size == 1000


def test_plain_text_is_a_document_per_file(tmp_path):
    for name, content in {"a.txt": b"\xef\xbb\xbfone\r\n", "b.md": b"two", "c.txt": b"", "d.txt": b"\xff"}.items():
        (tmp_path / name).write_bytes(content)
    *good, bad = documents(tmp_path)
    assert good == ["one\r\n", "two", ""]
    assert str(bad).startswith(f"{tmp_path}/d.txt: not UTF-8")


def test_bad_lines_are_named_by_their_number_in_the_file(tmp_path):
    bad = {
        3: (b'{"text": "x"', "not JSON"),
        8: (b'{"body": "x"}', "no field 'text', only ['body']"),
        9: (b'{"text": 3}', "is not text but 3"),
        15: (b'{"text": "\xff"}', "not UTF-8"),
        16: (b'["text"]', "not a JSON object"),
        17: (b'{"text": "\\ud800"}', "surrogate"),
        21: (b"[" * 100_000, "not JSON"),
        22: (b'{"text": null}', "is not text but None"),
    }
    lines = [bad[n][0] if n in bad else b'{"text": "fine"}' for n in range(1, 31)]
    lines[9] = b""
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))  # without a newline at the end
    for part_size in (1 << 30, 200, 30):
        found = [text for text in documents(tmp_path / "a.jsonl", part_size) if isinstance(text, Bad)]
        assert [(record.where, record.number) for record in found] == [("line", n) for n in bad]
        for record, (_, message) in zip(found, bad.values(), strict=True):
            assert message in str(record)


def test_lines_without_an_end_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.readers.LONGEST_LINE", 64)
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{{"text": "{"x" * 500}"}}\n{{"text": "b"}}\n')
    first, long, last = documents(tmp_path / "a.jsonl")
    assert (first, last) == ("a", "b") and long.number == 2 and "longer than" in long.why


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_compression_keeps_what_can_be_read(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    path.write_bytes(path.read_bytes()[:-20])
    *good, bad = documents(path)
    assert good == TEXTS[: len(good)] and "how many lines that loses is not known (1 counted)" in bad.why


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow", "a.array_record"])
def test_damaged_tables_are_named(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"nothing of the kind", b""):
        path.write_bytes(damaged)
        found = documents(path)
        good = [text for text in found if isinstance(text, str)]
        assert good == TEXTS[: len(good)]
        assert isinstance(found[-1], Bad) and str(path) in str(found[-1])


@pytest.mark.parametrize("name", WRITERS)
def test_files_that_the_system_cannot_read_are_not_bad_records(tmp_path, name):
    """What is wrong may be gone tomorrow, and nothing may be left out silently: found at once, and later too."""
    path = tmp_path / name
    WRITERS[name](path)
    files = find_files([str(path)])
    parts = plan(files, "text", 1 << 30)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, limit[1]))
        with pytest.raises(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(OSError) as caught:
            list(read(parts[0], "text"))
        assert caught.value.errno == errno.EMFILE
        if "jsonl" not in name:  # which need not be opened to be planned
            with pytest.raises(OSError) as caught:
                plan(files, "text", 1 << 30)
            assert caught.value.errno == errno.EMFILE and str(path) in str(caught.value)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(read(parts[0], "text"))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("pread() failed: {}; at 0")])
def test_disks_that_fail_while_they_are_read(tmp_path, error, monkeypatch):
    """In the midst of a file: neither a row group nor a record is counted as bad for it."""
    failing = error if isinstance(error, OSError) else RuntimeError(str(error).format(os.strerror(errno.EIO)))

    def fail(*arguments, **options):
        raise failing

    if isinstance(error, OSError):
        write_parquet(path := tmp_path / "a.parquet")
        parts = plan(find_files([str(path)]), "text", 1 << 30)
        monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", lambda *a, **o: map(fail, range(1)))
    else:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        write_array_record(path := tmp_path / "a.array_record")
        parts = plan(find_files([str(path)]), "text", 1 << 30)
        monkeypatch.setattr(ArrayRecordDataSource, "__getitem__", fail)
    with pytest.raises(OSError, match=str(path)) as caught:
        list(read(parts[0], "text"))
    assert caught.value.errno == errno.EIO


def write_compressed(path, texts, stream):
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    rows = pyarrow.table({"text": texts})
    with new(str(path), rows.schema, options=options) as writer:
        writer.write_table(rows, max_chunksize=7)


@pytest.mark.parametrize("stream", [False, True])
def test_damaged_record_batch_loses_its_rows(tmp_path, stream):
    """All of them are counted: --max-bad-records would otherwise let many rows go as one. In streams what follows is
    lost, too."""
    path = tmp_path / "a.arrow"
    write_compressed(path, TEXTS, stream)
    content = bytearray(path.read_bytes())
    frames = [at for at in range(len(content)) if content.startswith(b"\x28\xb5\x2f\xfd", at)]
    content[frames[5] : frames[5] + 4] = b"\xff" * 4  # two a batch, of offsets and texts: those of the third
    path.write_bytes(content)
    found = documents(path)
    (bad,) = (text for text in found if isinstance(text, Bad))
    assert [text for text in found if isinstance(text, str)] == TEXTS[:14] + ([] if stream else TEXTS[21:])
    expected = ("row", 15, len(TEXTS) - 14) if stream else ("record batch 3, row", 1, 7)
    assert (bad.where, bad.number, bad.records) == expected
    assert "not known" not in bad.why


def test_rows_that_cannot_be_counted_are_owned_up_to(tmp_path):
    path = tmp_path / "stream.arrow"
    write_arrow_stream(path)
    path.write_bytes(path.read_bytes()[:2000])
    *good, bad = documents(path)
    assert good == TEXTS[: len(good)] and good
    assert "how many rows that loses is not known (1 counted)" in bad.why


def test_damaged_offsets_are_not_followed(tmp_path):
    """pyarrow alone ends the process where a text is said to be longer than memory."""
    path = tmp_path / "a.arrow"
    texts = pyarrow.array(TEXTS)
    with pyarrow.ipc.new_file(str(path), pyarrow.schema({"text": texts.type})) as writer:
        writer.write_batch(pyarrow.record_batch({"text": texts}))
    content = path.read_bytes()
    offsets = texts.buffers()[1].to_pybytes()[: 4 * (len(TEXTS) + 1)]
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f" + offsets[12:]))
    (bad,) = documents(path)
    assert bad.records == len(TEXTS)


def test_damaged_row_group_loses_its_rows_only(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table(), path, row_group_size=10, compression="snappy", use_dictionary=False)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
    content = bytearray(path.read_bytes())
    begin = column.data_page_offset
    content[begin : begin + 40] = b"\xff" * 40
    path.write_bytes(content)
    found = documents(path)
    (bad,) = (text for text in found if isinstance(text, Bad))
    assert [text for text in found if isinstance(text, str)] == TEXTS[:10] + TEXTS[20:]
    assert (bad.where, bad.number, bad.records) == ("row group 2, row", 1, 10)


def test_bad_rows_are_named(tmp_path):
    texts = pyarrow.array([b"fine", None, b"\xff", b"fine"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    first, missing, broken, last = documents(tmp_path / "a.parquet")
    assert first == last == "fine"
    assert str(missing).endswith("row group 1, row 2: field 'text' is not text but None")
    assert "row group 1, row 3: not UTF-8" in str(broken)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_wrong_columns_are_refused(tmp_path, name):
    WRITERS[name](tmp_path / name)
    with pytest.raises(ValueError, match="has no column 'content'; --field names one, of id, text"):
        documents(tmp_path / name, field="content")
    with pytest.raises(ValueError, match="is not text but int64"):
        documents(tmp_path / name, field="id")


def test_missing_library_is_named(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs pyarrow to be read; run: pip install 'qwen2-jax\[data\]'"):
        documents(tmp_path / "a.parquet")
