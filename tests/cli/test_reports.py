"""`headgate usage`, `calls` and `bill`, run as processes over a ledger with three calls."""

import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from headgate.storage.database import open_database
from headgate.storage.tables import attempts
from headgate.storage.tables import calls as calls_table

HOUR_NS = 3600 * 10**9


@pytest.fixture
def ledger(headgate) -> Path:
    """Two calls of Lan, one of Minh two days ago that failed."""
    now_ns = time.time_ns()
    settled = {"state": "settled", "outcome": "completed", "status": 200, "model": "claude-sonnet-4-6"}
    rows = [
        {"call_id": "call_1", "at_ns": now_ns - HOUR_NS, "user_id": "lan", "cost_nanousd": 7_500_000, **settled},
        {"call_id": "call_2", "at_ns": now_ns, "user_id": "lan", "cost_nanousd": 500_000, **settled},
        {
            "call_id": "call_0",
            "at_ns": now_ns - 48 * HOUR_NS,
            "user_id": "minh",
            "model": "claude-haiku-4-5",
            "state": "void",
            "outcome": "failed",
            "status": 529,
            "error_code": "overloaded",
        },
    ]
    engine = open_database(headgate.data, now_ns=time.time_ns)
    with engine.begin() as connection:
        for row in rows:
            connection.execute(sa.insert(calls_table).values(input_tokens=100, output_tokens=20, total_ms=900, **row))
            connection.execute(
                sa.insert(attempts).values(
                    call_id=row["call_id"], number=1, model=row["model"], state=row["state"], status=row["status"]
                )
            )
    engine.dispose()
    return headgate.data


@pytest.mark.usefixtures("ledger")
def test_usage_groups_by_user_over_the_span_that_was_asked(headgate) -> None:
    day = headgate.json("usage", "--group-by", "user", "--since", "24h")
    assert [(row["user"], row["requests"], row["cost_nanousd"]) for row in day["rows"]] == [("lan", 2, 8_000_000)]
    week = headgate.json("usage", "--group-by", "user", "--since", "7d")
    assert {row["user"]: row["errors"] for row in week["rows"]} == {"lan": 0, "minh": 1}
    assert week["total"]["requests"] == 3
    before = headgate.json("usage", "--since", "7d", "--until", "24h")
    assert [row["user"] for row in before["rows"]] == ["minh"]


@pytest.mark.usefixtures("ledger")
def test_calls_come_newest_first_and_page_by_cursor(headgate) -> None:
    first = headgate.json("calls", "--limit", "2")
    assert [call["call_id"] for call in first["calls"]] == ["call_2", "call_1"]
    assert [attempt["number"] for attempt in first["calls"][0]["attempts"]] == [1]
    rest = headgate.json("calls", "--limit", "2", "--cursor", first["cursor"])
    assert [call["call_id"] for call in rest["calls"]] == ["call_0"]
    assert rest["cursor"] is None


@pytest.mark.usefixtures("ledger")
def test_the_tables_show_what_the_json_says(headgate) -> None:
    usage = headgate("usage", "--group-by", "model", "--since", "7d").stdout
    assert "claude-haiku-4-5" in usage
    assert "total" in usage
    calls = headgate("calls").stdout
    assert "call_0" in calls
    assert "529 overloaded" in calls
    assert "$0.007500" in calls


@pytest.mark.usefixtures("ledger")
def test_the_bill_is_the_sum_of_its_parts(headgate) -> None:
    bill = headgate.json("bill")
    assert bill["so_far_nanousd"] == sum(row["cost_nanousd"] for row in bill["by_model"])
    assert bill["so_far_nanousd"] == sum(row["cost_nanousd"] for row in bill["by_user"])
    said = headgate("bill").stdout
    assert bill["month"] in said
    assert "claude-sonnet-4-6" in said


@pytest.mark.usefixtures("ledger")
def test_of_a_crowd_the_bill_shows_who_costs_most_and_the_sum_of_the_rest(headgate) -> None:
    engine = open_database(headgate.data, now_ns=time.time_ns)
    call = {"at_ns": time.time_ns(), "model": "claude-sonnet-4-6", "state": "settled", "outcome": "completed"}
    with engine.begin() as connection:
        people = [{"call_id": f"c{n}", "user_id": f"u{n}", "cost_nanousd": 100_000 + n} | call for n in range(25)]
        connection.execute(sa.insert(calls_table), people)
    engine.dispose()
    said = headgate("bill").stdout
    assert "u24" in said
    assert "u0 " not in said
    kinds = headgate.json("bill")["by_user"]
    assert f"and {len(kinds) - 20} more, together $0.000" in said


def test_reports_of_an_empty_ledger_are_empty_and_not_an_error(headgate) -> None:
    assert headgate.json("usage")["rows"] == []
    assert headgate.json("calls") == {"calls": [], "cursor": None}
    assert headgate("bill").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["usage", "--group-by", "shoe"], "endpoint"),
        (["usage", "--since", "yesterday"], "2026-11-24"),
        (["calls", "--limit", "0"], "1000"),
        (["calls", "--cursor", "me"], "cursor"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_with_what_would(headgate, arguments: list[str], word: str) -> None:
    code, said = headgate.refusal(*arguments)
    assert code == 2
    assert word in said
