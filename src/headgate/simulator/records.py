"""What the simulator remembers of every request it got: bytes in, timing, how it ended and what it was billed. For
assertions.
"""

import base64
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from headgate.simulator.bill import Line
from headgate.simulator.http import Request
from headgate.simulator.usage import Usage

End = Literal["open", "complete", "error", "fault", "client_left"]


@dataclass(slots=True)
class Exchange:
    """One request and its answer, filled in as it happens. Times are monotonic seconds, except `wall_s`."""

    number: int
    """From 1, in order of arrival; never reused before a reset."""
    request: Request
    request_id: str
    wall_s: float
    body_kept: bool = True
    """False once the body was dropped to keep memory bounded."""
    model: str | None = None
    streamed: bool = False
    status: int | None = None
    fault: str | None = None
    end: End = "open"
    head_s: float | None = None
    ended_s: float | None = None
    client_closed_s: float | None = None
    """When the client left before the answer was complete."""
    bytes_sent: int = 0
    events_sent: int = 0
    output_tokens: int = 0
    """Produced so far."""
    message_id: str | None = None
    usage: Usage | None = None
    """Billed usage; None when nothing was billed."""
    cost_nanousd: int = 0

    def billed(self, line: Line) -> None:
        """Notes what the exchange cost."""
        self.usage = line.usage
        self.cost_nanousd = line.cost_nanousd
        self.message_id = line.message_id

    def as_dict(self, *, body: bool) -> dict[str, object]:
        """The record as /sim/requests shows it; `body` adds `body_base64`."""
        request = self.request
        shown: dict[str, object] = {
            "number": self.number,
            "connection": request.connection,
            "request_id": self.request_id,
            "method": request.method,
            "path": request.path,
            "query": request.query,
            "headers": request.headers,
            "body_bytes": len(request.body),
            "body_kept": self.body_kept,
            "at": self.wall_s,
            "received_s": request.received_s,
            "head_s": self.head_s,
            "ended_s": self.ended_s,
            "client_closed_s": self.client_closed_s,
            "model": self.model,
            "streamed": self.streamed,
            "status": self.status,
            "fault": self.fault,
            "end": self.end,
            "bytes_sent": self.bytes_sent,
            "events_sent": self.events_sent,
            "output_tokens": self.output_tokens,
            "message_id": self.message_id,
            "usage": self.usage,
            "cost_nanousd": self.cost_nanousd,
        }
        if body:
            shown["body_base64"] = base64.b64encode(request.body).decode() if self.body_kept else None
        return shown


class RequestLog:
    """The last requests, bounded in number and in body bytes; the oldest go first, bodies before records."""

    def __init__(self, *, records_max: int, bytes_max: int) -> None:
        self._records: deque[Exchange] = deque()
        self._records_max = records_max
        self._bytes_max = bytes_max
        self._bytes = 0
        self._bodiless = 0
        self.count = 0
        """Requests ever received, since the last reset."""

    def open(self, request: Request, request_id: str, wall_s: float) -> Exchange:
        """A new record."""
        self.count += 1
        exchange = Exchange(self.count, request, request_id, wall_s)
        self._records.append(exchange)
        self._bytes += len(request.body)
        while self._bytes > self._bytes_max:
            self._drop_body(self._records[self._bodiless])
            self._bodiless += 1
        while len(self._records) > self._records_max:
            oldest = self._records.popleft()
            if self._bodiless:
                self._bodiless -= 1
            else:
                self._bytes -= len(oldest.request.body)
        return exchange

    def since(self, number: int, limit: int) -> Iterator[Exchange]:
        """Up to `limit` records after that number, oldest first."""
        shown = 0
        for exchange in self._records:
            if exchange.number > number:
                if shown == limit:
                    return
                shown += 1
                yield exchange

    def find(self, number: int) -> Exchange | None:
        """The record of that number, if it is still kept."""
        if not self._records or not self._records[0].number <= number <= self._records[-1].number:
            return None
        return self._records[number - self._records[0].number]

    def clear(self) -> None:
        """Forgets all; numbering starts anew."""
        self._records.clear()
        self._bytes = 0
        self._bodiless = 0
        self.count = 0

    def _drop_body(self, exchange: Exchange) -> None:
        request = exchange.request
        self._bytes -= len(request.body)
        exchange.body_kept = False
        exchange.request = Request(
            request.connection,
            request.method,
            request.path,
            request.query,
            request.headers,
            b"",
            request.oversize,
            request.received_s,
        )
