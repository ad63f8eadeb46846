"""RFC 3339 times from nanoseconds, cheap enough for every line."""

from __future__ import annotations

from datetime import UTC, datetime


class Timestamps:
    """Writes UTC times with milliseconds; the part down to the second is made once a second."""

    __slots__ = ("_prefix", "_second")

    def __init__(self) -> None:
        self._second = -1
        self._prefix = ""

    def text(self, at_ns: int) -> str:
        """`2026-11-24T15:03:00.125Z` for nanoseconds since 1970."""
        second, rest_ns = divmod(at_ns, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._prefix = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._prefix}.{rest_ns // 1_000_000:03d}Z"
