"""What people type for a span of time, a moment or a sum of money, made into the numbers we count with."""

import re
from datetime import UTC, datetime
from decimal import Decimal

import typer

NS_PER_S = 1_000_000_000
NANOUSD_PER_USD = 1_000_000_000
SPAN_S_MAX = 100 * 365 * 86_400
YEAR_MAX = 2261
"""Nanoseconds since 1970 fit into 64 bits up to here."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def span_s(text: str) -> int:
    """Seconds of `90s`, `30m`, `24h`, `30d`, `2w`; a century at most. Raises typer.BadParameter."""
    match = re.fullmatch(r"([0-9]{1,10})([smhdw])", text)
    if match is None or int(match[1]) * _SECONDS[match[2]] > SPAN_S_MAX:
        raise typer.BadParameter(f"{text!r} is no span of time; write 30m, 24h, 30d or 2w")
    return int(match[1]) * _SECONDS[match[2]]


def moment_ns(text: str, *, now_ns: int) -> int:
    """UTC nanoseconds of a date, a time (RFC 3339) or a span that lies back from now. Raises typer.BadParameter."""
    if re.fullmatch(r"[0-9]+[smhdw]", text):
        return now_ns - span_s(text) * NS_PER_S
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.year > YEAR_MAX:
        raise typer.BadParameter(f"{text!r} is no time; write 24h, 7d, 2026-11-24 or 2026-11-24T08:00:00Z")
    # A time without a zone is UTC, as every time in the ledger is.
    return int(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()) * NS_PER_S


def nanousd(text: str) -> int:
    """Nano-dollars of `20`, `0.5` or `$20`; exact, since a float would not be. Raises typer.BadParameter."""
    if re.fullmatch(r"\$?[0-9]{1,9}(\.[0-9]{1,9})?", text):
        amount = int(Decimal(text.removeprefix("$")) * NANOUSD_PER_USD)
        if amount > 0:
            return amount
    raise typer.BadParameter(f"{text!r} is no sum in dollars; write 20 or 0.50")
