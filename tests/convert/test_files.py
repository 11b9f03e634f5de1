"""A file that is written in one piece is the new one or the old one, and nothing is left beside it."""

import errno
import os

import pytest

from convert.files import write_whole


def refuse(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("through", [None, "beside"])
@pytest.mark.parametrize("call", ["os.pwrite", "os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file(call, through, tmp_path, monkeypatch):
    (tmp_path / "beside").mkdir()
    through = through and tmp_path / through
    for content in (b"older, and longer", b"old"):
        write_whole(tmp_path / "file", content, through)
    monkeypatch.setattr(call, refuse)
    with pytest.raises(OSError, match="No space left on device"):
        write_whole(tmp_path / "file", b"new", through)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["beside", "file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_what_a_crash_left_is_written_over(tmp_path):
    (tmp_path / f"file.{os.getpid()}").write_bytes(b"torn by a process of the same number")
    write_whole(tmp_path / "file", b"whole")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"whole"}
