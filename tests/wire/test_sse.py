"""Laws of the SSE reader: the same frames for any chunking, no byte lost, no memory beyond its limits."""

import time
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headgate.wire import sse
from headgate.wire.sse import BLOCK_BYTES_MAX, EVENT_BYTES_MAX, EventTooLarge, SseReader

EVENT = b'event: ping\ndata: {"type": "ping"}\n\n'
LINES = st.sampled_from(
    [
        b"event: content_block_delta",
        b"event:ping",
        b'data: {"type":"ping"}',
        b"data:x",
        b"data:  two spaces",
        b"data",
        b"event",
        b"data:",
        b": a comment",
        b":",
        b"id: 7",
        b"retry: 100",
        b"data: a: b",
        b" data: indented",
        "data: chào 漢字".encode(),
        b"data: \xff\x00",
        b"",
    ]
)
ENDS = st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"])
STREAMS = st.one_of(
    st.lists(st.tuples(LINES, ENDS).map(b"".join), max_size=14).map(b"".join),
    st.lists(LINES, max_size=14).map(b"\n".join),
    st.lists(st.sampled_from([b"\n", b"\r", b"a", b":", b" "]), max_size=14).map(b"".join),
)


def fed(chunks) -> tuple[list[bytes], SseReader]:
    reader = SseReader()
    return [frame for chunk in chunks for frame in reader.feed(chunk)], reader


def each_byte(stream: bytes) -> list[bytes]:
    return [stream[at : at + 1] for at in range(len(stream))]


@st.composite
def chunkings(draw, streams=STREAMS):
    """A stream and some way of cutting it up, empty chunks included."""
    stream = draw(streams)
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    return stream, [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


def lines_of(text: bytes) -> list[bytes]:
    """The lines of a stream, without the unfinished last one: a reading of the standard that looks at every byte."""
    lines, line, at = [], b"", 0
    while at < len(text):
        if text[at : at + 2] == b"\r\n":
            lines.append(line)
            line, at = b"", at + 2
        elif text[at : at + 1] in (b"\r", b"\n"):
            lines.append(line)
            line, at = b"", at + 1
        else:
            line, at = line + text[at : at + 1], at + 1
    return lines


def dispatched(text: bytes) -> list[tuple[bytes, bytes]]:
    """The `(event, data)` that a browser would dispatch, by the rules of the WHATWG standard, §9.2.6."""
    events, event, data = [], b"", b""
    for line in lines_of(text):
        if line == b"":
            if data:
                events.append((event, data[:-1]))
            event, data = b"", b""
            continue
        if line.startswith(b":"):
            continue
        field, value = line, b""
        if b":" in line:
            field, value = line[: line.index(b":")], line[line.index(b":") + 1 :]
            if value[:1] == b" ":
                value = value[1:]
        if field == b"event":
            event = value
        elif field == b"data":
            data += value + b"\n"
    return events


@given(chunkings())
@example((b"a\n\n\nb\n\n\r", [b"a\n\n\nb\n\n", b"\r"]))
@example((b"\n\n\n\n", [b"\n\n\n\n"]))
@example((b"a\r\n\r\n", [b"a\r", b"\n\r", b"\n"]))
def test_any_chunking_gives_the_same_frames(cut):
    stream, chunks = cut
    whole, _ = fed([stream])
    assert fed(chunks)[0] == whole
    assert fed(each_byte(stream))[0] == whole


@given(chunkings(st.one_of(STREAMS, st.binary(max_size=30))))
def test_no_byte_is_lost_or_made_up(cut):
    stream, chunks = cut
    frames, reader = fed(chunks)
    given_back = b"".join(frames)
    assert stream.startswith(given_back)
    assert reader.pending == len(stream) - len(given_back)


@given(STREAMS)
def test_what_is_read_is_what_a_browser_would_dispatch(stream):
    closed = stream + b"\n\n"
    frames, _ = fed(each_byte(closed + b":end\n"))
    events = [sse.parse(frame) for frame in frames]
    with_data = [
        (event, data) for (event, data), frame in zip(events, frames, strict=True) if data or dispatched(frame)
    ]
    assert with_data == dispatched(closed)


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_each_line_end_cuts_alike(end):
    stream = (EVENT + b"data: x\n\n").replace(b"\n", end)
    frames, reader = fed([stream + b"d"])
    assert frames == [EVENT.replace(b"\n", end), b"data: x\n\n".replace(b"\n", end)]
    assert reader.pending == 1


def test_a_frame_is_given_as_soon_as_its_last_line_feed_has_come():
    reader = SseReader()
    assert reader.feed(EVENT[:-1]) == []
    assert reader.feed(b"\n") == [EVENT]
    assert reader.pending == 0


@given(STREAMS, st.sampled_from([b"\n", b"\r\n", b"\r"]))
@example(b"", b"\r")
def test_the_end_of_a_stream_gives_out_a_frame_that_only_a_carriage_return_closed(stream, end):
    stream += b"data: x" + end * 2
    frames, reader = fed(each_byte(stream))
    last = reader.close()
    assert b"".join([*frames, *last]) == stream
    assert (len(last) == 1) <= stream.endswith(b"\r")
    assert reader.pending == 0


@given(st.binary(max_size=20).filter(lambda tail: not tail.endswith((b"\r", b"\n"))))
def test_the_end_of_a_stream_makes_no_frame_of_what_is_cut(tail):
    assert fed([b"data: x\n\n" + tail + b"y"])[1].close() == []


@pytest.mark.parametrize(
    ("frame", "event", "data"),
    [
        (EVENT, b"ping", b'{"type": "ping"}'),
        (b"data: a\ndata: b\n\n", b"", b"a\nb"),
        (b"data\ndata\n\n", b"", b"\n"),
        (b"event: a\nevent: b\n\n", b"b", b""),
        (b": only a comment\n\n", b"", b""),
        (b"data:x\r\ndata: y\r\r\n", b"", b"x\ny"),
        (b"data:  x\n\n", b"", b" x"),
        (b"", b"", b""),
    ],
)
def test_event_and_data_are_read_by_the_standard(frame, event, data):
    assert sse.parse(frame) == (event, data)


@given(st.binary(max_size=60))
def test_reading_a_frame_never_raises(frame):
    event, data = sse.parse(frame)
    assert isinstance(event, bytes)
    assert isinstance(data, bytes)


@given(st.sampled_from([b"ping", b"message_start"]), st.text().map(lambda text: repr(text).encode()))
def test_a_frame_that_was_written_is_read_back(event, data):
    written = sse.frame(event, data)
    assert fed([written])[0] == [written]
    assert sse.parse(written) == (event, data)


def test_the_ping_is_a_frame_of_its_own():
    assert fed([sse.PING])[0] == [EVENT]


@pytest.mark.parametrize("newline", [b"", b"\r\n"])
@pytest.mark.parametrize(
    ("start", "limit"),
    [
        (b"data: ", EVENT_BYTES_MAX),
        (b"event: content_block_delta\ndata: ", EVENT_BYTES_MAX),
        (b"event: content_block_start\ndata: ", BLOCK_BYTES_MAX),
    ],
)
def test_an_event_beyond_its_limit_is_refused_and_never_held(start, limit, newline):
    reader = SseReader()
    piece = b"x" * (256 << 10)
    if newline:
        assert reader.feed(b":" + newline * 2) == [b":" + newline * 2]
    reader.feed(start)

    def flood() -> None:
        for _ in range(limit // len(piece) + 1):
            assert reader.pending <= limit
            reader.feed(piece)

    with pytest.raises(EventTooLarge):
        flood()
    assert reader.pending <= limit + len(piece)


@pytest.mark.parametrize(
    ("start", "size"), [(b"data: ", EVENT_BYTES_MAX), (b"event: content_block_start\ndata: ", 4 << 20)]
)
def test_an_event_within_its_limit_passes_whole(start, size):
    stream = start + b"x" * (size - len(start) - 2) + b"\n\n"
    chunks = [stream[at : at + 65_536] for at in range(0, len(stream), 65_536)]
    assert fed(chunks)[0] == [stream]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_time_and_memory_grow_with_the_stream_and_not_with_its_square(end):
    def cost_of(count: int) -> tuple[float, int]:
        chunk = b"data: " + b"x" * 100 + end * 2
        reader = SseReader()
        tracemalloc.start()
        began = time.process_time()
        taken = sum(len(reader.feed(chunk)) for _ in range(count))
        spent_s, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert taken >= count - 1
        return spent_s, peak

    cost_of(100)
    few_s, few_bytes = cost_of(1_000)
    many_s, many_bytes = cost_of(8_000)
    assert many_s < 8 * few_s * 3 + 0.05
    assert many_bytes < few_bytes + 10_000


@pytest.mark.parametrize("opening", [b"data: ", b": carriage\r\ndata: "])
def test_a_long_line_in_small_pieces_is_looked_at_once(opening):
    """A megabyte in pieces of 64 bytes; looked at from its start each time, this takes minutes."""
    reader = SseReader()
    reader.feed(opening)
    piece = b"x" * 64
    began = time.process_time()
    for _ in range((EVENT_BYTES_MAX - 100) // len(piece)):
        reader.feed(piece)
    assert len(reader.feed(b"\n\n:\n")) == 1
    assert time.process_time() - began < 2.0
