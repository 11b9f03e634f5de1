"""What is finished survives a kill, and only for the same settings."""

import pytest

from qwen2_jax.evaluation.journal import Journal

SETTINGS = {"task": "needle", "lengths": (64, 128), "model": None}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


def records(path, settings=SETTINGS, **options):
    with Journal(path, settings, **options) as journal:
        return journal.records


def test_records_come_back(path):
    with Journal(path, SETTINGS) as journal:
        journal.append({"a": 1}, {"a": 2.5})
        journal.append({"text": "two\nlines"})
        assert journal.records == [{"a": 1}, {"a": 2.5}, {"text": "two\nlines"}]
    assert records(path) == [{"a": 1}, {"a": 2.5}, {"text": "two\nlines"}]
    assert records(path, overwrite=True) == records(path) == []


def test_every_byte_at_which_a_kill_can_come(path):
    with Journal(path, SETTINGS) as journal:
        journal.append({"a": 1})
        journal.append({"a": 2})
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        found = records(path)
        assert len(found) == max(whole[:cut].count(b"\n") - 1, 0)
        with Journal(path, SETTINGS) as journal:
            journal.append({"a": 3})
        assert records(path) == [*found, {"a": 3}]


def test_other_settings_are_refused_by_name(path):
    with Journal(path, SETTINGS) as journal:
        journal.append({"a": 1})
    with pytest.raises(ValueError, match=r"other settings \(lengths: \[64, 128\], now \[64\]\).*--overwrite"):
        records(path, {**SETTINGS, "lengths": (64,)})
    with pytest.raises(ValueError, match="chat: null, now true"):
        records(path, {**SETTINGS, "chat": True})
    assert records(path) == [{"a": 1}]


def test_damage_and_two_runs_at_once(path, tmp_path):
    with Journal(path, SETTINGS), pytest.raises(ValueError, match="another run is writing"):
        Journal(path, SETTINGS)
    path.write_text('{"settings": {}}\nnot json\n{"a": 1}\n')
    with pytest.raises(ValueError, match="damaged in line 2"):
        records(path, {})
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="it names none"):
        records(path, {})
    with pytest.raises(OSError):
        Journal(tmp_path / "nowhere" / "run.jsonl", {})
