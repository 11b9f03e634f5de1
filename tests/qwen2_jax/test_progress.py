"""Bars on a terminal and lines elsewhere say how far long work is, and leave the terminal as it was."""

import pytest

from qwen2_jax.progress import byte_progress, count_progress

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def terminal(monkeypatch, capsys):
    """A function that makes standard error a terminal; capsys has another one in place while it is set up."""

    def become() -> None:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)

    return become


def test_a_bar_of_bytes(terminal, capsys):
    terminal()
    with byte_progress("tokenizing a{x}[red]/\x1b[1m") as update:  # a path may have any characters
        update(5, 10)
        update(10, 10)
    out, error = capsys.readouterr()
    assert (out, "tokenizing a{x}[red]/\\x1b[1m " in error, "10/10 bytes" in error) == ("", True, True)


def test_a_bar_of_counts(terminal, capsys):
    terminal()
    with count_progress("prompts", 2, 10) as update:
        update(3, "dca, 64 [tokens]")
        update(5, "yarn, 64 tokens")
    out, error = capsys.readouterr()
    assert (out, "prompts: " in error, "10/10" in error, "yarn, 64 tokens" in error) == ("", True, True, True)


@pytest.mark.parametrize("progress", [lambda: byte_progress("converting"), lambda: count_progress("prompts", 0, 1)])
def test_a_process_that_ends_on_the_spot_leaves_the_cursor(progress, terminal, capsys):
    terminal()
    with progress():
        before = capsys.readouterr().err
    assert HIDE in before, "rich hides it no longer: then nothing needs to be done about it"
    assert before.rindex(SHOW) > before.rindex(HIDE) and HIDE not in capsys.readouterr().err


def test_lines(monkeypatch, capsys):
    monkeypatch.setattr("qwen2_jax.progress._SECONDS_BETWEEN_LINES", 0.0)
    with byte_progress("comparing") as update:
        update(10**9, 2 * 10**9)
    assert capsys.readouterr().err.startswith("comparing: 1.00 of 2.00 GB, ")
    with count_progress("windows", 1, 3) as update:
        update(1, "plain")
    assert capsys.readouterr() == ("", "windows: 2 of 3 (plain)\n")


def test_quiet(terminal, capsys):
    terminal()
    with byte_progress("converting", quiet=True) as update:
        update(10, 10)
    with count_progress("windows", 0, 3, quiet=True) as update:
        update(1, "plain")
    with count_progress("windows", 3, 3) as update:
        pass  # nothing is left to do
    assert capsys.readouterr() == ("", "")
