"""Faults on demand: which request gets which, and what a fault does to an answer.

`FaultPlan` chooses (by script, by outage, by rate); `reshape` bends a stream; a fault of a status is answered by
`error_of`. Neither sleeps nor writes.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from headgate.simulator.errors import ApiError, default_error
from headgate.simulator.events import PING, Act, Frame, error_event

STATUS_KINDS: dict[str, str] = {
    "400": "bad request",
    "400-spend": "400 of a workspace spend limit set by its owner",
    "401": "bad key",
    "402": "billing",
    "403": "permission",
    "404": "not found",
    "408": "request timeout",
    "409": "conflict",
    "413": "too large",
    "422": "unprocessable",
    "429": "rate limit with retry-after (`retry_after`, default 1)",
    "429-no-retry-after": "rate limit without retry-after",
    "429-spend": "tier's spend cap: no retry-after, error_code enforced_spend_limit_reached",
    "429-ramp": "acceleration limit: error_code ramp_limit_exceeded",
    "500": "internal error",
    "502": "an edge's HTML page",
    "503": "unavailable",
    "504": "timeout_error, after `for_s` (default 0)",
    "529": "overloaded",
    "redirect": "302 to another host",
}
CONNECTION_KINDS: dict[str, str] = {
    "refuse": "the listening port is closed for `for_s` (default 1) from now on",
    "reset": "connection reset before any byte of an answer",
    "hang": "no byte of an answer for `for_s` (default 400), then reset",
    "slow-headers": "the response head at one byte each `for_s` (default 0.05)",
}
STREAM_KINDS: dict[str, str] = {
    "reset-after-headers": "connection reset right after the head",
    "error-first": "an error event before message_start",
    "error-mid": "an error event in mid-block, after event `at` (default 6)",
    "truncate": "the body ends cleanly after event `at` (default 6), without message_stop",
    "cut": "the connection breaks after byte `at` (default 600) of the body",
    "stall": "silence for `for_s` (default 400) after event `at` (default 6)",
    "unknown-event": "an event of an unknown type after event `at` (default 1)",
    "slow-loris": "one byte each `for_s` (default 1)",
    "ping-flood": "50 pings before each event",
    "crlf": "CRLF line ends",
    "wrong-content-type": "the right body as text/plain",
    "garbage": "an event whose data is not JSON, after event `at` (default 6)",
    "duplicate-start": "message_start twice",
    "index-jump": "content blocks numbered from 7",
    "after-stop": "events after message_stop",
    "giant-event": "one event of `at` bytes (default 2 MiB)",
    "gzip": "a compressed body nobody asked for",
}
KINDS = STATUS_KINDS | CONNECTION_KINDS | STREAM_KINDS
"""Every kind, and what it does."""

MESSAGES_PATH = "/v1/messages"
SCRIPT_MAX = 10_000
GIANT_BYTES = 2 * 2**20
PINGS = 50


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, as it strikes one request."""

    kind: str
    model: str | None = None
    """Only requests for this model, by its id or an alias; None for any."""
    path: str = MESSAGES_PATH
    """Only requests to this path."""
    retry_after: str | None = None
    """Sent as it is, however wrong."""
    at: int | None = None
    for_s: float | None = None
    error_code: str | None = None
    message: str | None = None
    how: Literal["close", "reset", "end"] | None = None
    """How a `cut` breaks: FIN without the last chunk, RST, or a clean end of the body."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault kind {self.kind!r}; one of {', '.join(KINDS)}")


class Scripted(msgspec.Struct, forbid_unknown_fields=True):
    """What POST /sim/faults takes: a fault with a count, or `rate`, or `outage`, or a list of scripted faults."""

    kind: str | None = None
    model: str | None = None
    path: str = MESSAGES_PATH
    count: int = 1
    retry_after: str | int | float | None = None
    at: int | None = None
    for_s: float | None = None
    error_code: str | None = None
    message: str | None = None
    how: Literal["close", "reset", "end"] | None = None
    rate: dict[str, float] | None = None
    outage: "Scripted | None" = None
    script: "list[Scripted] | None" = None

    def fault(self) -> Fault:
        """The fault itself. Raises ValueError for an unknown kind."""
        return self.fault_of(self.kind or "")

    def fault_of(self, kind: str) -> Fault:
        """The same for another kind."""
        after = self.retry_after
        return Fault(
            kind=kind.replace("_", "-"),
            model=self.model,
            path=self.path,
            retry_after=None if after is None else str(after),
            at=self.at,
            for_s=self.for_s,
            error_code=self.error_code,
            message=self.message,
            how=self.how,
        )


class FaultPlan:
    """What is to go wrong: a script (first match first, each used `count` times), outages until ended, and rates."""

    def __init__(self) -> None:
        self._script: list[tuple[Fault, int]] = []
        self._outages: list[Fault] = []
        self._rates: list[tuple[Fault, float]] = []

    def add(self, order: Scripted) -> None:
        """Takes an order. Raises ValueError, and takes nothing, when any part of it is wrong."""
        script = [(item.fault(), item.count) for item in order.script or ()]
        if order.kind is not None:
            script.append((order.fault(), order.count))
        outage = order.outage.fault() if order.outage is not None else None
        rates = [(order.fault_of(kind), share) for kind, share in (order.rate or {}).items()]
        if any(share < 0.0 for _, share in rates) or sum(share for _, share in rates) > 1.0:
            raise ValueError("rates are shares of requests: none below 0, together at most 1")
        if len(self._script) + len(script) > SCRIPT_MAX:
            raise ValueError(f"a script holds at most {SCRIPT_MAX} entries")
        self._script += [(fault, count) for fault, count in script if count > 0]
        if outage is not None:
            self._outages.append(outage)
        if order.rate is not None:
            self._rates = [(fault, share) for fault, share in self._rates if fault.model != order.model] + rates

    def pick(self, path: str, models: tuple[str, ...], die: float) -> Fault | None:
        """The fault for a request to `path` that goes by any of these model names; `die` is uniform in [0, 1)."""

        def strikes(fault: Fault) -> bool:
            return fault.path == path and (fault.model is None or fault.model in models)

        for position, (fault, count) in enumerate(self._script):
            if strikes(fault):
                if count > 1:
                    self._script[position] = (fault, count - 1)
                else:
                    del self._script[position]
                return fault
        for fault in self._outages:
            if strikes(fault):
                return fault
        for fault, share in self._rates:
            if strikes(fault):
                if die < share:
                    return fault
                die -= share
        return None

    def end_outages(self, model: str | None) -> None:
        """Ends the outages of a model, or all."""
        self._outages = [fault for fault in self._outages if model is not None and fault.model != model]

    def clear(self) -> None:
        """No fault any more."""
        self._script.clear()
        self._outages.clear()
        self._rates.clear()

    def snapshot(self) -> dict[str, object]:
        """All that is still to come."""
        return {
            "script": [{"fault": fault, "count": count} for fault, count in self._script],
            "outages": self._outages,
            "rates": [{"fault": fault, "rate": share} for fault, share in self._rates],
        }


def error_of(fault: Fault) -> ApiError:
    """The answer of a fault of a status; for `502` and `redirect` only its status and headers count."""
    if fault.kind == "redirect":
        return ApiError(302, "Found", headers=(("location", "http://127.0.0.1:9/elsewhere"),))
    status = int(fault.kind.partition("-")[0])
    base = default_error(status)
    code, message, headers = fault.error_code, fault.message or base.message, base.headers
    if fault.kind == "400-spend":
        message = fault.message or "You have reached your specified API usage limits."
    if fault.kind == "429-spend":
        code = code or "enforced_spend_limit_reached"
        message = (
            fault.message or "You have reached your API usage limits: your organization's monthly spend cap is used up."
        )
    if fault.kind == "429-ramp":
        code = code or "ramp_limit_exceeded"
        headers = (("retry-after", "10"),)
    if fault.kind == "429":
        headers = (("retry-after", "1"),)
    if fault.retry_after is not None:
        headers = (("retry-after", fault.retry_after),)
    return ApiError(status, message, code, headers=headers)


def content_headers(fault: Fault | None) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The content type of a stream under a fault, and the headers it adds."""
    if fault is not None and fault.kind == "wrong-content-type":
        return "text/plain; charset=utf-8", ()
    if fault is not None and fault.kind == "gzip":
        return "text/event-stream; charset=utf-8", (("content-encoding", "gzip"),)
    return "text/event-stream; charset=utf-8", ()


def reshape(fault: Fault, frames: Iterator[Frame]) -> Iterator[Frame]:
    """The stream as the fault leaves it. Kinds that are not about streams leave it alone."""
    at = fault.at if fault.at is not None else 6
    match fault.kind:
        case "reset-after-headers":
            return iter([Frame(b"", 0.0, 0, "reset")])
        case "error-first":
            return iter([Frame(_overloaded(fault), 0.0, 0), Frame(b"", 0.0, 0, "end")])
        case "error-mid":
            return _ended(frames, at, [(_overloaded(fault), "send"), (b"", "end")])
        case "truncate":
            return _ended(frames, at, [(b"", "end")])
        case "cut":
            return _cut(frames, fault.at if fault.at is not None else 600, fault.how or "close")
        case "stall":
            return _stalled(frames, at, fault.for_s if fault.for_s is not None else 400.0)
        case "unknown-event":
            extra = b'event: telemetry_hint\ndata: {"type":"telemetry_hint","value":[1,{"a":"\xc3\xa9"}]}\n\n'
            return _inserted(frames, fault.at if fault.at is not None else 1, extra)
        case "garbage":
            extra = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"del\xff{{\n\n'
            return _inserted(frames, at, extra)
        case "giant-event":
            size = fault.at if fault.at is not None else GIANT_BYTES
            extra = b'event: giant\ndata: {"type":"giant","x":"' + b"x" * size + b'"}\n\n'
            return _inserted(frames, 3, extra)
        case "slow-loris":
            return _dripped(frames, fault.for_s if fault.for_s is not None else 1.0)
        case "ping-flood":
            return (frame._replace(data=PING * PINGS + frame.data) if frame.data else frame for frame in frames)
        case "crlf":
            return (frame._replace(data=frame.data.replace(b"\n", b"\r\n")) for frame in frames)
        case "duplicate-start":
            return _doubled(frames)
        case "index-jump":
            return (frame._replace(data=_renumbered(frame.data)) for frame in frames)
        case "after-stop":
            return _appended(frames)
        case "gzip":
            return _gzipped(frames)
        case _:
            return frames


def reshape_body(fault: Fault, body: bytes) -> Iterator[Frame]:
    """The JSON of a message that is not streamed, as the fault leaves it. Its content-length stays what the whole
    body has.
    """
    half = min(fault.at if fault.at is not None else len(body) // 2, len(body))
    match fault.kind:
        case "reset-after-headers":
            return iter([Frame(b"", 0.0, 0, "reset")])
        case "truncate":
            return iter([Frame(body[:half], 0.0, 0), Frame(b"", 0.0, 0, "close")])
        case "cut":
            act: Act = "reset" if fault.how == "reset" else "close"
            return iter([Frame(body[:half], 0.0, 0), Frame(b"", 0.0, 0, act)])
        case "stall":
            silent_s = fault.for_s if fault.for_s is not None else 400.0
            return iter([Frame(body[:half], 0.0, 0), Frame(body[half:], silent_s, 0)])
        case "garbage":
            return iter([Frame(b"{" * len(body), 0.0, 0)])
        case "slow-loris":
            return _dripped(iter([Frame(body, 0.0, 0)]), fault.for_s if fault.for_s is not None else 1.0)
        case _:
            return iter([Frame(body, 0.0, 0)])


def drip(data: bytes, wait_s: float) -> Iterator[Frame]:
    """Bytes outside the chunked framing, one at a time."""
    return (Frame(data[i : i + 1], wait_s, 0, "raw") for i in range(len(data)))


def _overloaded(fault: Fault) -> bytes:
    error = ApiError(529, fault.message or "Overloaded", fault.error_code)
    return error_event(error.body(None))


def _ended(frames: Iterator[Frame], at: int, last: list[tuple[bytes, Literal["send", "end"]]]) -> Iterator[Frame]:
    produced = 0
    events = 0
    for frame in frames:
        if events >= at:
            break
        events += bool(frame.data)
        produced = frame.output_tokens
        yield frame
    for data, act in last:
        yield Frame(data, 0.0, produced, act)


def _cut(frames: Iterator[Frame], at: int, how: Literal["close", "reset", "end"]) -> Iterator[Frame]:
    left = at
    produced = 0
    for frame in frames:
        if len(frame.data) >= left:
            yield frame._replace(data=frame.data[:left])
            break
        left -= len(frame.data)
        produced = frame.output_tokens
        yield frame
    yield Frame(b"", 0.0, produced, how)


def _stalled(frames: Iterator[Frame], at: int, silent_s: float) -> Iterator[Frame]:
    events = 0
    for frame in frames:
        if frame.data:
            events += 1
            if events == at + 1:
                frame = frame._replace(wait_s=frame.wait_s + silent_s)
        yield frame


def _inserted(frames: Iterator[Frame], at: int, extra: bytes) -> Iterator[Frame]:
    events = 0
    for frame in frames:
        yield frame
        if frame.data:
            events += 1
            if events == at:
                yield Frame(extra, 0.0, frame.output_tokens)


def _dripped(frames: Iterator[Frame], wait_s: float) -> Iterator[Frame]:
    for frame in frames:
        for i in range(len(frame.data)):
            yield frame._replace(data=frame.data[i : i + 1], wait_s=wait_s)


def _doubled(frames: Iterator[Frame]) -> Iterator[Frame]:
    first = next(frames)
    yield first
    yield first
    yield from frames


def _appended(frames: Iterator[Frame]) -> Iterator[Frame]:
    last = Frame(b"", 0.0, 0)
    for frame in frames:
        last = frame
        yield frame
    delta = b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"late"}}'
    extra = b"event: content_block_delta\ndata: " + delta + b"\n\n"
    yield Frame(extra, 0.0, last.output_tokens)


def _renumbered(data: bytes) -> bytes:
    for index in range(3):
        data = data.replace(b'"index":%d' % index, b'"index":%d' % (index + 7))
        if b'"index":%d' % (index + 7) in data:
            break
    return data


def _gzipped(frames: Iterator[Frame]) -> Iterator[Frame]:
    packer = zlib.compressobj(wbits=31)
    produced = 0
    for frame in frames:
        produced = frame.output_tokens
        if frame.data:
            yield frame._replace(data=packer.compress(frame.data) + packer.flush(zlib.Z_SYNC_FLUSH))
        else:
            yield frame
    yield Frame(packer.flush(), 0.0, produced)
