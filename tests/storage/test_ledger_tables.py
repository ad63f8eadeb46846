"""Laws of the fold's SQL: a row comes back as it went in, a closed one stays, and position and rows go together."""

import sqlite3

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headgate.storage.fold import AttemptRow, CallRow, Fold
from headgate.storage.ledger_tables import LedgerTables
from headgate.storage.tables import attempts, calls
from headgate.wire.usage import IterationUsage, Usage


@pytest.fixture
def tables(engine):
    tables = LedgerTables(engine)
    yield tables
    tables.close()


def distinct(kind, **given):
    """A record whose every field has a value that no other has, so that a column in the wrong place shows."""
    values = dict(given)
    for at, field in enumerate(msgspec.structs.fields(kind), start=1):
        if field.name not in values:
            values[field.name] = at if field.type in (int, int | None) else f"{field.name}-{at}"
    return kind(**values)


def test_a_call_comes_back_as_it_went_in(tables):
    used = Usage(1, 2, 3, 4, 5, 6, 7, "priority", "fast", "us", True, (IterationUsage("compaction", "m", 8),))
    tried = distinct(AttemptRow, number=1, usage=used, state="settled", changed=False)
    call = distinct(CallRow, attempts=[tried], outcome="completed", streamed=True, reused=True)
    tables.commit([call.values()], [tried.values(call.call_id)], "1-1-0", 100)
    assert tables.find(call.call_id) == call
    assert tables.find("call_unknown") is None


def test_every_column_of_a_call_holds_what_its_name_says(engine, tables):
    tried = distinct(AttemptRow, number=1, usage=Usage(11, 12, 13, 14, 15), state="settled")
    call = distinct(CallRow, attempts=[tried], outcome="completed", streamed=False, reused=False)
    tables.commit([call.values()], [tried.values(call.call_id)], "1-1-0", 100)
    with engine.connect() as connection:
        row = connection.execute(sa.select(calls)).mappings().one()
        attempt = connection.execute(sa.select(attempts)).mappings().one()
    of_attempts = {
        "state": "settled",
        "input_tokens": 11,
        "cache_read_tokens": 12,
        "cache_write_5m_tokens": 13,
        "cache_write_1h_tokens": 14,
        "output_tokens": 15,
        "cost_nanousd": tried.cost_nanousd,
        "saved_nanousd": tried.saved_nanousd + call.reused_nanousd,
    }
    for name, value in row.items():
        assert value == of_attempts.get(name, getattr(call, name, None)), name
    for name, value in attempt.items():
        if name not in {"call_id", "usage"}:
            assert value == getattr(tried, name, None), name


def test_rows_and_position_are_committed_together_or_not_at_all(engine, tables, call):
    fold = Fold(tables.find)
    fold.apply(call(1).opening(), "1-1")
    call_rows, attempt_rows = fold.changed()
    broken = [(*attempt_rows[0][:-1], object())]
    with pytest.raises(sqlite3.Error):
        tables.commit(call_rows, broken, "1-1-0", 50)
    assert tables.position("1-1-0") == 0
    assert tables.find(call(1).id) is None
    tables.commit(call_rows, attempt_rows, "1-1-0", 50)
    assert tables.position("1-1-0") == 50
    assert tables.find(call(1).id) is not None


def test_a_call_that_is_closed_is_never_written_again(tables, call):
    fold = Fold(tables.find)
    fold.apply((*call(1).opening(), *call(1).ending()), "1-1")
    tables.commit(*fold.changed(), "1-1-0", 50)
    before = tables.find(call(1).id)
    replay = Fold(tables.find)
    replay.apply((*call(1).opening(), call(1).failed()), "1-1")
    tables.commit(*replay.changed(), "1-1-0", 60)
    assert tables.find(call(1).id) == before


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_batching_and_any_replay_make_the_same_tables(tables, call, data):
    number = data.draw(st.integers(0, 10**9))
    one, two = call(2 * number), call(2 * number + 1)
    told = [*one.opening(), *two.opening(), one.failed(), one.intent(2), one.started(2), two.started(), one.progress(9)]
    told += [*two.ending(), one.ended(2), one.closed()]
    expected = Fold(lambda _: None)
    expected.apply(told, "1-1")
    in_one_batch = expected.changed()
    for begin in (0, data.draw(st.integers(0, len(told)))):
        rest, fold = told[begin:], Fold(tables.find)
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            fold.apply(rest[:size], "1-1")
            tables.commit(*fold.changed(), "1-1-0", 1)
            fold.committed()
            rest = rest[size:]
    found = [tables.find(each.id) for each in (one, two)]
    assert [row.values() for row in found] == in_one_batch[0]
    assert [attempt.values(row.call_id) for row in found for attempt in row.attempts] == in_one_batch[1]
    assert not [row for row in tables.open_calls() if row.call_id in (one.id, two.id)]
