"""The header lines that are ours on an answer: which call it was, what became of it, and the caller's own limits."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from datetime import UTC, datetime

from headgate.policy.limiter import Subject
from headgate.storage.interfaces import Limits

_CONTROL = bytes(range(32)) + b"\x7f"


def attempt_lines(*, model: str, attempts: int, queue_ms: int, asked_first: str, fallback_reason: str) -> bytes:
    """What was done for the call. `fallback_reason` is why another model than `asked_first` was; empty: none was."""
    lines = b"x-headgate-model: %b\r\nx-headgate-attempts: %d\r\nx-headgate-queue-ms: %d\r\n" % (
        _header_value(model),
        attempts,
        queue_ms,
    )
    if fallback_reason:
        lines += b"x-headgate-fallback: from=%b; reason=%b\r\n" % (
            _header_value(asked_first),
            _header_value(fallback_reason),
        )
    return lines


def limit_lines(limits: Limits, subjects: Iterable[Subject], now_ns: int) -> bytes:
    """The caller's own limit, the one that is nearest, where Anthropic's headers told of ours."""
    nearest: tuple[float, float, float] | None = None
    for subject in subjects:
        level = limits.subject_level(subject)
        if level is not None and subject.rpm is not None and (nearest is None or level < nearest[0]):
            nearest = (level, subject.rpm, subject.burst_s)
    if nearest is None:
        return b""
    level, rpm, burst_s = nearest
    full_in_s = max(rpm / 60 * burst_s - level, 0.0) * 60 / rpm
    return (
        b"anthropic-ratelimit-requests-limit: %d\r\nanthropic-ratelimit-requests-remaining: %d\r\n"
        b"anthropic-ratelimit-requests-reset: %b\r\n" % (rpm, max(level, 0), _time(math.ceil(now_ns / 1e9 + full_in_s)))
    )


def bill_lines(cost_nanousd: int, *, cache_read: int, cache_written: int) -> bytes:
    """What an answer that is not streamed cost, and what the prompt cache did for it. In nano-dollars and tokens."""
    cache = b"read" if cache_read else b"write" if cache_written else b"none"
    return b"x-headgate-cost-usd: %d.%09d\r\nx-headgate-cache: %b\r\n" % (*divmod(cost_nanousd, 1_000_000_000), cache)


@functools.lru_cache(maxsize=4096)
def _time(at_s: int) -> bytes:
    """RFC 3339 in UTC, as Anthropic writes the end of a limit."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ").encode()


@functools.lru_cache(maxsize=256)
def _header_value(text: str) -> bytes:
    """A caller's text as it may stand in a header: one line, ASCII."""
    return text.encode("ascii", "replace").translate(None, _CONTROL)
