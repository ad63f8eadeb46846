"""What people type for a span of time, a moment or a sum of money, made into the numbers we count with."""

import re
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation

import typer

NS_PER_S = 1_000_000_000
NANOUSD_PER_USD = 1_000_000_000
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def span_s(text: str) -> int:
    """Seconds of `90s`, `30m`, `24h`, `30d`, `2w`. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no span of time; write 30m, 24h, 30d or 2w")
    return int(match[1]) * _SECONDS[match[2]]


def moment_ns(text: str, *, now_ns: int) -> int:
    """UTC nanoseconds of a date, a time (RFC 3339) or a span that lies back from now. Raises typer.BadParameter."""
    if re.fullmatch(r"\d+[smhdw]", text):
        return now_ns - span_s(text) * NS_PER_S
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no time; write 24h, 7d, 2026-11-24 or 2026-11-24T08:00:00Z") from None
    # A time without a zone is UTC, as every time in the ledger is.
    return int(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()) * NS_PER_S


def nanousd(text: str) -> int:
    """Nano-dollars of `20`, `0.5` or `$20`; exact, since a float would not be. Raises typer.BadParameter."""
    try:
        amount = Decimal(text.removeprefix("$")) * NANOUSD_PER_USD
        if amount.is_finite() and amount > 0 and amount == amount.to_integral_value():
            return int(amount)
    except InvalidOperation:
        pass
    raise typer.BadParameter(f"{text!r} is no sum in dollars; write 20 or 0.50")
