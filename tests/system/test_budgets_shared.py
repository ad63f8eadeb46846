"""Budgets of several processes on one Redis: two workers of one gateway, two gateways, and a Redis that dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.storage.redis_server import RedisServer
from tests.system.callers import Desk
from tests.system.conftest import Simulator, Stack, until
from tests.system.scripted import Reply, run
from tests.system.test_budgets import CENT, USD, answers, billed, budget, held_for, split, together
from tests.system.test_workers import Workers, start

from headgate.policy.budgets import LATELY_S

BODY = answers(1000)
OPEN = {
    "VELOCITY__ENABLED": "false",
    "CACHE__PLAN": "false",
    "TIERS__FREE__RPM": "1000000",
    "TIERS__PERSON__RPM": "1000000",
    "TIERS__PERSON__BUDGET_USD_DAY": "0.3",
    "PACING__RPM": "10000000",
    "PACING__ITPM": "1000000000",
    "PACING__OTPM": "1000000000",
}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def simulator(stack: Stack) -> Simulator:
    return stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0", "--otps", "100000")


def desk_of(workers: Workers) -> Desk:
    """An operator's desk that any worker knows."""
    desk = Desk.of(workers.through[0])
    until(lambda: all(Desk(one, desk.key)._knows(desk.key) for one in workers.through), what="all to know the key")
    return desk


def shared_budget(desk: Desk, workers: Workers, day_nanousd: int) -> tuple[str, str]:
    (key,) = desk.keys({"name": "spender", "budget_day_nanousd": day_nanousd})
    until(lambda: all(Desk(one, key)._knows(key) for one in workers.through), what="all to know the key")
    return key, f"key:{key[3:11]}"


async def until_refused(desk: Desk, key: str, *, lanes: int, keep_on: Callable[[], bool]) -> list[Reply]:
    """So many at a time, each until it is refused and `keep_on` is over."""
    replies: list[Reply] = []

    async def lane() -> None:
        while True:
            reply = await desk.ask("", BODY, key=key)
            replies.append(reply)
            if reply.status != 200:
                if not keep_on():
                    return
                await asyncio.sleep(0.05)

    await asyncio.gather(*(lane() for _ in range(lanes)))
    return replies


@pytest.mark.drill
def test_two_workers_share_a_dollar(stack: Stack, simulator: Simulator, redis: RedisServer) -> None:
    workers = start(stack, simulator.url, redis.url, **OPEN)
    desk = desk_of(workers)
    key, account = shared_budget(desk, workers, USD)
    answered, _ = split(run(together(*(desk.ask("", BODY, key=key) for _ in range(200)))))
    assert len(answered) > 40
    # What has ended is told to Redis a moment later: who was refused meanwhile asks again.
    again = iter(range(5))
    run(until_refused(desk, key, lanes=1, keep_on=lambda: next(again) < 4))
    bill = billed(simulator)
    stands = budget(desk, account)
    assert USD - held_for(BODY) <= bill <= USD
    assert (stands["spent_nanousd"], stands["reserved_nanousd"]) == (bill, 0)
    assert budget(Desk(workers.through[1], desk.key), account) == stands, "whoever is asked"


@pytest.mark.drill
def test_redis_dies_and_comes_back_under_load(stack: Stack, simulator: Simulator, redis: RedisServer) -> None:
    workers = start(stack, simulator.url, redis.url, **OPEN)
    desk = desk_of(workers)
    key, account = shared_budget(desk, workers, USD)
    over = False

    def both_back() -> bool:
        return len(workers.process.lines(event="redis_budgets_shared")) >= 4

    async def main() -> list[Reply]:
        nonlocal over
        async with asyncio.TaskGroup() as group:
            load = group.create_task(until_refused(desk, key, lanes=6, keep_on=lambda: not over))
            await asyncio.sleep(0.15)
            await asyncio.to_thread(redis.kill)
            await asyncio.sleep(3)
            await asyncio.to_thread(redis.start)
            await asyncio.to_thread(until, both_back, within_s=30, what="both to be back")
            await asyncio.sleep(2)
            over = True
        return load.result()

    replies = run(main())
    split(replies)
    bill = billed(simulator)
    until(lambda: quiet(desk, account), within_s=60, what="nothing to be held")
    assert bill <= USD
    until(lambda: budget(desk, account)["spent_nanousd"] == bill, within_s=60, what="the count to be the bill")


def quiet(desk: Desk, account: str) -> dict[str, Any] | None:
    stands = budget(desk, account)
    return stands if stands["reserved_nanousd"] == 0 else None


@pytest.mark.drill
def test_two_gateways_with_ledgers_of_their_own_share_the_budget_of_a_person(
    stack: Stack, simulator: Simulator, redis: RedisServer
) -> None:
    one = Desk.of(stack.gateway(simulator.url, REDIS_URL=redis.url, **OPEN))
    other = Desk.of(stack.gateway(simulator.url, REDIS_URL=redis.url, **OPEN))

    def both() -> int:
        desks = (one, other) * 20
        split(run(together(*(desk.ask("chung", BODY, tier="person") for desk in desks))))
        return billed(simulator)

    assert 10 * CENT < both() <= 30 * CENT
    while (before := billed(simulator)) != both():
        pass
    assert 30 * CENT - held_for(BODY) <= before <= 30 * CENT
    other.gateway.process.stop()
    # Until what it settled is forgotten, the count would keep it whatever a ledger says.
    time.sleep(LATELY_S + 1)
    other = Desk(stack.gateway(simulator.url, REDIS_URL=redis.url, data_dir=other.gateway.data_dir, **OPEN), other.key)
    assert both() <= 30 * CENT, "a start reads a ledger that has half of it"
    (told,) = other.gateway.process.lines(event="budgets_of_several_ledgers")
    assert "share a database" in told["mend"]
    stands = budget(one, "user:chung", tier="person")
    assert (stands["spent_nanousd"], stands["reserved_nanousd"]) == (billed(simulator), 0)
