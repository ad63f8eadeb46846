"""An HTTP client that hides nothing: bytes out, bytes back, many requests on few connections.

What it is: keep-alive and pipelining over plain sockets. What it is not: an SDK; it retries nothing and adds no header.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools

WITHIN_S = 60.0


@dataclass
class Response:
    """One response as it came; `body` is without chunk framing."""

    status: int
    headers: list[tuple[bytes, bytes]]
    """Names in lower case, in the order they came."""
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        """The one header of this name; None when there is none. Several are a failure."""
        found = [value for key, value in self.headers if key == name]
        assert len(found) < 2, (name, found)
        return found[0] if found else None

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)

    @property
    def error_code(self) -> str | None:
        """`error.details.error_code`."""
        code: str | None = (self.json()["error"].get("details") or {}).get("error_code")
        return code


def request(
    method: str, target: str, headers: Iterable[tuple[str | bytes, str | bytes]] = (), body: bytes = b""
) -> bytes:
    """One request with a Host and a Content-Length, and otherwise what it is told."""
    lines = [b"%b %b HTTP/1.1\r\nhost: gateway.test\r\n" % (method.encode(), target.encode())]
    lines += [b"%b: %b\r\n" % (_bytes(name), _bytes(value)) for name, value in headers]
    return b"%bcontent-length: %d\r\n\r\n%b" % (b"".join(lines), len(body), body)


def send(
    url: str, *requests: bytes, connections: int = 1, window: int = 1, source: str = "127.0.0.1"
) -> list[Response]:
    """The responses to these requests, in their order, asked for from the address `source`.

    They are dealt out over `connections`; on each at most `window` are under way at once, pipelined.
    """
    return asyncio.run(_send(url, requests, connections, window, source))


def ask(
    url: str,
    method: str,
    target: str,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    *,
    source: str = "127.0.0.1",
) -> Response:
    """One request, one response."""
    (response,) = send(url, request(method, target, (headers or {}).items(), body), source=source)
    return response


async def _send(url: str, requests: Sequence[bytes], connections: int, window: int, source: str) -> list[Response]:
    loop = asyncio.get_running_loop()
    parts = urlsplit(url)
    lines = []
    for number in range(min(connections, len(requests))):
        _, line = await loop.create_connection(
            lambda n=number: _Line(requests[n::connections], window),  # type: ignore[misc]
            parts.hostname,
            parts.port,
            local_addr=(source, 0),
        )
        lines.append(line)
    async with asyncio.timeout(WITHIN_S):
        answered = await asyncio.gather(*(line.done for line in lines))
    responses: list[Response] = [None] * len(requests)  # type: ignore[list-item]
    for number, found in enumerate(answered):
        responses[number::connections] = found
    return responses


class _Line(asyncio.Protocol):
    """One connection with its share of the requests."""

    def __init__(self, requests: Sequence[bytes], window: int) -> None:
        self._waiting = deque(requests)
        self._wanted = len(requests)
        self._window = window
        self._responses: list[Response] = []
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self.done: asyncio.Future[list[Response]] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        for _ in range(self._window):
            self._next()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            got = f"{len(self._responses)} of {self._wanted} responses"
            self.done.set_exception(exc or ConnectionError(f"closed after {got}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        self._responses.append(Response(self._parser.get_status_code(), self._headers, b"".join(self._pieces)))
        self._headers, self._pieces = [], []
        self._next()
        if len(self._responses) == self._wanted and not self.done.done():
            self.done.set_result(self._responses)
            self._transport.close()

    def _next(self) -> None:
        if self._waiting:
            self._transport.write(self._waiting.popleft())  # type: ignore[attr-defined]


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
