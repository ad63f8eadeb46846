"""Laws of the reports: what is counted, in which form, and by which index."""

import json
import random

import msgspec
import pytest
import sqlalchemy as sa

from headgate.policy.experiments import Arm, Experiment, Unit, cost_per_request, error_rate
from headgate.policy.records import AttemptEnded, AttemptIntent, CallClosed, CallOpened
from headgate.storage.fold import Fold
from headgate.storage.ledger_tables import LedgerTables
from headgate.storage.reports import (
    GROUPS,
    InvalidQuery,
    bill,
    bill_json,
    calls_json,
    calls_page,
    calls_statement,
    experiments,
    experiments_json,
    usage,
    usage_json,
    usage_statement,
)
from headgate.storage.tables import calls
from headgate.wire.usage import Usage

DAY_NS = 86_400 * 10**9
AUGUST_10_NS = 20_675 * DAY_NS  # 2026-08-10T00:00:00Z
MODELS = ("claude-sonnet-4-6", "claude-haiku-4-5", "claude-opus-4-7")
TOKENS = ("input_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens", "output_tokens")


def call_events(number: int, at_ns: int, **given):
    """A call with one attempt; `given` overrides what it is."""
    facts = {"user": "an", "key_id": "key00001", "model": MODELS[0], "endpoint": "chat", "arm": "", "cost": 100}
    facts |= {"outcome": "completed", "total_ms": 1_000, "first_byte_ms": 200, "usage": Usage(input_tokens=10)}
    facts |= {"conversation": "conv_1"} | given
    call_id = f"call_{number:024d}"
    return (
        CallOpened(
            call_id,
            at_ns,
            facts["key_id"],
            facts["user"],
            "free",
            facts["endpoint"],
            facts["model"],
            True,
            facts["conversation"],
            facts["arm"],
        ),
        AttemptIntent(call_id, 1, facts["model"], at_ns, 10, 10),
        AttemptEnded(call_id, 1, "settled", 200, facts["usage"], "row-1", facts["cost"], 7, "", f"req_{number}"),
        CallClosed(
            call_id, facts["outcome"], 200, facts["model"], facts["total_ms"], 3, facts["first_byte_ms"], "", "end_turn"
        ),
    )


@pytest.fixture
def tell(engine):
    """Puts events into the tables."""
    tables = LedgerTables(engine)
    fold = Fold(tables.find)

    def put(*events):
        fold.apply(events, "1-1")
        tables.commit(*fold.changed(), "1-1-0", 0)
        fold.committed()

    yield put
    tables.close()


@pytest.fixture
def connection(engine):
    with engine.connect() as connection:
        yield connection


def all_usage(connection, group_by):
    return usage(connection, group_by, since_ns=0, until_ns=1 << 62)


def test_usage_has_the_exact_form(tell, connection):
    used = Usage(10, 20, 30, 40, 50)
    tell(*call_events(1, AUGUST_10_NS, usage=used))
    tell(*call_events(2, AUGUST_10_NS, usage=used, outcome="failed", cost=5))
    row = {
        "user": "an",
        "requests": 2,
        "errors": 1,
        "input_tokens": 20,
        "cache_read_tokens": 40,
        "cache_write_5m_tokens": 60,
        "cache_write_1h_tokens": 80,
        "output_tokens": 100,
        "cost_nanousd": 105,
        "saved_nanousd": 14,
        "p50_ms": 1_000,
        "p95_ms": 1_000,
        "first_byte_p50_ms": 200,
        "first_byte_p95_ms": 200,
    }
    total = {name: value for name, value in row.items() if name != "user"}
    assert usage_json(all_usage(connection, "user")) == {"rows": [row], "total": total}


@pytest.mark.parametrize(
    ("group_by", "expected"),
    [
        ("user", {"an": 300, "binh": 100}),
        ("key", {"key00001": 100, "key00002": 300}),
        ("model", {MODELS[0]: 300, MODELS[1]: 100}),
        ("endpoint", {"chat": 200, "search": 200}),
        ("day", {"2026-08-10": 200, "2026-08-11": 200}),
        ("arm", {"": 300, "b": 100}),
    ],
)
def test_usage_is_grouped_by_what_was_asked(tell, connection, group_by, expected):
    tell(*call_events(1, AUGUST_10_NS))
    tell(*call_events(2, AUGUST_10_NS + DAY_NS - 1, user="binh", key_id="key00002"))
    tell(*call_events(3, AUGUST_10_NS + DAY_NS, model=MODELS[1], endpoint="search", key_id="key00002"))
    tell(*call_events(4, AUGUST_10_NS + DAY_NS, arm="b", endpoint="search", key_id="key00002"))
    report = usage_json(all_usage(connection, group_by))
    assert {row[group_by]: row["cost_nanousd"] for row in report["rows"]} == expected
    assert report["total"]["cost_nanousd"] == 400


def test_rows_are_dearest_first_and_days_in_their_order(tell, connection):
    for number, cost in enumerate((5, 50, 20)):
        tell(*call_events(number, AUGUST_10_NS + number * DAY_NS, user=f"user-{number}", cost=cost))
    assert [row.group for row in all_usage(connection, "user").rows] == ["user-1", "user-2", "user-0"]
    assert [row.group for row in all_usage(connection, "day").rows] == ["2026-08-10", "2026-08-11", "2026-08-12"]


def test_the_span_holds_its_beginning_and_not_its_end(tell, connection):
    for number in range(4):
        tell(*call_events(number, AUGUST_10_NS + number))
    report = usage(connection, "user", since_ns=AUGUST_10_NS + 1, until_ns=AUGUST_10_NS + 3)
    assert report.total.requests == 2


def test_nothing_was_used_is_an_answer_too(connection):
    report = all_usage(connection, "user")
    assert report.rows == ()
    assert (report.total.requests, report.total.cost_nanousd, report.total.p95_ms) == (0, 0, None)


def test_a_group_there_is_not_is_refused(connection):
    with pytest.raises(InvalidQuery, match="user, key, model, endpoint, day, arm"):
        all_usage(connection, "call_id; DROP TABLE calls")


def test_sums_and_percentiles_agree_with_a_count_by_hand(tell, connection):
    dice = random.Random(7)
    facts = []
    for number in range(500):
        fact = {
            "user": f"user-{dice.randrange(5)}",
            "model": dice.choice(MODELS),
            "outcome": dice.choice(["completed"] * 8 + ["failed", "cut", "refused", "abandoned"]),
            "total_ms": dice.randrange(5_000),
            "first_byte_ms": dice.choice([None, *range(100)]),
            "cost": dice.randrange(10**6),
            "usage": Usage(*(dice.randrange(1_000) for _ in range(5))),
        }
        facts.append(fact)
        tell(*call_events(number, AUGUST_10_NS + number, **fact))
    for group_by in ("user", "model"):
        report = all_usage(connection, group_by)
        assert len(report.rows) > 2
        for row in (*report.rows, report.total):
            of_it = [fact for fact in facts if row.group in ("", fact[group_by])]
            done = [fact for fact in of_it if fact["outcome"] == "completed"]
            assert row.requests == len(of_it)
            assert row.errors == sum(fact["outcome"] in {"failed", "cut", "refused"} for fact in of_it)
            assert row.cost_nanousd == sum(fact["cost"] for fact in of_it)
            for name in TOKENS:
                assert getattr(row, name) == sum(getattr(fact["usage"], name) for fact in of_it)
            for name, field in (("p{}_ms", "total_ms"), ("first_byte_p{}_ms", "first_byte_ms")):
                timings = sorted(fact[field] for fact in done if fact[field] is not None)
                for percent in (50, 95):
                    value = getattr(row, name.format(percent))
                    assert sum(timing <= value for timing in timings) * 100 >= percent * len(timings)
                    assert sum(timing < value for timing in timings) * 100 < percent * len(timings)


def test_calls_have_the_exact_form(tell, connection, call):
    one = call(5, at_ns=AUGUST_10_NS)
    tell(*one.opening(), one.failed(1), one.intent(2), one.ended(2, output_tokens=90), one.closed())
    no_tokens = dict.fromkeys(TOKENS, 0)
    tokens = no_tokens | {"input_tokens": 700, "cache_read_tokens": 50, "output_tokens": 90}
    page = calls_json(calls_page(connection))
    assert json.loads(json.dumps(page)) == {
        "calls": [
            {
                "call_id": one.id,
                "at": "2026-08-10T00:00:00.000Z",
                "key_id": "key00001",
                "user": "an",
                "tier": "free",
                "endpoint": "chat",
                "conversation": "",
                "model_asked": MODELS[0],
                "model": MODELS[0],
                "arm": "",
                "status": 200,
                "error_code": "",
                "outcome": "completed",
                "state": "settled",
                "estimated": False,
                "stop_reason": "",
                "streamed": True,
                **tokens,
                "cost_nanousd": 12_345,
                "saved_nanousd": 6,
                "queue_ms": 2,
                "first_byte_ms": 300,
                "total_ms": 1_500,
                "family": "",
                "reused": False,
                "attempts": [
                    {
                        "number": 1,
                        "model": MODELS[0],
                        "state": "void",
                        "status": 529,
                        "error_code": "overloaded_error",
                        "upstream_request_id": "",
                        **no_tokens,
                        "cost_nanousd": 0,
                    },
                    {
                        "number": 2,
                        "model": MODELS[0],
                        "state": "settled",
                        "status": 200,
                        "error_code": "",
                        "upstream_request_id": "",
                        **tokens,
                        "cost_nanousd": 12_345,
                    },
                ],
            }
        ],
        "cursor": None,
    }


def test_a_call_that_is_still_open_says_so(tell, connection, call):
    tell(*call(1).opening(), call(1).started())
    (found,) = calls_json(calls_page(connection))["calls"]
    assert (found["state"], found["outcome"], found["input_tokens"], found["first_byte_ms"]) == (
        "open",
        None,
        700,
        None,
    )


@pytest.mark.parametrize("limit", [1, 3, 7, 10, 11])
def test_pages_hold_every_call_once_newest_first_also_those_of_one_moment(tell, connection, limit):
    for number in range(10):
        tell(*call_events(number, AUGUST_10_NS + number // 4))
    seen, cursor = [], ""
    while cursor is not None:
        page = calls_page(connection, limit=limit, cursor=cursor)
        assert len(page.calls) <= limit
        seen += [entry.call_id for entry in page.calls]
        assert len(seen) <= 10
        cursor = page.cursor
    assert seen == [f"call_{number:024d}" for number in reversed(range(10))]


def test_a_call_that_comes_between_two_pages_moves_neither(tell, connection):
    for number in range(6):
        tell(*call_events(number, AUGUST_10_NS + number))
    first = calls_page(connection, limit=3)
    tell(*call_events(99, AUGUST_10_NS + 99))
    second = calls_page(connection, limit=3, cursor=first.cursor)
    assert [entry.at_ns - AUGUST_10_NS for entry in second.calls] == [2, 1, 0]


@pytest.mark.parametrize("cursor", ["x", "1", "1.", ".call_1", "-1.call_1", "9" * 30 + ".call_1", "²." + "call_1"])
def test_a_cursor_that_no_page_gave_is_refused(connection, cursor):
    with pytest.raises(InvalidQuery):
        calls_page(connection, cursor=cursor)


@pytest.mark.parametrize("limit", [0, -1, 1_001])
def test_a_limit_out_of_range_is_refused(connection, limit):
    with pytest.raises(InvalidQuery):
        calls_page(connection, limit=limit)


def test_the_bill_is_that_of_the_utc_month_by_model_user_endpoint_and_day(tell, connection):
    august = AUGUST_10_NS - 9 * DAY_NS
    tell(*call_events(1, august - 1, cost=1_000))  # July
    tell(*call_events(2, august, cost=10, usage=Usage(input_tokens=30, cache_read_tokens=50)))
    tell(*call_events(3, AUGUST_10_NS, cost=20, user="binh", model=MODELS[1], usage=Usage(cache_write_1h_tokens=20)))
    report = bill_json(bill(connection, now_ns=AUGUST_10_NS + DAY_NS // 2))
    assert (report["month"], report["so_far_nanousd"], report["total"]["cost_nanousd"]) == ("2026-08", 30, 30)
    assert report["cached_share"] == 0.5
    for group_by, expected in {
        "model": {MODELS[0]: 10, MODELS[1]: 20},
        "user": {"an": 10, "binh": 20},
        "endpoint": {"chat": 30},
        "day": {"2026-08-01": 10, "2026-08-10": 20},
    }.items():
        assert {row[group_by]: row["cost_nanousd"] for row in report[f"by_{group_by}"]} == expected
    billed = {"requests", "errors", *TOKENS, "cost_nanousd", "saved_nanousd", "reused", "reused_nanousd"}
    assert set(report["by_user"][0]) == {"user", "cached_share", *billed}
    assert {row["user"]: row["cached_share"] for row in report["by_user"]} == {"an": 50 / 80, "binh": 0.0}


def test_what_reused_answers_saved_is_told_apart_from_what_caching_saved(tell, connection):
    tell(*call_events(1, AUGUST_10_NS, cost=10))
    call_id = f"call_{2:024d}"
    tell(
        CallOpened(call_id, AUGUST_10_NS, "key00001", "an", "free", "chat", MODELS[0], True),
        CallClosed(call_id, "completed", 200, MODELS[0], 5, reused=True, saved_nanousd=30),
    )
    report = bill_json(bill(connection, now_ns=AUGUST_10_NS + 1))
    total = report["total"]
    assert (total["saved_nanousd"], total["reused"], total["reused_nanousd"]) == (37, 1, 30)
    assert report["cache_saved_nanousd"] == 7
    assert "reused" not in usage_json(usage(connection, "user", since_ns=0, until_ns=AUGUST_10_NS + 1))["total"]


def test_the_projection_of_the_first_day_looks_back_into_the_month_before(tell, connection):
    august = AUGUST_10_NS - 9 * DAY_NS
    for back in range(1, 8):
        tell(*call_events(back, august - back * DAY_NS, cost=70))
    report = bill_json(bill(connection, now_ns=august + 1))
    assert (report["so_far_nanousd"], report["rate_days"], report["projected_nanousd"]) == (0, 7, 31 * 70)


def test_a_month_without_calls_has_a_bill_of_nothing(connection):
    report = bill_json(bill(connection, now_ns=AUGUST_10_NS))
    assert (report["so_far_nanousd"], report["projected_nanousd"], report["cached_share"]) == (0, None, None)
    assert report["by_user"] == []


E = Experiment(name="e", model=MODELS[0], arms=(Arm("a", MODELS[0]), Arm("b", MODELS[1])))


def all_experiments(connection, *running):
    return experiments(connection, running, since_ns=0, until_ns=1 << 62)


def test_experiments_have_the_exact_form(tell, connection):
    used = Usage(10, 20, 30, 40, 50)
    for number in range(4):
        outcome = "failed" if number == 3 else "completed"
        given = {"conversation": f"c{number // 2}", "outcome": outcome, "cost": 100 + 10 * number, "usage": used}
        tell(*call_events(number, AUGUST_10_NS, arm="e:a", **given))
    report = json.loads(json.dumps(experiments_json(all_experiments(connection, E))))
    rate = error_rate([Unit(2, 0, 210), Unit(2, 1, 250)])
    cost = cost_per_request([Unit(2, 0, 210), Unit(2, 1, 250)])
    nothing = dict.fromkeys(("requests", "errors", *TOKENS, "cost_nanousd", "saved_nanousd"), 0)
    untimed = dict.fromkeys(("p50_ms", "p95_ms", "first_byte_p50_ms", "first_byte_p95_ms"))
    unknown = dict.fromkeys(
        (
            *("error_rate", "error_rate_low", "error_rate_high", "error_rate_differs"),
            *("cost_per_request_nanousd", "cost_per_request_low_nanousd", "cost_per_request_high_nanousd"),
            "cost_differs",
        )
    )
    assert report == {
        "experiments": [
            {
                "experiment": "e",
                "arms": [
                    {
                        "arm": "a",
                        "model": MODELS[0],
                        "units": 2,
                        "requests": 4,
                        "errors": 1,
                        "input_tokens": 40,
                        "cache_read_tokens": 80,
                        "cache_write_5m_tokens": 120,
                        "cache_write_1h_tokens": 160,
                        "output_tokens": 200,
                        "cost_nanousd": 460,
                        "saved_nanousd": 28,
                        "p50_ms": 1_000,
                        "p95_ms": 1_000,
                        "first_byte_p50_ms": 200,
                        "first_byte_p95_ms": 200,
                        "error_rate": 0.25,
                        "error_rate_low": rate.low,
                        "error_rate_high": rate.high,
                        "error_rate_differs": None,
                        "cost_per_request_nanousd": 115,
                        "cost_per_request_low_nanousd": round(cost.low),
                        "cost_per_request_high_nanousd": round(cost.high),
                        "cost_differs": None,
                    },
                    {"arm": "b", "model": MODELS[1], "units": 0, **nothing, **untimed, **unknown},
                ],
            }
        ]
    }


def test_arms_are_compared_with_the_first_of_the_settings(tell, connection):
    dice = random.Random(5)
    for number in range(400):
        arm = "ab"[number % 2]
        failed = dice.random() < (0.1 if arm == "a" else 0.4)
        given = {"arm": f"e:{arm}", "conversation": f"c{number}", "outcome": "failed" if failed else "completed"}
        tell(*call_events(number, AUGUST_10_NS + number, cost=dice.randrange(900, 1_100), **given))
    reversed_e = Experiment(name="e", model=MODELS[0], arms=E.arms[::-1])
    for running, order in ((E, ["a", "b"]), (reversed_e, ["b", "a"])):
        (report,) = all_experiments(connection, running)
        assert [arm.arm for arm in report.arms] == order
        first, second = report.arms
        assert (first.error_rate_differs, first.cost_differs) == (None, None)
        assert (second.error_rate_differs, second.cost_differs) == (True, False)


def test_what_is_dealt_is_the_conversation_and_the_person_where_there_is_none(tell, connection):
    for number, (conversation, user) in enumerate(
        [("c", "an"), ("c", "binh"), ("an", "an"), ("", "an"), ("", "an"), ("", "binh")]
    ):
        tell(*call_events(number, AUGUST_10_NS, arm="e:a", conversation=conversation, user=user))
    (report,) = all_experiments(connection, E)
    assert (report.arms[0].units, report.arms[0].used.requests) == (4, 6)


def test_experiments_that_are_over_come_after_those_that_run_and_calls_without_an_arm_not_at_all(tell, connection):
    for number, arm in enumerate(("", "old:y", "e:b", "old:x", "e:gone", "")):
        tell(*call_events(number, AUGUST_10_NS, arm=arm))
    found = all_experiments(connection, E)
    assert [(one.experiment, [(arm.arm, arm.model, arm.used.requests) for arm in one.arms]) for one in found] == [
        ("e", [("a", MODELS[0], 0), ("b", MODELS[1], 1), ("gone", "", 1)]),
        ("old", [("x", "", 1), ("y", "", 1)]),
    ]
    assert all_experiments(connection)[0].experiment == "e"


def test_experiments_are_of_the_span_and_agree_with_usage_by_arm(tell, connection):
    for number in range(10):
        given = {"arm": f"e:{'ab'[number % 2]}", "cost": number, "total_ms": number, "conversation": f"c{number % 3}"}
        tell(*call_events(number, AUGUST_10_NS + number, **given))
    span = {"since_ns": AUGUST_10_NS + 2, "until_ns": AUGUST_10_NS + 9}
    by_arm = {row.group: row for row in usage(connection, "arm", **span).rows}
    (report,) = experiments(connection, (E,), **span)
    for arm in report.arms:
        row = by_arm[f"e:{arm.arm}"]
        assert row.requests in (3, 4)
        assert {**msgspec.structs.asdict(arm.used), "group": row.group} == msgspec.structs.asdict(row)


def test_without_experiments_there_is_an_answer_too(connection):
    assert experiments_json(all_experiments(connection)) == {"experiments": []}


def test_experiments_find_their_span_by_the_index_of_time(connection):
    statement = usage_statement(calls.c.arm, calls.c.conversation, since_ns=1, until_ns=2).where(calls.c.arm != "")
    assert "SEARCH calls USING INDEX calls_by_time (at_ns>? AND at_ns<?)" in plan(connection, statement)


@pytest.mark.parametrize("group_by", GROUPS)
def test_usage_finds_its_span_by_the_index_of_time(connection, group_by):
    group = {"day": calls.c.at_ns // DAY_NS, "user": calls.c.user_id, "key": calls.c.key_id}.get(group_by)
    group = calls.c[group_by] if group is None else group
    assert "SEARCH calls USING INDEX calls_by_time (at_ns>? AND at_ns<?)" in plan(
        connection, usage_statement(group, since_ns=1, until_ns=2)
    )


@pytest.mark.parametrize("cursor", ["", "5.call_1"])
def test_a_page_of_calls_is_read_off_the_index_without_sorting(connection, cursor):
    steps = plan(connection, calls_statement(limit=51, cursor=cursor))
    assert "USING INDEX calls_by_time" in steps
    assert "TEMP B-TREE" not in steps
    assert ("SEARCH" if cursor else "SCAN") in steps


def test_open_calls_are_found_by_their_own_index(connection):
    assert "calls_open" in plan(connection, sa.select(calls).where(calls.c.state == sa.text("'open'")))


def plan(connection, statement) -> str:
    text = str(statement.compile(connection.engine, compile_kwargs={"literal_binds": True}))
    return "\n".join(step[-1] for step in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}"))
