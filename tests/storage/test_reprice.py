"""Laws of pricing again: a corrected price goes through all that is ended, once, with one row of the audit."""

import json
from importlib import resources

import msgspec
import pytest
import sqlalchemy as sa

from headgate.policy.pricing import price
from headgate.storage.audit import broken_at
from headgate.storage.reprice import CALLS_AT_ONCE, reprice
from headgate.storage.tables import attempts, audit, calls
from headgate.wire.catalog import DAY_NS, Catalog, load_catalog, packaged
from headgate.wire.usage import Usage

SONNET, HAIKU = "claude-sonnet-4-6", "claude-haiku-4-5"
NOW_NS = 20_780 * DAY_NS  # 2026-11-23
USAGE = Usage(input_tokens=100, cache_read_tokens=4_000, cache_write_1h_tokens=50, output_tokens=70)
EMPTY = {"price_id": "", "cost_nanousd": 0, "saved_nanousd": 0}


def corrected() -> Catalog:
    """The packaged catalogue, in which Sonnet 4.6 puts out for $16 and not for $15."""
    text = resources.files("headgate.wire").joinpath("catalog.toml").read_text()
    head, model, rest = text.partition('id = "claude-sonnet-4-6"')
    return load_catalog((head + model + rest.replace("output = 15.0", "output = 16.0")).encode())


def put(engine, number: int, model: str = SONNET, *, usages=(USAGE,), call=None, **given) -> str:
    """A call of an hour ago with these attempts, priced by the packaged catalogue; `given` is of its attempts."""
    call_id, at_ns = f"call_{number:05d}", NOW_NS - DAY_NS + number
    rows, cost_nanousd, saved_nanousd = [], 0, 0
    for attempt, usage in enumerate(usages):
        cost = price(usage, model, at_ns, packaged())
        values = {"price_id": cost.price_id, "cost_nanousd": cost.cost_nanousd, "saved_nanousd": cost.saved_nanousd}
        values = {"state": "settled", "model": model, "at_ns": at_ns, **values, **given}
        rows.append({"call_id": call_id, "number": attempt + 1, "usage": msgspec.json.encode(usage).decode(), **values})
        cost_nanousd += values["cost_nanousd"]
        saved_nanousd += values["saved_nanousd"]
    with engine.begin() as connection:
        values = {"state": "settled", "cost_nanousd": cost_nanousd, "saved_nanousd": saved_nanousd, **(call or {})}
        connection.execute(sa.insert(calls).values(call_id=call_id, at_ns=at_ns, model=model, **values))
        if rows:
            connection.execute(sa.insert(attempts), rows)
    return call_id


def tables(engine):
    with engine.connect() as connection:
        return [
            [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key.columns))]
            for table in (calls, attempts)
        ]


def told(engine):
    with engine.connect() as connection:
        assert broken_at(connection) is None
        return connection.execute(sa.select(audit)).all()


def run(engine, catalog, **given):
    facts = {"since_ns": 0, "until_ns": NOW_NS, "dry_run": False}
    return reprice(engine, catalog, **{**facts, **given})


def test_the_same_catalogue_changes_nothing_and_says_nothing(engine) -> None:
    put(engine, 1, usages=(USAGE, USAGE))
    before = tables(engine)
    done = run(engine, packaged())
    assert (done.attempts_seen, done.attempts_changed, done.cost_before_nanousd) == (2, 0, done.cost_after_nanousd)
    assert tables(engine) == before
    assert told(engine) == []


def test_a_corrected_price_goes_through_attempts_and_calls_and_back(engine) -> None:
    put(engine, 1, usages=(USAGE, USAGE))
    put(engine, 2, HAIKU)
    before = tables(engine)
    dry = run(engine, corrected(), dry_run=True)
    assert tables(engine) == before
    assert told(engine) == []
    done = run(engine, corrected())
    assert done == dry
    assert (done.attempts_changed, done.calls_changed, done.attempts_seen) == (2, 1, 3)
    assert done.cost_after_nanousd - done.cost_before_nanousd == 2 * 70 * 1_000
    with engine.connect() as connection:
        costs = dict(connection.execute(sa.select(calls.c.call_id, calls.c.cost_nanousd)).all())
        sums = sa.select(attempts.c.call_id, sa.func.sum(attempts.c.cost_nanousd)).group_by(attempts.c.call_id)
        assert costs == dict(connection.execute(sums).all())
    assert run(engine, corrected()).attempts_changed == 0
    run(engine, packaged())
    assert tables(engine) == before
    first, second = told(engine)
    assert (first.action, first.actor, first.key_id) == ("reprice", "cli", "")
    entry = json.loads(first.after)
    assert json.loads(first.before)["cost_nanousd"] == done.cost_before_nanousd
    assert (entry["attempts"], entry["calls"], entry["cost_nanousd"]) == (2, 1, done.cost_after_nanousd)
    assert json.loads(second.before)["cost_nanousd"] == done.cost_after_nanousd


def test_what_is_open_unbilled_or_reused_stays(engine) -> None:
    put(engine, 1, call={"state": "open"})
    put(engine, 2, state="open", call={"state": "open"})
    put(engine, 3, **EMPTY)  # a refusal: it has tokens and no price
    put(engine, 4, usages=(), call={"reused": 1, "saved_nanousd": 77, "state": "void"})
    before = tables(engine)
    assert run(engine, corrected()).attempts_changed == 0
    assert tables(engine) == before


def test_what_a_reconciliation_corrected_stays_unless_all_is_asked_for(engine) -> None:
    put(engine, 1, cost_nanousd=5, estimated_nanousd=9)
    before = tables(engine)
    kept = run(engine, corrected())
    assert (kept.attempts_changed, kept.kept_reconciled) == (0, 1)
    assert tables(engine) == before
    assert run(engine, corrected(), reconciled_too=True).attempts_changed == 1
    with engine.connect() as connection:
        cost, estimated = connection.execute(sa.select(attempts.c.cost_nanousd, attempts.c.estimated_nanousd)).one()
    assert (cost, estimated) == (price(USAGE, SONNET, NOW_NS, corrected()).cost_nanousd, None)


def test_a_model_that_was_unknown_gets_its_price_and_a_hop_that_of_who_answered(engine) -> None:
    assumed = price(USAGE, "claude-of-tomorrow", NOW_NS, packaged())
    facts = {"cost_nanousd": assumed.cost_nanousd, "saved_nanousd": assumed.saved_nanousd}
    put(engine, 1, SONNET, price_id=assumed.price_id, **facts)
    served = price(USAGE, HAIKU, NOW_NS, packaged())
    facts = {"cost_nanousd": served.cost_nanousd, "saved_nanousd": served.saved_nanousd}
    put(engine, 2, SONNET, price_id=served.price_id, **facts)
    assert run(engine, packaged()).attempts_changed == 1
    with engine.connect() as connection:
        ids = connection.execute(sa.select(attempts.c.price_id).order_by(attempts.c.call_id)).scalars().all()
    assert [one.partition("/")[0] for one in ids] == [SONNET, "claude-haiku-4-5-20251001"]


@pytest.mark.parametrize("hours", [0, 30])
def test_a_span_is_a_span(engine, hours) -> None:
    put(engine, 1)
    since_ns = NOW_NS - hours * 3_600 * 10**9
    assert run(engine, corrected(), since_ns=since_ns, dry_run=True).attempts_seen == (hours > 24)


def test_many_calls_go_in_batches_with_one_row_of_the_audit(engine) -> None:
    number = CALLS_AT_ONCE * 2 + 1
    usage = msgspec.json.encode(USAGE).decode()
    cost = price(USAGE, SONNET, NOW_NS - DAY_NS, packaged())
    money = {
        "cost_nanousd": cost.cost_nanousd,
        "saved_nanousd": cost.saved_nanousd,
        "model": SONNET,
        "state": "settled",
    }
    ids = [f"call_{one:05d}" for one in range(number)]
    with engine.begin() as connection:
        connection.execute(sa.insert(calls), [{"call_id": one, "at_ns": NOW_NS - DAY_NS, **money} for one in ids])
        facts = {"number": 1, "usage": usage, "price_id": cost.price_id, **money}
        connection.execute(sa.insert(attempts), [{"call_id": one, **facts} for one in ids])
    done = run(engine, corrected())
    assert (done.attempts_seen, done.attempts_changed, done.calls_changed) == (number, number, number)
    assert len(told(engine)) == 1
