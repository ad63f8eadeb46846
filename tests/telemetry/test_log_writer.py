"""The thread that writes lines, on real pipes."""

import json
import os

from headgate.telemetry.log_writer import LINES_MAX, LogWriter


def test_every_line_is_written_once_in_order_and_counted(line) -> None:
    reading, writing = os.pipe()
    seen: list[str] = []
    writer = LogWriter(writing, lambda each: seen.append(each.call_id))
    writer.start()
    calls = [f"call_{number}" for number in range(100)]
    for call_id in calls:
        writer.put(line(call_id=call_id))
    writer.close()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert [json.loads(written)["call_id"] for written in pipe] == calls
    assert seen == calls
    assert writer.dropped == 0


def test_a_log_that_nobody_reads_drops_lines_and_still_counts_calls(line) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    seen: list[str] = []
    writer = LogWriter(writing, lambda each: seen.append(each.call_id))
    writer.start()
    writer.put(line(call_id="call_1"))
    writer.close()
    os.close(writing)
    assert (seen, writer.dropped) == (["call_1"], 1)


def test_without_a_log_calls_are_counted_and_nothing_is_dropped(line) -> None:
    seen: list[str] = []
    writer = LogWriter(None, lambda each: seen.append(each.call_id))
    writer.start()
    writer.put(line(call_id="call_1"))
    writer.close()
    assert (seen, writer.dropped) == (["call_1"], 0)


def test_what_waits_is_bounded(line) -> None:
    writer = LogWriter(None, lambda _: None)  # not started: nothing is taken away
    one = line()
    for _ in range(LINES_MAX + 2):
        writer.put(one)
    assert writer.dropped == 2
