"""HTTP/1.1 in: one asyncio Protocol a connection, parsed by httptools, and the rules that the parser does not keep.

What it is: framing, limits, deadlines and backpressure towards clients. What it is not: routes, keys or upstream; an
`App` is told of each request's head (it may refuse before the body is read) and of each complete request.

What httptools lets pass and this file refuses was measured (failure-model §7): two Hosts or none, absolute-form
targets, headers without bound, bodies without deadline. What it refuses itself: CL with TE, bare LF, obs-fold.
"""

from __future__ import annotations

import asyncio
import socket
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Protocol

import httptools

from headgate.gateway.settings import ServerSection

HEADER_BYTES_MAX = 16 << 10
HEADERS_MAX = 64
TARGET_BYTES_MAX = 2 << 10
PIPELINE_MAX = 16
"""Requests of one connection that wait for the one before them."""
WRITE_BUFFER_BYTES = 64 << 10
"""With one read of READ_BUFFER_BYTES on top, less than the 256 KiB that a stream may buffer."""
READ_BUFFER_BYTES = 64 << 10
DISCARD_BYTES_MAX = 32 << 20
"""Of a refused request's body: read and thrown away, so that its sender sees the answer and not a reset."""
LINGER_S = 2.0
BODY_TIMEOUT_FACTOR = 4

_CHECKED = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"})
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES = {status: f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode() for status in HTTPStatus}

# One buffer for all connections: the loop fills it and hands it to the parser before it reads from any other socket,
# so no connection needs memory of its own to read into.
_read_buffer = bytearray(READ_BUFFER_BYTES)


def status_line(status: int) -> bytes:
    """`HTTP/1.1 200 OK\\r\\n`, for unknown codes without a phrase of their own."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d Status\r\n" % status  # type: ignore[call-overload]


class App(Protocol):
    """What serves the requests."""

    def head(self, exchange: Exchange) -> None:
        """The head is complete. To refuse at once, respond; otherwise return and wait for `request`."""

    def request(self, exchange: Exchange) -> None:
        """The request is complete and its turn has come. The response may come at any time later."""

    def refusal(self, exchange: Exchange | None, status: int, code: str, message: str) -> tuple[bytes, bytes]:
        """`(header lines, body)` of an error that the HTTP layer found, in the service's own envelope."""


class Exchange:
    """One request and its response."""

    __slots__ = (
        "_body",
        "_chunked",
        "_connection",
        "_deferred",
        "body_bytes",
        "complete",
        "expects_continue",
        "finished",
        "header",
        "headers",
        "http_1_0",
        "keep_alive",
        "method",
        "on_gone",
        "on_paused",
        "path",
        "query",
        "route",
        "started",
        "streaming",
        "target",
    )

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self._body: list[bytes] = []
        self._chunked = False
        self._deferred: bytes | None = None
        self.target = b""
        self.path = b""
        self.query = b""
        self.method = b""
        self.headers: list[tuple[bytes, bytes]] = []
        """Names in lower case, in the order they came."""
        self.header: Mapping[bytes, bytes] = {}
        """The same by name, once the head is complete; of several with one name the last."""
        self.http_1_0 = False
        self.keep_alive = True
        self.expects_continue = False
        self.body_bytes = 0
        self.complete = False
        """Whether the whole request has come."""
        self.started = False
        """Whether any of the response has been handed to the connection."""
        self.streaming = False
        self.finished = False
        self.on_gone: Callable[[], None] | None = None
        """Called once when the client leaves before the response has ended."""
        self.on_paused: Callable[[bool], None] | None = None
        """Called with True when the client reads too slowly, with False when it may be written to again."""
        self.route: object = None
        """For the app: what `head` found out, for `request` to go on with."""

    @property
    def peer(self) -> str:
        """The client's address, without its port."""
        return self._connection.peer

    @property
    def gone(self) -> bool:
        """Whether the client has left."""
        return self._connection.closed

    def body(self) -> bytes:
        """The request's body as it came. Call it once; the pieces are let go."""
        pieces, self._body = self._body, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def respond(self, status: int, header_lines: bytes, body: bytes) -> None:
        """The whole response. `header_lines` are `name: value\\r\\n` each, without the framing ones."""
        if self.started or self.gone:
            return
        self.started = True
        close = b"" if self.keep_alive and not self._connection.closing_after(self) else b"connection: close\r\n"
        head = b"%b%b%bcontent-length: %d\r\n\r\n" % (status_line(status), header_lines, close, len(body))
        self._connection.send(self, head if self.method == b"HEAD" else head + body)
        self._finish()

    def start_stream(self, status: int, header_lines: bytes) -> None:
        """The head of a response whose length is not known."""
        if self.started or self.gone:
            return
        self.started = self.streaming = True
        self._chunked = not self.http_1_0
        self.keep_alive = self.keep_alive and self._chunked
        close = b"" if self.keep_alive and not self._connection.closing_after(self) else b"connection: close\r\n"
        framing = b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n"
        self._connection.send(self, b"%b%b%b%b" % (status_line(status), header_lines, close, framing))

    def write(self, data: bytes) -> None:
        """A piece of a streamed body."""
        if not self.finished and data and not self.gone:
            self._connection.send(self, b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self, data: bytes = b"") -> None:
        """The streamed body is whole with these last bytes."""
        if not self.finished and not self.gone:
            if self._chunked:
                last = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
                self._connection.send(self, last)
            elif data:
                self._connection.send(self, data)
            self._finish()

    def abort(self) -> None:
        """End the connection in the middle of the response: the client must see that it is broken."""
        if not self.finished:
            self.finished = True
            self.on_gone = self.on_paused = None
            self._connection.abort()

    def _finish(self) -> None:
        self.finished = True
        self.on_gone = self.on_paused = None
        self._connection.finished(self)


class ServerConnection(asyncio.BufferedProtocol):
    """One client connection: at most one response at a time, pipelined requests in their order."""

    __slots__ = (
        "_app",
        "_body_started_at",
        "_current",
        "_deadline",
        "_discarded",
        "_header_bytes",
        "_in_head",
        "_incoming",
        "_lingering",
        "_parser",
        "_paused_at",
        "_queue",
        "_reading_paused",
        "_rejected",
        "_server",
        "_transport",
        "_url",
        "closed",
        "peer",
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._app = server.app
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # set in connection_made
        self._queue: deque[Exchange] = deque()
        self._current: Exchange | None = None
        self._incoming: Exchange | None = None
        self._in_head = False
        self._header_bytes = 0
        self._url = b""
        self._body_started_at = 0.0
        self._deadline = 0.0
        self._paused_at: float | None = None
        self._reading_paused = False
        self._rejected = False
        self._lingering = False
        self._discarded = 0
        self.closed = False
        self.peer = ""

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        self._transport = transport  # type: ignore[assignment]
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if isinstance(peer, tuple) else ""
        self._deadline = self._server.clock() + self._server.settings.header_timeout_s
        if not self._server.add(self):
            head, body = self._app.refusal(None, 529, "connections_exhausted", "This gateway has too many connections.")
            self._transport.write(
                b"%b%bconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (status_line(529), head, len(body), body)
            )
            self._transport.close()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the loop may read into."""
        return memoryview(_read_buffer)

    def buffer_updated(self, nbytes: int) -> None:
        """The loop has read `nbytes`."""
        if self._lingering:
            self._discarded += nbytes
            if self._discarded > DISCARD_BYTES_MAX:
                self.abort()
            return
        if self._in_head:
            self._header_bytes += nbytes
        try:
            self._parser.feed_data(memoryview(_read_buffer)[:nbytes])
        except httptools.HttpParserUpgrade:
            self._reject(400, "upgrade_unsupported", "This gateway speaks HTTP/1.1 only.")
        except httptools.HttpParserError:
            self._reject(400, "malformed_request", "The request is not well-formed HTTP/1.1.")
        if self._in_head and self._header_bytes > HEADER_BYTES_MAX:
            self._reject(431, "header_too_large", f"The header is larger than {HEADER_BYTES_MAX} bytes.")

    def eof_received(self) -> bool:
        """The client has closed its side: it waits for nothing more."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """The connection is gone, by whoever's will."""
        self.closed = True
        self._server.remove(self)
        current, self._current = self._current, None
        for exchange in (current, self._incoming, *self._queue):
            if exchange is not None:
                self._server.release(exchange)
        self._incoming = None
        self._queue.clear()
        if current is not None and not current.finished:
            on_gone, current.on_gone, current.on_paused = current.on_gone, None, None
            if on_gone is not None:
                on_gone()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        self._paused_at = self._server.clock()
        if self._current is not None and self._current.on_paused is not None:
            self._current.on_paused(True)

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._paused_at = None
        if self._current is not None and self._current.on_paused is not None:
            self._current.on_paused(False)

    # httptools' side. A callback that raises would be wrapped; after a refusal they do nothing instead.

    def on_message_begin(self) -> None:
        """First byte of a request."""
        self._incoming = Exchange(self)
        self._in_head = True
        self._header_bytes = 0
        self._url = b""
        if self._current is None:
            self._deadline = self._server.clock() + self._server.settings.header_timeout_s

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, whole."""
        incoming = self._incoming
        if self._in_head and incoming is not None and not self._rejected:  # trailers are not headers
            incoming.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is whole: check what the parser does not, and let the app look at it."""
        incoming = self._incoming
        if incoming is None or self._rejected:
            return
        self._in_head = False
        parser = self._parser
        incoming.method = parser.get_method()
        incoming.keep_alive = parser.should_keep_alive()
        incoming.target = self._url
        incoming.http_1_0 = parser.get_http_version() == "1.0"
        problem = self._head_problem(incoming)
        if problem is not None:
            self._reject(*problem)
            return
        incoming.path, _, incoming.query = self._url.partition(b"?")
        incoming.header = dict(incoming.headers)
        self._app.head(incoming)
        self._body_started_at = self._server.clock()
        if self._current is None:
            self._deadline = self._body_started_at + self._server.settings.body_timeout_s
        if incoming.expects_continue and not incoming.started and self._current is None and not self._queue:
            self._transport.write(_CONTINUE)

    def on_body(self, data: bytes) -> None:
        """A piece of a body."""
        incoming = self._incoming
        if incoming is None or self._rejected:
            return
        if incoming.started:
            # Refused by its head: read on without keeping anything, so that the sender sees why.
            self._discarded += len(data)
            if self._discarded > DISCARD_BYTES_MAX:
                self.abort()
            return
        if not self._server.reserve(incoming, len(data)):
            self._too_large(incoming)
            return
        incoming._body.append(data)
        now = self._server.clock()
        if self._current is None:
            settings = self._server.settings
            self._deadline = min(
                now + settings.body_timeout_s, self._body_started_at + BODY_TIMEOUT_FACTOR * settings.body_timeout_s
            )

    def on_message_complete(self) -> None:
        """A request is whole."""
        incoming, self._incoming = self._incoming, None
        if incoming is None or self._rejected:
            return
        incoming.complete = True
        self._discarded = 0
        if self._current is None and not self._queue:
            self._begin(incoming)
            return
        self._queue.append(incoming)
        if len(self._queue) >= PIPELINE_MAX and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    # the exchanges' side

    def closing_after(self, exchange: Exchange) -> bool:
        """Whether this response is the connection's last."""
        return self._server.draining or (self._incoming is exchange and exchange.expects_continue)

    def send(self, exchange: Exchange, data: bytes) -> None:
        """Write it, or keep it until the responses before it are done."""
        if exchange is self._current or (self._current is None and not self._queue):
            self._transport.write(data)
        else:
            exchange._deferred = data

    def finished(self, exchange: Exchange) -> None:
        """The response has been written whole: the next request's turn."""
        self._server.release(exchange)
        if exchange._deferred is not None:
            return
        if not exchange.keep_alive or self.closing_after(exchange):
            self._close_after(exchange)
        elif exchange is self._current:
            self._current = None
            self._next()

    def abort(self) -> None:
        """Drop the connection at once."""
        self._transport.abort()

    def _begin(self, exchange: Exchange) -> None:
        if exchange.finished:
            # Answered by its head alone.
            self._after_response()
            return
        self._current = exchange
        self._app.request(exchange)

    def _next(self) -> None:
        while self._current is None and self._queue and not self.closed:
            exchange = self._queue.popleft()
            if exchange._deferred is not None:
                self._transport.write(exchange._deferred)
                if not exchange.keep_alive:
                    self._close_after(exchange)
                    return
                continue
            self._begin(exchange)
        if self._current is None:
            self._after_response()

    def _after_response(self) -> None:
        now = self._server.clock()
        settings = self._server.settings
        self._deadline = now + (settings.header_timeout_s if self._incoming else settings.idle_timeout_s)
        if self._reading_paused and not self.closed:
            self._reading_paused = False
            self._transport.resume_reading()

    def _close_after(self, exchange: Exchange) -> None:
        """Close once the response has gone out; what the client still sends is read until then, or it sees a reset."""
        if exchange.complete:
            self._transport.close()
            return
        self._lingering = True
        self._deadline = self._server.clock() + LINGER_S
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def _too_large(self, exchange: Exchange) -> None:
        limit = self._server.settings.body_bytes_max
        if exchange.body_bytes > limit:
            self._reject(413, "request_too_large", f"The request is larger than {limit} bytes.")
        else:
            self._reject(529, "bodies_exhausted", "This gateway holds too many large requests; try again shortly.")

    def _reject(self, status: int, code: str, message: str) -> None:
        """Answer what cannot be served and close; nothing after it on this connection is read as a request."""
        if self._rejected or self.closed:
            return
        self._rejected = True
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming._body.clear()
            self._server.release(incoming)
        if self._current is not None or self._queue or (incoming is not None and incoming.started):
            # A response is being written: a second one now would be taken for a part of it.
            self._transport.pause_reading()
            if self._current is not None:
                self._current.keep_alive = False
            else:
                self._transport.close()
            return
        header_lines, body = self._app.refusal(incoming, status, code, message)
        self._transport.write(
            b"%b%bconnection: close\r\ncontent-length: %d\r\n\r\n%b"
            % (status_line(status), header_lines, len(body), body)
        )
        self._in_head = False
        self._lingering = True
        self._discarded = 0
        self._deadline = self._server.clock() + LINGER_S
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def _head_problem(self, exchange: Exchange) -> tuple[int, str, str] | None:
        """What is wrong with a head that the parser let pass, or None."""
        headers = exchange.headers
        hosts = lengths = 0
        size = len(self._url)
        for name, value in headers:
            size += len(name) + len(value) + 4
            if name not in _CHECKED:
                continue
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                lengths += 1
                if len(value) > 15 or not value.isdigit():
                    return 400, "malformed_request", "The Content-Length is no number."
                if int(value) > self._server.settings.body_bytes_max:
                    return (
                        413,
                        "request_too_large",
                        (f"The request is larger than {self._server.settings.body_bytes_max} bytes."),
                    )
            elif name == b"transfer-encoding":
                lengths += 1
                if value.lower() != b"chunked":
                    return 400, "malformed_request", "The only transfer encoding here is 'chunked'."
            elif name == b"expect":
                exchange.expects_continue = value.lower() == b"100-continue"
        if size > HEADER_BYTES_MAX or len(headers) > HEADERS_MAX:
            return 431, "header_too_large", f"The header has more than {HEADER_BYTES_MAX} bytes or {HEADERS_MAX} lines."
        if len(self._url) > TARGET_BYTES_MAX:
            return 414, "target_too_long", f"The target is longer than {TARGET_BYTES_MAX} bytes."
        if hosts > 1 or (hosts == 0 and not exchange.http_1_0):
            return 400, "malformed_request", "A request has exactly one Host header."
        if lengths > 1:
            return 400, "malformed_request", "A request has one Content-Length or one Transfer-Encoding, not both."
        if self._parser.get_http_version() not in ("1.1", "1.0"):
            return 505, "http_version", "This gateway speaks HTTP/1.1."
        if not self._url.startswith(b"/"):
            return 400, "malformed_request", "The target must be a path."
        return None

    # the server's side

    @property
    def busy(self) -> bool:
        """Whether a request is being served or read."""
        return self._current is not None or self._incoming is not None or bool(self._queue)

    @property
    def transport(self) -> asyncio.Transport:
        """The socket's transport."""
        return self._transport

    def tick(self, now: float) -> None:
        """Hold the deadlines."""
        if self._paused_at is not None:
            if now - self._paused_at > self._server.settings.write_timeout_s:
                self.abort()
        elif self._current is None and now > self._deadline:
            if self._incoming is not None and not self._lingering and not self._incoming.started:
                self._reject(408, "request_timeout", "The request did not come in time.")
            else:
                # Idle, or lingering after an answer that its client never took.
                self._transport.abort() if self._lingering else self._transport.close()


class Server:
    """Listens, and owns its connections. `tick` must be called a few times a second."""

    def __init__(self, app: App, settings: ServerSection, *, clock: Callable[[], float]) -> None:
        self.app = app
        self.settings = settings
        self.clock = clock
        self.draining = False
        self._connections: set[ServerConnection] = set()
        self._bodies_bytes = 0
        self._listener: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port that is listened on (useful after asking for 0)."""
        assert self._listener is not None
        return int(self._listener.sockets[0].getsockname()[1])

    async def listen(self, host: str, port: int) -> None:
        """Begin to accept. Raises OSError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: ServerConnection(self), host, port, backlog=2048, reuse_address=True, start_serving=True
        )
        for listening in self._listener.sockets:
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def stop_accepting(self) -> None:
        """No new connections; those without a request are closed, the others after their response."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            if not connection.busy:
                connection.transport.close()

    def busy(self) -> int:
        """Connections with a request in them."""
        return sum(1 for connection in self._connections if connection.busy)

    def __len__(self) -> int:
        return len(self._connections)

    def abort_all(self) -> None:
        """Drop what is left."""
        for connection in list(self._connections):
            connection.abort()

    def tick(self, now: float) -> None:
        """Hold the deadlines of all connections."""
        for connection in list(self._connections):
            connection.tick(now)

    def add(self, connection: ServerConnection) -> bool:
        """Whether there is room for one more."""
        self._connections.add(connection)
        return len(self._connections) <= self.settings.connections_max

    def remove(self, connection: ServerConnection) -> None:
        """A connection has ended."""
        self._connections.discard(connection)

    def reserve(self, exchange: Exchange, size: int) -> bool:
        """Whether a body may grow by `size`; the bytes of all bodies together bound the process's memory."""
        exchange.body_bytes += size
        self._bodies_bytes += size
        return exchange.body_bytes <= self.settings.body_bytes_max and (
            self._bodies_bytes <= self.settings.bodies_bytes_max
        )

    def release(self, exchange: Exchange) -> None:
        """The body of this exchange is no longer held. Safe to call twice."""
        self._bodies_bytes -= exchange.body_bytes
        exchange.body_bytes = 0


class BadEncoding(ValueError):
    """A body's content-encoding is one we do not know, or its bytes are not what it says."""


class DecodedTooLarge(ValueError):
    """A compressed body is larger than the limit once it is decoded."""


def decode_body(body: bytes, encoding: bytes, *, bytes_max: int) -> bytes:
    """A body without its content-encoding (gzip or deflate).

    Raises BadEncoding and DecodedTooLarge; never holds more than `bytes_max` decoded bytes.
    """
    match encoding.strip().lower():
        case b"identity" | b"":
            return body
        case b"gzip" | b"x-gzip":
            window = 16 + zlib.MAX_WBITS
        case b"deflate":
            window = zlib.MAX_WBITS
        case _:
            raise BadEncoding("Content-Encoding must be gzip, deflate or identity.")
    decoder = zlib.decompressobj(window)
    try:
        decoded = decoder.decompress(body, bytes_max + 1)
    except zlib.error:
        raise BadEncoding("The body is not what its Content-Encoding says.") from None
    if len(decoded) > bytes_max:
        raise DecodedTooLarge(f"The body is larger than {bytes_max} bytes once it is decoded.")
    if not decoder.eof or decoder.unused_data:
        raise BadEncoding("The body is not what its Content-Encoding says.")
    return decoded
