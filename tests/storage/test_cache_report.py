"""Laws of the cache report: sums add up whoever saves them, and it says what the ledger and the linter say."""

import json

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql

from headgate.policy.cache_lint import CacheDeltas, FamilyDelta, FindingDelta
from headgate.storage.cache_report import cache_json, cache_report, save, used_statement
from headgate.storage.tables import cache_families, cache_findings, calls
from headgate.wire import catalog

DAY = 20_675  # 2026-08-10
DAY_NS = 86_400 * 10**9
AT_NS = DAY * DAY_NS
MODEL = "claude-sonnet-4-6"
PLACE = {"part": "system", "byte": 9, "value_at": 4, "before": "at 00", "after": "at 00", "message": "A time."}


def finding(cause="timestamp", family="f", *, day=DAY, count=1, lost=10, at_ns=AT_NS, **place):
    return FindingDelta(family, cause, day, count, lost, at_ns, at_ns, json.dumps(PLACE | place))


def family(name="f", *, at_ns=AT_NS, ttl="5m"):
    detail = json.dumps({"ttl": ttl, "ttl_reason": "used every 40 s"})
    return FamilyDelta(name, "key00001", "chat", MODEL, detail, at_ns)


def add_call(connection, number, **given_):
    facts = {"family": "f", "key_id": "key00001", "endpoint": "chat", "model": MODEL, "at_ns": AT_NS + number}
    connection.execute(sa.insert(calls).values(call_id=f"call_{number}", **(facts | given_)))


@pytest.fixture
def connection(engine):
    with engine.connect() as found:
        yield found
        found.rollback()


def test_saving_adds_up_and_keeps_the_latest_place(connection):
    save(connection, CacheDeltas((finding(count=2, at_ns=AT_NS + 5, byte=5),), ()))
    save(connection, CacheDeltas((finding(count=3, at_ns=AT_NS + 9, byte=9), finding("uuid")), ()))
    save(connection, CacheDeltas((finding(count=4, at_ns=AT_NS + 1, byte=1),), ()))
    row = connection.execute(sa.select(cache_findings).where(cache_findings.c.cause == "timestamp")).mappings().one()
    assert (row["count"], row["lost_nanousd"]) == (9, 30)
    assert (row["first_at_ns"], row["last_at_ns"]) == (AT_NS + 1, AT_NS + 9)
    assert json.loads(row["detail"])["byte"] == 9


def test_a_family_is_what_was_told_last(connection):
    save(connection, CacheDeltas((), (family(at_ns=AT_NS + 9, ttl="1h"),)))
    save(connection, CacheDeltas((), (family(at_ns=AT_NS + 1, ttl="5m"),)))
    (row,) = connection.execute(sa.select(cache_families)).mappings().all()
    assert json.loads(row["detail"])["ttl"] == "1h"
    save(connection, CacheDeltas((), ()))


SPLIT = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 100), st.integers(0, 50)), min_size=1, max_size=12)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SPLIT)
def test_any_batching_sums_to_the_same(connection, batches):
    connection.execute(sa.delete(cache_findings))
    for count, lost, after in batches:
        save(connection, CacheDeltas((finding(count=count, lost=lost, at_ns=AT_NS + after),), ()))
    (row,) = connection.execute(sa.select(cache_findings)).mappings().all()
    assert row["count"] == sum(count for count, _, _ in batches)
    assert row["lost_nanousd"] == sum(lost for _, lost, _ in batches)
    assert row["first_at_ns"] == AT_NS + min(after for *_, after in batches)
    assert row["last_at_ns"] == AT_NS + max(after for *_, after in batches)


def test_the_report_has_the_exact_form(connection):
    add_call(connection, 1, input_tokens=100, cache_write_5m_tokens=900, cost_nanousd=7, saved_nanousd=-3)
    add_call(connection, 2, input_tokens=100, cache_read_tokens=900, cost_nanousd=5, saved_nanousd=9)
    add_call(connection, 3, family="")
    save(connection, CacheDeltas((finding(count=2, lost=70), finding("uuid", lost=80)), (family(),)))
    theirs = FindingDelta("f", "anthropic:system_changed", DAY, 3, 0, AT_NS, AT_NS, '{"missed_tokens":800}')
    save(connection, CacheDeltas((theirs,), ()))
    report = json.loads(json.dumps(cache_json(cache_report(connection, AT_NS, AT_NS + DAY_NS))))
    sums = {
        "requests": 2,
        "input_tokens": 200,
        "cache_read_tokens": 900,
        "cache_write_5m_tokens": 900,
        "cache_write_1h_tokens": 0,
        "cost_nanousd": 12,
        "saved_nanousd": 6,
        "unread_write_nanousd": 0,
        "lost_nanousd": 150,
        "hit_rate": 0.45,
        "read_share": 0.5,
    }
    at = {"first_at": "2026-08-10T00:00:00.000Z", "last_at": "2026-08-10T00:00:00.000Z"}
    assert report == {
        "families": [
            {
                **sums,
                "family": "f",
                "key_id": "key00001",
                "endpoint": "chat",
                "model": MODEL,
                "ttl": "5m",
                "ttl_reason": "used every 40 s",
                "findings": [
                    {"cause": "uuid", "count": 1, "lost_nanousd": 80, **at, **PLACE},
                    {"cause": "timestamp", "count": 2, "lost_nanousd": 70, **at, **PLACE},
                ],
                "anthropic": [{"type": "system_changed", "count": 3, "missed_tokens": 800}],
            }
        ],
        "total": sums,
        "left_out": 0,
    }


def test_writes_that_nobody_can_have_read_cost_their_premium(connection):
    price = catalog.packaged().price_row(MODEL, AT_NS)
    add_call(connection, 1, cache_write_5m_tokens=1_000)
    add_call(connection, 2, cache_write_1h_tokens=1_000)
    (row,) = cache_report(connection, AT_NS, AT_NS + DAY_NS).families
    premium = 1_000 * (price.cache_write_5m_nanousd + price.cache_write_1h_nanousd - 2 * price.input_nanousd)
    assert row.unread_write_nanousd == premium > 0
    add_call(connection, 3, cache_read_tokens=1_000)
    (row,) = cache_report(connection, AT_NS, AT_NS + DAY_NS).families
    assert row.unread_write_nanousd == premium // 2
    add_call(connection, 4, cache_read_tokens=5_000)
    (row,) = cache_report(connection, AT_NS, AT_NS + DAY_NS).families
    assert row.unread_write_nanousd == 0


def test_only_calls_of_the_span_and_findings_of_its_days_count(connection):
    for day in range(4):
        add_call(connection, day, at_ns=AT_NS + day * DAY_NS)
        save(connection, CacheDeltas((finding(day=DAY + day, at_ns=AT_NS + day * DAY_NS, byte=day),), ()))
    (row,) = cache_report(connection, AT_NS + DAY_NS, AT_NS + 3 * DAY_NS).families
    assert (row.requests, row.findings[0].count, row.findings[0].byte) == (2, 2, 2)


def test_what_loses_most_comes_first_and_the_rest_is_in_the_total(connection):
    for number, name in enumerate("abc"):
        add_call(connection, number, family=name, cost_nanousd=number)
    save(connection, CacheDeltas((finding(family="a"), finding(family="gone", lost=3)), ()))
    report = cache_report(connection, AT_NS, AT_NS + DAY_NS, families_max=3)
    assert [row.family for row in report.families] == ["a", "gone", "c"]
    assert (report.left_out, report.total.requests, report.total.lost_nanousd) == (1, 3, 13)


def test_an_empty_ledger_has_an_empty_report(connection):
    report = cache_json(cache_report(connection, AT_NS, AT_NS + DAY_NS))
    assert report["families"] == []
    assert report["total"]["hit_rate"] is None


def test_a_detail_that_is_damaged_is_left_out(connection):
    save(connection, CacheDeltas((FindingDelta("f", "uuid", DAY, 1, 0, AT_NS, AT_NS, "{"),), ()))
    assert cache_report(connection, AT_NS, AT_NS + 1).families[0].findings[0].message == ""


def test_the_span_is_found_by_the_index_of_time(engine):
    text = str(used_statement(1, 2).compile(engine, compile_kwargs={"literal_binds": True}))
    with engine.connect() as found:
        steps = [step[-1] for step in found.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]
    assert "SEARCH calls USING INDEX calls_by_time (at_ns>? AND at_ns<?)" in steps


def test_postgresql_is_sent_the_same_upserts_and_no_parameter_in_a_group():
    said = str(used_statement(1, 2).compile(dialect=postgresql.dialect()))
    assert "%(" not in said[said.index("GROUP BY") :]

    class Recorder:
        """A connection to PostgreSQL that keeps what it is told."""

        dialect = postgresql.dialect()
        told = []  # noqa: RUF012 - one recorder, one test

        def execute(self, statement, rows):
            assert rows
            self.told.append(str(statement.compile(dialect=self.dialect)))

    save(Recorder(), CacheDeltas((finding(),), (family(),)))
    assert "ON CONFLICT (family, cause, day) DO UPDATE SET" in Recorder.told[0]
    assert "count = (cache_findings.count + excluded.count)" in Recorder.told[0]
    assert "ON CONFLICT (family) DO UPDATE SET" in Recorder.told[1]
