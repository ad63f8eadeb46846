"""Anthropic's response headers that steer a client: when to try again, and how much of each limit is left.

Everything here takes what a server sent and never raises: a header that cannot be read counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

import msgspec

RETRY_AFTER_TEXT_MAX = 64
"""Longer values are no number and no date (failure-model §2.1 tries 10 kB of them)."""


def retry_after_s(headers: Mapping[bytes, bytes], *, now_s: float) -> float | None:
    """Seconds to wait, ≥ 0, or None when the server named none that can be read.

    `retry-after-ms` (milliseconds) wins over `retry-after` (seconds, or an HTTP date that is compared with `now_s`,
    UTC seconds), as in the official SDK (claude-api §5.1). Negative, past, infinite and unreadable values count as
    absent.
    """
    milliseconds = _number(headers.get(b"retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get(b"retry-after")
    seconds = _number(value)
    if seconds is not None or value is None or len(value) > RETRY_AFTER_TEXT_MAX:
        return seconds
    try:
        date = parsedate_to_datetime(value.decode("ascii"))
        # A date without a zone is UTC, as all of HTTP's are; a naive one would be taken for local time.
        wait_s = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now_s
    except (ValueError, TypeError, OverflowError, OSError, IndexError):
        return None
    return wait_s if wait_s > 0 else None


def should_retry(headers: Mapping[bytes, bytes]) -> bool | None:
    """`x-should-retry`: True, False, or None when absent or neither."""
    return {b"true": True, b"false": False}.get(headers.get(b"x-should-retry", b"").strip().lower())


class RateLimit(msgspec.Struct, frozen=True, gc=False):
    """One of Anthropic's limits as its headers tell it: tokens or requests a minute, and what is left."""

    limit: int
    remaining: int


class RateLimits(msgspec.Struct, frozen=True, gc=False):
    """The limits in a response's head. None where a header is missing or unreadable (claude-api §6.3).

    Token counts are rounded to thousands, and stand as they were before this answer's output.
    """

    requests: RateLimit | None = None
    input_tokens: RateLimit | None = None
    output_tokens: RateLimit | None = None


def rate_limits(headers: Mapping[bytes, bytes]) -> RateLimits:
    """`anthropic-ratelimit-{requests,input-tokens,output-tokens}-{limit,remaining}`."""
    return RateLimits(
        requests=_rate_limit(headers, b"requests"),
        input_tokens=_rate_limit(headers, b"input-tokens"),
        output_tokens=_rate_limit(headers, b"output-tokens"),
    )


def _rate_limit(headers: Mapping[bytes, bytes], name: bytes) -> RateLimit | None:
    limit = _count(headers.get(b"anthropic-ratelimit-%b-limit" % name))
    remaining = _count(headers.get(b"anthropic-ratelimit-%b-remaining" % name))
    return None if limit is None or remaining is None else RateLimit(limit, remaining)


def _count(value: bytes | None) -> int | None:
    return int(value) if value is not None and value.isdigit() and len(value) <= 15 else None


def _number(value: bytes | None) -> float | None:
    if value is None or len(value) > RETRY_AFTER_TEXT_MAX:
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 and not value.strip().startswith(b"-") else None
