"""Alerts in a real table: kept once for a cause, ended, listed."""

import pytest
import sqlalchemy as sa

from headgate.policy.alerts import TOLD_AGAIN_AFTER_NS, Alert, CallCost
from headgate.storage import alerts as table
from headgate.storage.alerts import AlertNotFound, alerts_json

NOW_NS = 1_785_000_000 * 10**9
DAY_NS = TOLD_AGAIN_AFTER_NS


def alert(subject: str = "user:an", kind: str = "loop", at_ns: int = NOW_NS) -> Alert:
    return Alert(kind, subject, "what, and how to mend it", at_ns, (CallCost("call_1", 5), CallCost("call_2")))


def listed(engine: sa.Engine, **options) -> tuple[Alert, ...]:
    with engine.connect() as connection:
        return table.listed(connection, **options)


def test_what_is_kept_comes_back_as_it_was(engine) -> None:
    number = table.save(engine, alert())
    (found,) = listed(engine)
    assert (found.id, found.kind, found.subject, found.message) == (number, "loop", "user:an", alert().message)
    assert found.calls == alert().calls
    assert (found.repeats, found.ended_at_ns, found.ended_by) == (0, None, "")


def test_a_cause_that_is_open_is_one_row_whoever_met_it(engine) -> None:
    first = table.save(engine, alert())
    assert table.save(engine, alert(at_ns=NOW_NS + DAY_NS - 1)) == first
    assert table.save(engine, alert("user:binh")) != first
    assert table.save(engine, alert(kind="spend_velocity")) != first
    assert {each.subject: each.repeats for each in listed(engine) if each.kind == "loop"} == {
        "user:an": 1,
        "user:binh": 0,
    }


def test_after_a_day_or_an_end_it_is_a_new_row(engine) -> None:
    first = table.save(engine, alert())
    second = table.save(engine, alert(at_ns=NOW_NS + DAY_NS))
    assert table.end(engine, second, by="lan", at_ns=NOW_NS + DAY_NS + 1).ended_by == "lan"
    third = table.save(engine, alert(at_ns=NOW_NS + DAY_NS + 2))
    assert len({first, second, third}) == 3
    assert [(each.id, each.ended_by) for each in listed(engine)] == [(third, ""), (second, "lan"), (first, "time")]


def test_an_alert_ends_once(engine) -> None:
    number = table.save(engine, alert())
    ended = table.end(engine, number, by="lan", at_ns=NOW_NS + 7)
    assert (ended.id, ended.ended_at_ns, ended.calls) == (number, NOW_NS + 7, alert().calls)
    for missing in (number, number + 1):
        with pytest.raises(AlertNotFound, match="GET /admin/alerts"):
            table.end(engine, missing, by="lan", at_ns=NOW_NS)
    assert listed(engine)[0].ended_at_ns == NOW_NS + 7


def test_a_cause_that_is_over_ends_its_row_and_no_other(engine) -> None:
    table.save(engine, alert())
    table.save(engine, alert("user:binh"))
    assert table.end_cause(engine, "loop", "user:an", by="time", at_ns=NOW_NS + 1) == 1
    assert table.end_cause(engine, "loop", "user:an", by="time", at_ns=NOW_NS + 2) == 0
    assert [each.subject for each in listed(engine, only_open=True)] == ["user:binh"]


def test_the_list_is_the_newest_first_since_a_moment_and_bounded(engine) -> None:
    for number in range(5):
        table.save(engine, alert(f"user:{number}", at_ns=NOW_NS + number))
    assert [each.subject for each in listed(engine, since_ns=NOW_NS + 2)] == ["user:4", "user:3", "user:2"]
    assert [each.subject for each in listed(engine, most=2)] == ["user:4", "user:3"]


def test_the_form_of_admin_and_of_the_command_line(engine) -> None:
    number = table.save(engine, alert())
    table.end(engine, number, by="lan", at_ns=NOW_NS + 1_500_000_000)
    assert alerts_json(listed(engine)) == {
        "alerts": [
            {
                "id": number,
                "at": "2026-07-25T17:20:00.000Z",
                "kind": "loop",
                "subject": "user:an",
                "message": "what, and how to mend it",
                "calls": [{"call_id": "call_1", "cost_nanousd": 5}, {"call_id": "call_2", "cost_nanousd": 0}],
                "repeats": 0,
                "ended_at": "2026-07-25T17:20:01.500Z",
                "ended_by": "lan",
            }
        ]
    }
