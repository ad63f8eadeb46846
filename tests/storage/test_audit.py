"""Laws of the audit: a row tells what it was given, and what was changed afterwards is found."""

import sqlalchemy as sa

from headgate.storage.audit import add_audit, broken_at
from headgate.storage.database import begin_write
from headgate.storage.tables import audit


def add(engine: sa.Engine, at_ns: int, **given: object) -> None:
    with begin_write(engine) as connection:
        add_audit(connection, at_ns=at_ns, actor="cli", action="reprice", **given)


def broken(engine: sa.Engine) -> int | None:
    with engine.connect() as connection:
        return broken_at(connection)


def test_a_row_tells_what_it_was_given_and_needs_no_key(engine) -> None:
    add(engine, 7, before=b'{"a":1}', after=b'{"a":2}')
    with engine.connect() as connection:
        row = connection.execute(sa.select(audit)).one()
    assert (row.at_ns, row.actor, row.action, row.key_id) == (7, "cli", "reprice", "")
    assert (row.before, row.after) == ('{"a":1}', '{"a":2}')


def test_a_change_and_a_gap_are_found_at_the_row_where_they_are(engine) -> None:
    assert broken(engine) is None
    for number in range(4):
        add(engine, number)
    assert broken(engine) is None
    with engine.begin() as connection:
        connection.execute(sa.update(audit).where(audit.c.id == 3).values(actor="somebody"))
    assert broken(engine) == 3
    with engine.begin() as connection:
        connection.execute(sa.update(audit).where(audit.c.id == 3).values(actor="cli"))
        connection.execute(sa.delete(audit).where(audit.c.id == 2))
    assert broken(engine) == 3
