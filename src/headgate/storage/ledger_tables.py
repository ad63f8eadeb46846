"""How the fold reaches its tables: driver SQL, compiled once from the tables' descriptions.

What it is: whole-row upserts with the journal's position in the same transaction, and the few reads of the fold.
What it is not: the reports (`reports.py`). One thread uses one of these; errors are the driver's (`sqlite3.Error`).
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from headgate.storage.fold import CallRow, call_from_columns
from headgate.storage.tables import attempts, calls, journal_positions

ROWS_PER_STATEMENT = 50
"""Rows that one statement writes. A statement for each row takes and gives back the interpreter's lock each time, and
under a busy event loop every one of those is a switch between threads."""


class LedgerTables:
    """A connection of the fold's own."""

    def __init__(self, engine: sa.Engine) -> None:
        def text(statement: sa.Executable) -> str:
            return str(statement.compile(engine))  # type: ignore[attr-defined]  # every statement used here compiles

        self._connection = engine.raw_connection()
        self._cursor = self._connection.cursor()
        still_open = sa.text("'open'")
        self._upsert_call = _Upsert(text(_upsert(calls, calls.c.state == still_open)), len(calls.columns))
        self._upsert_attempt = _Upsert(text(_upsert(attempts, attempts.c.state == still_open)), len(attempts.columns))
        self._upsert_position = text(_upsert(journal_positions))
        call_id: sa.BindParameter[str] = sa.bindparam("call_id")
        segment: sa.BindParameter[str] = sa.bindparam("segment")
        self._call = text(sa.select(calls).where(calls.c.call_id == call_id))
        self._attempts = text(sa.select(attempts).where(attempts.c.call_id == call_id))
        self._open = text(sa.select(calls).where(calls.c.state == still_open))
        self._position = text(sa.select(journal_positions.c.offset_bytes).where(journal_positions.c.segment == segment))
        self._positions = text(sa.select(journal_positions.c.segment))
        self._forget = text(sa.delete(journal_positions).where(journal_positions.c.segment == segment))

    def commit(
        self, call_rows: list[tuple[Any, ...]], attempt_rows: list[tuple[Any, ...]], segment: str, offset: int
    ) -> None:
        """Write rows, and that this segment is folded up to `offset`: both or neither."""
        cursor = self._cursor
        cursor.execute("BEGIN IMMEDIATE")
        try:
            self._upsert_call.write(cursor, call_rows)
            self._upsert_attempt.write(cursor, attempt_rows)
            cursor.execute(self._upsert_position, (segment, offset))
            cursor.execute("COMMIT")
        except BaseException:
            self._connection.rollback()
            raise

    def find(self, call_id: str) -> CallRow | None:
        """The call with its attempts, as it was committed."""
        row = self._cursor.execute(self._call, (call_id,)).fetchone()
        return None if row is None else self._call_row(row)

    def open_calls(self) -> list[CallRow]:
        """Calls that are open, of whatever writer."""
        return [self._call_row(row) for row in self._cursor.execute(self._open).fetchall()]

    def position(self, segment: str) -> int:
        """Offset up to which the segment is folded."""
        row = self._cursor.execute(self._position, (segment,)).fetchone()
        return row[0] if row else 0

    def segments(self) -> list[str]:
        """Names of the segments that have a position."""
        return [name for (name,) in self._cursor.execute(self._positions).fetchall()]

    def forget(self, segment: str) -> None:
        """Drop the position of a segment that is deleted."""
        self._cursor.execute(self._forget, (segment,))

    def checkpoint(self) -> bool:
        """Bring every commit so far to the disk, past a power loss. False when a reader is in the way: try later."""
        busy, frames, moved = self._cursor.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return bool(busy == 0 and frames == moved)

    def close(self) -> None:
        """Give the connection back."""
        self._cursor.close()
        self._connection.close()

    def _call_row(self, row: tuple[Any, ...]) -> CallRow:
        tried = self._cursor.execute(self._attempts, (row[0],)).fetchall()
        return call_from_columns(
            dict(zip(calls.columns.keys(), row, strict=True)),
            [dict(zip(attempts.columns.keys(), attempt, strict=True)) for attempt in tried],
        )


class _Upsert:
    """An upsert of whole rows, many to a statement."""

    __slots__ = ("_many", "_one")

    def __init__(self, statement: str, columns: int) -> None:
        places = f"({', '.join('?' * columns)})"
        assert statement.count(places) == 1, statement
        self._one = statement
        self._many = statement.replace(places, ", ".join([places] * ROWS_PER_STATEMENT))

    def write(self, cursor: Any, rows: list[tuple[Any, ...]]) -> None:  # Any: a driver's cursor, and what it takes
        whole = len(rows) - len(rows) % ROWS_PER_STATEMENT
        for at in range(0, whole, ROWS_PER_STATEMENT):
            cursor.execute(self._many, tuple(chain.from_iterable(rows[at : at + ROWS_PER_STATEMENT])))
        cursor.executemany(self._one, rows[whole:])


def _upsert(table: sa.Table, where: sa.ColumnElement[bool] | None = None) -> sa.Executable:
    """Insert whole rows; where there is one already, overwrite it if `where` holds for it."""
    statement = insert(table)
    rest = {column.name: statement.excluded[column.name] for column in table.columns if not column.primary_key}
    return statement.values({column.name: sa.bindparam(column.name) for column in table.columns}).on_conflict_do_update(
        index_elements=list(table.primary_key.columns), set_=rest, where=where
    )
