"""Lines of intervals and events keep their form, which scripts rely on; the display on a terminal shows the same."""

import fcntl
import io
import math
import os
import pty
import re
import struct
import termios
import threading

import pytest

from train.report.console import Lines, console, duration, event_line, interval_line

RECORD = {
    "step": 120,
    "loss": 3.21449,
    "cross_entropy": 3.2,
    "validation_loss": 3.5,
    "gradient_norm": 0.81249,
    "learning_rate": 2.95e-4,
    "tokens_per_second": 12345.4,
    "mfu": 0.4124,
    "mfu_6n": 0.3561,
    "data_wait_share": 0.0031,
    "device_memory": 3 * 2**29,
    "skipped": 2,
    "eta": 7384.2,
}
NUMBER = r"(-|nan|-?inf|[-+.\de]+)"
LINE = re.compile(
    rf"step \d+/\d+ loss {NUMBER} val_loss {NUMBER} grad_norm {NUMBER} lr {NUMBER} tokens_per_s {NUMBER} "
    rf"mfu {NUMBER}%? mfu_6n {NUMBER}%? data_wait {NUMBER}%? memory {NUMBER}(GiB)? skipped {NUMBER} "
    r"eta (-|\d+:\d\d:\d\d)"
)


def test_line_of_an_interval():
    assert interval_line(RECORD, 1000) == (
        "step 120/1000 loss 3.2145 val_loss 3.5000 grad_norm 0.8125 lr 2.95e-04 tokens_per_s 12345 mfu 41.2% "
        "mfu_6n 35.6% data_wait 0.3% memory 1.50GiB skipped 2 eta 2:03:04"
    )


@pytest.mark.parametrize("value", [0, 1, 1e-9, -3.5, 1e30, math.nan, math.inf, -math.inf, None], ids=str)
def test_every_line_has_the_same_fields(value):
    record = {name: value for name in RECORD} | {"step": 7}
    line = interval_line(record, 1000)
    assert LINE.fullmatch(line), line
    assert len(line.split(" ")[3]) <= len("-1.2345e+30"), "a loss that explodes fills the screen"
    assert len(line.split(" ")) == 24
    assert LINE.fullmatch(interval_line({"step": 7}, 1000))


def test_duration():
    known = {0: "0:00:00", 59.6: "0:01:00", 3599.4: "0:59:59", 90061: "25:01:01", -5: "0:00:00"}
    assert {seconds: duration(seconds) for seconds in known} == known
    assert {duration(seconds) for seconds in (None, math.nan, math.inf)} == {"-"}


def test_line_of_an_event():
    fields = {"step": 100, "seconds": 1.23456, "reason": 'not "finite"', "path": "a/b", "none": "", "odd": "\x1b[2J\n"}
    assert event_line("checkpoint", fields) == (
        'event checkpoint step 100 seconds 1.235 reason "not \\"finite\\"" path a/b none "" odd \\x1b[2J\\n'
    )


def test_lines_elsewhere_than_on_a_terminal():
    stream = io.StringIO()
    output = console(stream, 1000, 0)
    assert isinstance(output, Lines)
    output.start({"model": "tiny\x1b[2J", "mesh": "data=2"})
    output.tick(1)
    output.step(RECORD)
    output.event("rollback", {"step": 120, "to": 100})
    output.close()
    facts = ["model: tiny\\x1b[2J", "mesh: data=2"]
    assert stream.getvalue().splitlines() == [*facts, interval_line(RECORD, 1000), "event rollback step 120 to 100"]


def test_live_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    seen = bytearray()

    def read():
        with os.fdopen(ours, "rb", buffering=0) as file:
            while not seen.endswith(b"the end\r\n"):
                seen.extend(file.read(4096))

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        output = console(terminal, 1000, 100)
        output.start({"model": "tiny", "mesh": "[bold]data=2"})
        output.tick(101)
        output.step({**RECORD, "mfu": None})
        output.event("checkpoint", {"step": 120, "seconds": 1.5})
        output.close()
        print("the end", file=terminal, flush=True)
        reader.join(timeout=60)
    text = seen.decode()
    assert text.count("\x1b[?25l") <= text.count("\x1b[?25h")  # the cursor is back
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text).replace("\r", "")
    known = interval_line({**RECORD, "mfu": None}, 1000, whole=False)
    assert " mfu " not in known
    lines = plain.splitlines()
    assert known in plain and "event checkpoint step 120 seconds 1.5" in plain and "[bold]data=2" in plain
    assert any(re.match(r"step 120/1000 +━.* 12.0% +elapsed 0:00:0", line) for line in lines), lines
    assert any(re.match(r"loss 3.2145 +val_loss 3.5000  grad_norm 0.8125  lr", line) for line in lines), lines
    assert lines[-1].endswith("the end")
