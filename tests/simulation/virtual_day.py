"""A day of a gateway in seconds: rushes, outages, greedy people, poison, money that runs out, and scattered faults.

    python -m tests.simulation.virtual_day [--seed N] [--requests N]

Prints one JSON object: the digest of all ledger rows, sums, counts, and every law that was broken (`world.py`).
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from hashlib import sha256

from tests.simulation.world import USD_PER_MTOK, Asker, Books, JumpingLoop, World, bill

from headgate.gateway.settings import load_settings
from headgate.storage.tables import attempts as attempt_table
from headgate.storage.tables import calls as call_table

DAY_S = 86_400.0
FAULTS = {
    "429": 0.02,
    "ramp": 0.0005,
    "5xx": 0.03,
    "529": 0.01,
    "connect": 0.005,
    "reset": 0.005,
    "timeout": 0.002,
    "truncated": 0.008,
    "stall": 0.004,
    "malformed": 0.003,
    "error_first": 0.004,
    "error_later": 0.004,
    "spend_cap": 0.00005,
    "bad_request": 0.004,
    "refusal": 0.002,
}
RUSHES = 12
RUSH_S = 120.0
RUSH_SHARE = 0.4
"""Of the day's requests, in 24 minutes of it: twice and more of what Anthropic's limits let pass."""
SETTINGS = {"PACING__RPM": "300", "PACING__ITPM": "450000", "PACING__OTPM": "90000"}
PEOPLE = 200
GREEDY = 3
"""People who send a sixth of everything, much of it in bursts, and through ten keys each."""
BURST = 30
BURST_SHARE = 0.06


class Day(World):
    """The load, the weather, and the reckoning at the end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seed: int) -> None:
        super().__init__(loop, seed, load_settings(), self._fault)
        self._weather_dice = random.Random(seed + 3)
        self.rushes = [(number + 0.5) * DAY_S / RUSHES for number in range(RUSHES)]

    def _fault(self, model: str, now: float) -> str:
        """Outages in three of the rushes, and scattered faults always."""
        gone, all_gone, flaps = self.rushes[3] + 60, self.rushes[6] + 60, self.rushes[9]
        if gone <= now < gone + 600 and model == "claude-sonnet-4-6":
            return "529"
        if all_gone <= now < all_gone + 90:
            return "5xx" if model == "claude-haiku-4-5" else "529"
        if flaps <= now < flaps + 300 and model == "claude-sonnet-4-6" and (now - flaps) % 10 >= 5:
            return "529"
        roll = self._weather_dice.random()
        for fault, share in FAULTS.items():
            roll -= share
            if roll < 0:
                return fault
        return ""

    async def live(self, requests: int) -> None:
        """The whole day: requests at random times, some impatient."""
        dice = self.dice
        bursts = round(requests * BURST_SHARE / BURST)
        arrivals = [(dice.uniform(0, DAY_S), f"greedy_{number % GREEDY}") for number in range(bursts)] * BURST
        while len(arrivals) < requests:
            in_rush = dice.random() < RUSH_SHARE
            at = dice.choice(self.rushes) + dice.uniform(0, RUSH_S) if in_rush else dice.uniform(0, DAY_S)
            arrivals.append((at, ""))
        ticks = self.loop.create_task(self.tick())
        for at, greedy in sorted(arrivals):
            await asyncio.sleep(max(at - self.loop.time(), 0.0))
            self._arrive(greedy)
        await self.rest()
        ticks.cancel()

    def _arrive(self, greedy: str) -> None:
        dice = self.dice
        asker = Asker(greedy, key_id=f"key{dice.randrange(10):05d}") if greedy else self._asker()
        body: dict[str, object] = {
            "model": dice.choices(list(USD_PER_MTOK), [6, 3, 1])[0],
            "max_tokens": 1024,
            "messages": [{"role": "user", "content": "x" * dice.randint(10, 400)}],
            "prompt_tokens": dice.randint(50, 9_000),
        }
        if dice.random() < 0.7:
            body["stream"] = True
        rush = next((number for number, at in enumerate(self.rushes) if at <= self.clock() < at + RUSH_S), 1)
        if rush % 3 == 0:
            # Short questions and answers meet the limit on requests; else that on output, and with long prompts input.
            body |= {"prompt_tokens": dice.randint(50, 500), "answer_tokens": dice.randint(8, 80)}
        elif rush % 3 == 2:
            body |= {"prompt_tokens": dice.randint(4_000, 14_000), "answer_tokens": dice.randint(8, 200)}
        if dice.random() < 0.002:
            body = {"model": "claude-haiku-4-5", "max_tokens": 16, "messages": [], "prompt_tokens": 10, "poison": True}
        deadline_s = dice.choice([5.0, 20.0, 20.0, 20.0, 60.0])
        exchange = self.arrive(body, asker, deadline_s=deadline_s, named_by_app=asker.key_id == "key0app0")
        if dice.random() < 0.04:
            self.loop.call_later(dice.uniform(0.0, 8.0), exchange.leave)

    def _asker(self) -> Asker:
        """Free people, paying ones, background work, people of an app; some keys bound their calls at once."""
        dice = self.dice
        if dice.random() < 0.1:
            return Asker(f"greedy_{dice.randrange(GREEDY)}", key_id=f"key{dice.randrange(10):05d}")
        number = dice.randrange(PEOPLE)
        user = f"user_{number}"
        if number % 10 == 0:
            return Asker(user, "batch", f"key{number:05d}")
        if number % 10 == 1:
            return Asker(user, "free", f"key{number:05d}", concurrency=2)
        if number % 10 == 2:
            return Asker(user, "paid", "key0app0")
        return Asker(user, "paid" if number % 3 == 0 else "free", f"key{number:05d}")

    # the reckoning

    def report(self) -> dict:
        """Hold the ledger against the books, and sum up."""
        laws, tables = self.laws, self.tables
        calls = [dict(zip(call_table.columns.keys(), row, strict=True)) for row in tables.calls.values()]
        tried = [dict(zip(attempt_table.columns.keys(), row, strict=True)) for row in tables.attempts.values()]
        costs: Counter[str] = Counter()
        billed = estimated = estimated_true = fallbacks = 0
        for row in tried:
            key = row["call_id"], row["number"]
            books, usage = self.books.get(key, Books(row["model"])), json.loads(row["usage"])
            tokens = [usage.get(f"{kind}_tokens", 0) for kind in ("input", "cache_read", "cache_write_5m", "output")]
            own = bill(row["model"], *tokens)
            if row["state"] == "settled" and books.free:
                own = 0
            costs[row["call_id"]] += own
            laws.hold(row["model"] == books.model, "an attempt is charged to the model that was asked", row)
            laws.hold(row["cost_nanousd"] == own, "a cost is its tokens times their price", (row, own))
            laws.hold(row["state"] != "open", "every attempt has its one terminal state", row)
            laws.hold((row["state"] == "settled") <= books.final, "only a whole answer is settled", row)
            laws.hold(
                (row["state"] == "void") <= (books.free or not books.nanousd), "what was billed is never void", row
            )
            if row["state"] == "settled":
                billed += books.nanousd
                laws.hold(row["cost_nanousd"] == books.nanousd, "a settled attempt costs what Anthropic bills", row)
            elif row["state"] == "estimated":
                if books.began:
                    estimated += row["cost_nanousd"]
                    estimated_true += books.nanousd
                exact = [books.input, books.cache_read, books.write]
                laws.hold(not books.began or tokens[:3] == exact, "the input of a cut answer is exact", (row, exact))
        for call in calls:
            laws.hold(call["outcome"] is not None, "every call has an outcome", call)
            laws.hold(call["cost_nanousd"] == costs[call["call_id"]], "a call costs what its attempts cost", call)
            tries = self.exchanges[call["call_id"]].attempts
            if call["outcome"] == "completed":
                served = self.books[call["call_id"], tries].model
                laws.hold(call["model"] == served, "a call names the model that served", (call, served))
                fallbacks += served != self.exchanges[call["call_id"]].model
            laws.hold(self.lines[call["call_id"]] == 1, "every call leaves one log line", call)
            told = self.lines_nanousd[call["call_id"]]
            laws.hold(told == call["cost_nanousd"], "a log line costs what its call costs", (call, told))
            exchange = self.exchanges[call["call_id"]]
            left = exchange.gone and not exchange.streamed
            laws.hold(not left or call["outcome"] == "abandoned", "a call that nobody waited for is abandoned", call)
        laws.hold(set(tables.closed.values()) == {1}, "every call is closed once", tables.closed.most_common(3))
        laws.hold(tables.intents == tables.ended, "every intent ends once", len(tables.intents))
        laws.hold(set(self.books) == set(tables.intents), "the ledger has every attempt and no other", len(self.books))
        laws.hold(len(calls) == len(self.exchanges), "every request is a call", len(calls))
        laws.hold(tables.fold.contradictions == 0, "nobody contradicts an ending", tables.fold.contradictions)
        laws.hold(not tables.fold.open, "the fold lets go of what has ended", len(tables.fold.open))
        self.settled()
        rows = json.dumps([calls, tried], sort_keys=True).encode()
        return {
            "digest": sha256(rows).hexdigest(),
            "log_digest": self.log_digest.hexdigest(),
            "calls": len(calls),
            "attempts": len(tried),
            "left": self.left,
            "outcomes": dict(sorted(Counter(call["outcome"] for call in calls).items())),
            "states": dict(sorted(Counter(row["state"] for row in tried).items())),
            "statuses": dict(sorted(Counter(str(call["status"]) for call in calls).items())),
            "attempts_per_call": dict(sorted(Counter(str(n) for n in self._tries()).items())),
            "refused": dict(
                sorted(Counter(call["error_code"] for call in calls if call["outcome"] == "refused").items())
            ),
            "queued": sum(call["queue_ms"] > 0 for call in calls),
            "queue_ms_max": max(call["queue_ms"] for call in calls),
            "breaker_transitions": len(self.transitions),
            "served_by_fallback": fallbacks,
            "cost_nanousd": sum(call["cost_nanousd"] for call in calls),
            "own_sum_nanousd": sum(costs.values()),
            "settled_nanousd": billed,
            "cut_nanousd": estimated,
            "cut_true_nanousd": estimated_true,
            "broken": dict(laws.broken),
            "examples": laws.examples,
        }

    def _tries(self) -> list[int]:
        return [exchange.attempts for exchange in self.exchanges.values()]


def main() -> None:
    """Live one day and print its report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=50_000)
    options = parser.parse_args()
    os.environ.update({f"HEADGATE_{name}": value for name, value in SETTINGS.items()})
    began = time.process_time()
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        day = Day(runner.get_loop(), options.seed)
        runner.run(day.live(options.requests))
        report = day.report()
    print(json.dumps(report | {"cpu_s": round(time.process_time() - began, 1)}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
