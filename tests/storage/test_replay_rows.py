"""Laws of the rows a replay gets: every billed attempt once, in order of start, with the waits taken off."""

import time

import msgspec
import sqlalchemy as sa

from headgate.policy.replay import AS_RECORDED, Policy, Replay
from headgate.storage.replay_rows import replay_rows, rows_statement
from headgate.storage.tables import attempts, calls
from headgate.wire.catalog import packaged
from headgate.wire.usage import Usage

AT_NS = 1_795_000_000 * 10**9
MODEL = "claude-sonnet-4-6"


def put(engine, number: int, *, tries: int = 1, **given) -> None:
    """A call of that second with attempts a second apart."""
    call_id, at_ns = f"call_{number:05d}", AT_NS + number * 10**9
    facts = {"state": "settled", "outcome": "completed", "model": MODEL, "cost_nanousd": 5 * tries, "total_ms": 3_000}
    with engine.begin() as connection:
        connection.execute(sa.insert(calls).values(call_id=call_id, at_ns=at_ns, **{**facts, **given}))
        for one in range(tries):
            usage = msgspec.json.encode(Usage(input_tokens=10 + one)).decode()
            values = {"model": MODEL, "state": "settled", "usage": usage, "cost_nanousd": 5, "max_tokens": 9}
            at = {"call_id": call_id, "number": one + 1, "at_ns": at_ns + (one * 2 + 1) * 10**9}
            connection.execute(sa.insert(attempts).values(**at, **values))


def rows(engine, since_ns: int = 0, until_ns: int = 1 << 62):
    with engine.connect() as connection:
        return list(replay_rows(connection, since_ns=since_ns, until_ns=until_ns))


def test_attempts_come_by_their_start_and_reused_answers_between_them(engine) -> None:
    put(engine, 1, tries=2, first_byte_ms=1_400, queue_ms=1_000, prefix="ab", prefix_tokens=7, digest="d", streamed=1)
    put(engine, 3, tries=0, reused=1, saved_nanousd=40, cost_nanousd=0)
    put(engine, 2)
    put(engine, 4, state="open", outcome=None)
    found = rows(engine)
    assert [(row.call_id[-1], (row.at_ns - AT_NS) // 10**9) for row in found] == [
        ("1", 2),
        ("2", 3),
        ("3", 3),
        ("1", 4),
    ]
    first, _, again, second = found
    assert (first.priced_at_ns - AT_NS, first.usage.input_tokens, first.cost_nanousd) == (10**9, 10, 5)
    assert (first.prefix, first.prefix_tokens, first.digest, first.streamed, first.complete) == (
        "ab",
        7,
        "d",
        True,
        True,
    )
    # The call came a second before its first attempt: its first byte 1.4 s after the call is 0.4 s after the attempt.
    assert (first.first_byte_ms, first.total_ms, first.max_tokens) == (400, 2_000, 9)
    assert second.first_byte_ms == 0
    assert (again.reused, again.reused_nanousd, again.usage) == (True, 40, Usage())


def test_a_span_takes_attempts_by_their_own_start(engine) -> None:
    put(engine, 1, tries=2)
    assert len(rows(engine, AT_NS + 4 * 10**9)) == 1
    assert len(rows(engine, until_ns=AT_NS + 3 * 10**9)) == 1
    with engine.connect() as connection:
        plan = connection.execute(sa.text(f"EXPLAIN QUERY PLAN {compiled()}")).all()
    assert any("calls_by_time" in str(step) for step in plan)


def compiled() -> str:
    return str(rows_statement(since_ns=1, until_ns=2).compile(compile_kwargs={"literal_binds": True}))


def test_the_recorded_policy_is_the_recorded_bill_and_ten_thousand_rows_take_seconds(engine) -> None:
    usage = msgspec.json.encode(Usage(input_tokens=300, cache_read_tokens=8_000, output_tokens=250)).decode()
    money = {"cost_nanousd": 7_050_000, "state": "settled", "model": MODEL}
    with engine.begin() as connection:
        facts = {**money, "outcome": "completed", "prefix": "ab"}
        ids = [(f"call_{number:05d}", AT_NS + number * 10**9) for number in range(10_000)]
        connection.execute(sa.insert(calls), [{"call_id": one, "at_ns": at_ns, **facts} for one, at_ns in ids])
        facts = {**money, "number": 1, "usage": usage}
        connection.execute(sa.insert(attempts), [{"call_id": one, "at_ns": at_ns, **facts} for one, at_ns in ids])
    began = time.process_time()
    replays = [Replay(policy, packaged(), since_ns=0, now_ns=AT_NS) for policy in (AS_RECORDED, Policy(ttl="1h"))]
    for row in rows(engine):
        for replay in replays:
            replay.add(row)
    assert time.process_time() - began < 5.0
    same, hour = (replay.projection() for replay in replays)
    assert same.recorded == same.projected
    assert same.recorded.cost_nanousd == 10_000 * 7_050_000
    # The first writes for an hour what was recorded as read.
    assert hour.projected.cost_nanousd - hour.recorded.cost_nanousd == 8_000 * (6_000 - 300)
