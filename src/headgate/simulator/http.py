"""HTTP/1.1 for the simulator: one asyncio Protocol over httptools. Parses requests, frames responses; knows no route.

A connection answers one request at a time; what a client pipelines waits. Anything malformed closes the connection
with a bare 400, as an edge would.
"""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import httptools

from headgate.simulator.errors import reason_phrase

BODY_BYTES_MAX = 32 * 2**20
BATCH_BODY_BYTES_MAX = 256 * 2**20
BATCHES_PATH = "/v1/messages/batches"
HEAD_BYTES_MAX = 64 * 2**10
PIPELINE_MAX = 64
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER with a zero timeout: close sends RST."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came."""

    connection: int
    """Number of the connection, from 1."""
    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    """Names and values as received, in order."""
    body: bytes
    """As received, without chunk framing, not decompressed; b"" when `oversize`."""
    oversize: bool
    received_s: float
    """When the last byte came, on the simulator's monotonic clock."""

    def header(self, name: str) -> str | None:
        """The first header of that name (lower case), or None."""
        for found, value in self.headers:
            if found.lower() == name:
                return value
        return None


class Reply:
    """The way back for one request. After `end`, `close` or `reset` it does nothing more."""

    __slots__ = ("_chunked", "_connection", "_done", "_head_only", "_keep_alive", "bytes_sent", "on_gone", "on_room")

    def __init__(self, connection: "Connection", *, keep_alive: bool, head_only: bool) -> None:
        self._connection = connection
        self._keep_alive = keep_alive
        self._head_only = head_only
        self._chunked = False
        self._done = False
        self.bytes_sent = 0
        self.on_gone: Callable[[], None] | None = None
        """Called once if the client leaves before the reply is done."""
        self.on_room: Callable[[], None] | None = None
        """Called when a full send buffer has room again."""

    @property
    def full(self) -> bool:
        """Whether the send buffer is full: whoever paces a stream should wait for `on_room`."""
        return self._connection.full

    @property
    def done(self) -> bool:
        """Whether nothing more can be sent."""
        return self._done

    def whole(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """A complete response."""
        head = self.head(status, headers, length=len(body))
        self.raw(head if self._head_only else head + body)
        self.end()

    def head(self, status: int, headers: Iterable[tuple[str, str]], *, length: int | None) -> bytes:
        """The bytes of a response head. `length` None starts a chunked body."""
        self._chunked = length is None
        lines = [f"{name}: {value}\r\n" for name, value in headers]
        lines.append("transfer-encoding: chunked\r\n" if length is None else f"content-length: {length}\r\n")
        if not self._keep_alive:
            lines.append("connection: close\r\n")
        return _status_line(status) + "".join(lines).encode("latin-1") + b"\r\n"

    def raw(self, data: bytes) -> None:
        """Bytes as they are."""
        if not self._done and data:
            self.bytes_sent += len(data)
            self._connection.write(data)

    def data(self, data: bytes) -> None:
        """Bytes of the body, framed as the head announced."""
        self.raw(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and data else data)

    def end(self) -> None:
        """The body is complete."""
        if not self._done:
            if self._chunked:
                self.raw(b"0\r\n\r\n")
            self._done = True
            self._connection.answered(keep_alive=self._keep_alive)

    def close(self) -> None:
        """Ends the connection with FIN, whatever the body still lacks."""
        self._done = True
        self._connection.close()

    def reset(self) -> None:
        """Ends the connection with RST."""
        self._done = True
        self._connection.reset()


Serve = Callable[[Request, Reply], None]


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(
        self, number: int, serve: Serve, clock: Callable[[], float], gone: Callable[["Connection"], None]
    ) -> None:
        self.number = number
        self.full = False
        self.since_s = clock()
        """When the connection last began to wait: for a head to be complete, or for a next request."""
        self._serve = serve
        self._clock = clock
        self._gone = gone
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[tuple[Request, bool]] = deque()
        self._reply: Reply | None = None
        self._closing = False
        self._start()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self._reply is None

    @property
    def mid_request(self) -> bool:
        """Whether part of a request has come."""
        return self._begun

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from asyncio's
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family != getattr(socket, "AF_UNIX", None):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserUpgrade, httptools.HttpParserError):
            self._refuse()
            return
        if self._begun and not self._head_complete:
            # The parser hands a header over when it is whole, and would collect an endless one for ever.
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio calls it)
        self._closing = True
        self._waiting.clear()
        self._gone(self)
        reply, self._reply = self._reply, None
        if reply is not None and not reply.done and reply.on_gone is not None:
            reply.on_gone()

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        if self._reply is not None and self._reply.on_room is not None:
            self._reply.on_room()

    # ---- httptools

    def on_message_begin(self) -> None:
        self._begun = True
        self.since_s = self._clock()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self._head_complete = True
        self._limit = BATCH_BODY_BYTES_MAX if self._url.partition(b"?")[0] == BATCHES_PATH.encode() else BODY_BYTES_MAX
        if any(name.lower() == "expect" and value.lower() == "100-continue" for name, value in self._headers):
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        self.since_s = self._clock()
        if self._size > self._limit:
            self._body.clear()
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        path, _, query = self._url.decode("latin-1").partition("?")
        request = Request(
            connection=self.number,
            method=self._parser.get_method().decode("latin-1"),
            path=path,
            query=query,
            headers=tuple(self._headers),
            body=b"".join(self._body),
            oversize=self._size > self._limit,
            received_s=self._clock(),
        )
        keep_alive = self._parser.should_keep_alive() and self._parser.get_http_version() != "1.0"
        self._start()
        if len(self._waiting) >= PIPELINE_MAX:
            self._refuse()
            return
        self._waiting.append((request, keep_alive))
        self._next()

    # ---- for Reply and the server

    def write(self, data: bytes) -> None:
        """Queues bytes for the client."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def answered(self, *, keep_alive: bool) -> None:
        """The current request has its answer; the next may begin."""
        self._reply = None
        self.since_s = self._clock()
        if keep_alive and not self._closing:
            self._next()
        else:
            self.close()

    def close(self) -> None:
        """FIN, after what is queued."""
        self._closing = True
        self._reply = None
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """RST, now."""
        self._closing = True
        self._reply = None
        if self._transport is not None:
            raw = self._transport.get_extra_info("socket")
            if raw is not None:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            self._transport.abort()

    def _start(self) -> None:
        self._url = b""
        self._headers: list[tuple[str, str]] = []
        self._body: list[bytes] = []
        self._size = 0
        self._limit = BODY_BYTES_MAX
        self._begun = False
        self._head_complete = False
        self._head_bytes = 0

    def _next(self) -> None:
        if self._reply is None and self._waiting:
            request, keep_alive = self._waiting.popleft()
            self._reply = Reply(self, keep_alive=keep_alive, head_only=request.method == "HEAD")
            self._serve(request, self._reply)

    def _refuse(self) -> None:
        if self._reply is None:
            self.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.close()


@lru_cache(maxsize=64)
def _status_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} {reason_phrase(status)}\r\n".encode()
