"""The HTTP/1.1 server by itself: framing, order, refusals, whatever bytes come. Limits: test_server_limits.py."""

from __future__ import annotations

import asyncio
import itertools
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.gateway.server_scenes import (
    HOST,
    LOOPS,
    House,
    Run,
    chunked,
    get,
    house,
    parse,
    post,
    run_on,
    send_all_then_read,
    turns,
    until,
)

from headgate.gateway.server import (
    LINGER_S,
)


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test's coroutine function, on asyncio's loop and on uvloop's."""
    return lambda test: run_on(request.param, test)


# framing and order


def test_a_connection_is_kept_and_closed_when_the_client_asks(run):
    async def test():
        async with house() as it:
            client = await it.client()
            for number in range(50):
                client.send(post(b"/%d" % number, b"x" * number))
                answers = await client.answers(number + 1)
                assert answers[-1].body == b"x" * number
                assert "connection" not in answers[-1].headers
            client.send(get(b"/last", b"connection: close"))
            await client.end()
            assert parse(client.data)[-1].headers["connection"] == "close"
            await client.close()
            await until(lambda: len(it.server) == 0)

    run(test)


def test_an_old_client_gets_a_body_without_chunks_and_a_closed_connection(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(b"POST /stream HTTP/1.0\r\ncontent-length: 20\r\n\r\n" + b"0123456789" * 2)
            await client.end()
            (answer,) = parse(client.data)
            assert answer.body == b"0123456789" * 2
            assert "transfer-encoding" not in answer.headers

    run(test)


def test_an_old_client_gets_no_interim_answer(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(b"POST /x HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
            await until(lambda: it.desk.heads)
            client.send(b"ab")
            await client.end()
            assert [answer.status for answer in parse(client.data)] == [200]

    run(test)


def test_an_old_client_cannot_keep_a_connection_after_chunks(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(
                b"POST /x HTTP/1.0\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
                + get(b"/smuggled")
            )
            await client.end()
            assert len(parse(client.data)) == 1
            assert b"/smuggled" not in it.desk.heads

    run(test)


def test_head_is_answered_without_a_body(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(b"HEAD /a" + HOST + b"\r\n", b"HEAD /refuse" + HOST + b"\r\n", get(b"/b"))
            answers = await client.answers(3, ["HEAD", "HEAD", "GET"])
            assert [answer.status for answer in answers] == [200, 401, 200]
            assert answers[1].headers["content-length"] == "7"

    run(test)


def test_bodies_come_whole_in_any_framing_and_any_pieces(run):
    async def test():
        async with house() as it:
            for pieces in (1, 3, 1000):
                client = await it.client()
                request = post(b"/fixed", b"abcdefghij" * 30) + chunked(b"/chunked", b"a", b"bc" * 99, b"d" * 256)
                for at in range(0, len(request), pieces):
                    client.send(request[at : at + pieces])
                    await asyncio.sleep(0)
                fixed, coded = await client.answers(2)
                assert fixed.body == b"abcdefghij" * 30
                assert coded.body == b"a" + b"bc" * 99 + b"d" * 256

    run(test)


def test_pipelined_requests_are_answered_in_their_order(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(get(b"/held/1"), get(b"/2"), post(b"/refuse/3", b"abc"), post(b"/stream/4", b"xyz"), get(b"/5"))
            await until(lambda: len(it.desk.heads) == 5)
            await turns()
            assert client.data == b"", "an answer overtook the one before it"
            it.desk.held.pop().respond(200, b"x-target: /held/1\r\n", b"slow")
            answers = await client.answers(5)
            targets = [answer.headers["x-target"] for answer in answers]
            assert targets == ["/held/1", "/2", "/refuse/3", "/stream/4", "/5"]
            assert [answer.body for answer in answers] == [b"slow", b"", b"refused", b"xyz", b""]

    run(test)


def test_a_refusal_whose_body_comes_after_its_predecessor_was_answered_is_still_sent(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(get(b"/held"), post(b"/refuse", b"abcd")[:-4])
            await until(lambda: len(it.desk.heads) == 2)
            it.desk.held.pop().respond(200, b"", b"slow")
            assert [answer.status for answer in await client.answers(2)] == [200, 401]
            client.send(b"abcd", get(b"/next"))
            assert [answer.status for answer in await client.answers(3)] == [200, 401, 200]

    run(test)


def test_a_thousand_pipelined_requests_are_answered_in_order(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(*(get(b"/%d" % number) for number in range(1000)))
            answers = await client.answers(1000)
            assert [answer.headers["x-target"] for answer in answers] == [f"/{number}" for number in range(1000)]

    run(test)


def test_a_thousand_requests_behind_a_slow_one_neither_overflow_the_stack_nor_get_stuck(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(get(b"/held") + b"".join(get(b"/%d" % number) for number in range(1000)))
            await until(lambda: it.desk.held and len(it.desk.heads) > 200)
            it.desk.held.pop().respond(200, b"x-target: /held\r\n", b"slow")
            answers = await client.answers(1001)
            assert [answer.headers["x-target"] for answer in answers[1:]] == [f"/{number}" for number in range(1000)]

    run(test)


@pytest.mark.parametrize("count", [15, 16, 17, 40])
def test_a_full_pipeline_is_read_on_when_it_has_been_answered(run, count):
    async def test():
        async with house() as it:
            client = await it.client()
            for served in (count, 2 * count, 3 * count):
                client.send(get(b"/held") * count)
                async with asyncio.timeout(5):
                    while len(it.desk.served) < served or it.desk.held:
                        while it.desk.held:
                            it.desk.held.pop().respond(200, b"", b"")
                        await asyncio.sleep(0)
                await client.answers(served)
            assert it.connection()._transport.is_reading()

    run(test)


def test_a_pipelined_body_has_its_time_from_its_turn_on(run):
    async def test():
        async with house(body_timeout_s=30, header_timeout_s=10) as it:
            for sent in (
                post(b"/x", b"abcd")[:-2],
                post(b"/x", b"abcd", b"expect: 100-continue")[:-4],
                get(b"/y")[:-4],
            ):
                client = await it.client()
                client.send(get(b"/held"), sent)
                await until(lambda: it.desk.held)
                await turns()
                it.pass_time(1000)
                it.desk.held.pop().respond(200, b"", b"slow")
                await until(lambda client=client: b"slow" in client.data)
                it.pass_time(1)
                await turns()
                assert b" 408 " not in client.data, "a request was late before its turn had come"
                it.pass_time(40)
                await client.end()
                assert parse(client.data)[-1].status == 408

    run(test)


@pytest.mark.parametrize("closing", [b"/held", b"/refuse", b"/plain", b"/stream"])
def test_nothing_is_served_after_a_request_that_closes(run, closing):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(
                get(b"/first") + post(closing, b"{}", b"connection: close") + get(b"/late/1") + post(b"/late/2", b"x")
            )
            await until(lambda: len(it.desk.heads) >= 2)
            for exchange in it.desk.held:
                exchange.respond(200, b"", b"")
            await client.end()
            assert client.error is None, "a reset may cost the client its answer"
            assert len(parse(client.data)) == 2
            assert not {b"/late/1", b"/late/2"} & set(it.desk.served)

    run(test)


def test_a_long_answer_reaches_a_client_that_sends_on_after_asking_to_close(run):
    async def test():
        async with house() as it:
            client = await it.client(receive_buffer=4096)
            client.send(get(b"/held", b"connection: close"))
            await until(lambda: it.desk.held)
            it.desk.held.pop().respond(200, b"", b"a" * 1_000_000)
            client.send(b"junk" * 50_000)
            await client.end()
            assert len(parse(client.data)[0].body) == 1_000_000

    run(test)


@pytest.mark.parametrize(
    "lines",
    [
        (b"connection: upgrade", b"upgrade: h2c"),
        (b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c", b"http2-settings: AAMAAABkAAQAoAAAAAIAAAAA"),
        (b"connection: upgrade", b"upgrade: websocket"),
    ],
)
@pytest.mark.parametrize("target", [b"/plain", b"/held", b"/refuse"])
def test_a_request_to_upgrade_gets_one_answer(run, lines, target):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(get(target, *lines))
            await until(lambda: it.desk.held or client.data)
            await turns()
            for exchange in it.desk.held:
                exchange.respond(200, b"", b"")
            await until(lambda: client.data)
            it.pass_time(LINGER_S + 100)
            await client.end()
            assert len(parse(client.data)) == 1
            assert parse(client.data)[0].status != 101

    run(test)


# Expect


def test_an_accepted_body_is_asked_for(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(post(b"/x", b"abcd", b"Expect: 100-Continue")[:-4])
            assert [answer.status for answer in await client.answers(1)] == [100]
            client.send(b"abcd")
            answers = await client.answers(2)
            assert (answers[1].status, answers[1].body) == (200, b"abcd")
            client.send(get(b"/next"))
            await client.answers(3)

    run(test)


def test_a_refused_body_is_not_asked_for_and_the_connection_ends(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(post(b"/refuse", b"abcd", b"expect: 100-continue")[:-4])
            await client.end()
            (answer,) = parse(client.data)
            assert answer.status == 401
            assert answer.headers["connection"] == "close"

    run(test)


def test_a_pipelined_body_is_asked_for_when_its_turn_has_come(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(get(b"/held"), post(b"/x", b"abcd", b"expect: 100-continue")[:-4])
            await until(lambda: len(it.desk.heads) == 2)
            it.desk.held.pop().respond(200, b"", b"")
            assert [answer.status for answer in await client.answers(2)] == [200, 100]
            client.send(b"abcd")
            assert [answer.status for answer in await client.answers(3)] == [200, 100, 200]

    run(test)


def test_a_pipelined_body_that_is_refused_is_answered_when_its_turn_has_come(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(get(b"/held"), post(b"/refuse", b"abcd", b"expect: 100-continue")[:-4])
            await until(lambda: len(it.desk.heads) == 2)
            it.desk.held.pop().respond(200, b"", b"")
            await client.end()
            assert [answer.status for answer in parse(client.data)] == [200, 401]

    run(test)


# early refusals and large bodies


@pytest.mark.parametrize(
    ("target", "size", "status", "lines"),
    [
        (b"/refuse", 30_000_000, b"401", b""),
        (b"/refuse", 32 << 20, b"401", b""),
        (b"/refuse", 30_000_000, b"401", b"expect: 100-continue\r\n"),
        (b"/refuse", 30_000_000, b"401", b"connection: close\r\n"),
        (b"/plain", 33_000_000, b"200", b""),
        (b"/plain", (32 << 20) + 1, b"413", b""),
        (b"/plain", 33 << 20, b"413", b""),
        (b"/plain", 48 << 20, b"413", b""),
    ],
)
def test_a_client_that_sends_everything_before_it_reads_sees_its_refusal(run, target, size, status, lines):
    async def test():
        async with house() as it:
            head = b"POST %b%b%bcontent-length: %d\r\n\r\n" % (target, HOST, lines, size)
            data = await asyncio.to_thread(send_all_then_read, it.server.port, head, size)
            assert data.split(b" ")[1] == status, data[:200]

    run(test)


def test_a_connection_goes_on_after_a_refused_body(run):
    async def test():
        async with house() as it:
            client = await it.client()
            client.send(post(b"/refuse", b"x" * 1_000_000), chunked(b"/refuse", b"y" * 1_000_000), get(b"/next"))
            assert [answer.status for answer in await client.answers(3)] == [401, 401, 200]
            assert it.server._bodies_bytes == 0

    run(test)


def test_a_body_without_a_length_is_refused_when_it_has_grown_too_large(run):
    async def test():
        async with house(body_bytes_max=10_000) as it:
            client = await it.client()
            client.send(b"POST /x" + HOST + b"transfer-encoding: chunked\r\n\r\n")
            for _ in range(11):
                client.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
            await client.end()
            (answer,) = parse(client.data)
            assert (answer.status, answer.headers["x-code"]) == (413, "request_too_large")
            assert it.server._bodies_bytes == 0
            assert it.desk.served == []

    run(test)


def test_all_bodies_together_have_a_limit_and_one_that_does_not_fit_is_told_so(run):
    async def test():
        async with house(bodies_bytes_max=10_000) as it:
            first, second, third = await it.client(), await it.client(), await it.client()
            first.send(post(b"/held", b"x" * 8000))
            await until(lambda: it.desk.held)
            second.send(post(b"/x", b"x" * 3000))
            await second.end()
            (answer,) = parse(second.data)
            assert (answer.status, answer.headers["x-code"]) == (529, "bodies_exhausted")
            assert it.server._bodies_bytes == 8000
            it.desk.held.pop().respond(200, b"", b"")
            await first.answers(1)
            assert it.server._bodies_bytes == 0
            third.send(post(b"/x", b"x" * 3000))
            assert (await third.answers(1))[0].status == 200

    run(test)


def test_a_body_in_tiny_chunks_costs_no_more_memory_than_a_few_times_its_size():
    async def test():
        size = 200_000
        async with house() as it:
            client = await it.client()
            client.send(b"POST /x" + HOST + b"transfer-encoding: chunked\r\n\r\n")
            tracemalloc.start()
            try:
                for _ in range(size // 2000):
                    client.send(b"2\r\nab\r\n" * 1000)
                    await client.writer.drain()
                await until(lambda: it.server._bodies_bytes == size, within_s=15)
                held = sum(
                    line.size
                    for line in tracemalloc.take_snapshot().statistics("filename")
                    if line.traceback[0].filename.endswith("server.py")
                )
            finally:
                tracemalloc.stop()
            assert held < 4 * size

    run_on("uvloop", test)


# the property: whatever is asked in whatever pieces, each request is answered once, whole, in order


@st.composite
def exchanges(draw: st.DrawFn) -> list[tuple[str, bytes, str, bytes]]:
    """Requests as (method, target, framing, body)."""
    kinds = draw(st.lists(st.sampled_from(["plain", "stream", "refuse", "held", "head"]), min_size=1, max_size=24))
    requests = []
    for number, kind in enumerate(kinds):
        body = draw(st.binary(max_size=60)) if kind != "head" else b""
        framing = draw(st.sampled_from(["fixed", "chunked"])) if kind != "head" else "none"
        requests.append(("HEAD" if kind == "head" else "POST", b"/%b/%d" % (kind.encode(), number), framing, body))
    return requests


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=exchanges(),
    cuts=st.lists(st.floats(0, 1), max_size=30),
    chunk=st.integers(1, 30),
    order=st.randoms(use_true_random=False),
)
def test_each_request_is_answered_once_whole_and_in_its_order(requests, cuts, chunk, order):
    sent = b""
    for _method, target, framing, body in requests:
        if framing == "chunked":
            sent += chunked(target, *(body[at : at + chunk] for at in range(0, len(body), chunk)))
        elif framing == "fixed":
            sent += post(target, body)
        else:
            sent += b"HEAD %b%b\r\n" % (target, HOST)
    edges = sorted({0, *(int(cut * len(sent)) for cut in cuts), len(sent)})

    async def test():
        async with house() as it:
            client = await it.client()
            for begin, end in itertools.pairwise(edges):
                client.send(sent[begin:end])
                await turns(order.randint(0, 6))
                if it.desk.held and order.random() < 0.5:
                    answer_held(it)

            def whole() -> bool:
                answer_held(it)
                try:
                    return len(parse(client.data, methods)) >= len(requests)
                except (AssertionError, ValueError):
                    return False

            methods = [method for method, *_ in requests]
            await until(whole, within_s=3)
            answers = parse(client.data, methods)
            assert [answer.headers["x-target"].encode() for answer in answers] == [target for _, target, *_ in requests]
            for (_, target, _, body), answer in zip(requests, answers, strict=True):
                if target.startswith(b"/refuse"):
                    assert (answer.status, answer.body) == (401, b"refused")
                else:
                    assert (answer.status, answer.body) == (200, body)
            served = [target for _, target, *_ in requests if not target.startswith(b"/refuse")]
            assert it.desk.served == served
            assert it.server._bodies_bytes == 0

    def answer_held(it: House) -> bool:
        while it.desk.held:
            exchange = it.desk.held.pop()
            body = it.desk.bodies[it.desk.served.index(exchange.target)]
            if order.random() < 0.5:
                exchange.respond(200, b"x-target: %b\r\n" % exchange.target, body)
            else:
                exchange.start_stream(200, b"x-target: %b\r\n" % exchange.target)
                exchange.write(body[:5])
                exchange.end(body[5:])
        return False

    run_on("uvloop", test)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    junk=st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(
                [
                    get(b"/plain"),
                    post(b"/refuse", b"abc"),
                    chunked(b"/stream", b"abc"),
                    b"GET / HTTP/1.1\r\n",
                    b"POST /refuse HTTP/1.1\r\nhost: a\r\n",
                    b"GET /held HTTP/1.1\r\nhost: a\r\n",
                    b"abc",
                    b"host: a\r\n",
                    b"\r\n",
                    b"\n",
                    b"\r",
                    b"content-length: 3\r\n",
                    b"transfer-encoding: chunked\r\n",
                    b"connection: upgrade\r\nupgrade: h2c\r\n",
                    b"expect: 100-continue\r\n",
                    b"connection: close\r\n",
                    b"0\r\n\r\n",
                    b"fffffffffffffffff\r\n",
                    b" folded\r\n",
                ]
            ),
        ),
        max_size=12,
    )
)
def test_whatever_bytes_come_the_answers_are_whole_and_no_more_than_the_heads(junk):
    async def test():
        async with house() as it:
            client = await it.client()
            for piece in junk:
                client.send(piece)
                await turns(3)
                while len(it.desk.held) > 1:
                    it.desk.held.pop(0).respond(200, b"", b"late")
            await turns()
            while it.desk.held:
                it.desk.held.pop(0).respond(200, b"", b"late")
            await turns()
            it.pass_time(1000)
            it.pass_time(1000)
            it.pass_time(1000)
            await client.end()
            final = [answer for answer in parse(client.data) if answer.status >= 200]
            assert len(final) <= len(it.desk.heads) + 1, "more answers than requests and one refusal"
            assert all(answer.status < 500 or answer.status == 505 for answer in final)

    run_on("uvloop", test)
