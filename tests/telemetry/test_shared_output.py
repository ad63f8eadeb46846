"""Lines of several processes on one pipe: each is one write, however long what it tells of is."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.telemetry.log_line import LogLine, encode
from headgate.telemetry.log_writer import LogWriter
from headgate.telemetry.shared_output import WRITE_BYTES_MAX, encode_whole, render_whole, writes

LONG = "\x01" * 5_000
"""Six bytes of JSON a character."""


def everywhere(text: str) -> LogLine:
    """A line that holds this in every text it has."""
    texts = {name: text for name, kind in LogLine.__annotations__.items() if kind == "str"}
    return LogLine(**texts, reasons=(text,) * 50)


def test_a_line_that_fits_is_what_it_always_was(line) -> None:
    one = line(call_id="call_1", conversation="cuộc trò chuyện")
    assert encode_whole(one) == encode(one)


@pytest.mark.parametrize("text", ["a" * 300, "ắ" * 3_000, LONG])
def test_a_line_that_does_not_fit_is_cut_and_still_a_line(text: str) -> None:
    data = encode_whole(everywhere(text))
    assert len(data) <= WRITE_BYTES_MAX
    assert data.endswith(b"\n")
    assert text.startswith(json.loads(data)["user_id"])


@given(st.lists(st.integers(1, WRITE_BYTES_MAX)))
def test_pieces_are_whole_lines_in_order_within_one_write(sizes: list[int]) -> None:
    lines = [bytes([97 + number % 26]) * (size - 1) + b"\n" for number, size in enumerate(sizes)]
    pieces = list(writes(lines))
    assert b"".join(pieces) == b"".join(lines)
    assert all(piece.endswith(b"\n") and len(piece) <= WRITE_BYTES_MAX for piece in pieces)


def test_an_event_that_fits_is_not_touched() -> None:
    assert json.loads(render_whole(None, "info", {"event": "listening", "worker": 1})) == {
        "event": "listening",
        "worker": 1,
    }


@pytest.mark.parametrize("text", ["x" * 20_000, "ắ" * 20_000, LONG])
def test_a_long_traceback_keeps_its_beginning_its_end_and_the_numbers_beside_it(text: str) -> None:
    rendered = render_whole(None, "error", {"exception": f"Traceback{text}KeyError: 7", "worker": 1, "calls": 3})
    assert len(rendered) < WRITE_BYTES_MAX
    event = json.loads(rendered)
    assert event["exception"].startswith("Traceback")
    assert event["exception"].endswith("KeyError: 7")
    assert (event["worker"], event["calls"]) == (1, 3)


PROCESS = """
import sys
from headgate.telemetry.log_line import LogLine
from headgate.telemetry.log_writer import LogWriter
texts = {name: "" for name, kind in LogLine.__annotations__.items() if kind == "str"}
writer = LogWriter(1, lambda _: None, is_shared=True)
sys.stdin.read()  # until all are here
for number in range(3000):
    writer.put(LogLine(**{**texts, "call_id": f"{sys.argv[1]}-{number}", "user_id": "u" * (number % 600)}))
writer.start(); writer.close()
"""


def test_processes_that_write_to_one_pipe_at_the_same_time_tear_no_line() -> None:
    reading, writing = os.pipe()
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, name], stdin=subprocess.PIPE, stdout=writing)
        for name in ("a", "b", "c")
    ]
    os.close(writing)
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    with os.fdopen(reading, "rb") as pipe:
        written = Counter(json.loads(each)["call_id"] for each in pipe)
    assert [process.wait(30) for process in processes] == [0, 0, 0]
    assert written == Counter(f"{name}-{number}" for name in ("a", "b", "c") for number in range(3000))


def test_a_writer_that_is_alone_does_not_cut(line) -> None:
    reading, writing = os.pipe()
    writer = LogWriter(writing, lambda _: None)
    writer.start()
    writer.put(line(conversation="c" * 10_000))
    writer.close()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert json.loads(pipe.read())["conversation"] == "c" * 10_000
