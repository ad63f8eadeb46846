"""HTTP/1.1 out: the one place that talks to Anthropic, and a bounded pool of connections to its one origin.

What it is: an asyncio Protocol parsed by httptools, TLS, deadlines, and failures as values. What it is not: retries
(`policy/call.py`) or the meaning of an answer (`wire/`). There is no redirect, no proxy from the environment, and no
client input that chooses a host.
"""

from __future__ import annotations

import asyncio
import ssl
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol
from urllib.parse import urlsplit

import httptools

from headgate.gateway.settings import UpstreamSection
from headgate.gateway.tls import TlsPipe, client_context
from headgate.policy.records import Failure, FailureKind

READ_BUFFER_BYTES = 64 << 10
HEADER_BYTES_MAX = 64 << 10
ANSWER_BYTES_MAX = 64 << 20
"""Of an answer that is not streamed, decoded; it is held whole, so that a cut one can be tried again."""
SMALL_BODY_BYTES = 64 << 10
DECODED_RATIO_MAX = 100
DECODED_BYTES_FREE = 1 << 20
"""Of a compressed answer: beyond the first MiB at most a hundred bytes for each that came (failure-model §2.1)."""
SETTLE_S = 1.0
"""What the end of an answer that is known to be whole may take to arrive, before its connection is dropped."""
WAITERS_MAX = 10_000

_read_buffer = bytearray(READ_BUFFER_BYTES)

_STREAMED = frozenset(
    {
        b"text/event-stream",
        b"application/x-jsonl",
        b"application/jsonl",
        b"application/binary",
        b"application/octet-stream",
    }
)
"""Kinds of answers without an end in sight: events, and the results of a batch."""


class Sink(Protocol):
    """Where a streamed answer's body goes."""

    def body(self, data: bytes) -> None:
        """A piece of it, as it came."""

    def ended(self) -> None:
        """The HTTP body is whole."""

    def broke(self, failure: Failure) -> None:
        """It will not become whole."""


class Answer:
    """An answer's head, and its body unless that is streamed to a `Sink`."""

    __slots__ = (
        "_connection",
        "_ended",
        "_failure",
        "_pieces",
        "_sink",
        "_size",
        "head_at",
        "header_map",
        "headers",
        "status",
        "streamed",
    )

    def __init__(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        self._pieces: list[bytes] = []
        self._size = 0
        self._sink: Sink | None = None
        self._ended = False
        self._failure: Failure | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        """Names as they came, in order."""
        self.header_map: Mapping[bytes, bytes] = {}
        """By lower-case name; of several the last."""
        self.streamed = False
        self.head_at = 0.0

    def body(self) -> bytes:
        """The whole body; call it when `streamed` is False."""
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def attach(self, sink: Sink) -> None:
        """Send the body of a streamed answer there, beginning with what has come already."""
        self._sink = sink
        pieces, self._pieces = self._pieces, []
        if pieces:
            sink.body(b"".join(pieces))
        if self._sink is None:
            # It has had enough already.
            return
        if self._failure is not None:
            sink.broke(self._failure)
        elif self._ended:
            sink.ended()

    def detach(self) -> None:
        """The sink wants nothing more; the connection is kept if the answer's end follows at once, else dropped."""
        self._sink = None
        if not self._ended:
            self._connection.settle()

    def abort(self) -> None:
        """Close the connection now: Anthropic stops producing."""
        self._sink = None
        if not self._ended:
            self._connection.abort()

    def pause(self, paused: bool) -> None:
        """Stop or go on reading: backpressure from the client."""
        if not self._ended:
            self._connection.pause(paused)

    # the connection's side

    def take(self, data: bytes) -> bool:
        """A piece of the body; False when it grows beyond what is held."""
        if self._sink is not None:
            self._sink.body(data)
            return True
        self._pieces.append(data)
        self._size += len(data)
        return self._size <= ANSWER_BYTES_MAX

    def end(self) -> None:
        """The HTTP body is whole."""
        self._ended = True
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.ended()

    def fail(self, failure: Failure) -> None:
        """The connection broke in the middle of it."""
        self._failure = failure
        self._ended = True
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.broke(failure)


class UpstreamConnection(asyncio.BufferedProtocol):
    """One connection to Anthropic: at most one request at a time."""

    __slots__ = (
        "_answer",
        "_decoded_bytes",
        "_decoder",
        "_done",
        "_encoded_bytes",
        "_first_byte_timeout_s",
        "_handshaken",
        "_header_bytes",
        "_in_head",
        "_informational",
        "_keep_alive",
        "_parser",
        "_paused",
        "_settle_until",
        "_tls",
        "_transport",
        "_upstream",
        "_waiting",
        "closed",
        "dropped",
        "idle_since",
        "last_byte_at",
        "sent_at",
        "served",
    )

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # set in connection_made
        self._tls: TlsPipe | None = None
        self._handshaken: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._waiting: asyncio.Future[Answer | Failure] | None = None
        self._decoder: zlib._Decompress | None = None
        self._encoded_bytes = 0
        self._decoded_bytes = 0
        self._in_head = False
        self._informational = False
        self._keep_alive = False
        self._header_bytes = 0
        self._paused = False
        self._settle_until: float | None = None
        self._done: Answer | None = None
        self._first_byte_timeout_s = 0.0
        self.closed = False
        self.dropped = False
        self.idle_since = 0.0
        self.sent_at = 0.0
        self.last_byte_at = 0.0
        self.served = 0

    # the pool's side

    async def handshake(self, context: ssl.SSLContext, server_name: str, session: ssl.SSLSession | None) -> None:
        """Become a TLS connection. Raises ssl.SSLError or ConnectionError."""
        self._tls = TlsPipe(context, self._transport, server_name, session)
        self._handshaken = asyncio.get_running_loop().create_future()
        self._tls.start()
        await self._handshaken

    def request(
        self, head: bytes, body: bytes, waiting: asyncio.Future[Answer | Failure], *, first_byte_timeout_s: float
    ) -> None:
        """Send a request; `waiting` gets its answer, or why there is none.

        A streamed answer is told at its head, any other one when it is whole.
        """
        assert self._waiting is None
        if self.dropped or self.closed:
            waiting.set_result(Failure(kind="connect", message="The connection was lost before its use.", sent=False))
            return
        self._first_byte_timeout_s = first_byte_timeout_s
        self._waiting = waiting
        self._answer = None
        self._settle_until = None
        self.served += 1
        self.sent_at = self.last_byte_at = self._upstream.clock()
        # A large body is not copied to stand behind its head: many of them at once are what fills the memory.
        pieces = [head + body] if len(body) < SMALL_BODY_BYTES else [head, body]
        if self._tls is None:
            self._transport.writelines(pieces)
        else:
            for piece in pieces:
                self._tls.send(piece)

    def settle(self) -> None:
        """Nobody wants the rest of the answer; an end that has been said already may still come and free the line."""
        self._settle_until = self._upstream.clock() + SETTLE_S

    def pause(self, paused: bool) -> None:
        """Backpressure; a pause is no stall."""
        if paused != self._paused and not self.closed:
            self._paused = paused
            self.last_byte_at = self._upstream.clock()
            if paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once, and serve nobody any more."""
        if not self.dropped:
            self.dropped = True
            self._upstream.forget(self)
            self._transport.abort()

    @property
    def session(self) -> ssl.SSLSession | None:
        """A TLS session to resume from."""
        return self._tls.session if self._tls is not None else None

    def tick(self, now: float, settings: UpstreamSection) -> None:
        """Hold the deadlines."""
        if self._waiting is not None and self._answer_head_missing():
            if now - self.sent_at > self._first_byte_timeout_s:
                self._fail("timeout", "Anthropic did not begin to answer in time.")
        elif self._settle_until is not None:
            if now > self._settle_until:
                self.abort()
        elif (
            (self._waiting is not None or self._answer is not None)
            and not self._paused
            and now - self.last_byte_at > settings.stall_timeout_s
        ):
            self._fail("stall", "Anthropic fell silent in the middle of its answer.")

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = transport  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the loop may read into."""
        return memoryview(_read_buffer)

    def buffer_updated(self, nbytes: int) -> None:
        """The loop has read `nbytes`."""
        data = memoryview(_read_buffer)[:nbytes]
        if self._tls is None:
            self._feed(data)
            return
        try:
            pieces = self._tls.receive(data)
        except ssl.SSLError as error:
            self._tls_failed(error)
            return
        if self._handshaken is not None and self._tls.established:
            handshaken, self._handshaken = self._handshaken, None
            if not handshaken.done():
                handshaken.set_result(None)
        if pieces:
            self._feed(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def eof_received(self) -> bool:
        """Anthropic has closed its side."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Gone. An answer whose end is the connection's end is whole now, any other one is cut."""
        self.closed = self.dropped = True
        if self._handshaken is not None and not self._handshaken.done():
            self._handshaken.set_exception(ConnectionResetError("closed during the TLS handshake"))
        answer = self._answer
        if answer is not None and not self._in_head and exc is None and self._ends_with_connection(answer):
            self._complete(answer)
        elif answer is not None and not self._in_head:
            self._fail("truncated", "Anthropic ended the connection in the middle of its answer.")
        else:
            self._fail("reset", "Anthropic closed the connection before it answered.")
        self._upstream.lost(self)

    # httptools' side

    def on_message_begin(self) -> None:
        """First byte of an answer."""
        if self._waiting is None or self._done is not None:
            # Nobody asked for it: what follows an answer must not become the next caller's.
            self.abort()
            return
        self._in_head = True
        self._header_bytes = 0
        self._answer = Answer(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, whole."""
        if self._in_head and self._answer is not None:
            self._answer.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is whole."""
        answer = self._answer
        if answer is None or self._done is not None:
            return
        self._in_head = False
        answer.status = self._parser.get_status_code()
        self._informational = answer.status < 200
        if self._informational:
            return
        answer.head_at = self._upstream.clock()
        lower = _lower_names
        answer.header_map = headers = {lower[name]: value for name, value in answer.headers}
        self._encoded_bytes = self._decoded_bytes = 0
        encoding = headers.get(b"content-encoding", b"identity")
        self._decoder = _decoder_for(encoding)
        if self._decoder is None and encoding.strip().lower() not in (b"", b"identity"):
            self._fail("malformed", "Anthropic's answer has a content encoding that was not asked for.")
            return
        answer.streamed = answer.status == 200 and _is_streamed(headers.get(b"content-type", b""))
        if answer.streamed:
            self._answered(answer)

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        answer = self._answer
        if answer is None or self._done is not None or self._settle_until is not None:
            return
        if self._decoder is not None:
            self._encoded_bytes += len(data)
            room = DECODED_BYTES_FREE + DECODED_RATIO_MAX * self._encoded_bytes - self._decoded_bytes
            try:
                data = self._decoder.decompress(data, max(room, 1))
            except zlib.error:
                self._fail("malformed", "Anthropic's compressed answer cannot be decoded.")
                return
            self._decoded_bytes += len(data)
            if self._decoder.unconsumed_tail:
                self._fail("malformed", "Anthropic's compressed answer is too large once it is decoded.")
                return
        if data and not answer.take(data):
            self._fail("malformed", f"Anthropic's answer is larger than {ANSWER_BYTES_MAX} bytes.")

    def on_message_complete(self) -> None:
        """The answer is whole, if it is not just a 1xx. What is done about it waits until all that came is parsed."""
        if self._informational:
            self._informational = False
            self._answer = None
        elif self._done is None and not self.dropped:
            self._done = self._answer
            self._keep_alive = self._parser.should_keep_alive()

    # inside

    def _feed(self, data: memoryview | bytes) -> None:
        self.last_byte_at = self._upstream.clock()
        if self._waiting is None and self._answer is None:
            # Bytes that nobody asked for: the line is no longer to be trusted.
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._done is None:
                self._fail("malformed", "Anthropic's answer is not well-formed HTTP/1.1.")
                return
            # The answer is whole; what came after it is not, and the line is not used again.
            self.abort()
        if self._in_head:
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES_MAX:
                self._fail("malformed", f"Anthropic's header is larger than {HEADER_BYTES_MAX} bytes.")
        done, self._done = self._done, None
        if done is not None and self._answer is done:
            self._complete(done)

    def _complete(self, answer: Answer) -> None:
        if self._decoder is not None and not self._decoder.eof:
            self._fail("truncated", "Anthropic's compressed answer ended early.")
            return
        self._answer = None
        if self._waiting is not None:
            self._answered(answer)
        if not self.dropped and self._keep_alive:
            # Free the line before the end is told: whoever hears it may want to send at once.
            self.pause(False)
            self._upstream.release(self)
        else:
            self.abort()
        answer.end()

    def _answered(self, answer: Answer) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def _fail(self, kind: FailureKind, message: str) -> None:
        answer, self._answer = self._answer, None
        waiting, self._waiting = self._waiting, None
        failure = Failure(
            kind=kind, message=message, upstream_request_id=_request_id(answer), status=answer.status if answer else 0
        )
        self.abort()
        if waiting is not None:
            if not waiting.done():
                waiting.set_result(failure)
        elif answer is not None:
            answer.fail(failure)

    def _tls_failed(self, error: ssl.SSLError) -> None:
        if self._handshaken is not None and not self._handshaken.done():
            self._handshaken.set_exception(error)
            self.abort()
        else:
            self._fail("reset", "The TLS connection to Anthropic broke.")

    def _answer_head_missing(self) -> bool:
        return self._answer is None or self._in_head

    def _ends_with_connection(self, answer: Answer) -> bool:
        """Whether the connection's end may be the answer's; with TLS, only when it was said and not just done."""
        headers = answer.header_map
        framed = b"content-length" in headers or b"chunked" in headers.get(b"transfer-encoding", b"").lower()
        return not framed and (self._tls is None or self._tls.said_goodbye)


class Upstream:
    """The pool. `send` is all that a pipeline needs."""

    def __init__(self, url: str, settings: UpstreamSection, *, clock: Callable[[], float]) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._base_path = parts.path.rstrip("/").encode()
        self._context = client_context() if parts.scheme == "https" else None
        self._settings = settings
        self._session: ssl.SSLSession | None = None
        self._idle: list[UpstreamConnection] = []
        self._open: set[UpstreamConnection] = set()
        self._connecting = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self.clock = clock
        default_port = self._port == (443 if self._context else 80)
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.authority = (host if default_port else f"{host}:{self._port}").encode()
        """What goes into the Host header."""

    @property
    def base_path(self) -> bytes:
        """The path of the configured URL, put before each request's own."""
        return self._base_path

    async def send(
        self,
        head: bytes,
        body: bytes,
        track: Callable[[UpstreamConnection], bool],
        *,
        first_byte_timeout_s: float | None = None,
    ) -> Answer | Failure:
        """One request to one answer, or why there is none; never raises for weather.

        `track` is told the connection before any byte leaves, so that a client's leaving can close it; it answers
        False when nothing is to be sent any more.
        `first_byte_timeout_s` overrides the setting for answers that come whole and so late.
        """
        connection = self._take_idle()
        if connection is None:
            try:
                connection = await self._connect()
            except ssl.SSLCertVerificationError as error:
                message = f"Anthropic's certificate is not valid: {error.verify_message}"
                return Failure(kind="tls", message=message, sent=False)
            except OSError as error:  # TimeoutError and ssl.SSLError among them
                message = f"Anthropic cannot be reached: {str(error) or 'no connection in time'}"
                return Failure(kind="connect", message=message, sent=False)
        if not track(connection):
            self.release(connection)
            return Failure(kind="connect", message="The client left before anything was sent.", sent=False)
        waiting: asyncio.Future[Answer | Failure] = asyncio.get_running_loop().create_future()
        connection.request(
            head, body, waiting, first_byte_timeout_s=first_byte_timeout_s or self._settings.first_byte_timeout_s
        )
        return await waiting

    def tick(self, now: float) -> None:
        """Hold the deadlines, and let go of connections that were idle for long."""
        settings = self._settings
        for connection in list(self._open):
            connection.tick(now, settings)
        while self._idle and now - self._idle[0].idle_since > settings.idle_timeout_s:
            self._idle[0].abort()

    def close(self) -> None:
        """Drop all connections."""
        for connection in list(self._open):
            connection.abort()

    def snapshot(self) -> dict[str, int]:
        """Connections open, idle, and requests waiting for one."""
        return {"open": len(self._open), "idle": len(self._idle), "waiting": len(self._waiters)}

    # the connections' side

    def release(self, connection: UpstreamConnection) -> None:
        """Its answer is whole; it may serve again."""
        connection.idle_since = self.clock()
        self._idle.append(connection)
        self._wake_one()

    def lost(self, connection: UpstreamConnection) -> None:
        """It is closed."""
        if connection.served:
            self._session = connection.session or self._session
        self._open.discard(connection)
        self.forget(connection)
        self._wake_one()

    def forget(self, connection: UpstreamConnection) -> None:
        """It serves nobody any more; its place is free once it is closed."""
        if connection in self._idle:
            self._idle.remove(connection)

    # inside

    def _take_idle(self) -> UpstreamConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.dropped:
                return connection
        return None

    async def _connect(self) -> UpstreamConnection:
        async with asyncio.timeout(self._settings.connect_timeout_s):
            while len(self._open) + self._connecting >= self._settings.connections_max:
                connection = await self._wait_for_room()
                if connection is not None:
                    return connection
            loop = asyncio.get_running_loop()
            self._connecting += 1
            try:
                _, connection = await loop.create_connection(lambda: UpstreamConnection(self), self._host, self._port)
            except BaseException:
                self._connecting -= 1
                self._wake_one()
                raise
            self._connecting -= 1
            self._open.add(connection)
            if self._context is not None:
                try:
                    await connection.handshake(self._context, self._host, self._session)
                except BaseException:
                    connection.abort()
                    raise
            return connection

    async def _wait_for_room(self) -> UpstreamConnection | None:
        if len(self._waiters) >= WAITERS_MAX:
            raise TimeoutError("too many requests wait for a connection")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.cancelled():
                # Called and gone in the same turn: the call is passed on.
                self._wake_one()
            raise
        return self._take_idle()

    def _wake_one(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


def _decoder_for(encoding: bytes) -> zlib._Decompress | None:
    """We ask for `identity`; an edge in between may compress all the same."""
    match encoding.strip().lower():
        case b"gzip":
            return zlib.decompressobj(16 + zlib.MAX_WBITS)
        case b"deflate":
            return zlib.decompressobj()
        case _:
            return None


class _LowerNames(dict[bytes, bytes]):
    """Header names in lower case; Anthropic sends the same two dozen with every answer."""

    def __missing__(self, name: bytes) -> bytes:
        lower = name.lower()
        if len(self) < 1024:
            self[name] = lower
        return lower


_lower_names = _LowerNames()


def _is_streamed(content_type: bytes) -> bool:
    kind = content_type.partition(b";")[0].strip().lower()
    return kind in _STREAMED


def _request_id(answer: Answer | None) -> str:
    if answer is None:
        return ""
    for name, value in answer.headers:
        if name.lower() == b"request-id":
            return value.decode("latin-1")
    return ""
