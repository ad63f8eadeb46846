"""The budgets of one process, and the reading of the ledger that they are begun from and corrected by."""

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from tests.storage.conftest import MODEL, Call, price_per_token

from headgate.policy.budgets import Account, Budgets, MoneyAsk, MoneyVerdict, Spent, ask_id, periods
from headgate.policy.pricing import upper_bound
from headgate.policy.prompt_bound import prompt_tokens_max_of
from headgate.storage.database import begin_write
from headgate.storage.fold import AttemptRow, CallRow, ending_of_orphan
from headgate.storage.interfaces import Money
from headgate.storage.ledger_tables import LedgerTables
from headgate.storage.money import LocalMoney, ledger_name, ledger_reader, spent, spent_statement
from headgate.storage.tables import calls
from headgate.wire.catalog import packaged

CATALOG = packaged()
NOON_NS = int(datetime(2026, 11, 24, 12, tzinfo=UTC).timestamp()) * 10**9
AT = periods(NOON_NS)
AN = Account("user:an", day_nanousd=100)


def same_tier(name: str) -> str:
    return name


def reserved(money: Money, ask: MoneyAsk) -> MoneyVerdict:
    verdicts: list[MoneyVerdict] = []
    money.reserve(ask, verdicts.append)
    (verdict,) = verdicts
    return verdict


async def nothing_spent(_ids, at_ns) -> Spent:
    return Spent(at_ns, {})


# In one process


def test_all_that_happens_to_an_attempt_reaches_the_budgets():
    clock = [100.0]
    budgets = Budgets()
    money = LocalMoney(budgets, clock=lambda: clock[0], now_ns=lambda: NOON_NS, read=nothing_spent)
    assert (money.shared, money.uncertain) == (False, False)
    assert reserved(money, MoneyAsk("a", (AN,), 60, NOON_NS)).admitted
    assert reserved(money, MoneyAsk("b", (AN,), 60, NOON_NS)).affordable_nanousd == 40
    over: list[str] = []
    for nanousd in (60, 100, 101):
        money.spend("a", nanousd, lambda: over.append("a"))
    assert over == ["a"]
    clock[0] = 125.0
    money.renew("a", lease_s=30.0)
    money.tick(131.0)
    assert len(budgets) == 1
    money.tick(156.0)
    assert (len(budgets), money.uncertain) == (0, True)
    assert asyncio.run(money.seed())
    assert not money.uncertain
    assert [one.spent_nanousd for one in money.snapshot(["user:an"])] == [0, 0]
    assert reserved(money, MoneyAsk("c", (AN,), 60, NOON_NS)).admitted
    money.settle("c", 9)
    assert [one.spent_nanousd for one in money.snapshot(["user:an"])] == [9, 0]


def test_a_ledger_that_cannot_be_read_changes_nothing():
    async def away(_ids, _at_ns) -> Spent:
        raise OSError("no such disk")

    money = LocalMoney(Budgets(), clock=lambda: 0.0, now_ns=lambda: NOON_NS, read=away)
    reserved(money, MoneyAsk("a", (AN,), 60, NOON_NS))
    assert asyncio.run(money.seed()) is False
    assert [one.reserved_nanousd for one in money.snapshot(["user:an"])] == [60, 0]


def test_two_hundred_at_once_bill_no_more_than_a_dollar_and_leave_less_than_the_cheapest_call():
    dice = random.Random(4)
    money = LocalMoney(Budgets(), clock=lambda: 0.0, now_ns=lambda: NOON_NS, read=nothing_spent)
    dollar = Account("all", 10**9)
    billed, asks = 0, [(f"a{number}", dice.randint(8_000_000, 30_000_000)) for number in range(200)]
    under_way: list[tuple[str, int]] = []
    while asks or under_way:
        if asks and (dice.random() < 0.6 or not under_way):
            one = asks.pop()
            if reserved(money, MoneyAsk(one[0], (dollar,), one[1], NOON_NS)).admitted:
                under_way.append(one)
        else:
            name, upper = under_way.pop(dice.randrange(len(under_way)))
            cost = dice.randint(upper // 3, upper)
            billed += cost
            money.settle(name, cost)
    left = reserved(money, MoneyAsk("last", (dollar,), 10**9, NOON_NS))
    assert billed <= 10**9
    assert (left.spent_nanousd, left.reserved_nanousd) == (billed, 0)
    assert left.affordable_nanousd < 30_000_000


# What the ledger says


@pytest.fixture
def tables(engine):
    tables = LedgerTables(engine)
    yield tables
    tables.close()


def row(number: int, at_ns: int, *, user="an", key="k1", tier="free", costs=(7,), still_open=False) -> CallRow:
    """A call with ended attempts of these costs; with one more that is open when it is."""
    call = CallRow(f"call_{number:024d}", at_ns, "writer", key, user, tier, model=MODEL, outcome="completed")
    for at, cost in enumerate(costs, start=1):
        attempt = call.attempt(at)
        attempt.state, attempt.cost_nanousd = "settled", cost
    if still_open:
        call.outcome = None
        attempt = call.attempt(len(costs) + 1)
        attempt.model, attempt.at_ns = MODEL, at_ns
        attempt.input_tokens_estimate, attempt.max_tokens = 1_000, 500
    return call


def write(tables: LedgerTables, *rows: CallRow) -> None:
    attempts = [attempt.values(one.call_id) for one in rows for attempt in one.attempts]
    tables.commit([one.values() for one in rows], attempts, "segment", 1)


def ask_ledger(engine: sa.Engine, ids=(), at_ns=NOON_NS, tier_of=same_tier) -> Spent:
    with engine.connect() as connection, connection.begin():
        return spent(connection, at_ns, ids=ids, catalog=CATALOG, tier_of=tier_of)


def test_sums_are_of_the_day_and_the_month_by_key_person_tier_and_everybody(engine, tables):
    write(
        tables,
        row(1, AT.day_ns, costs=(7, 3)),
        row(2, AT.day_ns - 1, user="binh", key="k2", costs=(20,)),
        row(3, AT.month_ns, user="binh", tier="paid", costs=(100,)),
        row(4, AT.month_ns - 1, costs=(1_000,)),
        row(5, NOON_NS, costs=(5_000,)),
    )
    found = ask_ledger(engine)
    day = {"key:k1": 10, "user:an": 10, "tier:free": 10, "all": 10}
    month = {"user:an": 10, "user:binh": 120, "key:k1": 110, "key:k2": 20, "tier:free": 30, "tier:paid": 100}
    month["all"] = 130
    assert {key: value for key, value in found.sums.items() if key.startswith(AT.day)} == {
        f"{AT.day}:{name}": nanousd for name, nanousd in day.items()
    }
    assert {key: value for key, value in found.sums.items() if key.startswith(AT.month)} == {
        f"{AT.month}:{name}": nanousd for name, nanousd in month.items()
    }
    assert found.opened == ()


def test_open_attempts_count_with_the_most_they_can_cost_and_ended_ones_of_open_calls_are_in_the_sums(engine, tables):
    write(tables, row(1, AT.day_ns, costs=(7,), still_open=True), row(2, AT.day_ns - 1, costs=(), still_open=True))
    found = ask_ledger(engine, ids=["call_x:1", ask_id(f"call_{1:024d}", 1), ask_id(f"call_{1:024d}", 2)])
    assert found.sums[f"{AT.day}:all"] == 7
    bound = upper_bound(prompt_tokens_max_of(1_000), 500, MODEL, AT.day_ns, CATALOG)
    (one, other) = sorted(found.opened, key=lambda opened: opened.id)
    assert (one.id, one.nanousd) == (ask_id(f"call_{1:024d}", 2), bound)
    assert set(one.windows) == {
        f"{p}:{a}" for p in (AT.day, AT.month) for a in ("key:k1", "user:an", "tier:free", "all")
    }
    assert set(other.windows) == {f"{AT.month}:{a}" for a in ("key:k1", "user:an", "tier:free", "all")}
    assert found.ended == {ask_id(f"call_{1:024d}", 1): 7}


def test_a_tier_that_is_not_in_the_settings_counts_as_the_free_one(engine, tables):
    write(tables, row(1, AT.day_ns, tier="gold"), row(2, AT.day_ns, tier="free"))
    found = ask_ledger(engine, tier_of=lambda name: "free" if name == "gold" else name)
    assert found.sums[f"{AT.day}:tier:free"] == 14
    assert f"{AT.day}:tier:gold" not in found.sums


def test_many_attempts_are_looked_up(engine, tables):
    write(tables, *(row(number, AT.day_ns) for number in range(1_200)))
    found = ask_ledger(engine, ids=[ask_id(f"call_{number:024d}", 1) for number in range(1_200)])
    assert len(found.ended) == 1_200


def test_the_pass_over_the_month_reads_the_index_of_time(engine):
    text = spent_statement(NOON_NS).compile(engine, compile_kwargs={"literal_binds": True}).string
    with engine.connect() as connection:
        plan = [step[-1] for step in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]
    assert plan[0].startswith("SEARCH calls USING INDEX calls_by_time (at_ns>? AND at_ns<?)"), plan
    assert "GROUP BY" in spent_statement(NOON_NS).compile(dialect=postgresql.dialect()).string


def test_after_a_crash_the_budget_of_the_next_process_has_what_the_dead_one_sent(open_ledger, tmp_path, engine):
    # The dead process: it reserved, wrote its intent, sent, and died.
    call = Call(1, at_ns=AT.day_ns)
    dead = open_ledger()
    dead.write(*call.opening(), call.started(), call.progress(50))
    dead.flush()
    account = Account("user:an", day_nanousd=50_000_000, month_nanousd=None)

    async def scenario() -> tuple[int, int]:
        budgets = Budgets()
        read = ledger_reader(engine, dead, CATALOG, same_tier)
        money = LocalMoney(budgets, clock=time.monotonic, now_ns=lambda: NOON_NS, read=read)
        assert await money.seed()
        before = reserved(money, MoneyAsk("x", (account,), 50_000_000, NOON_NS)).spent_nanousd
        # The sweeper ends it as an estimate.
        orphan = CallRow(call.id, call.at_ns, "w", attempts=[AttemptRow(1, MODEL, at_ns=call.at_ns)])
        orphan.attempts[0].usage = call.started().usage
        dead.write(*ending_of_orphan(orphan, price_per_token))
        assert await money.seed()
        return before, reserved(money, MoneyAsk("x", (account,), 50_000_000, NOON_NS)).spent_nanousd

    before, after = asyncio.run(scenario())
    assert before == upper_bound(prompt_tokens_max_of(1_000), 500, MODEL, call.at_ns, CATALOG)
    assert after == 700 + 10


def test_a_ledger_that_is_not_folded_is_not_read(engine):
    class Behind:
        def flush(self, *, timeout_s: float) -> None:
            raise TimeoutError("not folded")

    with pytest.raises(TimeoutError):
        asyncio.run(ledger_reader(engine, Behind(), CATALOG, same_tier)([], NOON_NS))


@pytest.mark.drill
def test_a_month_of_a_million_and_a_half_calls_is_read_in_seconds(engine):
    dice = random.Random(1)
    count = 1_500_000
    columns = list(calls.columns.keys())
    with begin_write(engine) as connection:
        for start in range(0, count, 50_000):
            rows = []
            for number in range(start, start + 50_000):
                at_ns = AT.month_ns + number * ((NOON_NS - AT.month_ns) // count)
                one = row(number, at_ns, user=f"u{dice.randrange(2_000)}", key=f"k{dice.randrange(50)}", costs=())
                values = list(one.values())
                values[columns.index("cost_nanousd")] = dice.randrange(10**7)
                values[columns.index("call_id")] = f"call_{at_ns:020d}{number % 10_000:04d}"
                rows.append(tuple(values))
            names = ", ".join(columns[: len(rows[0])])
            places = ", ".join("?" * len(rows[0]))
            connection.exec_driver_sql(f"INSERT INTO calls ({names}) VALUES ({places})", rows)
    started_at = time.process_time()  # others may use the processor meanwhile
    found = ask_ledger(engine)
    took_s = time.process_time() - started_at
    assert len(found.sums) == 2 * (2_000 + 50 + 1 + 1)
    assert took_s < 10, "measured"


def test_a_ledger_has_one_name_whoever_asks_first(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        names = set(pool.map(lambda _: ledger_name(tmp_path), range(32)))
    assert len(names) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ledger-name"]
    assert ledger_name(tmp_path) in names
