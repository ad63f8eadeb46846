"""Budgets over several processes: the script held to the policy, and a Redis that goes away or forgets.

All on a real redis-server; what needs exact times gives them to the script.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import msgspec
import pytest
import redis
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.storage.redis_server import RedisServer

from headgate.policy.budgets import (
    Account,
    Budgets,
    Cut,
    MoneyAsk,
    MoneyVerdict,
    OpenAttempt,
    Spent,
    caps,
    corrections,
    periods,
    window_id,
)
from headgate.storage import redis_money
from headgate.storage.redis_limits import RedisMissing
from headgate.storage.redis_money import (
    SCRIPT,
    UNKNOWN_NANOUSD_MAX,
    RedisMoney,
    correcting,
    cut_of,
    owing,
    reserving,
    verdict_of,
)

NOON_NS = int(datetime(2026, 11, 24, 12, tzinfo=UTC).timestamp()) * 10**9
AT = periods(NOON_NS)
DOLLAR = 10**9
ALL = Account("all", DOLLAR)


tags = (f"{{money-{number}}}" for number in itertools.count())


class LedgerOf:
    """What a ledger would say: ended and open attempts of today, by everybody."""

    def __init__(self) -> None:
        self.ended: dict[str, int] = {}
        self.opened: dict[str, int] = {}
        self.reads = 0
        self.away = False

    async def __call__(self, ids, at_ns) -> Spent:
        self.reads += 1
        if self.away:
            raise OSError("no such database")
        windows = (f"{AT.day}:all", f"{AT.month}:all")
        sums = dict.fromkeys(windows, sum(self.ended.values())) if self.ended else {}
        opened = tuple(OpenAttempt(name, amount, windows) for name, amount in self.opened.items())
        return Spent(at_ns, sums, opened, {name: cost for name, cost in self.ended.items() if name in ids})


async def until(condition: Callable[[], object], *, within_s: float = 8.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def opened(
    server: RedisServer, ledger: LedgerOf | None = None, *, replicas: int = 1, **options
) -> AsyncIterator[RedisMoney]:
    """Budgets that are started, ticked as a gateway does, and closed."""
    money = RedisMoney(
        server.url,
        clock=time.monotonic,
        now_ns=lambda: NOON_NS,
        read=ledger or LedgerOf(),
        replicas=lambda: replicas,
        **options,
    )
    await money.start()

    async def tick() -> None:
        while True:
            money.tick(time.monotonic())
            await asyncio.sleep(0.1)

    ticking = asyncio.get_running_loop().create_task(tick())
    try:
        yield money
    finally:
        ticking.cancel()
        await money.close()


async def reserved(money: RedisMoney, name: str, upper: int, *accounts: Account) -> MoneyVerdict:
    answer: asyncio.Future[MoneyVerdict] = asyncio.get_running_loop().create_future()
    money.reserve(MoneyAsk(name, accounts or (ALL,), upper, NOON_NS), answer.set_result)
    async with asyncio.timeout(5.0):
        return await answer


def day(money: RedisMoney) -> tuple[int, int]:
    """Settled and reserved of everybody today, as last known."""
    one = money.snapshot(["all"])[0]
    return one.spent_nanousd, one.reserved_nanousd


# The script and the policy, with one history


class Script:
    """The script, with times that a test gives."""

    def __init__(self, server: RedisServer) -> None:
        self._client = redis.Redis(port=server.port)
        self.tag = next(tags)

    def run(self, operations: list[tuple[object, ...]], now: float) -> tuple[str, list[msgspec.Raw]]:
        reply = self._client.eval(SCRIPT, 1, self.tag, msgspec.msgpack.encode(operations), repr(now))
        generation, self.expired, answers = msgspec.msgpack.decode(reply, type=tuple[str, int, list[msgspec.Raw]])
        return generation, answers

    def begin(self, now: float, spent: Spent) -> None:
        _, (answer,) = self.run([correcting(corrections(Cut(NOON_NS, {}), spent), "g", NOON_NS)], now)
        assert msgspec.msgpack.decode(answer) == 1

    def delete(self, kind: str) -> int:
        return self._client.delete(f"{self.tag}:1:money:{kind}")

    def close(self) -> None:
        self._client.close()


ACCOUNTS = (
    Account("user:an", 100, 150),
    Account("user:an:of:colons", 90),
    Account("key:1", None, 120),
    Account("all", 200, 2**49),
    Account("user:binh", 0),
    Account("user:tie", 60, 60),
)
some = st.integers(0, 5)
amounts = st.sampled_from([0, 1, 7, 30, 60, 101, 10**15])
moves = st.one_of(
    st.tuples(
        st.just("reserve"),
        st.lists(st.sampled_from(ACCOUNTS), min_size=1, max_size=3, unique_by=lambda account: account.id),
        amounts,
        st.sampled_from([0, 0, 0, 86_400]),
        st.sampled_from([0.5, 30.0]),
    ),
    st.tuples(st.just("spend"), some, amounts),
    st.tuples(st.just("settle"), some, amounts),
    st.tuples(st.just("renew"), some, st.sampled_from([0.5, 30.0])),
    st.tuples(st.just("owe"), some, st.booleans(), amounts, st.booleans()),
    st.tuples(st.just("read"), st.integers(0, 2), st.integers(0, 200)),
)
waits = st.sampled_from([0.0, 0.0, 0.0, 0.3, 5.0, 20.0, 40.0])


@settings(max_examples=120)
@given(history=st.lists(st.tuples(waits, moves), max_size=30))
def test_the_script_decides_as_the_policy_does(standing, history):
    script = Script(standing)
    budgets, now, asks = Budgets(), 1_000.0, []
    seeded = Spent(NOON_NS, {f"{AT.day}:all": 20, f"{AT.month}:all": 30, f"{AT.day}:user:x": 5})
    script.begin(now, seeded)
    budgets.correct(corrections(Cut(NOON_NS, {}), seeded))

    def known(number: int) -> MoneyAsk:
        return asks[-1 - number] if number < len(asks) else MoneyAsk("never seen", (ACCOUNTS[0],), 5, NOON_NS)

    for wait_s, (move, *rest) in history:
        now += wait_s
        budgets.expire(now)
        if move == "reserve":
            accounts, upper, later_s, lease_s = rest
            ask = MoneyAsk(f"a{len(asks)}", tuple(accounts), upper, NOON_NS + later_s * 10**9, lease_s)
            asks.append(ask)
            _, (answer,) = script.run([reserving(ask)], now)
            assert verdict_of(answer, ask, caps(ask))[0] == budgets.reserve(ask, now)
            _, (answer,) = script.run([reserving(ask)], now)
            assert verdict_of(answer, ask, caps(ask))[0] == budgets.reserve(ask, now)
        elif move == "spend":
            _, (answer,) = script.run([(4, known(rest[0]).id, rest[1])], now)
            assert msgspec.msgpack.decode(answer) == budgets.spend(known(rest[0]).id, rest[1])
        elif move == "settle":
            script.run([(2, known(rest[0]).id, rest[1])], now)
            budgets.settle(known(rest[0]).id, rest[1], now)
        elif move == "renew":
            script.run([(3, known(rest[0]).id, rest[1])], now)
            budgets.renew(known(rest[0]).id, lease_s=rest[1], now=now)
        elif move == "owe":
            number, new, nanousd, live = rest
            ask = MoneyAsk(f"o{now}{number}", (ACCOUNTS[number],), 1, NOON_NS) if new else known(number)
            asks.append(ask)
            script.run([owing(ask, nanousd, live=live)], now)
            budgets.owe(ask, nanousd, live=live, now=now)
        elif move == "read":
            number, nanousd = rest
            windows = (f"{AT.day}:all", f"{AT.month}:key:1")
            ended = {known(number).id: nanousd}
            found = corrections(
                budgets.cut(NOON_NS),
                Spent(NOON_NS, dict.fromkeys(windows, nanousd), (OpenAttempt(f"c{now}", 9, windows),), ended),
            )
            budgets.correct(found)
            _, (answer,) = script.run([correcting(msgspec.structs.replace(found, generation="g"), "", NOON_NS)], now)
            assert msgspec.msgpack.decode(answer) == 1
        looks = [(6, [(AT.day, account.id), (AT.month, account.id)]) for account in ACCOUNTS]
        generation, (answer, *told) = script.run([(7, (AT.day, AT.month)), *looks], now)
        same(cut_of(answer, NOON_NS, generation), budgets.cut(NOON_NS))
        assert script.expired == budgets.uncertain
        for account, answer in zip(ACCOUNTS, told, strict=True):
            uses = budgets.uses([account.id], NOON_NS)
            numbers = [number for one in uses for number in (one.spent_nanousd, one.reserved_nanousd)]
            assert msgspec.msgpack.decode(answer) == numbers
    script.close()


def same(script: Cut, policy: Cut) -> None:
    nonzero = [{name: value for name, value in cut.settled.items() if value} for cut in (script, policy)]
    assert nonzero[0] == nonzero[1]
    assert {one.id: one for one in script.held} == {one.id: one for one in policy.held}


def test_amounts_of_a_million_dollars_are_exact(standing):
    script = Script(standing)
    script.begin(1.0, Spent(NOON_NS, {f"{AT.day}:all": 8 * 10**15 + 1}))
    ask = MoneyAsk("a", (Account("all", 10**15),), 10**15, NOON_NS)
    script.run([owing(ask, 10**15 - 3, live=False)], 1.0)
    _, (answer,) = script.run([(6, [(AT.day, "all")])], 1.0)
    assert msgspec.msgpack.decode(answer) == [9 * 10**15 - 2, 0]
    script.close()


@pytest.mark.parametrize("lost", ["generation", f"period:{AT.day}", f"period:{AT.month}"])
def test_a_count_of_which_any_part_was_lost_is_no_count(standing, lost):
    script = Script(standing)
    ask = MoneyAsk("a", (Account("all", 100, 100),), 60, NOON_NS)
    generation, (answer,) = script.run([reserving(ask)], 1.0)
    assert (generation, msgspec.msgpack.decode(answer)) == ("", [])
    script.begin(1.0, Spent(NOON_NS, {window_id(AT.day, "all"): 10, window_id(AT.month, "all"): 10}))
    assert script.run([reserving(ask)], 1.0)[0] == "g"
    assert script.delete(lost) == 1
    assert script.run([reserving(MoneyAsk("b", ask.accounts, 90, NOON_NS))], 1.0)[0] == ""
    script.begin(1.0, Spent(NOON_NS, {window_id(AT.day, "all"): 70}))
    _, (answer,) = script.run([(6, [(AT.day, "all"), (AT.month, "all")])], 1.0)
    assert msgspec.msgpack.decode(answer) == [70, 0, 0, 0]
    script.close()


def test_who_begins_a_count_anew_is_the_first_one(standing):
    script = Script(standing)
    begun = correcting(corrections(Cut(NOON_NS, {}), Spent(NOON_NS, {f"{AT.day}:all": 7})), "g", NOON_NS)
    answers = [msgspec.msgpack.decode(script.run([begun], 1.0)[1][0]) for _ in range(2)]
    assert answers == [1, 0]
    script.close()


# In gateways


def test_two_hundred_at_once_over_two_gateways_bill_no_more_than_a_dollar(standing):
    dice = random.Random(7)

    async def scenario() -> None:
        tag = next(tags)
        async with opened(standing, tag=tag) as one, opened(standing, tag=tag) as other:
            billed = 0

            async def call(number: int) -> None:
                nonlocal billed
                money = (one, other)[number % 2]
                upper = dice.randint(8_000_000, 30_000_000)
                if (await reserved(money, f"a{number}", upper)).admitted:
                    await asyncio.sleep(0)
                    cost = dice.randint(upper // 3, upper)
                    billed += cost
                    money.settle(f"a{number}", cost)

            await asyncio.gather(*(call(number) for number in range(200)))
            number = itertools.count(200)
            for _ in range(400):
                await call(next(number))
            await until(lambda: day(one) == (billed, 0))
            last = await reserved(other, "last", DOLLAR)
            assert billed <= DOLLAR
            assert (last.admitted, last.spent_nanousd, last.reserved_nanousd) == (False, billed, 0)
            assert last.affordable_nanousd <= 30_000_000

    asyncio.run(scenario())


def test_all_that_happens_to_an_attempt_reaches_redis(standing):
    async def scenario() -> None:
        over: list[str] = []
        async with opened(standing, tag=next(tags)) as money:
            assert money.shared
            assert (await reserved(money, "free", 5, Account("user:x"))).account == ""
            assert (await reserved(money, "a", DOLLAR // 2)).admitted
            money.spend("a", DOLLAR // 4, lambda: over.append("early"))
            money.spend("a", DOLLAR * 3 // 4, lambda: over.append("room"))
            await until(lambda: day(money) == (0, DOLLAR * 3 // 4))
            money.renew("a", lease_s=60.0)
            money.spend("a", DOLLAR + 1, lambda: over.append("over"))
            await until(lambda: over)
            money.settle("a", DOLLAR + 1)
            money.settle("a", 5)
            await until(lambda: day(money) == (DOLLAR + 1, 0))
            assert over == ["over"]
            for wrong in (lambda: money.settle("a", -1), lambda: money.spend("a", 10**16, over.clear)):
                with pytest.raises(ValueError, match="an amount is"):
                    wrong()

    asyncio.run(scenario())


def test_a_count_begins_with_what_the_ledger_says_and_follows_it(standing):
    ledger = LedgerOf()
    ledger.ended = {"x:1": DOLLAR // 2}
    ledger.opened = {"y:1": DOLLAR // 4}

    async def scenario() -> None:
        tag = next(tags)
        async with opened(standing, ledger, tag=tag) as money, opened(standing, ledger, tag=tag) as other:
            denied = await reserved(money, "a:1", DOLLAR // 2)
            assert (denied.admitted, denied.affordable_nanousd) == (False, DOLLAR // 4)
            ledger.ended["y:1"] = ledger.opened.pop("y:1") - DOLLAR // 8
            assert await other.seed()
            assert not other.uncertain
            assert (await reserved(money, "b:1", DOLLAR * 3 // 8)).admitted
            assert not (await reserved(money, "c:1", 1)).admitted
            ledger.away = True
            assert not await money.seed()

    asyncio.run(scenario())


def test_a_server_that_forgets_everything_is_told_again_and_nothing_more_is_spent_than_there_was(standing):
    ledger = LedgerOf()

    async def scenario() -> None:
        with structlog.testing.capture_logs() as lines:
            async with opened(standing, ledger, tag=next(tags)) as money:
                assert (await reserved(money, "a:1", DOLLAR // 2)).admitted
                assert (await reserved(money, "b:1", DOLLAR // 4)).admitted
                money.settle("b:1", DOLLAR // 5)
                ledger.opened, ledger.ended = {"a:1": DOLLAR // 2}, {"b:1": DOLLAR // 5}
                await until(lambda: day(money) == (DOLLAR // 5, DOLLAR // 2))
                standing.say("FLUSHALL")
                alone = await reserved(money, "c:1", DOLLAR * 3 // 10)
                assert (alone.admitted, money.shared) == (False, False)
                assert alone.affordable_nanousd == int((DOLLAR - DOLLAR // 2 - DOLLAR // 5) * 0.8)
                await until(lambda: money.shared)
                await until(lambda: day(money) == (DOLLAR // 5, DOLLAR // 2))
                money.settle("a:1", DOLLAR // 3)
                await until(lambda: day(money) == (DOLLAR // 5 + DOLLAR // 3, 0))
        assert "redis_budgets_counted_anew" in [line["event"] for line in lines]

    asyncio.run(scenario())


def kill(server: RedisServer) -> None:
    server.kill()


def freeze(server: RedisServer) -> None:
    server.freeze()


def restart(server: RedisServer) -> None:
    server.start()


def thaw(server: RedisServer) -> None:
    server.thaw()


@pytest.mark.parametrize(("fault", "mend"), [(kill, restart), (freeze, thaw)])
def test_while_redis_is_away_each_process_spends_its_share_of_what_was_left_and_tells_it_later(server, fault, mend):
    ledger = LedgerOf()

    async def scenario() -> None:
        async with opened(server, ledger, replicas=2) as money:
            assert (await reserved(money, "before:1", DOLLAR // 2)).admitted
            fault(server)
            started_at = time.monotonic()
            got = await asyncio.gather(*(reserved(money, f"a{number}:1", DOLLAR // 20) for number in range(10)))
            assert time.monotonic() - started_at < 0.25
            assert sum(one.admitted for one in got) == 4, "half of 0.8 of half a dollar"
            assert not money.shared
            admitted = [f"a{number}:1" for number, one in enumerate(got) if one.admitted]
            money.settle(admitted[0], DOLLAR // 50)
            money.settle("before:1", DOLLAR // 4)
            over: list[int] = []
            money.spend(admitted[1], DOLLAR // 20 + 1, lambda: over.append(1))
            assert not over
            money.spend(admitted[2], DOLLAR // 2, lambda: over.append(1))
            assert over
            # In the ledger too, should the count have to begin anew.
            ledger.ended = {admitted[0]: DOLLAR // 50, "before:1": DOLLAR // 4}
            ledger.opened = dict.fromkeys(admitted[1:], DOLLAR // 20)
            mend(server)
            await until(lambda: money.shared)
            live = 3 * (DOLLAR // 20) + 1
            if fault is kill:
                # Told twice, until the ledger is read once more.
                assert money.uncertain
                await until(lambda: day(money)[1] == live)
                assert await money.seed()
            await until(lambda: day(money) == (DOLLAR // 50 + DOLLAR // 4, live))
            for name in admitted[1:]:
                money.settle(name, 0)
            await until(lambda: day(money) == (DOLLAR // 50 + DOLLAR // 4, 0))

    asyncio.run(scenario())


def test_not_reached_and_with_no_ledger_there_is_a_little_and_no_more(server):
    server.kill()
    ledger = LedgerOf()
    ledger.away = True

    async def scenario() -> None:
        async with opened(server, ledger) as money:
            rich = Account("all", 1_000 * DOLLAR)
            assert not (await reserved(money, "a", UNKNOWN_NANOUSD_MAX + 1, rich)).admitted
            assert (await reserved(money, "b", UNKNOWN_NANOUSD_MAX, rich)).admitted
            assert not (await reserved(money, "c", DOLLAR // 49, Account("user:an", DOLLAR))).admitted
            assert (await reserved(money, "d", DOLLAR // 50, Account("user:an", DOLLAR))).admitted
            assert (await reserved(money, "e", DOLLAR)).cap_nanousd == DOLLAR

    asyncio.run(scenario())


def test_a_process_that_dies_leaves_its_bound_until_the_ledger_tells(standing):
    script = Script(standing)
    script.begin(1_000.0, Spent(NOON_NS, {}))
    ask = MoneyAsk("a:1", (ALL,), DOLLAR, NOON_NS)
    script.run([reserving(ask)], 1_000.0)
    generation, (answer,) = script.run([(7, (AT.day, AT.month))], 1_031.0)
    cut = cut_of(answer, NOON_NS, generation)
    assert [(one.id, one.state, one.nanousd) for one in cut.held] == [("a:1", "expired", DOLLAR)]
    assert cut.settled == {f"{AT.day}:all": DOLLAR}
    found = corrections(cut, Spent(NOON_NS, {f"{AT.day}:all": 77}, (), {"a:1": 77}))
    script.run([correcting(found, "", NOON_NS)], 1_031.0)
    _, (answer,) = script.run([(6, [(AT.day, "all")])], 1_031.0)
    assert msgspec.msgpack.decode(answer) == [77, 0]
    script.close()


def test_without_the_package_the_start_says_what_to_install(monkeypatch):
    monkeypatch.setattr(redis_money, "redis", None)
    with pytest.raises(RedisMissing, match=r"pip install 'headgate\[redis\]'"):
        RedisMoney("redis://x", clock=time.monotonic, now_ns=time.time_ns, read=LedgerOf(), replicas=lambda: 1)


def test_an_address_that_cannot_be_meant_stops_the_start():
    with pytest.raises(RedisMissing, match="looks like redis://"):
        RedisMoney("localhost", clock=time.monotonic, now_ns=time.time_ns, read=LedgerOf(), replicas=lambda: 1)


def test_a_count_of_two_ledgers_is_corrected_by_neither(standing):
    script = Script(standing)
    begun = correcting(corrections(Cut(NOON_NS, {}), Spent(NOON_NS, {f"{AT.day}:all": 7})), "g", NOON_NS, "one")
    script.run([begun], 1.0)
    own = correcting(corrections(Cut(NOON_NS, {f"{AT.day}:all": 7}, (), "g"), Spent(NOON_NS, {})), "", NOON_NS, "one")
    other = correcting(corrections(Cut(NOON_NS, {f"{AT.day}:all": 7}, (), "g"), Spent(NOON_NS, {})), "", NOON_NS, "two")
    answers = [msgspec.msgpack.decode(script.run([each], 1.0)[1][0]) for each in (other, own)]
    assert answers == [2, 2], "what one lacks the other has"
    _, (answer,) = script.run([(6, [(AT.day, "all")])], 1.0)
    assert msgspec.msgpack.decode(answer) == [7, 0]
    script.close()
