"""A client that leaves costs what was produced for it and nothing more, and one that reads slowly harms nobody.

Design §5.4, failure-model §2.2 and §3.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.system.conftest import Gateway, Simulator, Stack, until
from tests.system.scripted import (
    EVENT_STREAM_HEAD,
    FRAMES,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    SHORT_STREAM,
    WHOLE,
    Act,
    Books,
    Play,
    ScriptedUpstream,
    app_key,
    body_of,
    chunked_head,
    chunks,
    connect,
    failing,
    fetch,
    gather,
    head_of,
    read_head,
)

pytestmark = pytest.mark.alone

CLOSED_WITHIN_S = 0.25
"""Design §5.4: from a client's leaving to the upstream connection's end."""
POINTS = 200


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    scripted = ScriptedUpstream()
    yield scripted
    scripted.close()


@pytest.fixture(scope="module")
def gateway(shared_stack: Stack, upstream: ScriptedUpstream) -> Gateway:
    return shared_stack.gateway(
        upstream.url,
        UPSTREAM__BACKGROUND_TIMEOUT_S="1.5",
        SERVER__WRITE_TIMEOUT_S="3",
    )


@pytest.fixture(scope="module")
def key(gateway: Gateway) -> str:
    return app_key(gateway)


@pytest.fixture(scope="module")
def books(gateway: Gateway, key: str) -> Books:
    return Books(gateway, key)


@pytest.fixture(scope="module")
def simulator(shared_stack: Stack) -> Simulator:
    return shared_stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0.02", "--otps", "250")


@pytest.fixture(scope="module")
def paced(shared_stack: Stack, simulator: Simulator) -> tuple[Gateway, str, Books]:
    """A gateway before an API that takes its time."""
    gateway = shared_stack.gateway(simulator.url)
    key = app_key(gateway)
    return gateway, key, Books(gateway, key)


async def ask(url: str, key: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request and read nothing."""
    reader, writer = await connect(url)
    writer.write(head_of(url, key, len(body)) + body)
    await writer.drain()
    return reader, writer


def leave(writer: asyncio.StreamWriter, *, rudely: bool) -> float:
    """Close the connection, by RST if rudely; returns the moment."""
    if rudely:
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    at = time.monotonic()
    writer.transport.abort()
    return at


def leave_when_seen(gateway: Gateway, key: str, upstream: ScriptedUpstream, names: list[str], **more: Any) -> float:
    """Make these calls and leave all of them as soon as the upstream has got every one; returns the moment."""

    async def run() -> float:
        connections = [await ask(gateway.url, key, body_of(name, **more)) for name in names]
        async with asyncio.timeout(10):
            while not all(upstream.attempts(name) for name in names):  # noqa: ASYNC110  it is on another thread
                await asyncio.sleep(0.005)
        return [leave(writer, rudely=False) for _, writer in connections][-1]

    return asyncio.run(run())


# streams


def prompt(tokens: int, words: str = "Kể cho tôi nghe về Hà Nội") -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{words} [[sim: tokens={tokens}]]"}]


def test_a_client_cut_at_every_event_and_within_events_closes_upstream_and_pays_what_was_produced(
    paced, simulator, capsys, sdk
):
    gateway, key, books = paced
    client = sdk(gateway.url, key)
    # What a token weighs in bytes is learned from whole answers.
    for _ in range(5):
        with client.messages.stream(model="claude-sonnet-4-6", max_tokens=1000, messages=prompt(320)) as stream:
            stream.until_done()

    async def cut_at(point: int) -> tuple[str, float]:
        """Leave after `point` events; every second time in the middle of the one after it."""
        name = f"leaver-{point}"
        reader, writer = await ask(gateway.url, key, body_of(name, max_tokens=1000, messages=prompt(320)))
        status, _ = await read_head(reader)
        assert status == 200
        for _ in range(point // 2 + 1):
            await reader.readuntil(b"\n\n")
        if point % 2:
            await reader.readexactly(20)
        return name, leave(writer, rudely=point % 4 > 1)

    left = dict(asyncio.run(gather((cut_at(point) for point in range(POINTS)), at_once=25)))
    rows = books.of_users(left)
    requests = {request["request_id"]: request for request in simulator.requests()}
    closed_s, wrong, token_errors, cost, billed_cost = [], [], [], 0, 0
    for name, left_at in left.items():
        row = rows[name]
        (attempt,) = row["attempts"]
        request = requests[attempt["upstream_request_id"]]
        assert (request["end"], row["outcome"], row["state"]) == ("client_left", "abandoned", "estimated")
        closed_s.append(request["client_closed_s"] - left_at)
        assert row["input_tokens"] == request["usage"]["input_tokens"]
        token_error = abs(row["output_tokens"] - request["usage"]["output_tokens"])
        token_errors.append(token_error)
        cost_error = abs(row["cost_nanousd"] / request["cost_nanousd"] - 1)
        # Within a tenth (failure-model §2.2); of thirty words four may be longer or shorter than the average.
        if cost_error > 0.1 and token_error > 4:
            wrong.append((name, row["output_tokens"], request["usage"]["output_tokens"], cost_error))
        cost += row["cost_nanousd"]
        billed_cost += request["cost_nanousd"]
    closed_s.sort()
    p50_ms, p99_ms = (1000 * closed_s[len(closed_s) * percent // 100] for percent in (50, 99))
    with capsys.disabled():
        print(  # noqa: T201  a drill's figures are read by people
            f"\n{POINTS} clients left: upstream closed p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms; "
            f"cost {100 * (cost / billed_cost - 1):+.2f} % of the bill, worst call {max(token_errors)} tokens off"
        )
    assert closed_s[0] >= 0
    assert p99_ms <= 1000 * CLOSED_WITHIN_S
    assert abs(cost - billed_cost) <= 0.03 * billed_cost
    assert wrong == []


def test_two_hundred_clients_leaving_at_once_leave_nothing_upstream(paced, simulator):
    gateway, key, books = paced
    names = [f"crowd-{number}" for number in range(200)]

    async def run() -> None:
        writers = []
        for name in names:
            reader, writer = await ask(gateway.url, key, body_of(name, max_tokens=5000, messages=prompt(5000)))
            writers.append((reader, writer))
        for reader, _ in writers:
            await reader.readuntil(b"content_block_delta")
        assert simulator.streams()["count"] == len(names)
        for _, writer in writers:
            leave(writer, rudely=False)

    asyncio.run(run())
    until(lambda: simulator.streams()["count"] == 0, within_s=1.0, what="no stream upstream")
    rows = books.of_users(names)
    assert {row["state"] for row in rows.values()} == {"estimated"}


def test_leaving_the_sdk_stream_closes_upstream(paced, simulator, sdk):
    gateway, key, _ = paced
    client = sdk(gateway.url, key)
    with client.messages.stream(model="claude-sonnet-4-6", max_tokens=5000, messages=prompt(5000)) as stream:
        for event in stream:
            if event.type == "text":
                break
        assert simulator.streams()["count"] == 1
    client.close()
    until(lambda: simulator.streams()["count"] == 0, within_s=1.0, what="no stream upstream")


def test_a_client_that_leaves_a_stream_before_it_begins_closes_upstream_and_pays_for_its_input(
    gateway, key, books, upstream
):
    name = upstream.plan((Act.HANG,))
    left_at = leave_when_seen(gateway, key, upstream, [name])
    row = books.of_users([name])[name]
    (attempt,) = upstream.attempts(name)
    assert attempt.closed_at - left_at <= CLOSED_WITHIN_S
    assert (row["outcome"], row["state"], row["status"]) == ("abandoned", "estimated", 499)
    assert (row["input_tokens"] > 0, row["output_tokens"]) == (True, 0)


def test_a_client_that_leaves_while_events_are_held_pays_the_exact_input(gateway, key, books, upstream):
    name = upstream.plan((chunked_head() + chunks(FRAMES[0]), Act.HANG))

    async def run() -> None:
        _, writer = await ask(gateway.url, key, body_of(name))
        until(lambda: upstream.attempts(name))
        # A round trip on another connection: what was sent before it has been read.
        await fetch(gateway.url, key, body_of("no play"))
        leave(writer, rudely=False)

    asyncio.run(run())
    row = books.of_users([name])[name]
    assert (row["outcome"], row["input_tokens"]) == ("abandoned", INPUT_TOKENS)
    until(lambda: upstream.attempts(name)[0].closed_at, within_s=1.0, what="upstream closed")


# waiting


def test_a_client_that_leaves_in_backoff_has_no_further_attempt(gateway, key, books, upstream):
    refused = failing(429, "rate_limit_error", headers=b"retry-after: 1\r\n")
    gone, stays = upstream.plan(refused), upstream.plan(refused, WHOLE)
    leave_when_seen(gateway, key, upstream, [gone], stream=False)
    row = books.of_users([gone])[gone]
    assert (row["outcome"], row["state"], len(row["attempts"])) == ("abandoned", "void", 1)
    assert asyncio.run(fetch(gateway.url, key, body_of(stays, stream=False))).status == 200
    assert len(upstream.attempts(stays)) == 2
    assert len(upstream.attempts(gone)) == 1, "its second attempt would have been due before the other's"


def test_a_client_that_leaves_a_whole_answer_pays_exactly_what_it_cost(gateway, key, books, upstream):
    """It is billed in full anyway; up to 32 are read on, what is beyond is closed."""
    names = [upstream.plan((1.0, *WHOLE)) for _ in range(40)]
    left_at = leave_when_seen(gateway, key, upstream, names, stream=False)
    rows = books.of_users(names)
    settled = [name for name in names if rows[name]["state"] == "settled"]
    closed = [name for name in names if rows[name]["state"] == "estimated"]
    assert (len(settled), len(closed)) == (32, 8)
    assert {row["outcome"] for row in rows.values()} == {"abandoned"}
    for name in settled:
        assert (rows[name]["input_tokens"], rows[name]["output_tokens"]) == (INPUT_TOKENS, OUTPUT_TOKENS)
    for name in closed:
        assert upstream.attempts(name)[0].closed_at - left_at <= CLOSED_WITHIN_S
        assert rows[name]["cost_nanousd"] > 0


def test_an_answer_that_nobody_waits_for_is_read_no_longer_than_its_limit(gateway, key, books, upstream):
    name = upstream.plan((Act.HANG,))
    left_at = leave_when_seen(gateway, key, upstream, [name], stream=False)
    row = books.of_users([name])[name]
    assert (row["outcome"], row["state"]) == ("abandoned", "estimated")
    assert 1.5 <= upstream.attempts(name)[0].closed_at - left_at <= 1.5 + 0.7


def test_a_failed_answer_that_nobody_waits_for_is_not_tried_again(gateway, key, books, upstream):
    name = upstream.plan((0.3, *failing(500, "api_error")), WHOLE)
    leave_when_seen(gateway, key, upstream, [name], stream=False)
    row = books.of_users([name])[name]
    assert (row["outcome"], row["state"], len(row["attempts"])) == ("abandoned", "void", 1)
    assert len(upstream.attempts(name)) == 1


def test_a_client_that_leaves_before_its_request_is_whole_makes_no_call(gateway, key, books, upstream):
    name = upstream.plan(WHOLE)

    async def run() -> None:
        body = body_of(name)
        _, writer = await connect(gateway.url)
        writer.write(head_of(gateway.url, key, len(body)) + body[:-1])
        await writer.drain()
        await fetch(gateway.url, key, body_of("no play"))
        leave(writer, rudely=False)
        await fetch(gateway.url, key, body_of("no play"))

    asyncio.run(run())
    assert not upstream.attempts(name)
    assert name not in {call["user"] for call in books.newest()}


def test_a_client_that_leaves_takes_its_pipelined_requests_with_it(gateway, key, books, upstream):
    first, second = upstream.plan((Act.HANG,)), upstream.plan(WHOLE)

    async def run() -> None:
        _, writer = await connect(gateway.url)
        for name in (first, second):
            body = body_of(name)
            writer.write(head_of(gateway.url, key, len(body)) + body)
        await writer.drain()
        until(lambda: upstream.attempts(first))
        leave(writer, rudely=False)

    asyncio.run(run())
    assert books.of_users([first])[first]["outcome"] == "abandoned"
    assert not upstream.attempts(second)


# slow readers

LONG_FRAME = FRAMES[2].replace(b"Xin", b"Xin " * 16_000)
LONG_PIECE = chunks(LONG_FRAME)
LONG: Play = (chunked_head(head=EVENT_STREAM_HEAD) + chunks(*FRAMES[:2]), *(LONG_PIECE,) * 150, Act.HANG)
"""More than what kernels and the gateway may hold for a reader that does not read."""


def rss_kib(gateway: Gateway) -> int:
    """Resident memory of a gateway."""
    with open(f"/proc/{gateway.process.popen.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def test_a_hundred_stalled_readers_cost_little_memory_harm_nobody_and_are_ended(gateway, key, books, upstream, capsys):
    assert len(LONG_PIECE) * 150 > 8 << 20
    names = [upstream.plan(LONG) for _ in range(100)]
    host, port = urlsplit(gateway.url).hostname, urlsplit(gateway.url).port
    before_kib = rss_kib(gateway)

    async def healthy() -> list[float]:
        times = []
        for _ in range(100):
            reply = await fetch(gateway.url, key, body_of("no play"))
            assert (reply.status, reply.body) == (200, SHORT_STREAM)
            times.append(reply.elapsed_s)
        return sorted(times)

    calm_s = asyncio.run(healthy())
    readers = []
    for name in names:
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((host, port))
        body = body_of(name)
        reader.sendall(head_of(gateway.url, key, len(body)) + body)
        readers.append(reader)
    began_at = time.monotonic()
    until(lambda: all(upstream.attempts(name) for name in names), what="all streams to have begun")
    busy_s = asyncio.run(healthy())
    grown_kib = rss_kib(gateway) - before_kib
    until(lambda: all(upstream.attempts(name)[0].closed_at for name in names), within_s=8, what="all to be ended")
    ended_s = [upstream.attempts(name)[0].closed_at - began_at for name in names]
    rows = books.of_users(names)
    with capsys.disabled():
        print(  # noqa: T201  a drill's figures are read by people
            f"\n100 stalled readers: {grown_kib / 1024:.1f} MB; healthy p50 {1000 * statistics.median(calm_s):.1f} → "
            f"{1000 * statistics.median(busy_s):.1f} ms, p99 {1000 * calm_s[98]:.1f} → {1000 * busy_s[98]:.1f} ms; "
            f"ended after {min(ended_s):.2f} to {max(ended_s):.2f} s"
        )
    assert grown_kib <= 60 << 10
    # The readers' upstream runs in this very process, so the last percent is its noise as much as the gateway's.
    assert busy_s[89] <= 3 * calm_s[89] + 0.1
    assert min(ended_s) >= 2.5
    assert {(row["outcome"], row["state"], row["input_tokens"]) for row in rows.values()} == {
        ("abandoned", "estimated", INPUT_TOKENS)
    }
    for reader in readers:
        reader.close()


def test_a_reader_that_catches_up_gets_every_byte(gateway, key, books, upstream):
    """Backpressure, not loss: stopped for longer than the buffers last, and then read to the end."""
    rest = b"".join(FRAMES[8:])
    name = upstream.plan(
        (chunked_head() + chunks(*FRAMES[:2]), *(LONG_PIECE,) * 150, chunks(rest) + b"0\r\n\r\n", Act.KEEP)
    )

    async def run() -> bytes:
        reader, writer = await ask(gateway.url, key, body_of(name))
        await read_head(reader)
        # Others are served while this one is not read.
        await gather(fetch(gateway.url, key, body_of("no play")) for _ in range(50))
        pieces = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            pieces.append((await reader.readexactly(size + 2))[:-2])
        leave(writer, rudely=False)
        return b"".join(pieces)

    assert asyncio.run(run()) == b"".join(FRAMES[:2]) + LONG_FRAME * 150 + rest
    assert books.of_users([name])[name]["outcome"] == "completed"


def test_the_log_has_one_line_for_each_call_that_was_left(gateway, books):
    """Runs last in this file: what the ledger says, the log says."""
    rows = {call["call_id"]: call for call in books.newest() if call["outcome"] == "abandoned"}
    lines = [line for line in gateway.process.lines(event="call") if line["call_id"] in rows]
    assert len(lines) == len(rows) > 0
    for line in lines:
        row = rows[line["call_id"]]
        assert (line["outcome"], line["status"], line["error_code"]) == ("abandoned", 499, "client_left")
        assert line["cost_nanousd"] == row["cost_nanousd"], json.dumps(line)
