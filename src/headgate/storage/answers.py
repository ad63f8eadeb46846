"""Answers that may be given a second time: what a store of them does, and the store of one machine.

What it is: records by key, each with an owner and an end, bounded in bytes over all processes that share the store.
What it is not: a judgement of what is kept (`policy/answer_reuse.py`), or a place that must be there: whoever asks
takes every failure as a miss.

It holds the text of answers, the only place of the gateway that does without capture. It exists only where an
operator has switched reuse on for an endpoint, is readable by its owner alone, writes over what it deletes, and
`remove_file` takes it away where reuse is switched off.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

FILE_NAME = "answers.sqlite"
OVERHEAD_BYTES = 256
"""Counted for each answer beside its record: key, owner, index."""
EXPIRED_AT_ONCE = 500
"""Rows that one answer's keeping clears away."""
BUSY_TIMEOUT_S = 1.0
"""How long a writer waits for that of another process. Readers wait for nobody."""

CLOSE_S = 2.0

_NS = 1_000_000_000
_SCHEMA_VERSION = 1
_SCHEMA = (
    "CREATE TABLE answers (key TEXT PRIMARY KEY, owner TEXT NOT NULL, expires_at_ns INTEGER NOT NULL,"
    " bytes INTEGER NOT NULL, record BLOB NOT NULL)",
    "CREATE INDEX answers_by_end ON answers (expires_at_ns, bytes)",
    "CREATE INDEX answers_by_owner ON answers (owner)",
    "CREATE TABLE held (bytes INTEGER NOT NULL)",
    "INSERT INTO held VALUES (0)",
    "CREATE TRIGGER added AFTER INSERT ON answers BEGIN UPDATE held SET bytes = bytes + NEW.bytes; END",
    "CREATE TRIGGER removed AFTER DELETE ON answers BEGIN UPDATE held SET bytes = bytes - OLD.bytes; END",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})
"""The last is what a statement of this file gets where a table is missing."""

Result = TypeVar("Result")


class AnswersUnavailable(Exception):
    """The store cannot be asked now. Weather: a miss for who looks, a loss of nothing for who keeps."""


class Held(msgspec.Struct, frozen=True, gc=False):
    """What a store holds now. `bytes` are records and `OVERHEAD_BYTES` for each."""

    answers: int
    bytes: int


class Answers(Protocol):
    """A store of answers. Every method may raise AnswersUnavailable and nothing else; none blocks the loop.

    When it is full, what would end soonest goes first: of one endpoint's answers the oldest.
    """

    async def get(self, key: str, *, owner: str) -> bytes | None:
        """The record that this owner put under this key, as it was, unless its time is over."""

    async def put(self, key: str, record: bytes, *, owner: str, ttl_s: float) -> bool:
        """Keep a record for so long. False when it alone is more than the store may hold."""

    async def purge(self, owner: str | None) -> int:
        """Remove all records of this owner (None: of everybody) now; returns how many there were."""

    async def expire(self) -> None:
        """Remove what is over its time."""

    async def held(self) -> Held:
        """How full it is."""

    async def close(self) -> None:
        """Let go of files and connections."""


class SqliteAnswers:
    """See `Answers`: one file beside the database, shared by the processes of one machine.

    All of SQLite happens in one thread of its own. The file is opened when it is first asked for, and again after a
    failure. It is a cache: one that is damaged, or of another version of this, is removed and made anew.
    """

    def __init__(self, path: Path, *, bytes_max: int, now_ns: Callable[[], int]) -> None:
        """`now_ns` gives UTC nanoseconds. The file grows to about `bytes_max`, its -wal file to a few MiB."""
        self._path = path
        self._bytes_max = bytes_max
        self._now_ns = now_ns
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    async def get(self, key: str, *, owner: str) -> bytes | None:
        """See `Answers.get`. Only reads: it waits for no writer of another process."""
        return await self._ask(partial(_get, key=key, owner=owner, now_ns=self._now_ns()))

    async def put(self, key: str, record: bytes, *, owner: str, ttl_s: float) -> bool:
        """See `Answers.put`."""
        size = len(record) + OVERHEAD_BYTES
        if size > self._bytes_max:
            return False
        now_ns = self._now_ns()
        row = (key, owner, now_ns + int(ttl_s * _NS), size, record)
        await self._ask(partial(_put, row=row, bytes_max=self._bytes_max, now_ns=now_ns))
        return True

    async def purge(self, owner: str | None) -> int:
        """See `Answers.purge`."""
        return await self._ask(partial(_purge, owner=owner))

    async def expire(self) -> None:
        """See `Answers.expire`."""
        await self._ask(partial(_expire, now_ns=self._now_ns()))

    async def held(self) -> Held:
        """See `Answers.held`."""
        return await self._ask(_held)

    async def close(self) -> None:
        """See `Answers.close`. What was asked before is done first."""
        self._closed = True
        try:
            async with asyncio.timeout(CLOSE_S):
                await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        except TimeoutError:
            pass  # a disk that hangs must not keep the process
        self._thread.shutdown(wait=False)

    async def _ask(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        if self._closed:
            raise AnswersUnavailable(f"{self._path} is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, work)

    # In the thread

    def _do(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        try:
            try:
                return work(self._opened())
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
                    raise
                self._disconnect()
                remove_file(self._path.parent)
                return work(self._opened())
        except (sqlite3.Error, OSError) as error:
            self._disconnect()
            raise AnswersUnavailable(f"{self._path}: {error}") from error

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = _open(self._path)
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except sqlite3.Error:
                pass  # what it could not write was a cache


def remove_file(data_dir: Path) -> bool:
    """Remove the store's file of this data directory, where reuse is off or the file is of no use.

    Returns whether there was one; raises OSError.
    """
    there = (data_dir / FILE_NAME).exists()
    for ending in ("", "-wal", "-shm"):
        (data_dir / (FILE_NAME + ending)).unlink(missing_ok=True)
    return there


def _open(path: Path) -> sqlite3.Connection:
    """Made with mode 0600 before SQLite looks at it, which gives its -wal and -shm files the same."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA journal_size_limit = 4194304")
        # What was deleted is text of people: it is written over.
        connection.execute("PRAGMA secure_delete = ON")
        with _Transaction(connection):
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA:
                    connection.execute(statement)
        if version not in (0, _SCHEMA_VERSION):
            raise _other_version(version)
    except BaseException:
        connection.close()
        raise
    return connection


def _other_version(version: int) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(f"is of version {version}, not {_SCHEMA_VERSION}")
    error.sqlite_errorcode = sqlite3.SQLITE_NOTADB
    return error


class _Transaction:
    """A write that happens whole or not at all."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._connection.execute("COMMIT")
        elif self._connection.in_transaction:
            # A full disk has rolled it back already.
            self._connection.execute("ROLLBACK")


def _get(connection: sqlite3.Connection, *, key: str, owner: str, now_ns: int) -> bytes | None:
    query = "SELECT record, expires_at_ns FROM answers WHERE key = ? AND owner = ?"
    with closing(connection.execute(query, (key, owner))) as rows:
        row = rows.fetchone()
    return row[0] if row is not None and isinstance(row[0], bytes) and row[1] > now_ns else None


def _put(connection: sqlite3.Connection, *, row: tuple[str, str, int, int, bytes], bytes_max: int, now_ns: int) -> None:
    with _Transaction(connection):
        _remove(connection, "expires_at_ns <= ? ORDER BY expires_at_ns LIMIT ?", now_ns, EXPIRED_AT_ONCE)
        _remove(connection, "key = ?", row[0])
        while _total(connection) + row[3] > bytes_max and _remove(connection, "1 ORDER BY expires_at_ns LIMIT 1"):
            pass
        connection.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", row)


def _purge(connection: sqlite3.Connection, *, owner: str | None) -> int:
    with _Transaction(connection):
        count = _remove(connection, "1") if owner is None else _remove(connection, "owner = ?", owner)
    _forget_journal(connection)
    return count


def _expire(connection: sqlite3.Connection, *, now_ns: int) -> None:
    with _Transaction(connection):
        count = _remove(connection, "expires_at_ns <= ?", now_ns)
    if count:
        _forget_journal(connection)


def _held(connection: sqlite3.Connection) -> Held:
    (count,) = connection.execute("SELECT count(*) FROM answers").fetchone()
    return Held(count, _total(connection))


def _total(connection: sqlite3.Connection) -> int:
    (total,) = connection.execute("SELECT bytes FROM held").fetchone()
    return int(total)


def _remove(connection: sqlite3.Connection, which: str, *values: str | int) -> int:
    """`which` is one of the conditions of this file, never text from outside."""
    return connection.execute(
        f"DELETE FROM answers WHERE rowid IN (SELECT rowid FROM answers WHERE {which})",  # noqa: S608
        values,
    ).rowcount


def _forget_journal(connection: sqlite3.Connection) -> None:
    """Old pages lie in the -wal file until they are overwritten. Where another reads just now, next time."""
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
