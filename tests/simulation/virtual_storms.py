"""Storms in virtual time: a model that flaps, everything down under steady load, one person who asks a thousand times.

    python -m tests.simulation.virtual_storms

Prints the figures of each, one JSON object a line. What they must be is in `test_virtual_storms.py`; `load/storms.py`
does the same over sockets. All laws of `world.py` hold here too.
"""

import asyncio
import json
import math
import random
from collections.abc import Callable, Coroutine

import structlog
from tests.simulation.world import Asker, Exchange, JumpingLoop, World

from headgate.gateway.settings import Settings

SONNET, HAIKU, OPUS = "claude-sonnet-4-6", "claude-haiku-4-5", "claude-opus-4-7"
WIDE = {"pacing": {"rpm": 100_000, "itpm": 1_000_000_000, "otpm": 100_000_000}}
"""Limits that are in nobody's way."""
ARTICLE = {"pacing": {"tier": "tier2"}}

Weather = Callable[[str, float], str]
Load = Callable[[World], Coroutine[None, None, object]]


def lived(sections: dict, weather: Weather, load: Load, seed: int) -> World:
    """A world after this load. No law may have been broken in it."""
    before = structlog.get_config()
    try:
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            world = World(runner.get_loop(), seed, Settings(**sections), weather)
            runner.run(_whole(world, load))
    finally:
        structlog.configure(**before)
    assert not world.laws.broken, world.laws.examples
    return world


async def _whole(world: World, load: Load) -> None:
    ticks = world.loop.create_task(world.tick())
    await load(world)
    await world.rest()
    ticks.cancel()
    world.settled()


def body(dice: random.Random, model: str = SONNET, prompt_tokens: int = 300, answer_tokens: int = 40) -> dict:
    """A question that is answered in 0.2 to 0.4 s and half a second more."""
    asked: dict[str, object] = {
        "model": model,
        "max_tokens": 1024,
        "messages": [{"role": "user", "content": "x" * prompt_tokens * 3}],
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
        "first_byte_s": dice.uniform(0.2, 0.4),
    }
    return asked | ({"stream": True} if dice.random() < 0.7 else {})


def steady(per_s: float, until_s: float, *, people: int = 1_000, models: tuple[str, ...] = (SONNET,), **how) -> Load:
    """So many requests a second, of many people, each a little sooner or later than the clock would have it."""

    async def load(world: World) -> None:
        dice, number = random.Random(int(per_s * 100) + len(models)), 0
        while world.clock() < until_s:
            await asyncio.sleep(dice.uniform(0.5, 1.5) / per_s)
            world.arrive(body(dice, dice.choice(models)), Asker(f"person_{dice.randrange(people)}", "paid"), **how)
            number += 1

    return load


def quantile(values: list[float], share: float) -> float:
    """The smallest value that this share of them does not exceed; 0.0 of none."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


def busiest_second(moments: list[float], since: float, until: float = float("inf")) -> int:
    """Most of them that any second holds, wherever it begins."""
    ordered = sorted(at for at in moments if since <= at < until)
    first = most = 0
    for last, at in enumerate(ordered):
        while ordered[first] <= at - 1.0:
            first += 1
        most = max(most, last - first + 1)
    return most


def answered(exchanges: list[Exchange]) -> float:
    """Share of them that got an answer, whole."""
    return sum(one.status == 200 and one.finished for one in exchanges) / len(exchanges)


# a model that flaps


def flapping(per_s: float, seed: int, *, everything: bool) -> dict:
    """5 s up, 5 s down, for five minutes; Haiku is well, or is not."""

    def weather(model: str, now: float) -> str:
        return "529" if (everything or model == SONNET) and now % 10 >= 5 else ""

    world = lived(WIDE, weather, steady(per_s, 300.0), seed)
    exchanges = list(world.exchanges.values())
    of = [model for _, model, _ in world.transitions]
    codes = sorted({one.error_code for one in exchanges if one.status != 200})
    return {
        "storm": "everything flaps" if everything else "sonnet flaps",
        "per_s": per_s,
        "transitions": {model: of.count(model) for model in (SONNET, HAIKU) if model in of},
        "answered": round(answered(exchanges), 4),
        "errors": codes,
        "attempts_per_request": round(len(world.books) / len(exchanges), 3),
        "first_byte_p95_s": round(quantile([one.head_at - one.arrived_at for one in exchanges], 0.95), 2),
    }


def throttled(per_s: float, seed: int) -> dict:
    """Two minutes in which every answer is a 429."""
    world = lived(WIDE, lambda model, now: "429", steady(per_s, 120.0), seed)
    return {"storm": "429s", "transitions": len(world.transitions), "attempts": len(world.books)}


# everything down


def outage(per_s: float, seed: int, *, models: tuple[str, ...] = (SONNET,), fault: str = "529") -> dict:
    """Three minutes of calm, 60 s of nothing but faults on all models, two minutes of recovery."""
    down_at, up_at, end = 180.0, 240.0, 360.0
    world = lived(
        WIDE,
        lambda model, now: fault if down_at <= now < up_at else "",
        steady(per_s, end, models=models),
        seed,
    )
    exchanges = list(world.exchanges.values())
    moments = [books.arrived_at for books in world.books.values()]

    def latency(since: float, until: float) -> float:
        """p95 of the time to an answer's first byte; endless where one in twenty gets none."""
        these = [one for one in exchanges if since <= one.arrived_at < until]
        return quantile([one.head_at - one.arrived_at if one.status == 200 else math.inf for one in these], 0.95)

    normal_s = latency(60.0, 170.0)
    slow = [second for second in range(115) if latency(up_at + second, up_at + second + 5) > 1.1 * normal_s]
    recovered_s = max(slow, default=-1) + 1
    requests = sum(down_at <= one.arrived_at < up_at for one in exchanges)
    closed = [at for at, _, after in world.transitions if after == "closed"]
    return {
        "storm": f"60 s of {fault} everywhere",
        "per_s": per_s,
        "models": len(models),
        "requests": requests,
        "attempts": sum(down_at <= at < up_at for at in moments),
        "attempts_max": max(one.attempts for one in exchanges),
        "answered_in_outage": round(answered([one for one in exchanges if down_at <= one.arrived_at < up_at]), 3),
        "answered_after": round(answered([one for one in exchanges if one.arrived_at >= up_at]), 4),
        "answered_30_s_after": round(answered([one for one in exchanges if one.arrived_at >= up_at + 30]), 4),
        "normal_p95_s": round(normal_s, 2),
        "p95_normal_after_s": recovered_s,
        "p95_30_s_after_s": round(latency(up_at + 30, up_at + 60), 2),
        "closed_after_s": [round(at - up_at, 1) for at in closed],
        "busiest_second_before": busiest_second(moments, 60.0, down_at),
        "busiest_second_after": busiest_second(moments, up_at),
        "transitions": len(world.transitions),
    }


# one person


def crowding(seed: int, *, own_limits: bool, tokens: int = 1_000) -> dict:
    """One sends a thousand at once, twenty send one each 5 s. `own_limits` off: only the order protects them."""
    tiers = {} if own_limits else {"tiers": {"free": {"rpm": 100_000, "waiting_max": 1_000}}}

    async def load(world: World) -> None:
        dice = random.Random(seed)
        await asyncio.sleep(30.0)

        async def twenty(name: str) -> None:
            await asyncio.sleep(dice.uniform(0.0, 5.0))
            while world.clock() < 150.0:
                world.arrive(body(dice, SONNET, tokens), Asker(name), deadline_s=60.0)
                await asyncio.sleep(5.0)

        others = [world.loop.create_task(twenty(f"one_of_twenty_{number}")) for number in range(20)]
        for _ in range(1_000):
            world.arrive(body(dice, SONNET, tokens), Asker("who asks for a thousand"), deadline_s=60.0)
        await asyncio.gather(*others)

    world = lived(ARTICLE | tiers, lambda model, now: "", load, seed)
    exchanges = [one for one in world.exchanges.values() if one.asker.user.startswith("one_of")]
    greedy = [one for one in world.exchanges.values() if not one.asker.user.startswith("one_of")]
    waits = [one.first_sent_at - one.arrived_at for one in exchanges if one.first_sent_at is not None]
    return {
        "storm": "one against twenty" if own_limits else "one without limits against twenty",
        "answered": round(answered(exchanges), 4),
        "wait_p50_s": round(quantile(waits, 0.5), 2),
        "wait_p95_s": round(quantile(waits, 0.95), 2),
        "wait_max_s": round(max(waits), 2),
        "greedy_answered": sum(one.status == 200 for one in greedy),
    }


def keys(seed: int, count: int) -> dict:
    """One person sends five requests a second through so many keys, for three minutes; others are there too."""

    async def load(world: World) -> None:
        dice = random.Random(seed)
        number = 0
        while world.clock() < 180.0:
            await asyncio.sleep(0.2)
            key_id = f"key{number % count:05d}"
            world.arrive(body(dice), Asker("who has keys", "free", key_id), deadline_s=20.0)
            if number % 2:
                world.arrive(body(dice), Asker(f"other_{number % 60}"), deadline_s=20.0)
            number += 1

    world = lived(ARTICLE, lambda model, now: "", load, seed)
    mine = [one for one in world.exchanges.values() if one.asker.user == "who has keys"]
    return {"storm": "keys", "keys": count, "asked": len(mine), "answered": sum(one.status == 200 for one in mine)}


def main() -> None:
    """All of them, and what they showed."""
    for figures in (
        *(flapping(per_s, 1, everything=everything) for everything in (False, True) for per_s in (2.0, 10.0, 50.0)),
        throttled(10.0, 1),
        *(outage(50.0, seed) for seed in (1, 2)),
        outage(50.0, 1, models=(SONNET, HAIKU, OPUS)),
        outage(50.0, 1, fault="5xx"),
        outage(50.0, 1, fault="reset"),
        *(crowding(1, own_limits=own_limits) for own_limits in (True, False)),
        *(keys(1, count) for count in (1, 10)),
    ):
        print(json.dumps(figures), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
