"""However Anthropic's answer ends, the client is told the truth, and the ledger has it once.

Between the gateway and its upstream everything breaks here, at every byte: design §5.2, §5.3 and §5.5, failure-model
§2.0 and §2.1.
"""

from __future__ import annotations

import gzip
import json
import socket
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import anthropic
import pytest
from tests.system.conftest import Gateway, Stack, until
from tests.system.scripted import (
    EVENT_STREAM_HEAD,
    FIRST_DELTA_ENDS_AT,
    FRAMES,
    INPUT_TOKENS,
    JSON_HEAD,
    RECORDED,
    RECORDED_FRAMES,
    SHORT_STREAM,
    STREAMED,
    WHOLE,
    WHOLE_MESSAGE,
    Act,
    Books,
    Play,
    Reply,
    ScriptedUpstream,
    app_key,
    body_of,
    chunked,
    chunked_head,
    chunks,
    connect,
    failing,
    fetch,
    fetch_all,
    head_of,
    read_head,
    run,
    sized,
    until_close,
)

BASE_DELAY_S = 0.04
STALL_S = 1.0
FIRST_BYTE_S = 1.2
DEADLINE_S = 4.5
HOLD_S = 0.3
PING_AFTER_S = 0.2
LATE_S = 0.7
"""How much later than meant something may happen on a busy machine; never earlier."""
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
STOP = FRAMES[-1]
COMMIT_EVENTS = 3
"""message_start, content_block_start and the first delta: the answer has begun for the client."""


@dataclass
class World:
    """A scripted upstream and a gateway in front of it."""

    upstream: ScriptedUpstream
    gateway: Gateway
    key: str
    books: Books

    def ask(self, name: str, *, stream: bool = True, **more: Any) -> Reply:
        """One call, to its end."""
        return run(fetch(self.gateway.url, self.key, body_of(name, stream=stream, **more)))

    def ask_all(self, names: list[str], *, stream: bool = True, at_once: int = 32) -> list[Reply]:
        """Calls, many at a time."""
        bodies = [body_of(name, stream=stream) for name in names]
        return run(fetch_all(self.gateway.url, self.key, bodies, at_once=at_once))

    def fill_retry_budget(self, retries: int = 10) -> None:
        """Retries are at most a fifth of the requests: make the requests that a test's retries need.

        The first also ends a pause that a spend cap before it began.
        """
        until(lambda: self.ask("no play").status == 200, what="an answer")
        for reply in self.ask_all(["no play"] * 5 * retries):
            assert reply.status == 200

    def play(self, *plays: Play, stream: bool = True) -> tuple[str, Reply]:
        """Ask for these plays."""
        name = self.upstream.plan(*plays)
        return name, self.ask(name, stream=stream)

    def row(self, name: str) -> dict[str, Any]:
        """The ledger's one row for a name; it has as many attempts as the upstream saw."""
        row = self.books.of_users([name])[name]
        assert len(row["attempts"]) == len(self.upstream.attempts(name))
        return row


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    scripted = ScriptedUpstream()
    yield scripted
    scripted.close()


def _world(shared_stack: Stack, upstream: ScriptedUpstream, **settings: str) -> World:
    gateway = shared_stack.gateway(
        upstream.url,
        RETRY__BASE_DELAY_S=str(BASE_DELAY_S),
        UPSTREAM__STALL_TIMEOUT_S=str(STALL_S),
        UPSTREAM__FIRST_BYTE_TIMEOUT_S=str(FIRST_BYTE_S),
        QUEUE__DEADLINE_S=str(DEADLINE_S),
        UPSTREAM__HOLD_S=str(HOLD_S),
        **settings,
    )
    key = app_key(gateway)
    return World(upstream, gateway, key, Books(gateway, key))


@pytest.fixture(scope="module")
def world(shared_stack: Stack, upstream: ScriptedUpstream) -> World:
    """Silences have no pings."""
    return _world(shared_stack, upstream)


@pytest.fixture(scope="module")
def quiet(shared_stack: Stack, upstream: ScriptedUpstream) -> World:
    """Pings come soon."""
    return _world(shared_stack, upstream, SERVER__PING_AFTER_S=str(PING_AFTER_S))


def without_pings(frames: list[bytes]) -> list[bytes]:
    return [frame for frame in frames if not frame.startswith(b"event: ping\n")]


def assert_honest(reply: Reply) -> None:
    """The law: whole HTTP; complete frames; the recorded ones, as far as they go; and then the end or an error."""
    assert reply.whole
    if reply.status != 200:
        assert reply.error["type"]
        assert reply.headers["x-should-retry"] == "false"
        assert int(reply.headers.get("retry-after", "0")) <= 60
        return
    assert reply.body.endswith(b"\n\n")
    *events, last = without_pings(reply.frames)
    assert events == FRAMES[: len(events)]
    if last == STOP:
        assert len(events) == len(FRAMES) - 1
    else:
        assert last.startswith(b"event: error\n")
        assert reply.error["type"]


def events_before(offset: int) -> list[bytes]:
    """The recorded events that are complete before this byte, pings left out."""
    whole, end = [], 0
    for frame in RECORDED_FRAMES:
        end += len(frame)
        if end > offset:
            break
        whole.append(frame)
    return without_pings(whole)


def in_chunks(offset: int, stream: bytes = SHORT_STREAM) -> bytes:
    """Cut in the middle of one long chunk, or between two."""
    first, rest = stream[:offset], stream[offset:]
    if offset % 2:
        return chunked_head() + chunks(first)
    return chunked_head() + b"%x\r\n%b" % (len(first) + len(rest), first)


def with_length(offset: int, stream: bytes) -> bytes:
    return sized(stream[:offset], length=len(stream))


def to_the_close(offset: int, stream: bytes) -> bytes:
    return until_close(stream[:offset])


@pytest.mark.parametrize(
    ("framed", "act"),
    [(in_chunks, Act.CLOSE), (with_length, Act.CLOSE), (to_the_close, Act.CLOSE), (in_chunks, Act.RESET)],
    ids=["chunked", "content-length", "close-delimited", "chunked and reset"],
)
def test_a_stream_cut_at_any_byte_ends_with_an_error_and_has_one_row(world, framed, act):
    offsets = range(len(RECORDED))
    names = [world.upstream.plan((framed(offset, RECORDED), act)) for offset in offsets]
    replies = world.ask_all(names)
    rows = world.books.of_users(names)
    for offset, name, reply in zip(offsets, names, replies, strict=True):
        assert_honest(reply)
        assert reply.sends(b"message_stop") == 0, offset
        row, attempts = rows[name], world.upstream.attempts(name)
        assert len(row["attempts"]) == len(attempts) <= 2
        assert all(attempt["state"] in ("estimated", "void") for attempt in row["attempts"])
        events = events_before(offset)
        if len(events) >= COMMIT_EVENTS and act is Act.CLOSE:
            assert len(attempts) == 1, "no second attempt after the commit point"
            assert without_pings(reply.frames)[:-1] == events
            assert reply.error["details"]["error_code"] == "upstream_cut"
            assert (row["outcome"], row["state"], row["input_tokens"]) == ("cut", "estimated", INPUT_TOKENS)
            assert row["output_tokens"] > 0
        elif len(events) < COMMIT_EVENTS - 1:
            assert reply.status == 502, "nothing was shown, so the status tells"
            assert row["outcome"] == "failed"
            assert row["cost_nanousd"] > 0, "it may have been billed"


def test_every_byte_of_a_whole_answers_wire_may_be_its_last(world):
    """The head and the chunk framing are cut too, at each byte that is on the wire."""
    wire = chunked_head() + chunks(*FRAMES) + b"0\r\n\r\n"
    stop_ends_at = len(wire) - len(b"\r\n0\r\n\r\n")
    names = [world.upstream.plan((wire[:offset], Act.CLOSE)) for offset in range(len(wire))]
    replies = world.ask_all(names)
    world.books.of_users(names)
    for offset, reply in enumerate(replies):
        assert_honest(reply)
        assert (reply.status == 200 and reply.frames[-1] == STOP) == (offset >= stop_ends_at), offset


def test_before_the_commit_point_a_second_attempt_is_invisible(world):
    """Only pings of the first attempt may be seen; the answer is the second one, whole."""
    offsets = range(0, FIRST_DELTA_ENDS_AT, 5)
    names = []
    for offset in offsets:
        act = Act.RESET if offset % 2 else Act.CLOSE
        names.append(world.upstream.plan((in_chunks(offset), act), STREAMED))
        names += ["no play"] * 6
    world.fill_retry_budget()
    asked = [name for name in names if name != "no play"]
    replies = dict(zip(names, world.ask_all(names, at_once=4), strict=True))
    rows = world.books.of_users(asked)
    for name in asked:
        assert replies[name].status == 200
        assert without_pings(replies[name].frames) == FRAMES
        assert len(world.upstream.attempts(name)) == 2
        assert [attempt["state"] for attempt in rows[name]["attempts"]] == ["estimated", "settled"]
        assert rows[name]["outcome"] == "completed"


def test_a_whole_answer_cut_at_any_byte_is_never_a_200(world):
    names = [
        world.upstream.plan((sized(WHOLE_MESSAGE[:offset], head=JSON_HEAD, length=len(WHOLE_MESSAGE)), Act.CLOSE))
        for offset in range(len(WHOLE_MESSAGE))
    ]
    replies = world.ask_all(names, stream=False)
    rows = world.books.of_users(names)
    for name, reply in zip(names, replies, strict=True):
        assert reply.status == 502
        assert_honest(reply)
        assert len(rows[name]["attempts"]) == len(world.upstream.attempts(name)) <= 2


@pytest.mark.parametrize("frames_shown", range(COMMIT_EVENTS, len(FRAMES)))
def test_the_sdk_raises_on_a_cut_stream(world, frames_shown, sdk):
    cut_at = len(b"".join(FRAMES[:frames_shown])) + frames_shown
    name = world.upstream.plan((in_chunks(cut_at), Act.CLOSE))
    client = sdk(world.gateway.url, world.key)
    with (
        pytest.raises(anthropic.APIStatusError) as raised,
        client.messages.stream(
            model="claude-sonnet-4-6",
            max_tokens=100,
            metadata={"user_id": name},
            messages=[{"role": "user", "content": "Xin chào"}],
        ) as stream,
    ):
        for _ in stream:
            pass
    assert raised.value.body["error"]["details"]["error_code"] == "upstream_cut"


# silence


def test_silence_after_the_commit_point_ends_at_the_stall_limit(world):
    name, reply = world.play((chunked_head() + chunks(SHORT_STREAM[:FIRST_DELTA_ENDS_AT]), Act.HANG))
    assert_honest(reply)
    assert reply.error["details"]["error_code"] == "upstream_stalled"
    assert STALL_S <= reply.elapsed_s <= STALL_S + LATE_S
    (attempt,) = world.upstream.attempts(name)
    until(lambda: attempt.closed_at is not None, what="the connection to be closed")
    row = world.row(name)
    assert (row["outcome"], row["state"], row["input_tokens"]) == ("cut", "estimated", INPUT_TOKENS)


def test_silence_before_any_head_ends_at_the_first_byte_limit_and_is_tried_once_more(world):
    world.fill_retry_budget(2)
    name, reply = world.play((Act.HANG,))
    assert (reply.status, reply.error["type"]) == (504, "timeout_error")
    assert_honest(reply)
    first, second = world.upstream.attempts(name)
    assert FIRST_BYTE_S <= first.closed_at - first.at <= FIRST_BYTE_S + LATE_S
    until(lambda: second.closed_at is not None, what="the second connection to be closed")
    assert [attempt["state"] for attempt in world.row(name)["attempts"]] == ["estimated", "estimated"]


def test_a_head_that_drips_does_not_reset_the_first_byte_limit(world):
    world.fill_retry_budget(2)
    head = chunked(SHORT_STREAM)
    drip = tuple(act for at in range(200) for act in (head[at : at + 1], 0.05))
    name, reply = world.play(drip)
    assert reply.status == 504
    for attempt in world.upstream.attempts(name):
        until(lambda attempt=attempt: attempt.closed_at is not None, what="the connection to be closed")
        assert FIRST_BYTE_S <= attempt.closed_at - attempt.at <= FIRST_BYTE_S + LATE_S


@pytest.mark.parametrize("byte_or_ping", [b":", b'event: ping\ndata: {"type":"ping"}\n\n'], ids=["a byte", "a ping"])
def test_any_byte_of_upstreams_keeps_a_slow_stream_alive(world, byte_or_ping):
    waits = 4
    drip: Play = (0.4, chunks(byte_or_ping)) * waits
    end = b"\n\n" if byte_or_ping == b":" else b""
    name, reply = world.play(
        (
            chunked_head() + chunks(SHORT_STREAM[:FIRST_DELTA_ENDS_AT]),
            *drip,
            chunks(end, SHORT_STREAM[FIRST_DELTA_ENDS_AT:]) + b"0\r\n\r\n",
            Act.KEEP,
        )
    )
    assert reply.elapsed_s > waits * 0.4 > STALL_S
    assert reply.body == (
        SHORT_STREAM[:FIRST_DELTA_ENDS_AT] + byte_or_ping * waits + end + SHORT_STREAM[FIRST_DELTA_ENDS_AT:]
    )
    assert world.row(name)["outcome"] == "completed"


def test_a_silence_is_filled_with_pings_until_the_answer_goes_on(quiet):
    silence_s = 0.9
    name, reply = quiet.play(
        (
            chunked_head() + chunks(SHORT_STREAM[:FIRST_DELTA_ENDS_AT]),
            silence_s,
            chunks(SHORT_STREAM[FIRST_DELTA_ENDS_AT:]) + b"0\r\n\r\n",
            Act.KEEP,
        )
    )
    assert 2 <= reply.frames.count(PING) <= silence_s / PING_AFTER_S
    assert b"".join(frame for frame in reply.frames if frame != PING) == SHORT_STREAM
    assert quiet.row(name)["outcome"] == "completed"


def test_our_pings_do_not_hide_a_stall(quiet):
    _, reply = quiet.play((chunked_head() + chunks(SHORT_STREAM[:FIRST_DELTA_ENDS_AT]), Act.HANG))
    assert reply.frames.count(PING) >= 2
    assert reply.error["details"]["error_code"] == "upstream_stalled"
    assert STALL_S <= reply.elapsed_s <= STALL_S + LATE_S
    assert_honest(reply)


def test_no_ping_is_sent_while_the_status_is_still_open(quiet):
    """A 200 with a ping before Anthropic answered at all would turn every later error status into an event."""
    _, reply = quiet.play((3 * PING_AFTER_S, *failing(400, "invalid_request_error")))
    assert reply.status == 400


# the commit point


def test_events_are_held_until_the_first_content_or_for_hold_s(world):
    start = chunked_head() + chunks(*FRAMES[:2])
    rest = chunks(SHORT_STREAM[len(b"".join(FRAMES[:2])) :]) + b"0\r\n\r\n"
    _, at_once = world.play((start + rest, Act.KEEP))
    _, held = world.play((start, 0.95, rest, Act.KEEP))
    assert at_once.elapsed_s < HOLD_S
    assert HOLD_S <= held.head_s < 0.9
    assert held.body == at_once.body == SHORT_STREAM


def test_after_hold_s_there_is_no_second_attempt(world):
    name, reply = world.play((chunked_head() + chunks(*FRAMES[:2]), HOLD_S + 0.4, Act.CLOSE), STREAMED)
    assert_honest(reply)
    assert without_pings(reply.frames)[:-1] == FRAMES[:2]
    assert len(world.upstream.attempts(name)) == 1
    assert world.row(name)["outcome"] == "cut"


def test_a_cut_within_hold_s_is_tried_again(world):
    name, reply = world.play((chunked_head() + chunks(*FRAMES[:2]), HOLD_S / 3, Act.CLOSE), STREAMED)
    assert reply.body == SHORT_STREAM
    assert reply.headers["x-headgate-attempts"] == "2"
    assert len(world.upstream.attempts(name)) == 2


# error events


def error_event(error_type: str) -> bytes:
    """With an unknown field and a space more than ours has, so that a rewritten one would show."""
    return (
        b'event: error\ndata: {"type": "error",  "error":{"type":"%b","message":"\xc4\x90\xc3\xa0 N\xe1\xba\xb5ng",'
        b'"hint":[1.0]},"request_id":"req_of_anthropic"}\n\n' % error_type.encode()
    )


@pytest.mark.parametrize(
    ("error_type", "status", "attempts"),
    [
        ("overloaded_error", 529, 3),
        ("api_error", 500, 3),
        ("rate_limit_error", 429, 3),
        ("timeout_error", 504, 2),
        ("invalid_request_error", 400, 1),
        ("billing_error", 402, 1),
        ("a_type_of_tomorrow", 500, 3),
    ],
)
def test_an_error_event_that_comes_first_becomes_the_status_that_it_means(world, error_type, status, attempts):
    world.fill_retry_budget(3)
    event = error_event(error_type)
    name, reply = world.play((chunked(event), Act.KEEP))
    assert reply.status == status
    assert reply.body == event[len(b"event: error\ndata: ") : -2]
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["request-id"] == "req_scripted"
    assert reply.headers["x-should-retry"] == "false"
    assert len(world.upstream.attempts(name)) == attempts
    assert {attempt["state"] for attempt in world.row(name)["attempts"]} == {"void"}


def test_an_error_event_that_comes_first_once_is_not_seen(world):
    world.fill_retry_budget(2)
    name, reply = world.play((chunked(error_event("overloaded_error")), Act.KEEP), STREAMED)
    assert reply.body == SHORT_STREAM
    assert len(world.upstream.attempts(name)) == 2


def test_an_error_event_in_mid_stream_passes_to_the_byte_and_is_the_last(world):
    event = error_event("overloaded_error")
    before = SHORT_STREAM[:FIRST_DELTA_ENDS_AT]
    name, reply = world.play((chunked(before + event + b"".join(FRAMES[4:])), Act.KEEP))
    assert reply.body == before + event
    assert reply.whole
    assert len(world.upstream.attempts(name)) == 1
    row = world.row(name)
    assert (row["outcome"], row["state"], row["error_code"]) == ("cut", "estimated", "overloaded_error")


# what breaks the grammar


@pytest.mark.parametrize("after", [b"".join(FRAMES[3:]), b"event: x\ndata: {}\n\n", b"\xff\xfe garbage", FRAMES[0]])
def test_nothing_passes_after_message_stop(world, after):
    name, reply = world.play((chunked(SHORT_STREAM + after), Act.KEEP))
    assert reply.body == SHORT_STREAM
    assert reply.whole
    assert world.row(name)["state"] == "settled"


def test_message_stop_ends_the_answer_even_when_upstream_does_not(world):
    name, reply = world.play((chunked_head() + chunks(SHORT_STREAM), Act.HANG))
    assert reply.body == SHORT_STREAM
    assert reply.elapsed_s < STALL_S
    assert world.row(name)["state"] == "settled"


def test_a_second_message_start_never_reaches_the_client(world):
    world.fill_retry_budget(2)
    doubled = chunked(FRAMES[0] + SHORT_STREAM)
    _, before = world.play((doubled, Act.KEEP), STREAMED)
    assert before.body == SHORT_STREAM, "before the commit point it is a failed attempt"
    _, after = world.play((chunked(SHORT_STREAM[:FIRST_DELTA_ENDS_AT] + SHORT_STREAM), Act.KEEP))
    assert_honest(after)
    assert after.sends(b"message_start") == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"event: content_block_delta\ndata: {nonsense\n\n",
        b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"\xff\xfe"}}\n\n',
        b'event: content_block_delta\r\ndata: {"a":}\r\n\r\n',
        b"event: message_delta\ndata: []\n\n",
        b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":-5}}\n\n',
        b"event: error\ndata: overloaded\n\n",
        b"event: tomorrow\ndata: {\n\n",
        b"event: tomorrow\ndata: " + b"[" * 100_000 + b"\n\n",
        b"data: no JSON and no event\n\n",
    ],
)
def test_an_event_that_no_client_could_read_ends_the_stream_with_an_error(world, garbage):
    before = SHORT_STREAM[:FIRST_DELTA_ENDS_AT]
    name, reply = world.play((chunked(before + garbage + SHORT_STREAM[FIRST_DELTA_ENDS_AT:]), Act.KEEP))
    assert_honest(reply)
    assert reply.body.startswith(before + b"event: error\n")
    assert world.row(name)["outcome"] == "cut"
    assert world.ask("no play").body == SHORT_STREAM, "the next call is on a fresh connection"


@pytest.mark.parametrize(
    "wire",
    [
        chunked_head() + b"nonsense\r\n",
        chunked_head() + b"-5\r\nabcde\r\n",
        chunked_head() + b"fffffffffffffffff\r\nabc",
        b"\x00\x01\x02 not HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 7\r\n\r\nabcdefg",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n\x81\x00",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
    ],
    ids=["chunk size", "negative chunk", "endless chunk", "no HTTP", "two lengths", "upgrade", "endless header"],
)
@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
def test_an_answer_that_is_no_http_is_an_error_and_the_next_call_is_well(world, wire, streamed):
    name, reply = world.play((wire, Act.CLOSE), stream=streamed)
    assert reply.status == 502
    assert_honest(reply)
    assert world.row(name)["outcome"] == "failed"
    assert world.ask("no play", stream=streamed).status == 200


def test_unknown_events_comments_and_crlf_pass_to_the_byte(world):
    extra = b': a comment\n\nevent: tomorrow\ndata: {"a": [1.0, "\xc3\xa9"],\ndata:  "b":null}\n\nid: 7\n\n'
    for body in (
        SHORT_STREAM[:FIRST_DELTA_ENDS_AT] + extra + SHORT_STREAM[FIRST_DELTA_ENDS_AT:],
        SHORT_STREAM.replace(b"\n", b"\r\n"),
    ):
        _, reply = world.play((chunked(body), Act.KEEP))
        assert reply.body == body


def test_a_stream_with_carriage_returns_alone_passes_to_the_byte(world):
    body = SHORT_STREAM.replace(b"\n", b"\r")
    _, reply = world.play((chunked(body), Act.KEEP))
    assert reply.body == body


def test_an_event_larger_than_a_mebibyte_ends_the_stream_and_takes_no_memory(world):
    before = SHORT_STREAM[:FIRST_DELTA_ENDS_AT]
    giant = chunks(*[b"x" * (1 << 20)] * 64)
    rss_before = rss_kib(world.gateway)
    for start in (b'event: tomorrow\ndata: {"x":"', b""):
        _, reply = world.play((chunked_head() + chunks(before + start), giant, Act.HANG))
        assert_honest(reply)
        assert reply.body.startswith(before + b"event: error\n")
    assert rss_kib(world.gateway) - rss_before <= 10 << 10


def test_an_event_just_below_a_mebibyte_and_a_block_of_many_pass_to_the_byte(world):
    nearly = b'event: tomorrow\ndata: {"x":"' + b"y" * ((1 << 20) - 100) + b'"}\n\n'
    block = FRAMES[1].replace(b'"text":""', b'"text":"' + b"z" * (5 << 20) + b'"')
    body = SHORT_STREAM[:FIRST_DELTA_ENDS_AT] + nearly + block + SHORT_STREAM[FIRST_DELTA_ENDS_AT:]
    _, reply = world.play((chunked(body), Act.KEEP))
    assert reply.body == body


def rss_kib(gateway: Gateway) -> int:
    """Resident memory of a gateway."""
    with open(f"/proc/{gateway.process.popen.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


# compressed, though we asked for identity

GZIP_STREAM = EVENT_STREAM_HEAD + b"content-encoding: gzip\r\n"


def packed_by_frame() -> list[bytes]:
    packer = zlib.compressobj(wbits=31)
    return [packer.compress(frame) + packer.flush(zlib.Z_SYNC_FLUSH) for frame in FRAMES] + [packer.flush()]


@pytest.mark.parametrize("pieces", ["in one", "by frame", "by byte"])
def test_a_compressed_stream_is_read_in_any_pieces(world, pieces):
    world.fill_retry_budget(2)
    packed = packed_by_frame()
    head = chunked_head(head=GZIP_STREAM)
    play: Play
    match pieces:
        case "in one":
            play = (head + chunks(gzip.compress(SHORT_STREAM)) + b"0\r\n\r\n", Act.KEEP)
        case "by frame":
            play = (head, *(act for piece in packed for act in (chunks(piece), 0.005)), b"0\r\n\r\n", Act.KEEP)
        case _:
            data = b"".join(packed)
            play = (head, *(act for byte in data for act in (chunks(bytes([byte])), 0.001)), b"0\r\n\r\n", Act.KEEP)
    name, reply = world.play(play)
    assert reply.body == SHORT_STREAM
    assert "content-encoding" not in reply.headers
    assert len(world.upstream.attempts(name)) == 1


def test_a_compressed_whole_answer_is_read_in_any_pieces(world):
    world.fill_retry_budget(2)
    packed = gzip.compress(WHOLE_MESSAGE)
    wire = sized(packed, head=JSON_HEAD + b"content-encoding: gzip\r\n")
    name, reply = world.play(
        (wire[: -len(packed)], *(act for byte in packed for act in (bytes([byte]), 0.001)), Act.KEEP), stream=False
    )
    assert (reply.status, reply.body) == (200, WHOLE_MESSAGE)
    assert len(world.upstream.attempts(name)) == 1


def test_a_compressed_stream_cut_anywhere_is_honest(world):
    packed = b"".join(packed_by_frame())
    names = [
        world.upstream.plan((chunked_head(head=GZIP_STREAM) + chunks(packed[:offset]), Act.CLOSE))
        for offset in range(1, len(packed), 3)
    ]
    for reply in world.ask_all(names):
        assert_honest(reply)
    world.books.of_users(names)


def test_a_compressed_bomb_ends_at_once_and_takes_no_memory(world):
    bomb = gzip.compress(b"event: x\ndata: " + b"0" * (300 << 20))
    rss_before = rss_kib(world.gateway)
    packed = packed_by_frame()[:4]
    _, reply = world.play((chunked_head(head=GZIP_STREAM) + chunks(bomb) + b"0\r\n\r\n", Act.KEEP))
    assert reply.status == 502
    assert reply.elapsed_s < 2.0
    _, reply = world.play((chunked_head(head=GZIP_STREAM) + chunks(*packed, bomb[10:]) + b"0\r\n\r\n", Act.KEEP))
    assert_honest(reply)
    assert rss_kib(world.gateway) - rss_before <= 20 << 10


# what is no answer to the question


def test_an_answer_of_another_kind_than_asked_is_not_passed_on(world):
    plain = b"content-type: text/plain\r\n"
    for stream, wire in (
        (True, chunked(SHORT_STREAM, head=plain)),
        (True, sized(WHOLE_MESSAGE, head=JSON_HEAD)),
        (True, sized(b"<html>hello</html>", head=b"content-type: text/html\r\n")),
        (True, sized(b"", status=b"204 No Content", head=b"")),
        (False, chunked(SHORT_STREAM)),
        (False, sized(b"<html>hello</html>", head=b"content-type: text/html\r\n")),
        (False, sized(b'{"type":"message"}', head=JSON_HEAD)),
        (False, sized(b"", head=JSON_HEAD)),
    ):
        name, reply = world.play((wire, Act.KEEP), stream=stream)
        assert (reply.status, reply.error["type"]) == (502, "api_error"), wire
        assert_honest(reply)
        assert len(world.upstream.attempts(name)) <= 3
        assert world.row(name)["outcome"] == "failed"


def test_interim_answers_are_skipped(world):
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
    for stream, play, body in ((True, STREAMED, SHORT_STREAM), (False, WHOLE, WHOLE_MESSAGE)):
        name, reply = world.play((interim, 0.05, *play), stream=stream)
        assert reply.body == body
        assert "link" not in reply.headers
        assert len(world.upstream.attempts(name)) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(world, status):
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        location = b"location: http://127.0.0.1:%d/v1/messages\r\n" % elsewhere.getsockname()[1]
        wire = sized(b"", status=b"%d Elsewhere" % status, head=location)
        name, reply = world.play((wire, Act.KEEP))
        assert (reply.status, reply.error["type"]) == (502, "api_error")
        assert "location" not in reply.headers
        assert len(world.upstream.attempts(name)) <= 3
        elsewhere.settimeout(0.05)
        with pytest.raises(TimeoutError):
            elsewhere.accept()


# statuses: failure-model §2.1 for one model


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(
    ("status", "error_type", "code", "attempts"),
    [
        (400, "invalid_request_error", "", 1),
        (402, "billing_error", "", 1),
        (404, "not_found_error", "", 1),
        (413, "request_too_large", "", 1),
        (422, "invalid_request_error", "", 1),
        (429, "rate_limit_error", "", 3),
        (429, "rate_limit_error", "ramp_limit_exceeded", 3),
        (429, "rate_limit_error", "enforced_spend_limit_reached", 1),
        (429, "rate_limit_error", "contract_spend_limit_reached", 1),
        (500, "api_error", "", 3),
        (502, "api_error", "", 3),
        (503, "api_error", "", 3),
        (504, "timeout_error", "", 2),
        (529, "overloaded_error", "", 3),
    ],
)
def test_an_error_status_is_tried_as_often_as_it_may_be_and_passed_on_to_the_byte(
    world, status, error_type, code, attempts, streamed
):
    world.fill_retry_budget(3)
    play = failing(status, error_type, code=code, headers=b"x-of-anthropic: 1\r\nx-request-cost: 7\r\n")
    name, reply = world.play(play, stream=streamed)
    assert reply.status == status
    assert isinstance(play[0], bytes)
    assert reply.body == play[0].partition(b"\r\n\r\n")[2]
    assert reply.headers["request-id"] == "req_scripted"
    assert reply.headers["x-of-anthropic"] == "1"
    assert reply.headers["x-should-retry"] == "false"
    assert reply.headers["x-headgate-attempts"] == str(attempts)
    seen = world.upstream.attempts(name)
    assert len(seen) == attempts
    assert len({attempt.body for attempt in seen}) == 1, "the same bytes each time"
    row = world.row(name)
    assert (row["outcome"], row["status"], row["error_code"]) == ("failed", status, code or error_type)
    assert {attempt["state"] for attempt in row["attempts"]} == {"void"} or status == 504
    assert [attempt["status"] for attempt in row["attempts"]] == [status] * attempts


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529, 429])
def test_an_error_status_that_passes_is_not_seen(world, status):
    world.fill_retry_budget(2)
    name, reply = world.play(failing(status, "api_error"), STREAMED)
    assert reply.body == SHORT_STREAM
    assert reply.headers["x-headgate-attempts"] == "2"
    first, second = world.upstream.attempts(name)
    assert second.at - first.at <= BASE_DELAY_S + LATE_S
    if status in (500, 502, 503, 504):
        assert second.at - first.at >= BASE_DELAY_S / 4
    assert world.row(name)["outcome"] == "completed"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_of_our_own_key_is_our_fault_and_not_the_clients(world, status):
    name, reply = world.play(failing(status, "authentication_error"))
    assert (reply.status, reply.error["type"]) == (502, "api_error")
    assert reply.error["details"]["error_code"] == "upstream_credential"
    assert b"scripted" not in reply.body
    assert reply.headers["x-should-retry"] == "false"
    assert len(world.upstream.attempts(name)) == 1
    assert world.gateway.process.lines(event="upstream_credential", status=status)


def test_upstreams_own_advice_not_to_retry_is_taken(world):
    name, reply = world.play(failing(529, "overloaded_error", headers=b"x-should-retry: false\r\n"))
    assert reply.status == 529
    assert len(world.upstream.attempts(name)) == 1


def test_a_reset_before_the_head_is_tried_once_more_and_both_attempts_have_a_cost(world):
    world.fill_retry_budget(2)
    name, reply = world.play((Act.RESET,))
    assert (reply.status, reply.error["details"]["error_code"]) == (502, "upstream_cut")
    row = world.row(name)
    assert [attempt["state"] for attempt in row["attempts"]] == ["estimated", "estimated"]
    assert all(attempt["input_tokens"] > 0 and attempt["cost_nanousd"] > 0 for attempt in row["attempts"])


def test_an_upstream_that_refuses_connections_is_tried_three_times_for_nothing(stack):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can be there
        gateway = stack.gateway(f"http://127.0.0.1:{taken.getsockname()[1]}", RETRY__BASE_DELAY_S="0.1")
        reply = run(fetch(gateway.url, gateway.key(), body_of("nobody")))
    assert (reply.status, reply.error["details"]["error_code"]) == (502, "upstream_unreachable")
    assert_honest(reply)
    assert reply.elapsed_s <= 3.0
    (row,) = gateway.calls(1)
    assert [attempt["state"] for attempt in row["attempts"]] == ["void"] * 3
    assert row["cost_nanousd"] == 0


# Retry-After


def gap_s(world: World, name: str) -> float:
    """Between the first attempt and the second."""
    first, second = world.upstream.attempts(name)[:2]
    return second.at - first.at


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        (b"retry-after: 1\r\n", 1.0),
        (b"retry-after: 0.4\r\n", 0.4),
        (b"Retry-After:   1  \r\n", 1.0),
        (b"retry-after-ms: 300\r\n", 0.3),
        (b"retry-after-ms: 300\r\nretry-after: 30\r\n", 0.3),
        (b"retry-after: soon\r\nretry-after-ms: 250.5\r\n", 0.25),
        (b"retry-after-ms: NaN\r\nretry-after: 1\r\n", 1.0),
    ],
)
def test_retry_after_is_a_floor_with_a_fifth_of_jitter_above(world, headers, wait_s):
    world.fill_retry_budget(2)
    name, reply = world.play(failing(429, "rate_limit_error", headers=headers), STREAMED)
    assert reply.body == SHORT_STREAM
    assert wait_s <= gap_s(world, name) <= 1.25 * wait_s + LATE_S


def test_a_date_in_retry_after_is_a_floor(world):
    world.fill_retry_budget(2)
    date = (datetime.fromtimestamp(time.time(), UTC) + timedelta(seconds=2)).replace(microsecond=0)
    headers = b"retry-after: %b\r\n" % format_datetime(date, usegmt=True).encode()
    name, reply = world.play(failing(429, "rate_limit_error", headers=headers), STREAMED)
    assert reply.body == SHORT_STREAM
    assert 0.8 <= gap_s(world, name) <= 2 * 1.25 + LATE_S


@pytest.mark.parametrize(
    "value",
    [
        b"-5",
        b"NaN",
        b"1e309",
        b"-inf",
        b"",
        b"soon",
        b"1;2",
        b"\xff\xfe",
        b"9" * 10_000,
        b"Thu, 01 Jan 1970 00:00:00 GMT",
        b"Thu, 99 Foo 9999 99:99:99 GMT",
    ],
    ids=lambda value: value[:20].decode("latin-1") or "empty",
)
@pytest.mark.parametrize("name_of_header", [b"retry-after", b"retry-after-ms"])
def test_a_retry_after_that_means_nothing_counts_as_absent(world, value, name_of_header):
    world.fill_retry_budget(1)
    name, reply = world.play(
        failing(429, "rate_limit_error", headers=b"%b: %b\r\n" % (name_of_header, value)), STREAMED
    )
    assert reply.body == SHORT_STREAM
    assert gap_s(world, name) <= BASE_DELAY_S + LATE_S


@pytest.mark.parametrize(
    ("value", "told"), [("7", "7"), ("45.2", "46"), ("100", "60"), ("4294967295", "60"), ("1e30", "60")]
)
def test_a_wait_beyond_the_deadline_is_refused_now_and_never_asks_for_more_than_a_minute(stack, upstream, value, told):
    world = _world(stack, upstream)  # of its own: nothing leaves for this model until the time is over
    name, reply = world.play(failing(429, "rate_limit_error", headers=f"retry-after: {value}\r\n".encode()), STREAMED)
    assert reply.status == 429
    assert reply.elapsed_s <= 0.2 + LATE_S
    assert (reply.headers["retry-after"], reply.headers["x-should-retry"]) == (told, "false")
    assert len(world.upstream.attempts(name)) == 1
    later = world.ask(world.upstream.plan(STREAMED))
    assert (later.status, later.headers["x-should-retry"]) == (529, "true")
    assert int(told) - 2 <= int(later.headers["retry-after"]) <= int(told)


def test_no_attempt_is_made_after_the_deadline(stack, upstream):
    """Each wait fits alone, the second no longer."""
    world = _world(stack, upstream)
    world.fill_retry_budget(2)
    name, reply = world.play(failing(429, "rate_limit_error", headers=b"retry-after: 3\r\n"))
    assert reply.status == 429
    assert reply.elapsed_s <= DEADLINE_S + LATE_S
    assert len(world.upstream.attempts(name)) == 2


def test_an_outage_is_not_multiplied_by_retries(stack, upstream):
    """A thousand retries in backoff are counted when they are decided, not when they are sent."""
    gateway = stack.gateway(upstream.url, RETRY__BASE_DELAY_S="0.3")
    key = app_key(gateway)
    world = World(upstream, gateway, key, Books(gateway, key))
    names = [upstream.plan(failing(529, "overloaded_error")) for _ in range(300)]
    replies = world.ask_all(names, at_once=300)
    assert {reply.status for reply in replies} == {529}
    rows = world.books.of_users(names)
    attempts = sum(len(upstream.attempts(name)) for name in names)
    assert attempts == sum(len(row["attempts"]) for row in rows.values())
    assert len(names) + 10 <= attempts <= 1.2 * len(names) + 10


# the simulator's faults, through the official SDK


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "error-mid"},
        {"kind": "truncate"},
        *({"kind": "cut", "at": at, "how": how} for at in (900, 1000) for how in ("close", "reset", "end")),
        {"kind": "stall", "for_s": 30},
        {"kind": "garbage"},
    ],
    ids=lambda fault: "-".join(str(value) for value in fault.values()),
)
def test_the_sdk_raises_on_every_fault_that_breaks_a_stream(simulated, fault):
    simulator, books, client = simulated
    simulator.fault(**fault)
    before = len(simulator.requests())
    name = "-".join(("raised", *map(str, fault.values())))
    with pytest.raises(anthropic.APIStatusError) as raised, ask(client, name) as stream:
        for _ in stream:
            pass
    assert raised.value.body["type"] == "error"
    assert len(simulator.requests()) == before + 1
    row = books.of_users([name])[name]
    assert (row["outcome"], row["state"]) == ("cut", "estimated")
    assert row["input_tokens"] == simulator.requests()[-1]["usage"]["input_tokens"]


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": kind}
        for kind in (
            "unknown-event",
            "ping-flood",
            "crlf",
            "giant-event",
            "after-stop",
            "gzip",
            "error-first",
            "reset-after-headers",
            "reset",
            "duplicate-start",
            "wrong-content-type",
            "redirect",
            "500",
            "529",
        )
    ],
    ids=lambda fault: fault["kind"],
)
def test_the_sdk_sees_a_whole_answer_through_every_fault_that_can_be_mended(simulated, fault):
    simulator, books, client = simulated
    for _ in range(6):  # retries are at most a fifth of the requests
        client.messages.create(
            model="claude-sonnet-4-6", max_tokens=1, messages=[{"role": "user", "content": "Xin chào"}]
        )
    simulator.fault(**fault)
    name = f"mended-{fault['kind']}"
    with ask(client, name) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "end_turn"
    row = books.of_users([name])[name]
    assert (row["outcome"], row["output_tokens"]) == ("completed", message.usage.output_tokens)
    assert sum(block.text != "" for block in message.content) == 1


@pytest.fixture(scope="module")
def simulated(shared_stack: Stack) -> Iterator[Any]:
    simulator = shared_stack.simulator()
    gateway = shared_stack.gateway(simulator.url, RETRY__BASE_DELAY_S="0.04", UPSTREAM__STALL_TIMEOUT_S="0.5")
    key = app_key(gateway)
    with anthropic.Anthropic(base_url=gateway.url, api_key=key, max_retries=0) as client:
        yield simulator, Books(gateway, key), client


def ask(client: anthropic.Anthropic, name: str) -> Any:
    return client.messages.stream(
        model="claude-sonnet-4-6",
        max_tokens=200,
        metadata={"user_id": name},
        messages=[{"role": "user", "content": "Xin chào [[sim: tokens=60]]"}],
    )


# one connection, several answers


def test_a_failed_stream_leaves_the_clients_connection_fit_for_the_next_call(world):
    """The error event is a clean end of the HTTP message: nothing of it may leak into the next one."""
    cut = world.upstream.plan((in_chunks(FIRST_DELTA_ENDS_AT + 7), Act.CLOSE))

    async def both() -> tuple[bytes, bytes]:
        reader, writer = await connect(world.gateway.url)
        bodies = []
        for name in (cut, "no play"):
            body = body_of(name)
            writer.write(head_of(world.gateway.url, world.key, len(body)) + body)
            status, _ = await read_head(reader)
            assert status == 200
            pieces = []
            while size := int(await reader.readuntil(b"\r\n"), 16):
                pieces.append((await reader.readexactly(size + 2))[:-2])
            assert await reader.readexactly(2) == b"\r\n"
            bodies.append(b"".join(pieces))
        writer.close()
        return bodies[0], bodies[1]

    first, second = run(both())
    assert json.loads(first.rpartition(b"data: ")[2])["error"]["type"] == "api_error"
    assert second == SHORT_STREAM
