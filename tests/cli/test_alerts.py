"""`headgate alerts`, run as a process over a table with two alerts."""

import time

import pytest

from headgate.policy.alerts import Alert, CallCost
from headgate.storage import alerts as alert_table
from headgate.storage.database import open_database

DAY_NS = 86_400 * 10**9


@pytest.fixture
def two_alerts(headgate) -> None:
    """One of an hour ago, one of nine days ago that has ended."""
    now_ns = time.time_ns()
    engine = open_database(headgate.data, now_ns=time.time_ns)
    old = Alert("loop", "user:chi", "The same again and again.", now_ns - 9 * DAY_NS)
    alert_table.end(engine, alert_table.save(engine, old), by="lan", at_ns=now_ns)
    new = Alert("spend_velocity", "user:minh", "He spent $2.10.", now_ns - DAY_NS // 24, (CallCost("call_7", 9),))
    alert_table.save(engine, new)
    engine.dispose()


@pytest.mark.usefixtures("two_alerts")
def test_the_week_is_listed_and_more_when_asked(headgate) -> None:
    (alert,) = headgate.json("alerts")["alerts"]
    assert (alert["kind"], alert["subject"], alert["ended_at"]) == ("spend_velocity", "user:minh", None)
    assert alert["calls"] == [{"call_id": "call_7", "cost_nanousd": 9}]
    both = headgate.json("alerts", "--since", "30d")["alerts"]
    assert [alert["subject"] for alert in both] == ["user:minh", "user:chi"]


@pytest.mark.usefixtures("two_alerts")
def test_the_table_says_what_happened_and_what_is_open(headgate) -> None:
    said = headgate("alerts", "--since", "30d").stdout
    assert "He spent $2.10." in said
    assert "open" in said
    assert "by lan" in said


def test_no_alerts_are_an_empty_list_and_a_wrong_span_is_refused(headgate) -> None:
    assert headgate.json("alerts") == {"alerts": []}
    code, said = headgate.refusal("alerts", "--since", "lately")
    assert code == 2
    assert "2026-11-24" in said
