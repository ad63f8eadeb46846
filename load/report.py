"""How a run is told: bars that are met or not, and tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """Something the run had to reach."""

    what: str
    bar: str
    value: str
    met: bool


def bars_text(bars: Iterable[Bar]) -> str:
    """One line a bar."""
    return "\n".join(
        f"  {'met    ' if bar.met else 'NOT MET'}  {bar.what}: {bar.value} (bar: {bar.bar})" for bar in bars
    )


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells; the first column to the left, the others to the right."""
    cells = [tuple(row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def seconds(value: float | None) -> str:
    """`1.24 s`, or a dash."""
    if value is None:
        return "–"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def percent(share: float | None, digits: int = 1) -> str:
    """`99.5 %`, or a dash."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"
