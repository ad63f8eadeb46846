"""Measures what prompt caching and money take of the CPU of a request, part by part, without sockets or a ledger.

python bench/turn_costs.py [--calls 20000]

Of each part the median of a round of calls, and of those the lowest: a machine that others use only adds to it.
Run it with the Python that runs Headgate. Microseconds; what the timer itself takes (0.1) is taken off.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Collection
from itertools import pairwise

from bodies import make_body
from gateways import MODEL

from headgate.gateway.guards import AlertSink, SpendGuard, velocity_policy
from headgate.gateway.policies import policies
from headgate.gateway.prompt_caching import PromptCaching
from headgate.gateway.purse import Purse, Purses
from headgate.gateway.settings import Settings
from headgate.policy.budgets import Budgets, Spent
from headgate.policy.forecast import Forecaster
from headgate.policy.records import Plan, Principal
from headgate.policy.token_estimate import input_tokens, script
from headgate.storage.money import LocalMoney
from headgate.wire.catalog import packaged
from headgate.wire.message import scan
from headgate.wire.usage import Usage

ROUND = 2_000
PEOPLE = 50
NOW_NS = 1_789_000_000 * 10**9
HEADERS = b"content-type: application/json\r\nanthropic-version: 2023-06-01\r\nuser-agent: app/1.0\r\n"


async def unread(_ids: Collection[str], at_ns: int) -> Spent:
    return Spent(at_ns, {})


async def measure(name: str, calls: int) -> list[tuple[str, float]]:
    """Microseconds of each part for one kind of body."""
    settings, catalog = Settings.model_validate({"data_dir": "."}), packaged()
    rules = policies(settings, catalog).budgets
    caching = PromptCaching(settings.cache, catalog, clock=time.monotonic, now_ns=time.time_ns)
    velocity = settings.velocity
    guard = SpendGuard(
        velocity_policy(
            usd_per_10_min=velocity.usd_per_10_min, history_factor=velocity.history_factor, hold_s=velocity.hold_s
        ),
        AlertSink(None, now_ns=time.time_ns),
        clock=time.monotonic,
    )
    money = LocalMoney(Budgets(), clock=time.monotonic, now_ns=time.time_ns, read=unread)
    purses, forecaster = Purses(money, guard, catalog), Forecaster()
    principal = Principal("k1", "someone", tier="free")
    template = make_body(name)
    number_at = template.index(b"0" * 12)
    parts: dict[str, list[int]] = {}
    best: dict[str, float] = {}
    clock = time.perf_counter_ns
    for at in range(calls):
        body = template[:number_at] + b"%012d" % at + template[number_at + 12 :]
        scanned, call_id, user = scan(body), f"call-{at}", f"person-{at % PEOPLE}"
        times = [clock()]
        tokens, written_in = input_tokens(scanned), script(scanned)
        times.append(clock())
        purse = Purse(purses, rules, principal, user=user, tier="free", call_id=call_id, at_ns=NOW_NS)
        times.append(clock())
        cached = caching.plan(
            scanned,
            principal,
            endpoint="chat",
            user=user,
            model=MODEL,
            arm="",
            at_ns=NOW_NS,
            header_lines=HEADERS,
        )
        caching.goes_ahead(cached, call_id, unread_wake)
        times.append(clock())
        plan = Plan((MODEL,), body, False, tokens, 1024, 0.0)
        paid = await purse.reserve(1, plan, cached.body, time.monotonic(), speed="standard")
        assert paid is cached.body
        times.append(clock())
        forecast = forecaster.forecast(MODEL, tokens, written_in, cached.prefixes, 1024, time.monotonic())
        times.append(clock())
        purse.watch((), cached.digest, expected_nanousd=0)
        times.append(clock())
        caching.sent(cached, call_id)
        is_marked = bool(cached.marks)
        usage = Usage(
            input_tokens=60 if is_marked else tokens,
            output_tokens=40,
            cache_read_tokens=(tokens - 60) * (is_marked and not cached.cold),
            cache_write_5m_tokens=(tokens - 60) * (is_marked and bool(cached.cold)),
        )
        caching.began(cached, model=MODEL, usage=usage, message_id="msg_1", diagnostics=b"")
        times.append(clock())
        forecaster.began(MODEL, forecast, usage, time.monotonic())
        times.append(clock())
        purse.settle(100_000)
        times.append(clock())
        caching.leave(cached, call_id)
        purse.close(0 if at % 100 else 1, sent=1)
        times.append(clock())
        money.tick(time.monotonic())
        names = (
            "estimate",
            "purse",
            "plan and lint",
            "reserve",
            "forecast",
            "watch",
            "began",
            "forecast began",
            "settle",
            "close",
        )
        for part, (one, other) in zip(names, pairwise(times), strict=True):
            parts.setdefault(part, []).append(other - one)
        if at % ROUND == ROUND - 1:
            for part, samples in parts.items():
                best[part] = min(best.get(part, float("inf")), statistics.median(samples))
                samples.clear()
    timer = statistics.median(-(clock() - clock()) for _ in range(ROUND))
    return [(part, max(ns - timer, 0.0) / 1_000) for part, ns in best.items()]


def unread_wake() -> None:
    raise AssertionError("nobody waits here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000, help="of each body (default: %(default)s)")
    calls = max(parser.parse_args().calls, ROUND)
    for name in ("small", "large"):
        figures = asyncio.run(measure(name, calls))
        print(f"{name}: {sum(us for _, us in figures):.1f} µs")
        for part, us in figures:
            print(f"  {part:16} {us:6.1f}")


if __name__ == "__main__":
    main()
