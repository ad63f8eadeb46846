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
DISCARD_BYTES_MAX = 64 << 20
"""Of a refused request's body: read and thrown away, so that its sender sees the answer and not a reset."""
LINGER_S = 2.0
"""Of silence, after an answer whose client still sends; `LINGER_S_MAX` in all."""
LINGER_S_MAX = 30.0
SHED_MAX = 100
"""Connections beyond the limit that are told so in peace; those beyond this are just closed."""
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
        "_begun",
        "_buffer",
        "_chunked",
        "_connection",
        "_continued",
        "_deferred",
        "_piece",
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
        self._piece = b""
        self._buffer: bytearray | None = None
        self._chunked = False
        self._deferred = b""
        self._begun = False
        self._continued = False
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
        """What the server accounts to this request."""
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
        """The request's body as it came. Call it once; it is let go."""
        whole = self._piece if self._buffer is None else bytes(self._buffer)
        self.drop_body()
        return whole

    def account(self, size: int) -> bool:
        """Whether this request may hold `size` more bytes, all of the server's limits considered."""
        return self._connection.reserve(self, size)

    def respond(self, status: int, header_lines: bytes, body: bytes) -> None:
        """The whole response. `header_lines` are `name: value\\r\\n` each, without the framing ones."""
        if self.started or self.gone:
            return
        self.started = True
        head = b"%b%b%bcontent-length: %d\r\n\r\n" % (status_line(status), header_lines, self._close_line(), len(body))
        self._connection.send(self, head if self.method == b"HEAD" else head + body)
        self._finish()

    def start_stream(self, status: int, header_lines: bytes) -> None:
        """The head of a response whose length is not known."""
        if self.started or self.gone:
            return
        self.started = self.streaming = True
        self._chunked = not self.http_1_0
        self.keep_alive = self.keep_alive and self._chunked
        framing = b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n"
        self._connection.send(self, b"%b%b%b%b" % (status_line(status), header_lines, self._close_line(), framing))

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

    def take(self, data: bytes) -> None:
        """A piece of the body. Many small ones are joined: as objects they would weigh twenty times their bytes."""
        if self._buffer is not None:
            self._buffer += data
        elif self._piece:
            self._buffer = bytearray(self._piece)
            self._buffer += data
            self._piece = b""
        else:
            self._piece = data

    def drop_body(self) -> None:
        """Nobody will read it."""
        self._piece = b""
        self._buffer = None

    def _close_line(self) -> bytes:
        """Said when the connection ends with this response; who waits for a 100 may never send a body."""
        if self._connection.draining or (self.expects_continue and not self.complete and not self._continued):
            self.keep_alive = False
        return b"" if self.keep_alive else b"connection: close\r\n"

    def _finish(self) -> None:
        self.finished = True
        self.on_gone = self.on_paused = None
        self._connection.finished(self)


class ServerConnection(asyncio.BufferedProtocol):
    """One client connection.

    `_line` holds its requests in the order they came, from the moment their head is complete. Only the first of them
    is served and may write; `_advance` moves on when it has been answered. What is said before its turn waits.
    """

    __slots__ = (
        "_advancing",
        "_app",
        "_body_started_at",
        "_closing_at",
        "_deadline",
        "_deaf",
        "_discarded",
        "_header_bytes",
        "_heard_at",
        "_in_head",
        "_incoming",
        "_line",
        "_lingering",
        "_parser",
        "_paused_at",
        "_reading",
        "_server",
        "_transport",
        "_unproductive",
        "_url",
        "closed",
        "peer",
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._app = server.app
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # set in connection_made
        self._line: deque[Exchange] = deque()
        self._incoming: Exchange | None = None
        self._advancing = False
        self._in_head = False
        self._header_bytes = 0
        self._unproductive = 0
        """Bytes read since the last byte of a body: trailers and chunk headers may not grow without bound."""
        self._url = b""
        self._body_started_at = 0.0
        self._deadline = 0.0
        self._paused_at: float | None = None
        self._reading = True
        self._deaf = False
        """Nothing that comes is read as a request any more."""
        self._lingering = False
        self._closing_at: float | None = None
        self._heard_at = 0.0
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
            self._deaf = True
            self._write_refusal(None, 529, "connections_exhausted", "This gateway has too many connections.")
            self._close(linger=self._server.shed <= SHED_MAX)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the loop may read into."""
        return memoryview(_read_buffer)

    def buffer_updated(self, nbytes: int) -> None:
        """The loop has read `nbytes`."""
        if self._deaf:
            self._discard(nbytes)
            return
        self._unproductive += nbytes
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
        elif self._incoming is not None and self._unproductive > nbytes + HEADER_BYTES_MAX:
            self._reject(431, "trailer_too_large", f"What follows the body is larger than {HEADER_BYTES_MAX} bytes.")

    def eof_received(self) -> bool:
        """The client has closed its side: it waits for nothing more."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """The connection is gone, by whoever's will."""
        self.closed = True
        self._server.remove(self)
        first = self._line[0] if self._line else None
        for exchange in self._line:
            self._server.release(exchange)
        if self._incoming is not None:
            self._server.release(self._incoming)
            self._incoming = None
        self._line.clear()
        if first is not None and not first.finished:
            on_gone, first.on_gone, first.on_paused = first.on_gone, None, None
            if on_gone is not None:
                on_gone()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        self._paused_at = self._server.clock()
        self._tell_paused(True)
        self._read_or_not()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._paused_at = None
        self._tell_paused(False)
        self._advance()

    # httptools' side. A callback that raises would be wrapped; once the connection is deaf they do nothing instead.

    def on_message_begin(self) -> None:
        """First byte of a request."""
        if self._deaf:
            return
        self._incoming = Exchange(self)
        self._in_head = True
        self._header_bytes = 0
        self._url = b""
        if not self._line:
            self._deadline = self._server.clock() + self._server.settings.header_timeout_s

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, whole."""
        if self._in_head and self._incoming is not None:  # trailers are not headers
            self._incoming.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """The head is whole: check what the parser does not, and let the app look at it."""
        incoming = self._incoming
        if incoming is None or self._deaf:
            return
        self._in_head = False
        self._unproductive = 0
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
        self._line.append(incoming)
        self._body_started_at = self._server.clock()
        if self._line[0] is incoming:
            self._deadline = self._body_started_at + self._server.settings.body_timeout_s
        self._app.head(incoming)
        if incoming.expects_continue:
            self._advance()

    def on_body(self, data: bytes) -> None:
        """A piece of a body."""
        incoming = self._incoming
        self._unproductive = 0
        if incoming is None or self._deaf:
            return
        if incoming.started:
            # Refused by its head: read on without keeping anything, so that the sender sees why.
            self._discard(len(data))
            return
        if not self.reserve(incoming, len(data)):
            self._too_large(incoming)
            return
        incoming.take(data)
        if self._line[0] is incoming:
            settings = self._server.settings
            self._deadline = min(
                self._server.clock() + settings.body_timeout_s,
                self._body_started_at + BODY_TIMEOUT_FACTOR * settings.body_timeout_s,
            )

    def on_message_complete(self) -> None:
        """A request is whole."""
        incoming, self._incoming = self._incoming, None
        if incoming is None or self._deaf:
            return
        incoming.complete = True
        self._discarded = 0
        self._advance()

    # the exchanges' side

    @property
    def draining(self) -> bool:
        """Whether no request may follow the one that is being served."""
        return self._server.draining

    def send(self, exchange: Exchange, data: bytes) -> None:
        """Write it, or keep it until the responses before it are done."""
        if self._line and exchange is self._line[0]:
            self._transport.write(data)
        else:
            exchange._deferred += data

    def finished(self, exchange: Exchange) -> None:
        """The response has been handed over whole."""
        exchange.drop_body()
        self._server.release(exchange)
        if self._line and exchange is self._line[0]:
            self._advance()

    def reserve(self, exchange: Exchange, size: int) -> bool:
        """Whether this request may hold `size` more bytes."""
        return self._server.reserve(exchange, size)

    def abort(self) -> None:
        """Drop the connection at once."""
        self._transport.abort()

    # inside

    def _advance(self) -> None:
        """Serve the first in line, and go on as long as it is answered at once. Not entered twice: no recursion."""
        if self._advancing:
            return
        self._advancing = True
        before = self._line[0] if self._line else None
        try:
            self._serve_first()
        finally:
            self._advancing = False
        if self.closed or self._closing_at is not None:
            return
        now, settings = self._server.clock(), self._server.settings
        if not self._line:
            self._deadline = now + (settings.header_timeout_s if self._in_head else settings.idle_timeout_s)
            if self._deaf or self._server.draining:
                self._close(linger=self._deaf)
        elif self._line[0] is not before:
            # Its turn has come, and its body may still be on the way.
            self._body_started_at = now
            self._deadline = now + settings.body_timeout_s
        self._read_or_not()

    def _serve_first(self) -> None:
        line = self._line
        while line and not self.closed and self._closing_at is None and self._paused_at is None:
            first = line[0]
            if first._deferred:
                self._transport.write(first._deferred)
                first._deferred = b""
            if first.finished:
                if not first.keep_alive:
                    self._close(linger=True)
                elif first.complete:
                    line.popleft()
                    continue
                return
            if first._begun:
                return
            if first.complete:
                first._begun = True
                self._app.request(first)
                continue
            if first.expects_continue and not first._continued:
                first._continued = True
                self._transport.write(_CONTINUE)
            return

    def _read_or_not(self) -> None:
        """Stop reading when nothing more can be served; not under a stream, whose client must be seen leaving."""
        streaming = bool(self._line) and self._line[0].streaming
        reading = len(self._line) < PIPELINE_MAX and (self._paused_at is None or streaming)
        if reading != self._reading and not self.closed and self._closing_at is None:
            self._reading = reading
            if reading:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _tell_paused(self, paused: bool) -> None:
        if self._line and self._line[0].on_paused is not None:
            self._line[0].on_paused(paused)

    def _discard(self, size: int) -> None:
        self._discarded += size
        self._heard_at = self._server.clock()
        if self._discarded > DISCARD_BYTES_MAX:
            self.abort()

    def _close(self, *, linger: bool) -> None:
        """End the connection once its answers have gone out.

        With `linger` what the client still sends is read and thrown away for a while: closing on unread bytes resets
        the connection, and the client might never see its answer.
        """
        self._deaf = True
        self._closing_at = self._heard_at = self._server.clock()
        self._lingering = linger and not self._transport.is_closing() and self._transport.can_write_eof()
        if not self._lingering:
            self._transport.close()
            return
        self._discarded = 0
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()
        self._transport.write_eof()

    def _too_large(self, exchange: Exchange) -> None:
        limit = self._server.settings.body_bytes_max
        if exchange.body_bytes > limit:
            self._reject(413, "request_too_large", f"The request is larger than {limit} bytes.")
        else:
            self._reject(529, "bodies_exhausted", "This gateway holds too many large requests; try again shortly.")

    def _reject(self, status: int, code: str, message: str) -> None:
        """Answer what cannot be served, and close; nothing after it on this connection is read as a request.

        Behind requests that are still being served nothing is said: a second answer now would be taken for theirs.
        """
        if self._deaf or self.closed:
            return
        self._deaf = True
        self._in_head = False
        incoming, self._incoming = self._incoming, None
        answered = False
        if incoming is not None:
            incoming.drop_body()
            self._server.release(incoming)
            answered = incoming.started
            if self._line and self._line[-1] is incoming:
                self._line.pop()
        if self._line:
            self._line[-1].keep_alive = False
            self._advance()
            return
        if not answered:
            self._write_refusal(incoming, status, code, message)
        self._close(linger=True)

    def _write_refusal(self, exchange: Exchange | None, status: int, code: str, message: str) -> None:
        header_lines, body = self._app.refusal(exchange, status, code, message)
        head = b"%b%bconnection: close\r\ncontent-length: %d\r\n\r\n" % (status_line(status), header_lines, len(body))
        self._transport.write(head + body)

    def _head_problem(self, exchange: Exchange) -> tuple[int, str, str] | None:
        """What is wrong with a head that the parser let pass, or None."""
        headers = exchange.headers
        body_bytes_max = self._server.settings.body_bytes_max
        hosts = framings = 0
        size = len(self._url)
        for name, value in headers:
            size += len(name) + len(value) + 4
            if name not in _CHECKED:
                continue
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                framings += 1
                if len(value) > 15 or not value.isdigit():
                    return 400, "malformed_request", "The Content-Length is no number."
                if int(value) > body_bytes_max:
                    return 413, "request_too_large", f"The request is larger than {body_bytes_max} bytes."
            elif name == b"transfer-encoding":
                framings += 1
                if value.lower() != b"chunked" or exchange.http_1_0:
                    return 400, "malformed_request", "The only transfer encoding here is 'chunked', with HTTP/1.1."
            elif name == b"expect":
                exchange.expects_continue = value.lower() == b"100-continue" and not exchange.http_1_0
        if size > HEADER_BYTES_MAX or len(headers) > HEADERS_MAX:
            return 431, "header_too_large", f"The header has more than {HEADER_BYTES_MAX} bytes or {HEADERS_MAX} lines."
        if len(self._url) > TARGET_BYTES_MAX:
            return 414, "target_too_long", f"The target is longer than {TARGET_BYTES_MAX} bytes."
        if hosts > 1 or (hosts == 0 and not exchange.http_1_0):
            return 400, "malformed_request", "A request has exactly one Host header."
        if framings > 1:
            return 400, "malformed_request", "A request has one Content-Length or one Transfer-Encoding, not both."
        if self._parser.get_http_version() not in ("1.1", "1.0"):
            return 505, "http_version", "This gateway speaks HTTP/1.1."
        if self._parser.should_upgrade():
            return 400, "upgrade_unsupported", "This gateway speaks HTTP/1.1 only; do not ask for an upgrade."
        if not self._url.startswith(b"/"):
            return 400, "malformed_request", "The target must be a path."
        return None

    # the server's side

    @property
    def transport(self) -> asyncio.Transport:
        """The socket's transport."""
        return self._transport

    @property
    def busy(self) -> bool:
        """Whether a request is being served or read."""
        return self._closing_at is None and (bool(self._line) or self._incoming is not None)

    def stop(self) -> None:
        """The server drains: close if there is no request in it."""
        if not self.busy and self._closing_at is None:
            self._close(linger=False)

    def tick(self, now: float) -> None:
        """Hold the deadlines."""
        settings = self._server.settings
        if self._closing_at is not None:
            self._hold_closing(now)
        elif self._paused_at is not None:
            if now - self._paused_at > settings.write_timeout_s:
                self.abort()
        elif (not self._line or not self._line[0]._begun) and now > self._deadline:
            if self._incoming is not None and not self._incoming.started:
                self._reject(408, "request_timeout", "The request did not come in time.")
            else:
                self._close(linger=False)

    def _hold_closing(self, now: float) -> None:
        """Closing waits for the client to take its answer, and that may be never."""
        assert self._closing_at is not None
        if now - self._closing_at > self._server.settings.write_timeout_s:
            self.abort()
        elif self._lingering and not self._transport.get_write_buffer_size():
            silent = now - self._heard_at > LINGER_S
            if silent or now - self._closing_at > LINGER_S_MAX:
                self._lingering = False
                self._transport.close()


class Server:
    """Listens, and owns its connections. `tick` must be called a few times a second."""

    def __init__(self, app: App, settings: ServerSection, *, clock: Callable[[], float]) -> None:
        self.app = app
        self.settings = settings
        self.clock = clock
        self.draining = False
        self._connections: set[ServerConnection] = set()
        self._shed: set[ServerConnection] = set()
        self._bodies_bytes = 0
        self._listener: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port that is listened on (useful after asking for 0)."""
        assert self._listener is not None
        return int(self._listener.sockets[0].getsockname()[1])

    async def listen(self, host: str, port: int, *, reuse_port: bool = False) -> None:
        """Begin to accept; with `reuse_port` beside other processes, among which the kernel deals the connections.

        Raises OSError when the address cannot be had.
        """
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: ServerConnection(self),
            host,
            port,
            backlog=2048,
            reuse_address=True,
            reuse_port=reuse_port,
            start_serving=True,
        )
        for listening in self._listener.sockets:
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def stop_accepting(self) -> None:
        """No new connections; those without a request are closed, the others after their response."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.stop()

    def busy(self) -> int:
        """Connections with a request in them."""
        return sum(1 for connection in self._connections if connection.busy)

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def shed(self) -> int:
        """Connections beyond the limit that are being told so."""
        return len(self._shed)

    def abort_all(self) -> None:
        """Drop what is left."""
        for connection in (*self._connections, *self._shed):
            connection.abort()

    def tick(self, now: float) -> None:
        """Hold the deadlines of all connections."""
        for connection in (*self._connections, *self._shed):
            connection.tick(now)

    def add(self, connection: ServerConnection) -> bool:
        """Whether there is room for one more."""
        room = len(self._connections) < self.settings.connections_max
        (self._connections if room else self._shed).add(connection)
        return room

    def remove(self, connection: ServerConnection) -> None:
        """A connection has ended."""
        self._connections.discard(connection)
        self._shed.discard(connection)

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
