"""Which files a source names."""

import json
import os
from pathlib import Path

import pytest

from train.data.files import find_files


@pytest.fixture
def folder(tmp_path):
    for name in (
        "b/2.jsonl",
        "b/10.jsonl.gz",
        "a.TXT",
        "c.parquet",
        "notes.pdf",
        ".hidden.jsonl",
        ".git/x.txt",
        "z.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def names(files, folder):
    return [str(Path(file.path).relative_to(folder)) for file in files]


def test_folder_is_walked_in_order(folder):
    left_out = []
    files = find_files([str(folder)], left_out=left_out.append)
    assert [path.name for path in left_out] == ["notes.pdf", "z.py"]
    assert names(files, folder) == ["a.TXT", "c.parquet", "b/10.jsonl.gz", "b/2.jsonl"]
    assert [file.kind for file in files] == ["text", "parquet", "jsonl", "jsonl"]
    assert [file.compression for file in files] == ["", "", "gzip", ""]


def test_globs_and_files_may_be_of_any_kind(folder):
    files = find_files([str(folder / "**/*.jsonl"), str(folder / "z.py")])
    assert names(files, folder) == ["b/2.jsonl", "z.py"]
    assert [file.kind for file in files] == ["jsonl", "text"]


def test_kind_overrules_names(folder):
    files = find_files([str(folder)], "text")
    assert names(files, folder) == ["a.TXT", "c.parquet", "notes.pdf", "z.py", "b/10.jsonl.gz", "b/2.jsonl"]
    assert {file.kind for file in files} == {"text"}


def test_saved_data_set_keeps_its_order(tmp_path):
    for name in ("data-1.arrow", "data-0.arrow", "cache.arrow"):
        (tmp_path / name).touch()
    order = [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": order}))
    assert names(find_files([str(tmp_path)]), tmp_path) == ["data-1.arrow", "data-0.arrow"]


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    for source in (tmp_path / "pipe.jsonl", tmp_path / "p*.jsonl", "/dev/zero"):
        with pytest.raises(ValueError, match="is no regular file"):
            find_files([str(source)])
    with pytest.raises(ValueError, match="gone.jsonl cannot be read"):
        find_files([str(tmp_path / "g*.jsonl")])
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match="no file is called"):
        find_files([str(tmp_path / "*.txt")])


def test_what_cannot_be_a_source(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    cases = {
        (str(folder / "missing"),): "does not exist",
        (str(folder / "*.csv"),): "no file is called",
        (str(empty),): "holds no files",
        (str(folder), str(folder / "a.TXT")): "is named twice",
        (): "there are no sources",
        ("",): "is empty",
    }
    for sources, message in cases.items():
        with pytest.raises(ValueError, match=message):
            find_files(sources)
    (empty / "x.bin").touch()
    with pytest.raises(ValueError, match="only 1 file of unknown kinds"):
        find_files([str(empty)])
    for name in ("x.json", "x.JSON.gz"):
        (empty / name).touch()
        with pytest.raises(ValueError, match="would be read as plain text, braces and keys included"):
            find_files([str(empty / "x.*")])
        assert find_files([str(empty / name)], "text")[0].kind == "text"
        (empty / name).unlink()
    (empty / "x.json.bak").touch()
    assert find_files([str(empty / "*.bak")])[0].kind == "text"
    (empty / "dataset_dict.json").touch()
    (empty / "train").mkdir()
    with pytest.raises(ValueError, match=r"several splits \(train\)"):
        find_files([str(empty)])
    with pytest.raises(ValueError, match="no kind of file"):
        find_files([str(folder)], "csv")
