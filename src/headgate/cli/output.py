"""How a command answers: a table for people, JSON for programs. Formats, and decides nothing."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from headgate.telemetry.timestamp import Timestamps

NANOUSD_PER_USD = 1_000_000_000
PIPED_WIDTH = 220
"""Columns of a table that goes into a pipe or a file: nothing is cut off there."""
_PROSE_COLUMNS = 36
"""A column of sentences may be as narrow as this: they go on in the next line."""
_GAP = 2


def print_json(answer: Any) -> None:  # Any: whatever JSON can say
    """The whole answer, and nothing else, on standard output."""
    print(json.dumps(answer, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """A table; a column whose name ends in `>` is set to the right, as numbers are.

    Where the terminal is too narrow, columns come in several tables below one another, each with the first column.
    """
    where = console()
    for number, shown in enumerate(_parts(columns, rows, where.width)):
        if number:
            print()
        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for at in shown:
            name = columns[at]
            table.add_column(name.removesuffix(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
        for row in rows:
            table.add_row(*(row[at] for at in shown))
        where.print(table)


def _parts(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Which columns stand side by side; the first one in each part."""
    needs = []
    for at, name in enumerate(columns):
        widest = max((cell_len(row[at]) for row in rows), default=0)
        if widest > _PROSE_COLUMNS and any(" " in row[at] for row in rows):
            widest = _PROSE_COLUMNS
        needs.append(max(cell_len(name.removesuffix(">")), widest))
    parts = [[0]]
    taken = needs[0]
    for at in range(1, len(columns)):
        if taken + _GAP + needs[at] > width and parts[-1] != [0]:
            parts.append([0])
            taken = needs[0]
        parts[-1].append(at)
        taken += _GAP + needs[at]
    return parts


def count(number: int, noun: str) -> str:
    """`1 file`, `1,200 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def console() -> Console:
    """The terminal, or the pipe."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, markup=False, highlight=False)


def timestamp(at_ns: int) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    return Timestamps().text(at_ns)


def usd(nanousd: int) -> str:
    """`$12.34`, `-$12.34`; below a cent with as many digits as it takes to see something."""
    sign, amount = "-" if nanousd < 0 else "", abs(nanousd)
    if 0 < amount < NANOUSD_PER_USD // 100:
        return f"{sign}${amount / NANOUSD_PER_USD:.6f}"
    return f"{sign}${amount / NANOUSD_PER_USD:,.2f}"


def milliseconds(value: int | float | None) -> str:
    """`840 ms`, `12.3 s`, or a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.1f} s"
