"""What is fuzzed: each target takes any bytes, and an exception of it is a finding.

A target holds more than "does not crash": where another reading of the same bytes exists, the two are compared.
"""

import json
import math
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path

from headgate.storage.database import open_database
from headgate.storage.interfaces import KeyRefused
from headgate.storage.keys import KeyStore, LocalKeyRing
from headgate.wire import errors, sse
from headgate.wire.batches import rewrite_results_urls
from headgate.wire.headers import rate_limits, retry_after_s, should_retry
from headgate.wire.message import InvalidBody, Span, elements, members, scan, splice
from headgate.wire.sse import EventTooLarge, SseReader
from headgate.wire.stream import Kind, MalformedStream, StreamFold


def sse_reader(data: bytes) -> None:
    """The first byte says how long the chunks are; the frames must be those of the whole stream."""
    size, stream = max(data[0], 1) if data else 1, data[1:]
    whole, pieces = SseReader(), SseReader()
    try:
        frames = whole.feed(stream)
        in_pieces = [frame for at in range(0, len(stream), size) for frame in pieces.feed(stream[at : at + size])]
    except EventTooLarge:
        return
    assert frames == in_pieces
    assert whole.pending == pieces.pending == len(stream) - sum(map(len, frames))
    assert stream.startswith(b"".join(frames))
    for frame in frames:
        event, payload = sse.parse(frame)
        assert isinstance(event, bytes)
        assert isinstance(payload, bytes)


def stream_fold(data: bytes) -> None:
    """A stream's events: folded, or malformed."""
    fold = StreamFold()
    try:
        for frame in SseReader().feed(data):
            kind = fold.take(frame)
            assert isinstance(kind, Kind)
            assert fold.complete == (kind in (Kind.STOP, Kind.AFTER_STOP))
    except (EventTooLarge, MalformedStream):
        pass
    assert fold.output_bytes >= 0
    assert not fold.complete or fold.started


def request_scanner(data: bytes) -> None:
    """A body: refused, or read as the standard library reads it, with no key twice."""
    try:
        request = scan(data)
    except InvalidBody:
        return
    finally:
        rewrite_results_urls(data, "https://gateway")
    pairs = _decoded(data)
    assert [key for key, _ in pairs] == list(request.fields)
    for (_, value), span in zip(pairs, request.fields.values(), strict=True):
        assert _decoded(span.of(data)) == value
        _walk(data, span, 0)
    assert splice(data, []) == data
    for name in ("model", "stream"):
        try:
            getattr(request, name)
        except InvalidBody:
            pass
    assert request.max_tokens >= 0
    assert request.cache_marks >= 0
    assert isinstance(request.metadata_user_id, str)


def retry_after(data: bytes) -> None:
    """Headers, parted by NUL: a finite wait or none, and the others never raise."""
    first, _, second = data.partition(b"\0")
    for headers in ({b"retry-after": first}, {b"retry-after-ms": first, b"retry-after": second}):
        for now_s in (0.0, 1_795_532_580.0):
            wait_s = retry_after_s(headers, now_s=now_s)
            assert wait_s is None or (math.isfinite(wait_s) and wait_s >= 0)
    assert should_retry({b"x-should-retry": first}) in (True, False, None)
    limits = rate_limits(
        {b"anthropic-ratelimit-requests-limit": first, b"anthropic-ratelimit-requests-remaining": second}
    )
    assert limits.requests is None or limits.requests.remaining >= 0


def error_envelope(data: bytes) -> None:
    """An error's body: read, or an empty envelope."""
    assert isinstance(errors.error_code(errors.parse(data)), str)


def virtual_key(data: bytes) -> None:
    """A presented key: refused unless it is the one that was issued, also when most of it is right."""
    ring, key = _ring_and_key()
    at = data[0] % len(key) if data else 0
    for presented in (data, key[:at] + data[1:], key[:at] + data[1:2] + key[at + 1 :], key + data):
        if presented == key:
            assert ring.authenticate(presented).user == "an"
            continue
        try:
            ring.authenticate(presented)
        except KeyRefused:
            continue
        raise AssertionError("a key that nobody issued was let in")


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (sse_reader, stream_fold, request_scanner, retry_after, error_envelope, virtual_key)
}


def _walk(body: bytes, span: Span, depth: int) -> None:
    """Every nested value by its spans."""
    assert depth <= 200
    try:
        inner = {b"{": members, b"[": elements}.get(body[span.start : span.start + 1], lambda *_: [])(body, span)
    except InvalidBody:
        return  # a nested key twice
    for child in inner.values() if isinstance(inner, dict) else inner:
        _walk(body, child, depth + 1)


def _decoded(raw: bytes) -> object:
    return json.loads(raw, parse_int=str, parse_float=str, object_pairs_hook=list, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} was let through")


@cache
def _ring_and_key() -> tuple[LocalKeyRing, bytes]:
    folder = tempfile.TemporaryDirectory()
    engine = open_database(Path(folder.name), now_ns=lambda: 1)
    store = KeyStore(engine, now_ns=lambda: 1)
    # Rotated, so that there are two secrets to be confused.
    issued = store.rotate(store.create(name="an").record.id)
    ring = LocalKeyRing(engine, now_ns=count(2).__next__, monotonic=lambda: 0.0)
    engine.dispose()
    folder.cleanup()
    return ring, issued.key.encode()
