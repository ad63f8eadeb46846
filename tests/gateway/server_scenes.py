"""A small app behind the HTTP/1.1 server, real sockets in front of it, and a clock by hand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import uvloop

from headgate.gateway.server import (
    Exchange,
    Server,
)
from headgate.gateway.settings import ServerSection

HOST = b" HTTP/1.1\r\nhost: gateway\r\n"
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """An app: `/refuse…` is refused by its head, `/held…` is answered by the test, the rest is answered at once."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.served: list[bytes] = []
        self.bodies: list[bytes] = []
        self.held: list[Exchange] = []
        self.gone: list[bytes] = []
        self.paused: list[bool] = []
        self.headers: list[list[tuple[bytes, bytes]]] = []

    def head(self, exchange: Exchange) -> None:
        self.heads.append(exchange.target)
        if exchange.path.startswith(b"/refuse"):
            exchange.respond(401, b"x-target: %b\r\n" % exchange.target, b"refused")

    def request(self, exchange: Exchange) -> None:
        target = exchange.target
        self.served.append(target)
        self.headers.append(exchange.headers)
        body = exchange.body()
        self.bodies.append(body)
        exchange.on_gone = lambda: self.gone.append(target)
        exchange.on_paused = self.paused.append
        if exchange.path.startswith(b"/held"):
            self.held.append(exchange)
        elif exchange.path.startswith(b"/stream"):
            exchange.start_stream(200, b"x-target: %b\r\n" % target)
            for at in range(0, len(body), 7):
                exchange.write(body[at : at + 7])
            exchange.end()
        else:
            exchange.respond(200, b"x-target: %b\r\n" % target, body)

    def refusal(self, exchange: Exchange | None, status: int, code: str, message: str) -> tuple[bytes, bytes]:
        return b"x-code: %b\r\n" % code.encode(), message.encode()


@dataclass
class Answer:
    """One response as a strict client reads it."""

    status: int
    headers: dict[str, str]
    body: bytes


def parse(data: bytes, methods: list[str] | None = None) -> list[Answer]:
    """All responses in `data`, of which nothing may be left over. Responses to HEAD have no body; 100s are kept."""
    answers: list[Answer] = []
    asked = list(methods or [])
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        assert end, f"a head without its end: {data[:200]!r}"
        status_line, *lines = head.split(b"\r\n")
        version, status, *_ = status_line.split(b" ")
        assert version == b"HTTP/1.1", status_line
        assert status.isdigit(), status_line
        assert len(status) == 3, status_line
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(b": ")
            assert colon, line
            key = name.decode("ascii").lower()
            assert key not in headers, f"{key} twice"
            headers[key] = value.decode("latin-1")
        body = b""
        if int(status) >= 200:
            method = asked.pop(0) if asked else "GET"
            if method == "HEAD":
                pass
            elif headers.get("transfer-encoding") == "chunked":
                assert "content-length" not in headers
                while True:
                    size_line, end, rest = rest.partition(b"\r\n")
                    assert end, "a chunk without its size"
                    size = int(size_line, 16)
                    piece, rest = rest[:size], rest[size:]
                    assert len(piece) == size, "a cut chunk"
                    assert rest[:2] == b"\r\n", "a chunk without its end"
                    rest = rest[2:]
                    if size == 0:
                        break
                    body += piece
            elif "content-length" in headers:
                size = int(headers["content-length"])
                body, rest = rest[:size], rest[size:]
                assert len(body) == size, "a cut body"
            else:
                body, rest = rest, b""
        answers.append(Answer(int(status), headers, body))
        data = rest
    return answers


class Client:
    """A connection that keeps all it has read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.data = b""
        self.ended = False
        self.error: OSError | None = None
        self._reading = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        try:
            while piece := await self._reader.read(1 << 16):
                self.data += piece
        except OSError as error:
            self.error = error
        self.ended = True

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)

    async def answers(self, count: int, methods: list[str] | None = None) -> list[Answer]:
        """Exactly `count` responses, waited for (interim ones count)."""

        def complete() -> list[Answer] | None:
            try:
                found = parse(self.data, methods)
            except (AssertionError, ValueError):
                return None
            return found if len(found) >= count else None

        try:
            await until(complete)
        except AssertionError:
            raise AssertionError(f"no {count} whole responses in {self.data[:2000]!r}") from None
        found = parse(self.data, methods)
        assert len(found) == count, self.data[:2000]
        return found

    async def end(self) -> None:
        """Wait for the server's close."""
        await until(lambda: self.ended)

    async def close(self) -> None:
        self._reading.cancel()
        self.writer.transport.abort()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await self._reading
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


async def until(condition: Callable[[], Any], *, within_s: float = 5.0) -> Any:
    """The condition's first true value, looked for at every turn of the loop."""
    async with asyncio.timeout(within_s + 5):
        give_up_at = asyncio.get_running_loop().time() + within_s
        while not (value := condition()):
            assert asyncio.get_running_loop().time() < give_up_at, "the condition did not come true in time"
            await asyncio.sleep(0.001)
        return value


async def turns(count: int = 50) -> None:
    """Let the loop turn, for what must NOT happen."""
    for _ in range(count):
        await asyncio.sleep(0)


@dataclass
class House:
    """A server, its app, its clock, its clients, and what the loop complained about."""

    server: Server
    desk: Desk
    clock: Clock
    clients: list[Client]
    trouble: list[dict[str, Any]]
    sockets: list[socket.socket] = field(default_factory=list)

    async def client(self, *, receive_buffer: int | None = None) -> Client:
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.server.port))
        client = Client(*await asyncio.open_connection(sock=sock))
        self.clients.append(client)
        return client

    async def deaf_socket(self, receive_buffer: int = 4096) -> socket.socket:
        """A connection that nobody reads."""
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sockets.append(sock)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.server.port))
        return sock

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.server.tick(self.clock.now)

    def connection(self) -> Any:
        (connection,) = self.server._connections
        return connection


@contextlib.asynccontextmanager
async def house(**limits: Any) -> AsyncIterator[House]:
    """A running server. Whatever happened, no body may be accounted when all clients are gone, and nothing crashed."""
    clock, desk = Clock(), Desk()
    server = Server(desk, ServerSection(**limits), clock=clock)
    trouble: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: trouble.append(context))
    await server.listen("127.0.0.1", 0)
    it = House(server, desk, clock, [], trouble)
    try:
        yield it
    finally:
        server.stop_accepting()
        for client in it.clients:
            await client.close()
        for sock in it.sockets:
            sock.close()
        server.abort_all()
        await until(lambda: len(server) == 0)
    assert server._bodies_bytes == 0, "bodies stay accounted"
    assert len(desk.gone) == len(set(desk.gone)), "an exchange heard twice that its client is gone"
    assert not trouble, trouble


Run = Callable[[Callable[[], Awaitable[None]]], None]


def run_on(loop: str, test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(bounded())


def get(target: bytes, *lines: bytes) -> bytes:
    return b"GET %b%b%b\r\n" % (target, HOST, b"".join(line + b"\r\n" for line in lines))


def post(target: bytes, body: bytes, *lines: bytes) -> bytes:
    extra = b"".join(line + b"\r\n" for line in lines)
    return b"POST %b%b%bcontent-length: %d\r\n\r\n%b" % (target, HOST, extra, len(body), body)


def chunked(target: bytes, *chunks: bytes, trailers: bytes = b"") -> bytes:
    coded = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"POST %b%btransfer-encoding: chunked\r\n\r\n%b0\r\n%b\r\n" % (target, HOST, coded, trailers)


def send_all_then_read(port: int, head: bytes, size: int) -> bytes:
    """As most clients do it: not a byte is read before all has been sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(head)
        piece = b"x" * (1 << 20)
        while size > 0:
            sock.sendall(piece[: min(size, len(piece))])
            size -= len(piece)
        data = b""
        while b"\r\n\r\n" not in data:
            more = sock.recv(1 << 16)
            if not more:
                break
            data += more
        return data
