"""The migrations make exactly the tables that the code describes."""

import sqlalchemy as sa

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


def test_the_migrations_make_the_tables_that_tables_py_describes(engine):
    described = sa.create_engine("sqlite://")
    metadata.create_all(described)
    assert schema(engine) == schema(described)
    described.dispose()
