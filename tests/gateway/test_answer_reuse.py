"""Answers given a second time, over real sockets and real stores: by whom, for how long, and what a bad store costs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import msgspec
import pytest
from tests.storage.redis_server import RedisServer

from headgate.gateway import answer_reuse
from headgate.gateway.answer_reuse import AWAY_S, PIECE_BYTES, SWEEP_EVERY_S, AnswerReuse, Delivery, ReuseKey
from headgate.gateway.server import WRITE_BUFFER_BYTES, Exchange, Server
from headgate.gateway.settings import ServerSection
from headgate.gateway.tasks import Tasks
from headgate.policy.answer_reuse import ANSWER_BYTES_MAX, ReuseRule
from headgate.policy.records import ClientRequest, Plan
from headgate.storage.answers import FILE_NAME, Answers, Held, SqliteAnswers
from headgate.storage.redis_answers import RedisAnswers
from headgate.wire import sse
from headgate.wire.catalog import packaged
from headgate.wire.message import scan
from headgate.wire.usage import Usage

CATALOG = packaged()
MODEL = "claude-haiku-4-5"
BODY = b'{"model":"claude-haiku-4-5","max_tokens":100,"stream":true,"messages":[]}'
WHOLE_BODY = BODY.replace(b'"stream":true', b'"stream":false')
MESSAGE = (
    b'{"type":"message","model":"claude-haiku-4-5","stop_reason":"end_turn","content":[{"type":"text","text":"a"}]}'
)
COST = 44_000
RULES = {"faq": ReuseRule(ttl_s=60.0), "shared": ReuseRule(ttl_s=60.0, shared_by_users=True)}


def on_a_loop(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(**fixtures: object) -> None:
        asyncio.run(test(**fixtures))

    return run


def stream(text: str = "Chào bạn", count: int = 2, stop_reason: str = "end_turn") -> list[bytes]:
    """The frames of a whole stream."""

    def frame(event: str, **fields: object) -> bytes:
        return sse.frame(event.encode(), msgspec.json.encode({"type": event, **fields}))

    delta = frame("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
    return [
        frame("message_start", message={"id": "msg_1", "model": MODEL, "usage": {"input_tokens": 9}}),
        frame("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *[delta] * count,
        frame("content_block_stop", index=0),
        frame("message_delta", delta={"stop_reason": stop_reason}, usage={"output_tokens": 7}),
        frame("message_stop"),
    ]


class Clocks:
    """Both clocks; they pass when the test says so."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def monotonic(self) -> float:
        return 1_000.0 + self.passed_s

    def utc_ns(self) -> int:
        return 1_785_000_000_000_000_000 + int(self.passed_s * 1e9)


class SlowAnswers:
    """A store that says nothing until it is let go."""

    def __init__(self) -> None:
        self.asked = 0

    async def get(self, key: str, *, owner: str) -> bytes | None:
        self.asked += 1
        await asyncio.Event().wait()
        return None

    async def put(self, key: str, record: bytes, *, owner: str, ttl_s: float) -> bool:
        return True

    async def purge(self, owner: str | None) -> int:
        return 0

    async def expire(self) -> None:
        pass

    async def held(self) -> Held:
        return Held(0, 0)

    async def close(self) -> None:
        pass


class Bench:
    """Reuse over a store, with what a call does of it."""

    def __init__(self, answers: Answers) -> None:
        self.clocks = Clocks()
        self.crashes: list[BaseException] = []
        self.tasks = Tasks(self.crashes.append)
        self.reuse = AnswerReuse(
            answers,
            RULES,
            upstream="https://api.anthropic.com",
            catalog=CATALOG,
            tasks=self.tasks,
            clock=self.clocks.monotonic,
            now_ns=self.clocks.utc_ns,
        )

    def key(
        self,
        *,
        endpoint: str = "faq",
        user: str = "an",
        key_id: str = "key00001",
        body: bytes = BODY,
        model: str = MODEL,
        query: bytes = b"",
        version: bytes = b"2023-06-01",
    ) -> ReuseKey | None:
        request = ClientRequest("call_1", body, b"anthropic-version: %b\r\n" % version, query, 0.0, 0)
        scanned = scan(body)
        plan = Plan((model,), body, scanned.stream, 10, 100, 1.0)
        return self.reuse.key(endpoint, request, scanned, plan, key_id=key_id, user=user)

    def must(self, **fields) -> ReuseKey:
        key = self.key(**fields)
        assert key is not None
        return key

    async def keep(self, key: ReuseKey, parts: list[bytes] | None = None, **fields) -> None:
        recorder = self.reuse.recorder(key)
        for part in parts or (stream() if key.streamed else [MESSAGE]):
            recorder.write(part)
        recorder.keep(**self.end(**fields))
        recorder.drop()
        await self.tasks.join(5.0)
        assert self.crashes == []
        assert self.reuse.recording_bytes == 0

    def end(self, **fields) -> dict:
        return {
            "served": MODEL,
            "stop_reason": "end_turn",
            "content_type": b"text/event-stream; charset=utf-8",
            "request_id": "req_1",
            "usage": Usage(input_tokens=9, output_tokens=7),
            "cost_nanousd": COST,
            **fields,
        }

    async def hits(self, **fields) -> bool:
        key = self.key(**fields)
        return key is not None and await self.reuse.find(key) is not None

    def not_kept(self) -> dict[str, int]:
        return dict(self.reuse.counts().not_kept)


@contextlib.asynccontextmanager
async def benched(folder: Path) -> AsyncIterator[Bench]:
    answers = SqliteAnswers(folder / FILE_NAME, bytes_max=8 << 20, now_ns=Clocks().utc_ns)
    bench = Bench(answers)
    answers._now_ns = bench.clocks.utc_ns
    try:
        yield bench
    finally:
        await bench.tasks.join(5.0)
        await bench.reuse.close()


# Who gets whose answer


@on_a_loop
async def test_the_same_request_of_the_same_person_is_answered_again_and_no_other(tmp_path: Path) -> None:
    async with benched(tmp_path) as bench:
        assert not await bench.hits()
        await bench.keep(bench.must())
        found = await bench.reuse.find(bench.must())
        assert found is not None
        assert found.answer.body == b"".join(stream())
        assert found.answer.cost_nanousd == COST
        others = [
            {"user": "binh"},
            {"key_id": "key00002"},
            {"model": "claude-sonnet-4-6"},
            {"query": b"beta=true"},
            {"version": b"2024-01-01"},
            {"body": WHOLE_BODY},
            {"body": BODY + b" "},
        ]
        for other in others:
            assert not await bench.hits(**other), other
        counts = bench.reuse.counts()
        assert (counts.hits, counts.misses, counts.stored, counts.saved_nanousd) == (1, 1 + len(others), 1, COST)
        assert counts.stored_bytes > len(found.answer.body)


@on_a_loop
async def test_users_share_answers_only_where_the_owner_says_so(tmp_path: Path) -> None:
    async with benched(tmp_path) as bench:
        await bench.keep(bench.must(endpoint="shared"))
        assert await bench.hits(endpoint="shared", user="binh")
        assert not await bench.hits(endpoint="faq")
        assert not await bench.hits(endpoint="shared", key_id="key00002")


@on_a_loop
async def test_an_endpoint_that_nobody_switched_on_is_left_alone(tmp_path: Path) -> None:
    async with benched(tmp_path) as bench:
        assert bench.reuse.wanted("faq")
        assert not bench.reuse.wanted("messages")
        assert bench.key(endpoint="messages") is None
        await bench.keep(bench.must())
        bench.reuse.rules = {}
        assert bench.key() is None, "switched off while it runs"


@on_a_loop
async def test_a_request_that_is_none_for_reuse_has_no_key(tmp_path: Path) -> None:
    async with benched(tmp_path) as bench:
        assert bench.key(body=BODY.replace(b"100", b"0")) is None
        assert bench.key(body=BODY[:-1] + b',"container":"c"}') is None
        assert bench.not_kept() == {"max_tokens": 1, "server_state": 1}


@on_a_loop
async def test_an_answer_is_as_old_as_the_rule_allows(tmp_path: Path) -> None:
    async with benched(tmp_path) as bench:
        await bench.keep(bench.must())
        bench.clocks.passed_s = 59.0
        found = await bench.reuse.find(bench.must())
        assert found is not None
        assert found.age_s == 59.0
        bench.reuse.rules = {"faq": ReuseRule(ttl_s=30.0)}
        assert not await bench.hits(), "a rule that was made shorter holds for what is there"
        bench.reuse.rules = RULES
        bench.clocks.passed_s = 60.0
        assert not await bench.hits()


@on_a_loop
async def test_what_is_over_its_time_is_removed_without_any_call(tmp_path: Path) -> None:
    async with benched(tmp_path) as bench:
        await bench.keep(bench.must())
        bench.clocks.passed_s = 61.0
        for _ in range(3):
            bench.reuse.tick(bench.clocks.monotonic())
        assert len(bench.tasks) == 1
        await bench.tasks.join(5.0)
        assert rows(tmp_path) == []
        bench.reuse.tick(bench.clocks.monotonic() + SWEEP_EVERY_S - 0.1)
        assert len(bench.tasks) == 0


def rows(folder: Path, statement: str = "SELECT owner FROM answers") -> list[tuple]:
    with contextlib.closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as connection:
        return connection.execute(statement).fetchall()


# What is kept


@on_a_loop
async def test_what_is_not_kept_is_counted_by_its_reason(tmp_path: Path) -> None:
    async with benched(tmp_path) as bench:
        key = bench.must()
        for stop_reason in ("refusal", "max_tokens", "tool_use", "pause_turn"):
            await bench.keep(key, stop_reason=stop_reason)
        await bench.keep(key, served="claude-sonnet-4-6")
        await bench.keep(key, usage=Usage(web_search_requests=1))
        await bench.keep(key, stream()[:-1])
        await bench.keep(key, stream(stop_reason="refusal"))
        assert bench.not_kept() == {
            "stop_reason:refusal": 1,
            "stop_reason:max_tokens": 1,
            "stop_reason:tool_use": 1,
            "stop_reason:pause_turn": 1,
            "stop_reason:other": 1,
            "fallback": 1,
            "server_tools": 1,
            "not_whole": 1,
        }
        assert not await bench.hits()
        assert bench.reuse.counts().stored == 0


@on_a_loop
async def test_a_recording_that_grows_too_long_is_let_go_at_once(tmp_path: Path) -> None:
    async with benched(tmp_path) as bench:
        recorder = bench.reuse.recorder(bench.must())
        recorder.write(bytes(ANSWER_BYTES_MAX))
        assert bench.reuse.recording_bytes == ANSWER_BYTES_MAX
        recorder.write(b"a")
        assert bench.reuse.recording_bytes == 0
        recorder.write(b"b")
        recorder.keep(**bench.end())
        assert len(bench.tasks) == 0
        assert bench.not_kept() == {"answer_too_large": 1}


@on_a_loop
async def test_all_recordings_together_have_a_bound_and_give_back_what_they_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_reuse, "RECORDING_BYTES_MAX", 1_000)
    async with benched(tmp_path) as bench:
        one, other = bench.reuse.recorder(bench.must()), bench.reuse.recorder(bench.must(user="binh"))
        one.write(bytes(600))
        other.write(bytes(400))
        other.write(b"a")
        assert bench.reuse.recording_bytes == 600
        for _ in range(2):
            one.drop()
            other.drop()
        assert bench.reuse.recording_bytes == 0
        assert bench.not_kept() == {"recording_full": 1}
        parts = stream()
        third = bench.reuse.recorder(bench.must())
        for part in parts:
            third.write(part)
        third.keep(**bench.end())
        third.drop()
        assert bench.reuse.recording_bytes == len(b"".join(parts)), "counted until it is put away"
        await bench.tasks.join(5.0)
        assert bench.reuse.recording_bytes == 0
        assert await bench.hits()


@on_a_loop
async def test_a_purge_reaches_also_what_is_on_its_way(tmp_path: Path) -> None:
    async with benched(tmp_path) as bench:
        await bench.keep(bench.must())
        await bench.keep(bench.must(key_id="key00002"))
        recorder = bench.reuse.recorder(bench.must())
        for part in stream():
            recorder.write(part)
        assert await bench.reuse.purge("key00001") == 1
        recorder.keep(**bench.end())
        await bench.tasks.join(5.0)
        assert bench.not_kept() == {"purged": 1}
        assert not await bench.hits()
        assert await bench.hits(key_id="key00002")
        assert await bench.reuse.purge(None) == 1
        assert rows(tmp_path) == []


# Bad stores


@on_a_loop
async def test_a_damaged_record_is_a_miss_and_is_replaced(tmp_path: Path) -> None:
    async with benched(tmp_path) as bench:
        await bench.keep(bench.must())
        rows(
            tmp_path,
            "UPDATE answers SET record = CAST(substr(record, 1, 99) || 'damage' || substr(record, 106) AS BLOB)",
        )
        assert not await bench.hits()
        rows(tmp_path, "UPDATE answers SET record = x''")
        assert not await bench.hits()
        assert bench.reuse.counts().damaged == 2
        await bench.keep(bench.must())
        assert await bench.hits()


@on_a_loop
async def test_a_record_in_anothers_place_is_a_miss(tmp_path: Path) -> None:
    async with benched(tmp_path) as bench:
        await bench.keep(bench.must(user="binh"))
        rows(tmp_path, f"UPDATE answers SET key = '{bench.must().digest}'")
        assert not await bench.hits()
        assert bench.reuse.counts().damaged == 1


@on_a_loop
async def test_a_store_that_is_slow_is_a_miss_and_is_left_alone_for_a_second() -> None:
    answers = SlowAnswers()
    bench = Bench(answers)
    began = time.monotonic()
    assert not await bench.hits()
    assert 0.04 < time.monotonic() - began < 0.5
    assert not await bench.hits()
    assert answers.asked == 1
    await bench.keep(bench.must())
    assert bench.not_kept() == {"store_away": 1}
    bench.clocks.passed_s += AWAY_S
    assert not await bench.hits()
    assert answers.asked == 2
    assert bench.reuse.counts().unavailable == 2
    assert bench.reuse.counts().misses == 3


@on_a_loop
async def test_a_redis_that_was_killed_or_frozen_is_a_quick_miss(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    bench = Bench(RedisAnswers(server.url, bytes_max=1 << 20))
    try:
        await bench.keep(bench.must())
        assert await bench.hits()
        server.freeze()
        began = time.monotonic()
        assert not await bench.hits()
        assert time.monotonic() - began < 0.2
        server.thaw()
        bench.clocks.passed_s += AWAY_S
        assert await bench.hits()
        server.kill()
        began = time.monotonic()
        assert not await bench.hits()
        assert not await bench.hits()
        assert time.monotonic() - began < 0.2
        await bench.keep(bench.must())
        bench.clocks.passed_s += AWAY_S
        server.start()
        await bench.keep(bench.must())
        assert await bench.hits()
    finally:
        await bench.reuse.close()
        server.kill()


@on_a_loop
async def test_a_place_that_cannot_be_written_costs_no_call_anything(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with benched(tmp_path / "file") as bench:
        assert not await bench.hits()
        bench.clocks.passed_s += AWAY_S
        await bench.keep(bench.must())
        bench.reuse.tick(bench.clocks.monotonic())
        await bench.tasks.join(5.0)
        assert bench.crashes == []
        assert bench.reuse.counts().unavailable == 3


# Giving back, over sockets


class Desk:
    """An app that gives one answer to every request."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.key = bench.must()
        self.exchange: Exchange | None = None
        self.delivery: Delivery | None = None
        self.ends: list[bool] = []

    def head(self, exchange: Exchange) -> None:
        pass

    def request(self, exchange: Exchange) -> None:
        exchange.drop_body()
        self._bench.tasks.start(self._serve(exchange))

    async def _serve(self, exchange: Exchange) -> None:
        found = await self._bench.reuse.find(self.key)
        assert found is not None
        self.exchange = exchange
        self.delivery = Delivery(exchange, found, call_id="call_2", more_lines=b"x-more: 1\r\n")
        self.ends.append(await self.delivery.run())

    def refusal(self, exchange: Exchange | None, status: int, code: str, message: str) -> tuple[bytes, bytes]:
        return b"", b""


@contextlib.asynccontextmanager
async def served(folder: Path, parts: list[bytes], **fields) -> AsyncIterator[tuple[Desk, socket.socket]]:
    """A desk that gives these parts back, and a client that has asked for them and has read nothing yet."""
    async with benched(folder) as bench:
        await bench.keep(bench.must(**fields), parts)
        desk = Desk(bench)
        desk.key = bench.must(**fields)
        server = Server(desk, ServerSection(), clock=bench.clocks.monotonic)
        await server.listen("127.0.0.1", 0)
        # Or the kernel would take a whole answer off our hands.
        server._listener.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", server.port))
            head = b"POST /v1/messages HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            await asyncio.get_running_loop().sock_sendall(client, head)
            yield desk, client
        finally:
            client.close()
            server.stop_accepting()
            server.abort_all()


async def read_all(client: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of the response, to the end of the connection."""
    data = b""
    async with asyncio.timeout(10.0):
        while piece := await asyncio.get_running_loop().sock_recv(client, 1 << 16):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head:
        whole = b""
        while body:
            size, _, rest = body.partition(b"\r\n")
            whole += rest[: int(size, 16)]
            body = rest[int(size, 16) + 2 :]
        body = whole
    return head, body


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.005)


@on_a_loop
async def test_a_stream_comes_back_as_it_was(tmp_path: Path) -> None:
    parts = stream()
    async with served(tmp_path, parts) as (desk, client):
        head, body = await read_all(client)
        assert body == b"".join(parts)
        assert desk.ends == [True]
        assert head.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n")
        lines = head.split(b"\r\n")
        assert {b"request-id: req_1", b"x-headgate-call: call_2", b"x-headgate-reuse: age=0s", b"x-more: 1"} <= {*lines}
        assert b"x-headgate-cost-usd: 0.000000000" in lines


@on_a_loop
async def test_a_whole_answer_comes_back_as_it_was(tmp_path: Path) -> None:
    async with served(tmp_path, [MESSAGE], body=WHOLE_BODY) as (desk, client):
        head, body = await read_all(client)
        assert body == MESSAGE
        assert b"content-length: %d" % len(MESSAGE) in head
        assert desk.ends == [True]


LONG = stream("a" * 900, 1_000)
"""Just below a mebibyte."""


@on_a_loop
async def test_a_client_that_reads_slowly_is_waited_for_and_gets_it_all(tmp_path: Path) -> None:
    async with served(tmp_path, LONG) as (desk, client):
        await until(lambda: desk.delivery is not None and desk.delivery._paused)
        assert desk.ends == []
        buffered = desk.exchange._connection._transport.get_write_buffer_size()
        assert WRITE_BUFFER_BYTES < buffered <= WRITE_BUFFER_BYTES + PIECE_BYTES + 4_096
        _, body = await read_all(client)
        assert body == b"".join(LONG)
        assert desk.ends == [True]


@on_a_loop
async def test_a_client_that_leaves_ends_it(tmp_path: Path) -> None:
    async with served(tmp_path, LONG) as (desk, client):
        await until(lambda: desk.delivery is not None and desk.delivery._paused)
        client.close()
        await until(lambda: desk.ends)
        assert desk.ends == [False]


@on_a_loop
async def test_a_stream_that_is_interrupted_ends_with_an_error_between_two_events(tmp_path: Path) -> None:
    async with served(tmp_path, LONG) as (desk, client):
        await until(lambda: desk.delivery is not None and desk.delivery._paused)
        error = sse.frame(b"error", b'{"type":"error"}')
        desk.delivery.interrupt(error)
        _, body = await read_all(client)
        assert desk.ends == [False]
        assert body.endswith(b"}\n\n" + error)
        assert b"".join(LONG).startswith(body.removesuffix(error))
