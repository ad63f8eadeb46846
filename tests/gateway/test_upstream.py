"""The HTTP client by itself: its pool, answers and their ends, deadlines. TLS: test_upstream_connecting.py."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import socket
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.gateway.upstream_scenes import (
    LOOPS,
    OK,
    REQUEST,
    SSE,
    Clock,
    Line,
    Run,
    Sink,
    run_on,
    scene,
    script_of,
    turns,
    until,
)

from headgate.gateway.settings import UpstreamSection
from headgate.gateway.upstream import ANSWER_BYTES_MAX, Answer, Upstream
from headgate.policy.records import Failure


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test's coroutine function, on asyncio's loop and on uvloop's."""
    return lambda test: run_on(request.param, test)


# the pool


def test_one_connection_serves_request_after_request(run):
    async def test():
        async with scene(script_of(OK)) as it:
            for _ in range(20):
                assert (await it.answer()).body() == b"{}"
            assert it.connections == 1

    run(test)


def test_the_pool_is_bounded_and_those_who_wait_are_served_in_their_order(run):
    async def test():
        gate = asyncio.Event()

        async def script(line: Line, number: int) -> None:
            while True:
                await line.request()
                await gate.wait()
                line.send(OK)

        async with scene(script, connections_max=2) as it:
            order: list[int] = []

            async def one(number: int) -> None:
                await it.answer()
                order.append(number)

            async with asyncio.TaskGroup() as group:
                for number in range(10):
                    group.create_task(one(number))
                    await turns(3)
                await until(lambda: it.upstream.snapshot()["waiting"] == 8)
                gate.set()
            assert it.open_max == 2
            assert it.connections == 2
            assert sorted(order) == list(range(10))
            assert order[-1] in (8, 9)
            assert it.upstream.snapshot() == {"open": 2, "idle": 2, "waiting": 0}

    run(test)


def test_who_waits_too_long_for_a_connection_is_told_and_nothing_was_sent(run):
    async def test():
        async with scene(script_of(then="silence"), connections_max=1, connect_timeout_s=0.2) as it:
            first = asyncio.get_running_loop().create_task(it.send())
            await until(lambda: it.connections)
            failure = await it.failure()
            assert (failure.kind, failure.sent) == ("connect", False)
            assert it.upstream.snapshot()["waiting"] == 0
            it.upstream.close()
            assert isinstance(await first, Failure)

    run(test)


def test_one_who_gives_up_as_it_is_called_passes_the_call_on(run):
    """A wake-up that went to nobody left the others waiting beside a free connection."""

    async def test():
        gate = asyncio.Event()

        async def script(line: Line, number: int) -> None:
            while True:
                await line.request()
                line.send(SSE)
                await gate.wait()
                line.send(b"1\r\nx\r\n0\r\n\r\n")

        async with scene(script, connections_max=1) as it:
            answer = await it.answer()
            loop = asyncio.get_running_loop()
            impatient, patient = loop.create_task(it.send()), loop.create_task(it.send())
            await until(lambda: it.upstream.snapshot()["waiting"] == 2)
            sink = Sink(on_end=impatient.cancel)
            answer.attach(sink)
            gate.set()
            await until(lambda: sink.end)
            async with asyncio.timeout(2):
                assert isinstance(await patient, Answer)
            with contextlib.suppress(asyncio.CancelledError):
                await impatient

    run(test)


def test_a_connection_that_could_not_be_made_makes_room_for_those_who_wait(run):
    async def test():
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        settings_ = UpstreamSection(connections_max=1, connect_timeout_s=5)
        upstream = Upstream(f"http://127.0.0.1:{port}", settings_, clock=Clock())
        async with asyncio.timeout(2):
            failures = await asyncio.gather(*(upstream.send(REQUEST, b"", lambda _: True) for _ in range(3)))
        assert [(failure.kind, failure.sent) for failure in failures] == [("connect", False)] * 3
        listener.close()

    run(test)


def test_an_idle_connection_is_closed_after_its_limit_and_not_before(run):
    async def test():
        async with scene(script_of(OK), idle_timeout_s=30) as it:
            await it.answer()
            it.pass_time(29)
            await turns()
            assert it.upstream.snapshot()["idle"] == 1
            it.pass_time(2)
            await until(lambda: it.open_now == 0)
            await it.answer()
            assert it.connections == 2

    run(test)


def test_a_connection_that_was_closed_while_it_lay_idle_is_not_used(run):
    async def test():
        async with scene(script_of(OK, then="close", times=1)) as it:
            for number in range(5):
                await it.answer()
                await until(lambda: it.upstream.snapshot()["open"] == 0)
                assert it.connections == number + 1

    run(test)


def test_an_answer_that_says_close_is_the_connections_last(run):
    async def test():
        closing = OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        async with scene(script_of(closing)) as it:
            await it.answer()
            await it.answer()
            assert it.connections == 2

    run(test)


def test_nothing_is_sent_for_one_who_left_while_it_waited_and_the_connection_is_kept(run):
    async def test():
        async with scene(script_of(OK)) as it:
            failure = await it.upstream.send(REQUEST, b"", lambda _: False)
            assert isinstance(failure, Failure)
            assert not failure.sent
            await turns()
            assert bytes(it.received) == b""
            await it.answer()
            assert it.connections == 1

    run(test)


# answers and their ends


def test_interim_answers_are_passed_over(run):
    async def test():
        interim = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 5
        async with scene(script_of(*interim, OK)) as it:
            for _ in range(3):
                answer = await it.answer()
                assert (answer.status, answer.body()) == (200, b"{}")
                assert b"link" not in answer.header_map
            assert it.connections == 1

    run(test)


def test_interim_answers_without_end_do_not_move_the_deadline(run):
    async def test():
        async def script(line: Line, number: int) -> None:
            await line.request()
            while True:
                line.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
                await line.writer.drain()
                await turns(3)

        async with scene(script, first_byte_timeout_s=120) as it:
            sending = asyncio.get_running_loop().create_task(it.send())
            await until(lambda: it.received)
            for _ in range(121):
                await turns(5)
                it.pass_time(1)
            failure = await sending
            assert isinstance(failure, Failure)
            assert failure.kind == "timeout"

    run(test)


def test_a_switch_of_protocols_is_no_answer(run):
    async def test():
        switching = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
        async with scene(script_of(switching)) as it:
            assert (await it.failure()).kind in ("malformed", "reset")

    run(test)


def test_a_redirect_is_an_answer_and_is_not_followed(run):
    async def test():
        async with scene(
            script_of(b"HTTP/1.1 307 Go\r\nlocation: http://127.0.0.1:1/x\r\ncontent-length: 0\r\n\r\n")
        ) as it:
            assert (await it.answer()).status == 307
            assert it.connections == 1

    run(test)


def test_a_body_that_ends_with_its_connection_is_whole(run):
    async def test():
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"
        async with scene(script_of(head, b'{"a":', b"1}", then="close")) as it:
            assert (await it.answer()).body() == b'{"a":1}'
            assert (await it.answer()).body() == b'{"a":1}'
            assert it.connections == 2

    run(test)


@pytest.mark.parametrize(
    ("pieces", "then", "kind"),
    [
        ((), "close", "reset"),
        ((), "reset", "reset"),
        ((b"HTTP/1.1 200 OK\r\ncontent-le",), "close", "reset"),
        ((OK[:-1],), "close", "truncated"),
        ((OK[:-1],), "reset", "truncated"),
        ((OK.replace(b"content-length: 2", b"transfer-encoding: chunked")[:-2], b"2\r\n{}\r\n"), "close", "truncated"),
        ((b"HTTP/1.1 200 OK\r\n\r\n{}",), "reset", "truncated"),
        ((b"SSH-2.0-OpenSSH\r\n",), "wait", "malformed"),
        ((b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n",), "wait", "malformed"),
        ((b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n",), "wait", "malformed"),
        ((b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\n",), "wait", "malformed"),
        ((b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",), "wait", "malformed"),
        ((b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",), "wait", "malformed"),
        ((b"HTTP/1.1 200 OK\r\nx: a\nb: c\r\n\r\n",), "wait", "malformed"),
    ],
    ids=range(14),
)
def test_an_answer_that_is_cut_or_no_http_is_a_failure_by_its_name(run, pieces, then, kind):
    async def test():
        async with scene(script_of(*pieces, then=then)) as it:
            failure = await it.failure()
            assert (failure.kind, failure.sent) == (kind, True)
            await until(lambda: it.upstream.snapshot() == {"open": 0, "idle": 0, "waiting": 0})

    run(test)


@pytest.mark.parametrize("then", ["close", "reset"])
@pytest.mark.parametrize("tail", [b"", b"5\r\nab", b"5\r\nabcde\r\n", b"5\r\nabcde\r\n0\r\n"])
def test_a_stream_that_is_cut_breaks(run, tail, then):
    async def test():
        head = SSE.replace(b"\r\n\r\n", b"\r\nrequest-id: req_7\r\n\r\n")
        async with scene(script_of(head, b"1\r\nx\r\n", tail, then=then)) as it:
            _, sink = await it.stream()
            await until(lambda: sink.end)
            assert sink.end == "broke"
            assert sink.failure is not None
            assert (sink.failure.kind, sink.failure.upstream_request_id) == ("truncated", "req_7")
            assert sink.data[:1] == b"x"

    run(test)


@settings(max_examples=60, deadline=None)
@given(
    body=st.binary(max_size=400),
    framing=st.sampled_from(["length", "chunked", "close"]),
    coding=st.sampled_from(["identity", "gzip", "deflate"]),
    cuts=st.lists(st.floats(0, 1), max_size=12),
)
def test_an_answer_is_the_same_in_whatever_pieces_it_comes(body, framing, coding, cuts):
    coded = {"identity": lambda b: b, "gzip": gzip.compress, "deflate": zlib.compress}[coding](body)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    head += b"" if coding == "identity" else b"content-encoding: %b\r\n" % coding.encode()
    if framing == "length":
        data = head + b"content-length: %d\r\n\r\n%b" % (len(coded), coded)
    elif framing == "chunked":
        half = len(coded) // 2
        chunks = [chunk for chunk in (coded[:half], coded[half:]) if chunk]
        data = head + b"transfer-encoding: chunked\r\n\r\n"
        data += b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    else:
        data = head + b"\r\n" + coded
    edges = sorted({0, *(int(cut * len(data)) for cut in cuts), len(data)})
    pieces = [data[begin:end] for begin, end in itertools.pairwise(edges)]

    async def test():
        async with scene(script_of(*pieces, then="close" if framing == "close" else "wait")) as it:
            assert (await it.answer()).body() == body

    run_on("uvloop", test)


@pytest.mark.parametrize("coding", [gzip.compress, zlib.compress])
def test_a_compressed_answer_may_come_byte_by_byte(run, coding):
    async def test():
        text = b'{"text": "' + bytes(range(97, 123)) * 20 + b'"}'
        body = coding(text)
        name = b"gzip" if coding is gzip.compress else b"deflate"
        head = b"HTTP/1.1 200 OK\r\ncontent-encoding: %b\r\ncontent-length: %d\r\n\r\n" % (name, len(body))
        async with scene(script_of(head, *(body[at : at + 1] for at in range(len(body))))) as it:
            assert (await it.answer()).body() == text

    run(test)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        (b"gzip", gzip.compress(b'{"a": 1}' * 50)[:-9]),
        (b"gzip", gzip.compress(b'{"a": 1}' * 50)[:-1]),
        (b"gzip", gzip.compress(bytes(60_000_000), 9)),
        (b"gzip", b"{}"),
        (b"deflate", b"{}"),
        (b"br", b"\x8b\x00\x80{}\x03"),
        (b"zstd", b"\x28\xb5\x2f\xfd{}"),
        (b"gzip, gzip", gzip.compress(gzip.compress(b"{}"))),
    ],
    ids=["cut", "cut by a byte", "bomb", "no gzip", "no deflate", "brotli", "zstd", "twice"],
)
def test_a_compressed_answer_that_cannot_be_decoded_whole_is_a_failure(run, encoding, body):
    """What passed as it was would reach the client without the header that says how to read it."""

    async def test():
        head = b"HTTP/1.1 200 OK\r\ncontent-encoding: %b\r\ncontent-length: %d\r\n\r\n" % (encoding, len(body))
        async with scene(script_of(head + body)) as it:
            failure = await it.failure()
            assert failure.kind in ("malformed", "truncated")

    run(test)


def test_a_header_beyond_64_kib_is_a_failure(run):
    async def test():
        async with scene(script_of(b"HTTP/1.1 200 OK\r\n" + b"x-a: b\r\n" * 100_000)) as it:
            assert (await it.failure()).kind == "malformed"

    run(test)


def test_an_answer_beyond_what_is_held_is_a_failure(run):
    async def test():
        async def script(line: Line, number: int) -> None:
            await line.request()
            line.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
            for _ in range((ANSWER_BYTES_MAX >> 20) + 2):
                line.send(bytes(1 << 20))
                await line.writer.drain()

        async with scene(script) as it:
            assert (await it.failure()).kind == "malformed"

    run(test)


# deadlines


def test_a_head_that_drips_has_the_first_byte_deadline_in_all(run):
    async def test():
        async def script(line: Line, number: int) -> None:
            await line.request()
            line.send(b"HTTP/1.1 200 OK\r\n")
            while True:
                line.send(b"x-drip: 1\r\n")
                await line.writer.drain()
                await turns(3)

        async with scene(script, first_byte_timeout_s=120, stall_timeout_s=1000) as it:
            sending = asyncio.get_running_loop().create_task(it.send())
            await until(lambda: it.received)
            for _ in range(119):
                await turns(2)
                it.pass_time(1)
            assert not sending.done()
            it.pass_time(2)
            failure = await sending
            assert isinstance(failure, Failure)
            assert failure.kind == "timeout"
            await until(lambda: it.open_now == 0)

    run(test)


def test_silence_in_a_stream_is_a_stall_and_any_byte_resets_it(run):
    async def test():
        more = asyncio.Event()

        async def script(line: Line, number: int) -> None:
            await line.request()
            line.send(SSE)
            await more.wait()
            line.send(b"1\r\nx\r\n")
            await line.closed()

        async with scene(script, stall_timeout_s=180) as it:
            _, sink = await it.stream()
            it.pass_time(179)
            more.set()
            await until(lambda: sink.data)
            it.pass_time(179)
            await turns()
            assert not sink.end
            it.pass_time(2)
            assert sink.failure is not None
            assert sink.failure.kind == "stall"
            await until(lambda: it.open_now == 0)

    run(test)


def test_a_whole_answer_that_stalls_in_its_body_is_a_stall(run):
    async def test():
        async with scene(script_of(OK[:-1], then="silence"), stall_timeout_s=180) as it:
            sending = asyncio.get_running_loop().create_task(it.send())
            await until(lambda: it.received)
            await turns(100)
            it.pass_time(181)
            failure = await sending
            assert isinstance(failure, Failure)
            assert failure.kind == "stall"

    run(test)


def test_a_pause_for_a_slow_client_is_no_stall_and_stops_the_reading(run):
    async def test():
        sent = 0

        async def script(line: Line, number: int) -> None:
            nonlocal sent
            await line.request()
            line.writer.transport.set_write_buffer_limits(high=0)
            line.send(SSE)
            for _ in range(600):
                line.send(b"10000\r\n" + bytes(65536) + b"\r\n")
                sent += 65536
                await line.writer.drain()
            line.send(b"0\r\n\r\n")
            await line.closed()

        async with scene(script, stall_timeout_s=180) as it:
            answer, sink = await it.stream()
            await until(lambda: len(sink.data) > 100_000)
            answer.pause(True)
            await turns(300)
            held, heard = sent, len(sink.data)
            await turns(300)
            assert sent == held, "the reading goes on"
            assert held - heard < 20_000_000
            assert len(sink.data) == heard
            it.pass_time(500)
            assert not sink.end
            answer.pause(False)
            await until(lambda: sink.end)
            assert (sink.end, len(sink.data)) == ("ended", 600 * 65536)

    run(test)


def test_the_rest_of_a_settled_answer_may_free_the_line_but_not_hold_it(run):
    async def test():
        async def script(line: Line, number: int) -> None:
            await line.request()
            line.send(SSE, b"1\r\nx\r\n")
            if number == 1:
                while True:
                    line.send(b"1\r\ny\r\n")
                    await line.writer.drain()
                    await turns(3)
            line.send(b"0\r\n\r\n")
            await line.request()
            line.send(OK)
            await line.closed()

        async with scene(script) as it:
            answer = await it.answer()
            answer.detach()
            for _ in range(5):
                await turns(20)
                it.pass_time(0.9)
            await until(lambda: it.open_now == 0, within_s=1)
            second = await it.answer()
            second.detach()
            await until(lambda: it.upstream.snapshot()["idle"] == 1)
            await it.answer()
            assert it.connections == 2

    run(test)


def test_an_aborted_answer_closes_its_connection_at_once(run):
    async def test():
        async with scene(script_of(SSE, b"1\r\nx\r\n", then="silence")) as it:
            answer, sink = await it.stream()
            await until(lambda: sink.data)
            answer.abort()
            await until(lambda: it.open_now == 0, within_s=1)
            assert it.upstream.snapshot() == {"open": 0, "idle": 0, "waiting": 0}

    run(test)


# bytes that nobody asked for

EVIL = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 6\r\n\r\n" + b'"evil"'


@pytest.mark.parametrize(
    "extra",
    [EVIL, EVIL[:-3], EVIL[:30], EVIL * 3, b"\x00junk", b"HTTP/1.1 100 Continue\r\n\r\n", b"\r\n", b"0\r\n\r\n"],
    ids=["whole", "body cut", "head cut", "three", "junk", "interim", "blank line", "chunk"],
)
@pytest.mark.parametrize("when", ["same segment", "while idle"])
def test_bytes_that_nobody_asked_for_never_reach_the_next_request(run, extra, when):
    """An answer too many was the next caller's answer."""

    async def test():
        sent_extra = asyncio.Event()

        async def script(line: Line, number: int) -> None:
            await line.request()
            if number > 1:
                while True:
                    line.send(OK)
                    await line.request()
            if when == "same segment":
                line.send(OK + extra)
            else:
                line.send(OK)
                await sent_extra.wait()
                line.send(extra)
            with contextlib.suppress(ConnectionError):
                while True:
                    await line.request()
                    line.send(OK)

        async with scene(script) as it:
            assert (await it.answer()).body() == b"{}"
            sent_extra.set()
            if when == "while idle":
                await turns(100)
            assert it.upstream.snapshot()["idle"] <= 1, "one connection lies in the pool twice"
            answers = await asyncio.gather(it.send(), it.send(), it.send())
            for answer in answers:
                if isinstance(answer, Answer):
                    assert (answer.status, answer.body()) == (200, b"{}")
                else:
                    assert answer.kind in ("reset", "malformed", "connect")
            assert isinstance(await it.send(), Answer)

    run(test)


def test_one_who_waits_is_not_given_a_connection_that_is_being_dropped(run):
    async def test():
        async def script(line: Line, number: int) -> None:
            await line.request()
            line.send(OK + (b"\x00junk" if number == 1 else b""))
            while True:
                await line.request()
                line.send(OK)

        async with scene(script, connections_max=1) as it:
            answers = await asyncio.gather(it.send(), it.send())
            assert all(isinstance(answer, Answer) for answer in answers), answers

    run(test)
