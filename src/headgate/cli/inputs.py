"""What people type on the command line, made into the numbers we count with; complaints name the form that is meant."""

import re
from decimal import Decimal

import typer

from headgate.storage import moments

NANOUSD_PER_USD = 1_000_000_000


def span_ns(text: str) -> int:
    """Nanoseconds of `30m`, `24h`, `30d`. Raises typer.BadParameter."""
    try:
        return moments.span_s(text) * moments.NS_PER_S
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def moment_ns(text: str, *, now_ns: int) -> int:
    """UTC nanoseconds of a date, a time or a span back from now. Raises typer.BadParameter."""
    try:
        return moments.moment_ns(text, now_ns=now_ns)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def nanousd(text: str) -> int:
    """Nano-dollars of `20`, `0.5` or `$20`; exact, since a float would not be. Raises typer.BadParameter."""
    if re.fullmatch(r"\$?[0-9]{1,9}(\.[0-9]{1,9})?", text):
        amount = int(Decimal(text.removeprefix("$")) * NANOUSD_PER_USD)
        if amount > 0:
            return amount
    raise typer.BadParameter(f"{text!r} is no sum in dollars; write 20 or 0.50")
