"""`headgate prices` and `prices apply`, run as processes over a ledger of a few calls."""

import json
import time
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from headgate.policy.pricing import price
from headgate.storage.database import open_database
from headgate.storage.tables import attempts, audit, calls
from headgate.wire.catalog import packaged
from headgate.wire.usage import Usage

HOUR_NS = 3_600 * 10**9
MODEL = "claude-sonnet-4-6"


@pytest.fixture
def ledger(headgate) -> Path:
    """Four calls of the last four hours, streamed, of one prefix; the last was priced wrongly."""
    now_ns = time.time_ns()
    engine = open_database(headgate.data, now_ns=time.time_ns)
    usage = Usage(input_tokens=300, cache_write_5m_tokens=8_000, output_tokens=250)
    cost = price(usage, MODEL, now_ns, packaged())
    with engine.begin() as connection:
        for number in range(4):
            at_ns = now_ns - (4 - number) * HOUR_NS
            wrong = 1_000 if number == 3 else 0
            money = {"cost_nanousd": cost.cost_nanousd + wrong, "saved_nanousd": cost.saved_nanousd}
            facts = {"call_id": f"call_{number}", "at_ns": at_ns, "model": MODEL, "state": "settled", **money}
            more = {"outcome": "completed", "prefix": "ab", "prefix_tokens": 8_000, "streamed": 1, "endpoint": "chat"}
            connection.execute(sa.insert(calls).values(**facts, **more))
            more = {"number": 1, "usage": msgspec.json.encode(usage).decode(), "price_id": cost.price_id}
            connection.execute(sa.insert(attempts).values(**facts, **more))
    engine.dispose()
    return headgate.data


def test_todays_rows_and_their_history_with_dates_and_source(headgate) -> None:
    today = headgate.json("prices", "--model", "claude-sonnet-5-5")["prices"]
    assert [(row["cache_read_usd_per_mtok"], row["batch_factor"]) for row in today] == [(0.1, 0.5)]
    both = headgate.json("prices", "--model", "claude-sonnet-5-5", "--history")["prices"]
    assert [row["effective_from"] for row in both] == ["2026-09-28", "2026-10-07"]
    assert both[0]["source"]["url"].startswith("https://")
    code, text = headgate.refusal("prices", "--model", "sonet")
    assert (code, "claude-sonnet-5-5" in text) == (4, True)


@pytest.mark.usefixtures("ledger")
def test_for_what_you_run_a_newer_and_a_cheaper_model_with_the_difference(headgate) -> None:
    found = headgate.json("prices")["for_what_you_run"]
    assert found["requests_judged"] == 4
    by_model = {offer["model"]: offer for offer in found["offers"]}
    assert set(by_model) == {"claude-sonnet-5-5", "claude-haiku-5-5"}
    haiku = by_model["claude-haiku-5-5"]
    # 10,118 tokens written, 379 fresh, 316 of answer, four times.
    assert haiku["projected_nanousd"] == 4 * (10_118 * 125 + 379 * 100 + 316 * 500)
    assert haiku["saved_nanousd"] == haiku["recorded_nanousd"] - haiku["projected_nanousd"]
    assert "claude-haiku-5-5" in headgate("prices").stdout


@pytest.mark.usefixtures("ledger")
def test_apply_mends_a_wrong_price_once_and_notes_it(headgate) -> None:
    dry = headgate.json("prices", "apply", "--dry-run")
    assert (dry["attempts_changed"], dry["dry_run"]) == (1, True)
    done = headgate.json("prices", "apply", "--since", "7d")
    assert (done["attempts_seen"], done["attempts_changed"], done["calls_changed"]) == (4, 1, 1)
    assert done["cost_before_nanousd"] - done["cost_after_nanousd"] == 1_000
    assert headgate.json("prices", "apply")["attempts_changed"] == 0
    engine = open_database(headgate.data, now_ns=time.time_ns)
    with engine.connect() as connection:
        (row,) = connection.execute(sa.select(audit)).all()
    engine.dispose()
    assert (row.action, json.loads(row.after)["attempts"]) == ("reprice", 1)


@pytest.mark.usefixtures("ledger")
def test_replay_tells_both_sides_and_what_breaks(headgate) -> None:
    same = headgate.json("replay", "--since", "7d")
    assert same["recorded"] == same["projected"]
    hour = headgate.json("replay", "--ttl", "1h", "--batch", "50%")
    assert hour["projected"]["cache_write_1h_tokens"] == 4 * 8_000  # the calls are an hour apart, to the nanosecond
    assert [one["code"] for one in hour["breaks"]] == ["not_batchable"]
    text = headgate("replay", "--cache", "off", "--model", "claude-haiku-5-5").stdout
    assert "as recorded" in text
    assert "saves $" in text
    for wrong in (("--ttl", "2h"), ("--batch", "1.5")):
        assert headgate.refusal("replay", *wrong)[0] == 2
