"""Opens the database: SQLite in the data directory, at the revision this version knows, or not at all.

What it is: the checks of a start, the automatic migration (after a copy) and the settings of a connection.
What it is not: queries. A file that is damaged, newer than us or not ours is never touched, let alone made anew.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import sqlite

from headgate.storage.tables import metadata

DATABASE_NAME = "headgate.db"
QUICK_CHECK_BYTES_MAX = 64 << 20
"""Up to this size a start reads every page; a bigger file is probed at its edges."""
BUSY_TIMEOUT_S = 5.0
"""How long a writer waits for another's transaction. The longest of ours is a migration; a batch takes milliseconds."""

_MIGRATIONS = Path(__file__).parent / "migrations"
_MAGIC = b"SQLite format 3\0"
_RESTORE = "Put back a copy, or move it away with its -wal file: the next start then makes an empty one"
_RESTORE_MIGRATED = "Put back the copy that was made before the migration (*.bak)"


class DatabaseRefused(Exception):
    """The database is not one this version can work on. It was not changed."""

    def __init__(self, path: Path, wrong: str, mend: str) -> None:
        super().__init__(f"{path} {wrong}. {mend}.")
        self.path = path
        self.wrong = wrong
        self.mend = mend


class Migration(NamedTuple):
    """What `migrate` did."""

    before: str | None
    """The revision it found; None: there was no database."""
    after: str
    copy: Path | None
    """The database as it was, when there was something to change."""


def open_database(data_dir: Path, *, now_ns: Callable[[], int]) -> sa.Engine:
    """The database of this data directory, made if there is none, migrated if it is older. Raises DatabaseRefused."""
    migrate(data_dir, now_ns=now_ns)
    path = data_dir / DATABASE_NAME
    engine = _engine(path)
    missing = _missing(engine)
    if missing:
        engine.dispose()
        raise DatabaseRefused(path, f"lacks {', '.join(missing)}: a migration was cut short", _RESTORE_MIGRATED)
    return engine


def begin_write(engine: sa.Engine) -> AbstractContextManager[sa.Connection]:
    """`engine.begin()` that takes the write lock at once: what is read in it stays true until the commit."""
    return engine.execution_options(headgate_writes=True).begin()


def migrate(data_dir: Path, *, now_ns: Callable[[], int]) -> Migration:
    """Bring the database to the revision of this version, all or nothing, after a copy. Raises DatabaseRefused."""
    path = data_dir / DATABASE_NAME
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    before = _examine(path) if path.exists() and path.stat().st_size else None
    after = _scripts().get_current_head()
    assert after is not None
    if before == after:
        return Migration(before, after, None)
    copy = None
    if before is not None:
        copy = path.with_name(f"{path.name}.{before}.{now_ns()}.bak")
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    engine = _engine(path)
    with begin_write(engine) as connection:
        # SQLite rolls back DDL too: all revisions or none. A process that started beside us may have been first; then
        # this finds nothing to do.
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    engine.dispose()
    return Migration(before, after, copy)


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_S})

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _: object) -> None:
        # The driver's own transactions begin late and leave DDL out; ours begin in `_begin`.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        # NORMAL may lose the last commits with the power, and the journal still has them (decision 0003).
        connection.execute("PRAGMA synchronous = NORMAL")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("headgate_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(_MIGRATIONS))


def _examine(path: Path) -> str | None:
    """The revision of an existing file; None when it has no tables. Only reads. Raises DatabaseRefused."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise DatabaseRefused(path, "is not an SQLite database", _RESTORE)
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            _probe(connection, path, tables)
            versions: list[str] = []
            if "alembic_version" in tables:
                versions = [version for (version,) in connection.execute("SELECT version_num FROM alembic_version")]
    except sqlite3.DatabaseError as error:
        raise DatabaseRefused(path, f"is damaged ({error})", _RESTORE) from error
    if not tables:
        return None
    if len(versions) != 1:
        wrong = f"has tables and {len(versions)} revisions where there must be one: a migration was cut short"
        raise DatabaseRefused(path, wrong, _RESTORE_MIGRATED)
    if versions[0] not in {script.revision for script in _scripts().walk_revisions()}:
        wrong = f"is at revision {versions[0]}, which this version does not know: a newer one has used it"
        raise DatabaseRefused(path, wrong, "Install that version again, or put back the copy it made before (*.bak)")
    return versions[0]


def _probe(connection: sqlite3.Connection, path: Path, tables: set[str]) -> None:
    """Look for damage: everywhere in a small file; in a big one where rows are added. (SQLite looks at its length.)

    Raises sqlite3.DatabaseError.
    """
    if path.stat().st_size <= QUICK_CHECK_BYTES_MAX:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        return
    for table in metadata.sorted_tables:
        if table.name in tables:
            for columns in (table.primary_key.columns, *(index.columns for index in table.indexes)):
                last = sa.select(*table.primary_key.columns).order_by(*(column.desc() for column in columns)).limit(1)
                text = last.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True}).string
                connection.execute(text).fetchall()


def _missing(engine: sa.Engine) -> list[str]:
    """Tables, columns and indexes that a database at our revision has, and this one has not."""
    inspector = sa.inspect(engine)
    tables = set(inspector.get_table_names())
    missing: list[str] = []
    for table in metadata.sorted_tables:
        if table.name not in tables:
            missing.append(table.name)
            continue
        columns = {column["name"] for column in inspector.get_columns(table.name)}
        missing += [f"{table.name}.{column.name}" for column in table.columns if column.name not in columns]
        indexes = {index["name"] for index in inspector.get_indexes(table.name)}
        missing += [str(index.name) for index in table.indexes if index.name not in indexes]
    return missing
