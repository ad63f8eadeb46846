"""Spans and moments as people write them, made into numbers: for the command line and for `/admin`."""

from __future__ import annotations

import re
from datetime import UTC, datetime

NS_PER_S = 1_000_000_000
SPAN_S_MAX = 100 * 365 * 86_400
YEAR_MAX = 2261
"""Nanoseconds since 1970 fit into the database's 64 bits up to here."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def span_s(text: str) -> int:
    """Seconds of `90s`, `30m`, `24h`, `30d`, `2w`; a century at most. Raises ValueError that names the form."""
    match = re.fullmatch(r"([0-9]{1,10})([smhdw])", text)
    if match is None or int(match[1]) * _SECONDS[match[2]] > SPAN_S_MAX:
        raise ValueError(f"{text!r} is no span of time; write 30m, 24h, 30d or 2w")
    return int(match[1]) * _SECONDS[match[2]]


def moment_ns(text: str, *, now_ns: int) -> int:
    """UTC nanoseconds of a date, a time (RFC 3339) or a span that lies back from now. Raises ValueError."""
    if re.fullmatch(r"[0-9]+[smhdw]", text):
        return now_ns - span_s(text) * NS_PER_S
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or not 1970 <= moment.year <= YEAR_MAX:
        raise ValueError(f"{text!r} is no time; write 24h, 7d, 2026-11-24 or 2026-11-24T08:00:00Z")
    # A time without a zone is UTC, as every time in the ledger is.
    return int(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()) * NS_PER_S
