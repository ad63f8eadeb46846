"""A server that does exactly what a script says, and the HTTP client before it, with a clock by hand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import uvloop

from headgate.gateway.settings import UpstreamSection
from headgate.gateway.upstream import Answer, Upstream
from headgate.policy.records import Failure

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
SECRET = b"sk-ant-only-for-the-right-ears"
REQUEST = b"POST /v1/messages HTTP/1.1\r\nhost: up\r\nx-api-key: %b\r\ncontent-length: 2\r\n\r\n{}" % SECRET
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Line:
    """The server's side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: bytearray) -> None:
        self._reader = reader
        self.writer = writer
        self._received = received
        self._buffer = b""

    async def request(self) -> bytes:
        """The next request, whole."""
        while REQUEST not in self._buffer:
            piece = await self._reader.read(65536)
            if not piece:
                raise ConnectionError("the client closed")
            self._received += piece
            self._buffer += piece
        request, _, self._buffer = self._buffer.partition(REQUEST)
        assert not request, f"bytes between requests: {request[:100]!r}"
        return REQUEST

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)

    async def closed(self) -> None:
        """Wait until the client has closed."""
        with contextlib.suppress(OSError):
            while piece := await self._reader.read(65536):
                self._received += piece

    def reset(self) -> None:
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Line, int], Awaitable[None]]
"""What happens on a connection; it is told the connection's number, from 1."""


@dataclass
class Sink:
    """Keeps what it hears, and can act at the end."""

    data: bytearray = field(default_factory=bytearray)
    end: str = ""
    failure: Failure | None = None
    on_end: Callable[[], None] | None = None

    def body(self, data: bytes) -> None:
        assert not self.end, "bytes after the end"
        self.data += data

    def ended(self) -> None:
        assert not self.end
        self.end = "ended"
        if self.on_end is not None:
            self.on_end()

    def broke(self, failure: Failure) -> None:
        assert not self.end
        self.end, self.failure = "broke", failure


@dataclass
class Scene:
    """A scripted server and the pool that talks to it."""

    upstream: Upstream
    clock: Clock
    connections: int = 0
    open_now: int = 0
    open_max: int = 0
    received: bytearray = field(default_factory=bytearray)
    trouble: list[dict[str, Any]] = field(default_factory=list)
    sessions_reused: list[bool] = field(default_factory=list)

    async def send(self, data: bytes = REQUEST, **options: Any) -> Answer | Failure:
        async with asyncio.timeout(10):
            return await self.upstream.send(data, b"", lambda _: True, **options)

    async def answer(self) -> Answer:
        answer = await self.send()
        assert isinstance(answer, Answer), answer
        return answer

    async def failure(self) -> Failure:
        failure = await self.send()
        assert isinstance(failure, Failure), failure
        return failure

    async def stream(self) -> tuple[Answer, Sink]:
        answer = await self.answer()
        assert answer.streamed
        sink = Sink()
        answer.attach(sink)
        return answer, sink

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.upstream.tick(self.clock.now)


async def until(condition: Callable[[], Any], *, within_s: float = 5.0) -> Any:
    """The condition's first true value, looked for at every turn of the loop."""
    give_up_at = asyncio.get_running_loop().time() + within_s
    while not (value := condition()):
        assert asyncio.get_running_loop().time() < give_up_at, "the condition did not come true in time"
        await asyncio.sleep(0.001)
    return value


async def turns(count: int = 50) -> None:
    """Let the loop turn, for what must NOT happen."""
    for _ in range(count):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def scene(
    script: Script,
    *,
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
    name: str | None = None,
    **limits: Any,
) -> AsyncIterator[Scene]:
    clock = Clock()
    scripts: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        it.connections += 1
        it.open_now += 1
        it.open_max = max(it.open_max, it.open_now)
        task = asyncio.current_task()
        assert task is not None
        scripts.add(task)
        ssl_object = writer.get_extra_info("ssl_object")
        if ssl_object is not None:
            it.sessions_reused.append(ssl_object.session_reused)
        try:
            await script(Line(reader, writer, it.received), it.connections)
        except (ConnectionError, RuntimeError, asyncio.CancelledError, ssl.SSLError):
            pass
        finally:
            it.open_now -= 1
            scripts.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(connected, host, 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    shown = name or (f"[{host}]" if ":" in host else host)
    upstream = Upstream(f"{'https' if tls else 'http'}://{shown}:{port}", UpstreamSection(**limits), clock=clock)
    it = Scene(upstream, clock)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: it.trouble.append(context))
    try:
        yield it
    finally:
        upstream.close()
        await until(lambda: upstream.snapshot()["open"] == 0)
        server.close()
        for task in list(scripts):
            task.cancel()
        await until(lambda: not scripts)
        await turns(10)
    # A server's own complaint about a client that hung up in the handshake is not the client's fault.
    ours = [context for context in it.trouble if "SSL" not in str(context) and "ssl" not in str(context)]
    assert not ours, ours


Run = Callable[[Callable[[], Awaitable[None]]], None]


def run_on(loop: str, test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(bounded())


def script_of(*pieces: bytes, then: str = "wait", times: int = 1_000_000) -> Script:
    """Answer each request with `pieces`, then wait for the next one, close, or reset."""

    async def script(line: Line, number: int) -> None:
        for _ in range(times):
            await line.request()
            for piece in pieces:
                line.send(piece)
                await turns(3)
            if then == "close":
                await line.writer.drain()
                line.writer.close()
                return
            if then == "reset":
                line.reset()
                return
            if then == "silence":
                await line.closed()

    return script
