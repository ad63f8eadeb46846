"""How a command answers: a table for people, JSON for programs. Formats, and decides nothing."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from headgate.telemetry.timestamp import Timestamps

NANOUSD_PER_USD = 1_000_000_000
PIPED_WIDTH = 220
"""Columns of a table that goes into a pipe or a file: nothing is cut off there."""


def print_json(answer: Any) -> None:  # Any: whatever JSON can say
    """The whole answer, and nothing else, on standard output."""
    print(json.dumps(answer, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """A table; a column whose name ends in `>` is set to the right, as numbers are."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def console() -> Console:
    """The terminal, or the pipe."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, markup=False, highlight=False)


def timestamp(at_ns: int) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    return Timestamps().text(at_ns)


def usd(nanousd: int) -> str:
    """`$12.34`; below a cent with as many digits as it takes to see something."""
    if nanousd and abs(nanousd) < NANOUSD_PER_USD // 100:
        return f"${nanousd / NANOUSD_PER_USD:.6f}"
    return f"${nanousd / NANOUSD_PER_USD:,.2f}"


def milliseconds(value: int | float | None) -> str:
    """`840 ms`, `12.3 s`, or a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.1f} s"
