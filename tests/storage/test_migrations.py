"""The migrations make exactly the tables that the code describes."""

import time
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from headgate.storage import database
from headgate.storage.database import DATABASE_NAME, begin_write, open_database
from headgate.storage.keys import KeyRecord, KeyStore
from headgate.storage.tables import metadata


def schema(engine: sa.Engine) -> dict[str, object]:
    """Columns, indexes and their conditions of every table, as SQLite tells them."""
    with engine.connect() as connection:
        made = connection.exec_driver_sql("SELECT name, type, sql FROM sqlite_master WHERE sql IS NOT NULL").all()
        return {
            name: (
                sql.partition(" ON ")[2] if kind == "index" else "WITHOUT ROWID" in sql,
                connection.exec_driver_sql(f"PRAGMA table_xinfo('{name}')").all(),
            )
            for name, kind, sql in made
            if name != "alembic_version"
        }


def downgrade(engine: sa.Engine, revision: str) -> None:
    """Bring a database back to a revision, as somebody who goes back to an older version would."""
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    with begin_write(engine) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def test_the_migrations_make_the_tables_that_tables_py_describes(engine):
    described = sa.create_engine("sqlite://")
    metadata.create_all(described)
    assert schema(engine) == schema(described)
    described.dispose()


def test_keys_of_a_database_from_before_key_limits_work_on_without_them(engine, tmp_path):
    made = KeyStore(engine, now_ns=time.time_ns).create(name="app", rpm=7, otpm=900, concurrency=3).record
    downgrade(engine, "0001")
    with engine.connect() as connection:
        columns = [name for _, name, *_ in connection.exec_driver_sql("PRAGMA table_xinfo('keys')")]
    assert {"otpm", "concurrency"}.isdisjoint(columns)
    engine.dispose()
    migrated = open_database(tmp_path, now_ns=time.time_ns)
    store = KeyStore(migrated, now_ns=time.time_ns)
    assert store.list() == [KeyRecord(**{**_fields(made), "otpm": None, "concurrency": None})]
    assert store.create(name="later", otpm=900).record.otpm == 900
    assert store.audit_broken_at() is None
    assert len(list(tmp_path.glob(f"{DATABASE_NAME}.0001.*.bak"))) == 1
    migrated.dispose()


def test_a_migration_down_and_up_again_makes_the_same_tables(engine, tmp_path):
    before = schema(engine)
    downgrade(engine, "0001")
    assert schema(engine) != before
    open_database(tmp_path, now_ns=time.time_ns).dispose()
    assert schema(engine) == before


def _fields(record: KeyRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in KeyRecord.__struct_fields__}
