"""An upstream that plays, byte by byte, what a test has written for it, and a client that looks at every byte back.

What it is: raw sockets on both sides of a gateway, so that a cut, a reset, a silence or garbage can be put at any byte.
What it is not: an API (that is the simulator), nor a judge (that is the test).

A request says which play is meant for it by `play-<n>` anywhere in its body, which is passed on to the byte.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import URLError
from urllib.parse import urlsplit

from tests.system.conftest import Gateway, until

RECORDED = (Path(__file__).parents[1] / "transcripts" / "short_stream.sse").read_bytes()
"""A whole answer as it was recorded: a ping, six deltas of Vietnamese text, its bill."""
RECORDED_FRAMES = [frame + b"\n\n" for frame in RECORDED.split(b"\n\n")[:-1]]
FRAMES = [frame for frame in RECORDED_FRAMES if not frame.startswith(b"event: ping\n")]
SHORT_STREAM = b"".join(FRAMES)
"""The same without its ping, which may overtake events that are held."""
FIRST_DELTA_ENDS_AT = len(b"".join(FRAMES[:3]))
INPUT_TOKENS, OUTPUT_TOKENS = 32, 13
WHOLE_MESSAGE = json.dumps(
    {
        "id": "msg_01whole",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-6",
        "content": [{"type": "text", "text": "Xin chào"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS},
    }
).encode()
JSON_HEAD = b"content-type: application/json\r\nrequest-id: req_scripted\r\n"
EVENT_STREAM_HEAD = b"content-type: text/event-stream; charset=utf-8\r\nrequest-id: req_scripted\r\n"


try:
    from uvloop import new_event_loop
except ImportError:  # not made for every platform
    from asyncio import new_event_loop


class Act(Enum):
    """What a play does beside sending bytes and waiting (a float: seconds)."""

    CLOSE = "FIN"
    RESET = "RST, at once"
    HANG = "silence until the other side closes"
    KEEP = "the answer is over; the connection goes on"


Play = tuple[bytes | float | Act, ...]
T = TypeVar("T")


def chunks(*pieces: bytes) -> bytes:
    """Pieces of a chunked body, without its end."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece)


def chunked(body: bytes, *, head: bytes = EVENT_STREAM_HEAD) -> bytes:
    """A whole 200 in one chunk."""
    return b"HTTP/1.1 200 OK\r\n%btransfer-encoding: chunked\r\n\r\n%b0\r\n\r\n" % (head, chunks(body))


def chunked_head(*, head: bytes = EVENT_STREAM_HEAD) -> bytes:
    """The head of a chunked 200."""
    return b"HTTP/1.1 200 OK\r\n%btransfer-encoding: chunked\r\n\r\n" % head


def sized(body: bytes, *, status: bytes = b"200 OK", head: bytes = EVENT_STREAM_HEAD, length: int = -1) -> bytes:
    """An answer with a content-length: that of `body` when it is not told."""
    return b"HTTP/1.1 %b\r\n%bcontent-length: %d\r\n\r\n%b" % (status, head, length if length >= 0 else len(body), body)


def until_close(body: bytes, *, head: bytes = EVENT_STREAM_HEAD) -> bytes:
    """An answer whose end is the connection's."""
    return b"HTTP/1.1 200 OK\r\n%b\r\n%b" % (head, body)


def failing(status: int, error_type: str, *, code: str = "", headers: bytes = b"") -> Play:
    """An error of Anthropic's."""
    error: dict[str, Any] = {"type": error_type, "message": "scripted"}
    if code:
        error["details"] = {"error_code": code}
    body = json.dumps({"type": "error", "error": error, "request_id": "req_scripted"}).encode()
    return (sized(body, status=b"%d Scripted" % status, head=JSON_HEAD + headers), Act.KEEP)


STREAMED: Play = (chunked(SHORT_STREAM), Act.KEEP)
WHOLE: Play = (sized(WHOLE_MESSAGE, head=JSON_HEAD), Act.KEEP)


@dataclass
class Seen:
    """One attempt as the upstream saw it. Times are monotonic seconds."""

    at: float
    head: bytes
    body: bytes
    closed_at: float | None = None
    """When the other side closed while an answer was being played."""


@dataclass
class ScriptedUpstream:
    """Plays what it was told, on a thread of its own. What has no play gets a whole answer."""

    url: str = ""
    seen: dict[str, list[Seen]] = field(default_factory=dict)
    unread_connections: int = 0
    """Connections made, requests or not."""

    def __post_init__(self) -> None:
        self._plays: dict[str, tuple[Play, ...]] = {}
        self._numbers = itertools.count(1)
        self._loop = new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait(10)

    def plan(self, *plays: Play) -> str:
        """A fresh name; the n-th attempt that carries it gets the n-th play, further ones the last."""
        name = f"play-{next(self._numbers)}"
        self._plays[name] = plays
        self.seen[name] = []
        return name

    def attempts(self, name: str) -> list[Seen]:
        """What came for a name."""
        return self.seen[name]

    def close(self) -> None:
        """Stop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024, limit=64 << 20)
        )
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.unread_connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the other side's right
        finally:
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        seen = Seen(time.monotonic(), head, body)
        found = re.search(rb"play-\d+", body)
        name = found[0].decode() if found else ""
        plays = self._plays.get(name)
        if plays is None:
            plays = (STREAMED if b'"stream": true' in body else WHOLE,)
            self.seen.setdefault("", []).append(seen)
        else:
            self.seen[name].append(seen)
        number = len(self.seen[name]) if name in self._plays else 1
        for act in plays[min(number, len(plays)) - 1]:
            if isinstance(act, bytes):
                writer.write(act)
                try:
                    await writer.drain()
                except ConnectionError:
                    seen.closed_at = time.monotonic()
                    return False
            elif isinstance(act, float) or act is Act.HANG:
                try:
                    async with asyncio.timeout(act if isinstance(act, float) else None):
                        if not await reader.read(1):
                            seen.closed_at = time.monotonic()
                            return False
                except TimeoutError:
                    pass
                except ConnectionError:
                    seen.closed_at = time.monotonic()
                    return False
            elif act is Act.KEEP:
                return True
            elif act is Act.RESET:
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                return False
            else:
                return False
        return True


@dataclass
class Reply:
    """A response, byte for byte."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool
    """Whether the framing came to its end."""
    head_s: float
    """From the request to the end of the head."""
    elapsed_s: float

    @property
    def frames(self) -> list[bytes]:
        """The events, each with its blank line; what follows the last blank line stands last."""
        pieces = self.body.split(b"\n\n")
        return [piece + b"\n\n" for piece in pieces[:-1]] + ([pieces[-1]] if pieces[-1] else [])

    @property
    def error(self) -> dict[str, Any]:
        """The `error` of the body, or of the last event."""
        text = self.body if self.status != 200 else self.frames[-1].partition(b"data: ")[2]
        found: dict[str, Any] = json.loads(text)["error"]
        return found

    def sends(self, event: bytes) -> int:
        """How many events of this name it has."""
        return sum(frame.startswith(b"event: %b\n" % event) for frame in self.frames)


def body_of(name: str, *, stream: bool = True, **more: Any) -> bytes:
    """A request that names its play."""
    return json.dumps(
        {
            "model": "claude-sonnet-4-6",
            "max_tokens": 100,
            "stream": stream,
            "metadata": {"user_id": name},
            "messages": [{"role": "user", "content": "Xin chào"}],
            **more,
        }
    ).encode()


def head_of(url: str, key: str, length: int, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """The head of a request to `/v1/messages`."""
    lines = [
        "POST /v1/messages HTTP/1.1",
        f"host: {urlsplit(url).netloc}",
        f"x-api-key: {key}",
        "anthropic-version: 2023-06-01",
        "content-type: application/json",
        f"content-length: {length}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def connect(url: str, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to where a URL points."""
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port, **options)


async def fetch(
    url: str, key: str, body: bytes, *, headers: Iterable[tuple[str, str]] = (), within_s: float = 30.0
) -> Reply:
    """One request on a connection of its own, read to the end of its answer."""
    reader, writer = await connect(url)
    try:
        async with asyncio.timeout(within_s):
            return await exchange(reader, writer, head_of(url, key, len(body), headers) + body)
    finally:
        writer.transport.abort()


async def fetch_all(url: str, key: str, bodies: list[bytes], *, at_once: int) -> list[Reply]:
    """The answers to requests in their order, over so many connections that are kept."""
    replies: dict[int, Reply] = {}
    numbers = iter(range(len(bodies)))

    async def client() -> None:
        writer = None
        for number in numbers:
            if writer is None:
                reader, writer = await connect(url)
            async with asyncio.timeout(60):
                request = head_of(url, key, len(bodies[number])) + bodies[number]
                reply = replies[number] = await exchange(reader, writer, request)
            if not reply.whole or "connection" in reply.headers:
                writer.transport.abort()
                writer = None
        if writer is not None:
            writer.transport.abort()

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(client())
    return [replies[number] for number in range(len(bodies))]


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Reply:
    """One request on this connection, and its answer."""
    started_at = time.monotonic()
    writer.write(request)
    status, found = await read_head(reader)
    head_s = time.monotonic() - started_at
    data, whole = await read_body(reader, found)
    return Reply(status, found, data, whole, head_s, time.monotonic() - started_at)


def run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, on the faster loop where there is one."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, names in lower case."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status_line, *lines = head.split("\r\n")[:-2]
    pairs = [line.partition(":") for line in lines]
    return int(status_line.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> tuple[bytes, bool]:
    """What came of the body, and whether that is all of it."""
    pieces: list[bytes] = []
    try:
        if headers.get("transfer-encoding") != "chunked":
            return await reader.readexactly(int(headers["content-length"])), True
        while size := int(await reader.readuntil(b"\r\n"), 16):
            pieces.append((await reader.readexactly(size + 2))[:-2])
        return b"".join(pieces), await reader.readexactly(2) == b"\r\n"
    except asyncio.IncompleteReadError as error:
        return b"".join(pieces) + error.partial, False
    except ConnectionError:
        return b"".join(pieces), False


async def gather(calls: Iterable[Any], *, at_once: int = 32) -> list[Any]:
    """The results of coroutines in their order, so many of them at a time."""
    gate = asyncio.Semaphore(at_once)

    async def guarded(call: Any) -> Any:
        async with gate:
            return await call

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(guarded(call)) for call in calls]
    return [task.result() for task in tasks]


@dataclass
class Books:
    """Reads the ledger through the operator's door."""

    gateway: Gateway
    key: str

    def newest(self, users: set[str] | None = None) -> list[dict[str, Any]]:
        """Every call, newest first; with `users` no further back than these may be, eight calls for each and 100."""
        calls: list[dict[str, Any]] = []
        cursor = ""
        at_most = 1 << 62 if users is None else 8 * len(users) + 100
        limit = min(1000, at_most)
        while True:
            url = f"{self.gateway.operator_url}/admin/calls?limit={limit}&cursor={cursor}"
            with urllib.request.urlopen(
                urllib.request.Request(url, headers={"x-api-key": self.key}), timeout=30
            ) as answer:
                page = json.load(answer)
            calls += page["calls"]
            cursor = page["cursor"]
            if not cursor or len(calls) >= at_most:
                return calls

    def of_users(self, names: Iterable[str], *, within_s: float = 10.0) -> dict[str, dict[str, Any]]:
        """The one call of each of these users, once all have ended. Fails where there are none, or several."""
        wanted = set(names)

        def read() -> dict[str, dict[str, Any]] | None:
            try:
                found = [call for call in self.newest(wanted) if call["user"] in wanted]
            except URLError:  # not open yet: that is not this reader's matter
                return None
            by_user = {call["user"]: call for call in found}
            assert len(by_user) == len(found), "a call has two rows"
            ended = all(call["outcome"] and call["state"] != "open" for call in found)
            return by_user if ended and by_user.keys() == wanted else None

        calls: dict[str, dict[str, Any]] = until(read, within_s=within_s, what=f"{len(wanted)} calls in the ledger")
        return calls


def app_key(gateway: Gateway) -> str:
    """A key whose calls are booked on `metadata.user_id`, and which reads the books too."""
    return gateway.key("app", "--scope", "messages", "--scope", "app", "--scope", "admin:read")
