"""People: each asks once and writes down what came back.

What it is: one question to its end, streamed by the official SDK or whole over a plain connection, and whether the
answer was whole. What it is not: who asks when (the programs), nor a judgement (`report.py`). Nothing is retried unless
the run is about the SDK's retries: what a person would see is what is counted.

The SDK is what apps use, and it serves 200 people at once. With 1,000 each costs it 10 ms of CPU, most of it spent in
looking through its connections, and then it is what is measured: storms come over `Line`.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anthropic
from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient
from httpx2 import HTTPError, Limits

CONNECTIONS_MAX = 4_000


@dataclass
class Heard:
    """One question and what became of it. Times are monotonic seconds, shared by all processes of a machine."""

    user: str
    number: int
    asked_at: float
    ended_at: float = 0.0
    first_text_at: float | None = None
    whole: bool = False
    """Status 200, some text, a stop reason and `message_stop`."""
    error: str = ""
    """What came instead: `429 queue_deadline`, `cut`, `timeout`, …"""
    retry_after: str = ""
    model: str = ""
    attempts: int = 0
    queue_ms: int | None = None
    """As the gateway says; None where it did not."""

    @property
    def total_s(self) -> float:
        """From the question to the last byte."""
        return self.ended_at - self.asked_at

    @property
    def first_text_s(self) -> float | None:
        """From the question to the first word."""
        return None if self.first_text_at is None else self.first_text_at - self.asked_at


def sdk_client(url: str, key: str, *, max_retries: int = 0, timeout_s: float = 600.0) -> AsyncAnthropic:
    """The SDK's client, with room for a crowd: by default it has 1,000 connections and keeps 100."""
    limits = Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX)
    return AsyncAnthropic(
        base_url=url,
        api_key=key,
        max_retries=max_retries,
        timeout=timeout_s,
        http_client=DefaultAsyncHttpxClient(limits=limits, timeout=timeout_s, trust_env=False),
    )


async def ask_streamed(
    client: AsyncAnthropic, body: Mapping[str, Any], *, user: str, number: int, headers: Mapping[str, str] | None = None
) -> Heard:
    """Ask through the SDK, and hear it to the end. Raises nothing that a network or a gateway could cause."""
    heard = Heard(user, number, time.monotonic())
    try:
        await _hear_stream(client, body, headers, heard)
    except anthropic.APIStatusError as error:
        heard.error = f"{error.status_code} {_code(error.body)}".strip()
        heard.retry_after = error.response.headers.get("retry-after", "")
        _read_headers(error.response.headers, heard)
    except anthropic.APITimeoutError:
        heard.error = "timeout"
    except anthropic.APIConnectionError as error:
        heard.error = f"connection: {type(error.__cause__).__name__}"
    except HTTPError as error:
        # What breaks within a stream is not wrapped by the SDK.
        heard.error = f"cut: {type(error).__name__}"
    heard.ended_at = time.monotonic()
    if not heard.whole and not heard.error:
        heard.error = "an end without message_stop"
    return heard


class Line:
    """Plain connections to one place, kept open between questions. Not a client for anything else: it reads answers
    that have a content-length.
    """

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._head = (
            f"POST /v1/messages HTTP/1.1\r\nhost: {parts.netloc}\r\nx-api-key: {key}\r\n"
            "anthropic-version: 2023-06-01\r\ncontent-type: application/json\r\n"
        )
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(
        self, body: Mapping[str, Any], *, user: str, number: int, headers: Mapping[str, str] | None = None
    ) -> Heard:
        """Ask, and hear the whole answer. Cancelled, it leaves as a client does that goes away."""
        heard = Heard(user, number, time.monotonic())
        content = json.dumps(body).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = f"{self._head}{lines}content-length: {len(content)}\r\n\r\n".encode()
        try:
            reader, writer = await self._connection()
            try:
                writer.write(head + content)
                status, found, answer = await _answer(reader)
            except BaseException:
                writer.transport.abort()
                raise
        except (OSError, EOFError) as error:
            heard.error = f"connection: {type(error).__name__}"
        else:
            if found.get("connection") == "close":
                writer.close()
            else:
                self._idle.append((reader, writer))
            _read_headers(found, heard)
            message = json.loads(answer)
            if status == 200:
                heard.whole = message["stop_reason"] is not None and any(one.get("text") for one in message["content"])
                heard.error = "" if heard.whole else "an answer that is not whole"
                heard.model = heard.model or message["model"]
            else:
                heard.error = f"{status} {_code(message)}".strip()
                heard.retry_after = found.get("retry-after", "")
        heard.ended_at = time.monotonic()
        return heard

    def close(self) -> None:
        """Close what is idle."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status_line, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    return int(status_line.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def at(moment: float) -> None:
    """Sleep until this monotonic second."""
    await asyncio.sleep(max(moment - time.monotonic(), 0.0))


def quantile(values: Iterable[float], share: float) -> float | None:
    """The nearest-rank quantile: the smallest value that `share` of all do not exceed. None of nothing."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else None


def most_within(moments: Sequence[float], span_s: float) -> int:
    """The most events in any span of this length, wherever it begins."""
    ordered, most, start = sorted(moments), 0, 0
    for end, moment in enumerate(ordered):
        while moment - ordered[start] >= span_s:
            start += 1
        most = max(most, end - start + 1)
    return most


async def _hear_stream(
    client: AsyncAnthropic, body: Mapping[str, Any], headers: Mapping[str, str] | None, heard: Heard
) -> None:
    async with client.messages.stream(**body, extra_headers=headers) as stream:
        _read_headers(stream.response.headers, heard)
        stopped = False
        async for event in stream:
            if event.type == "content_block_delta" and heard.first_text_at is None:
                heard.first_text_at = time.monotonic()
            elif event.type == "message_stop":
                stopped = True
        message = await stream.get_final_message()
        heard.model = heard.model or message.model
        heard.whole = stopped and message.stop_reason is not None and _has_text(message)


def _has_text(message: anthropic.types.Message) -> bool:
    return any(block.type == "text" and block.text for block in message.content)


def _read_headers(headers: Mapping[str, str], heard: Heard) -> None:
    heard.model = headers.get("x-headgate-model", "")
    heard.attempts = int(headers.get("x-headgate-attempts", "0"))
    queue_ms = headers.get("x-headgate-queue-ms")
    heard.queue_ms = None if queue_ms is None else int(queue_ms)


def _code(body: object) -> str:
    found = body.get("error") if isinstance(body, dict) else None
    if not isinstance(found, dict):
        return ""
    details = found.get("details")
    code = details.get("error_code") if isinstance(details, dict) else None
    return str(code or found.get("type") or "")
