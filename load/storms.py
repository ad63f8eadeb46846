"""Storms: an outage of every model under steady load, one person who asks a thousand times, one person with ten keys.

    python -m load.storms                  all of them, four minutes
    python -m load.storms outage           one of: outage, crowding, keys
    python -m load.storms --short          in half a minute each, for a look

Exit code: 0 every bar is met, 1 one is not, 2 it could not be run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from load.crowd import Heard, Line, at, most_within, quantile
from load.report import Bar, bars_text, seconds
from load.stage import Place, Stage, StageError, ended_by_signals, get_json
from load.witness import Arrival, arrivals, attempts_of_each

MODEL = "claude-sonnet-4-6"
ATTEMPTS_RATIO, ATTEMPTS_START = 1.2, 10
"""A retry budget: so many attempts a request, and so many once."""
ATTEMPTS_MAX = 3
ARRIVALS_RATIO_MAX = 1.5
RECOVERED_WITHIN_S = 30.0
WAIT_P95_S_MAX = 3.0
KEYS_GAIN_MAX = 1.05
"""What ten keys may get of what one key gets: the same, but for the request that is just being answered."""
WINDOW_S = 5.0
UNLIMITED_TIER = "unlimited"
CROWDED_RPM = 600


@dataclass
class Finding:
    """What a storm showed."""

    name: str
    text: list[str]
    figures: dict[str, Any]
    bars: list[Bar]


def body_of(number: int) -> dict[str, Any]:
    """A short question. Its number tells whose attempt a call is."""
    content = f"[{number}] Đơn hàng của tôi bao giờ thì giao tới?"
    return {"model": MODEL, "max_tokens": 64, "messages": [{"role": "user", "content": content}]}


# an outage of everything


@dataclass(frozen=True)
class OutageStorm:
    """Steady load; for a while every call is answered 529, whatever the model."""

    rate_per_s: float = 50.0
    steady_s: float = 30.0
    """The gateway must have seen the load for ten seconds to know what steady is."""
    outage_s: float = 60.0
    after_s: float = 60.0
    breaker_open_s: float = 10.0
    people: int = 1_000

    def simulator_options(self) -> list[str]:
        """Limits above the load by a third, answers of 0.15 s."""
        rpm = round(self.rate_per_s * 80)
        return ["--tier", "tier4", "--rpm", str(rpm), "--ttft-s", "0.1", "--otps", "400", "--answer-tokens", "20"]

    def gateway_settings(self) -> dict[str, str]:
        """As it is installed, but for the limits."""
        settings = {"PACING__TIER": "tier4", "PACING__RPM": str(round(self.rate_per_s * 80))}
        if self.breaker_open_s != 10:
            settings |= {
                "BREAKER__OPEN_S": f"{self.breaker_open_s:g}",
                "BREAKER__OPEN_S_MAX": f"{12 * self.breaker_open_s:g}",
            }
        return settings


@dataclass
class OutageFinding:
    """Figures of one run."""

    storm: OutageStorm
    heard: list[Heard]
    calls: list[Arrival]
    begin: float
    end: float
    """Of the outage, monotonic seconds."""
    breakers: list[dict[str, Any]] = field(default_factory=list)

    def requests_in_outage(self) -> int:
        """Asked while it lasted."""
        return sum(self.begin <= one.asked_at < self.end for one in self.heard)

    def attempts_in_outage(self) -> int:
        """That reached the simulator while it lasted."""
        return sum(self.begin <= call.received_at < self.end for call in self.calls)

    def attempts_max(self) -> int:
        """Of any request, in the whole run."""
        return max(attempts_of_each(self.calls).values(), default=0)

    def steady_p95_s(self) -> float:
        """Before the outage, without the first two seconds, in which connections are made."""
        start = min(one.asked_at for one in self.heard) + 2
        return self._p95(start, self.begin)

    def recovered_after_s(self) -> float:
        """From the end of the outage until p95 stays normal: at most half as much again, or 0.1 s more. Who is not
        answered waits for ever.
        """
        normal = max(1.5 * self.steady_p95_s(), self.steady_p95_s() + 0.1)
        last = max(one.asked_at for one in self.heard)
        recovered_s, since = math.inf, self.end
        while since + WINDOW_S <= last + 0.1:
            if self._p95(since, since + WINDOW_S) <= normal:
                recovered_s = min(recovered_s, since - self.end)
            else:
                recovered_s = math.inf
            since += WINDOW_S / 5
        return recovered_s

    def arrivals_peak(self) -> int:
        """The most calls in any second after the outage."""
        return most_within([call.received_at for call in self.calls if call.received_at >= self.end], 1.0)

    def asked_peak(self) -> int:
        """The most questions in any second after it, which is what the machine made of an even load."""
        return most_within([one.asked_at for one in self.heard if one.asked_at >= self.end], 1.0)

    def bars(self) -> list[Bar]:
        """Of the issue."""
        requests, attempts = self.requests_in_outage(), self.attempts_in_outage()
        allowed = ATTEMPTS_RATIO * requests + ATTEMPTS_START
        peak_allowed = ARRIVALS_RATIO_MAX * self.storm.rate_per_s
        recovered_s = self.recovered_after_s()
        return [
            Bar(
                "attempts during the outage",
                f"at most {allowed:.0f}, {ATTEMPTS_RATIO} of the requests and {ATTEMPTS_START}",
                f"{attempts} for {requests} requests",
                attempts <= allowed,
            ),
            Bar(
                "attempts of any request", f"at most {ATTEMPTS_MAX}", f"{self.attempts_max()}", self.attempts_max() <= 3
            ),
            Bar(
                "p95 back to normal after the outage",
                f"within {RECOVERED_WITHIN_S:g} s",
                "never" if math.isinf(recovered_s) else seconds(recovered_s),
                recovered_s <= RECOVERED_WITHIN_S,
            ),
            Bar(
                "calls in any second after the outage",
                f"at most {peak_allowed:g}, {ARRIVALS_RATIO_MAX} of steady",
                f"{self.arrivals_peak()} ({self.asked_peak()} questions)",
                self.arrivals_peak() <= peak_allowed,
            ),
        ]

    def finding(self) -> Finding:
        """For a report."""
        spans = [
            ("before", -math.inf, self.begin),
            ("outage", self.begin, self.end),
            ("after", self.end, math.inf),
        ]
        text = [
            f"{self.storm.rate_per_s:g} requests a second; for {self.storm.outage_s:g} s every model answers 529.",
        ]
        figures: dict[str, Any] = {}
        for name, since, until in spans:
            heard = [one for one in self.heard if since <= one.asked_at < until]
            told = Counter("answered" if one.whole else one.error for one in heard)
            calls = sum(since <= call.received_at < until for call in self.calls)
            p95_s, slowest_s = (quantile([one.total_s for one in heard], share) for share in (0.95, 1.0))
            text.append(
                f"{name}: {len(heard)} requests, {calls} calls; {_counted(told)}; "
                f"p95 {seconds(p95_s)}, slowest {seconds(slowest_s)}"
            )
            figures[name] = {"requests": len(heard), "calls": calls, "told": dict(told), "p95_s": _finite(p95_s)}
        every = range(0, math.ceil(self.storm.after_s), 5)
        after = [self._p95(self.end + since, self.end + since + WINDOW_S) for since in every]
        text.append("p95 after it, each 5 s: " + " ".join("fails" if math.isinf(s) else f"{s:.2f}" for s in after))
        figures |= {
            "steady_p95_s": _finite(self.steady_p95_s()),
            "recovered_after_s": _finite(self.recovered_after_s()),
            "arrivals_peak": self.arrivals_peak(),
            "asked_peak": self.asked_peak(),
            "attempts_max": self.attempts_max(),
            "breakers": self.breakers,
        }
        text += [f"breaker of {b['model']}: {b['state']}, {b['transitions']} transitions" for b in self.breakers]
        return Finding("outage", text, figures, self.bars())

    def _p95(self, since: float, until: float) -> float:
        waits = [one.total_s if one.whole else math.inf for one in self.heard if since <= one.asked_at < until]
        found = quantile(waits, 0.95)
        return math.inf if found is None else found


async def outage_storm(storm: OutageStorm, place: Place) -> OutageFinding:
    """Run it. The questions come at even moments: what is uneven at the simulator was made on the way."""
    heard: list[Heard] = []
    started_at = time.monotonic() + 0.5
    begin, end = started_at + storm.steady_s, started_at + storm.steady_s + storm.outage_s
    count = round((storm.steady_s + storm.outage_s + storm.after_s) * storm.rate_per_s)

    async def order() -> tuple[float, float]:
        await at(begin)
        await asyncio.to_thread(get_json, f"{place.simulator_url}/sim/faults", data={"outage": {"kind": "529"}})
        began = time.monotonic()
        await at(end)
        ends = time.monotonic()
        await asyncio.to_thread(get_json, f"{place.simulator_url}/sim/faults/outages", method="DELETE")
        return began, ends

    with closing(Line(place.url, place.key)) as line:

        async def question(number: int) -> None:
            user = f"person-{number % storm.people}"
            headers = {"x-headgate-user": user, "x-headgate-tier": "paid"}
            heard.append(await line.ask(body_of(number), user=user, number=number, headers=headers))

        async with asyncio.TaskGroup() as group:
            ordered = group.create_task(order())
            for number in range(count):
                await at(started_at + number / storm.rate_per_s)
                group.create_task(question(number))
    calls = await asyncio.to_thread(arrivals, place.simulator_url, bodies=True)
    view = await asyncio.to_thread(get_json, f"{place.operator_url}/admin/limits", key=place.key)
    began, ended = ordered.result()
    return OutageFinding(storm, heard, calls, began, ended, view["breakers"])


# one person crowds the others


@dataclass(frozen=True)
class Crowding:
    """One person asks a thousand times at once; twenty others ask now and then."""

    requests: int = 1_000
    others: int = 20
    every_s: float = 5.0
    for_s: float = 60.0
    rpm: int = CROWDED_RPM
    own_limits: bool = True
    """Whether people have the limits of the free tier. Without them only the order of the queue protects."""

    @property
    def tier(self) -> str:
        """Of everybody."""
        return "free" if self.own_limits else UNLIMITED_TIER


def crowded_simulator_options(rpm: int) -> list[str]:
    """Answers of 0.2 s, so many requests a minute."""
    return ["--tier", "tier4", "--rpm", str(rpm), "--ttft-s", "0.15", "--otps", "400", "--answer-tokens", "20"]


def crowded_gateway_settings(rpm: int) -> dict[str, str]:
    """Everybody may wait for as long as it takes: what is tried is the order, not the deadline. One tier's people are
    held by nothing of their own.
    """
    return {
        "PACING__TIER": "tier4",
        "PACING__RPM": str(rpm),
        "QUEUE__DEADLINE_S": "600",
        "QUEUE__WAITING_MAX": "5000",
        f"TIERS__{UNLIMITED_TIER.upper()}__RPM": "1000000",
        f"TIERS__{UNLIMITED_TIER.upper()}__WAITING_MAX": "5000",
    }


@dataclass
class CrowdingFinding:
    """Figures of one run."""

    crowding: Crowding
    greedy: list[Heard]
    """Of the one person, as far as they were told by the end."""
    others: list[Heard]

    def waits_s(self) -> list[float]:
        """Of the others, in the queue. Who was not answered waits for ever."""
        return [(one.queue_ms or 0) / 1000 if one.whole else math.inf for one in self.others]

    def bars(self) -> list[Bar]:
        """Of the issue."""
        p95_s = quantile(self.waits_s(), 0.95)
        assert p95_s is not None
        value = "some are not answered" if math.isinf(p95_s) else seconds(p95_s)
        what = f"p95 wait of the {self.crowding.others} others"
        return [Bar(what, f"at most {WAIT_P95_S_MAX:g} s", value, p95_s <= WAIT_P95_S_MAX)]

    def finding(self) -> Finding:
        """For a report."""
        told = {name: Counter("answered" if one.whole else one.error for one in heard) for name, heard in self._both()}
        served = sum(one.whole for one in self.greedy)
        waits = self.waits_s()
        held = "the limits of the free tier" if self.crowding.own_limits else "no limits of their own"
        text = [
            f"One person asks {self.crowding.requests} times at once, {self.crowding.others} others once each "
            f"{self.crowding.every_s:g} s, for {self.crowding.for_s:g} s; {self.crowding.rpm} a minute; {held}.",
            f"the one: {served} answered in that time; {_counted(told['the one']) or 'told nothing yet'}",
            f"the others: {_counted(told['the others'])}; wait p50 {seconds(quantile(waits, 0.5))}, "
            f"p95 {seconds(quantile(waits, 0.95))}, longest {seconds(max(waits, default=None))}; "
            f"whole answer p95 {seconds(quantile([one.total_s for one in self.others], 0.95))}",
        ]
        figures = {
            "own_limits": self.crowding.own_limits,
            "greedy_answered": served,
            "told": {name: dict(counts) for name, counts in told.items()},
            "wait_s": {
                name: _finite(quantile(waits, share)) for name, share in (("p50", 0.5), ("p95", 0.95), ("max", 1))
            },
        }
        return Finding(
            "crowding" if self.crowding.own_limits else "crowding, no own limits", text, figures, self.bars()
        )

    def _both(self) -> list[tuple[str, list[Heard]]]:
        return [("the one", self.greedy), ("the others", self.others)]


async def crowding_storm(crowding: Crowding, place: Place) -> CrowdingFinding:
    """Run it. What the one person still waits for at the end is given up, as by a client that leaves."""
    greedy: list[Heard] = []
    others: list[Heard] = []
    started_at = time.monotonic() + 0.5

    with closing(Line(place.url, place.key)) as line:

        async def question(user: str, number: int, into: list[Heard]) -> None:
            headers = {"x-headgate-user": user, "x-headgate-tier": crowding.tier}
            into.append(await line.ask(body_of(number), user=user, number=number, headers=headers))

        async def steady(place_in_line: int) -> None:
            """One of the twenty; they do not ask at the same moments."""
            first_at = started_at + crowding.every_s * (place_in_line + 1) / crowding.others
            async with asyncio.TaskGroup() as mine:
                moment = first_at
                while moment < started_at + crowding.for_s:
                    await at(moment)
                    mine.create_task(question(f"other-{place_in_line}", 100_000 + place_in_line, others))
                    moment += crowding.every_s

        async with asyncio.TaskGroup() as group:
            await at(started_at)
            crowd = [group.create_task(question("greedy", number, greedy)) for number in range(crowding.requests)]
            async with asyncio.TaskGroup() as twenty:
                for place_in_line in range(crowding.others):
                    twenty.create_task(steady(place_in_line))
            for task in crowd:
                task.cancel()
    return CrowdingFinding(crowding, greedy, others)


# ten keys of one person


@dataclass(frozen=True)
class KeyStorm:
    """Two people ask as much as they can: one has one key, the other ten."""

    keys: int = 10
    requests: int = 300
    for_s: float = 20.0
    rpm: int = CROWDED_RPM
    own_limits: bool = True
    """Whether the keys are of the free tier, or of one without limits."""

    @property
    def tier(self) -> str:
        """Of all keys."""
        return "free" if self.own_limits else UNLIMITED_TIER


@dataclass
class KeyFinding:
    """Figures of one run."""

    storm: KeyStorm
    answered: dict[str, int]
    """By who asked."""

    def gain(self) -> float:
        """What many keys got, of what one got."""
        return self.answered["many keys"] / max(self.answered["one key"], 1)

    def bars(self) -> list[Bar]:
        """Of the issue. One answer more or less is chance."""
        many, one = self.answered["many keys"], self.answered["one key"]
        return [
            Bar(
                f"answers by {self.storm.keys} keys of one person",
                f"at most {KEYS_GAIN_MAX} of those by one key",
                f"{many} beside {one}",
                0 < many <= max(KEYS_GAIN_MAX * one, one + 1),
            )
        ]

    def finding(self) -> Finding:
        """For a report."""
        held = "the limits of the free tier" if self.storm.own_limits else "no limits of their own"
        text = [
            f"Two people ask {self.storm.requests} times at once for {self.storm.for_s:g} s, one with one key, "
            f"one with {self.storm.keys}; {self.storm.rpm} requests a minute; {held}."
        ]
        name = "keys" if self.storm.own_limits else "keys, no own limits"
        return Finding(name, text, {"answered": self.answered, "gain": self.gain()}, self.bars())


async def key_storm(storm: KeyStorm, place: Place, keys: dict[str, list[str]]) -> KeyFinding:
    """Run it. `keys` are those of "one key" and of "many keys"."""
    answered = dict.fromkeys(keys, 0)
    ends_at = time.monotonic() + 0.5 + storm.for_s

    async def question(line: Line, name: str, number: int) -> None:
        heard = await line.ask(body_of(number), user=name, number=number)
        if heard.whole and heard.ended_at <= ends_at:
            answered[name] += 1

    with ExitStack() as open_lines:
        lines = {
            name: [open_lines.enter_context(closing(Line(place.url, key))) for key in mine]
            for name, mine in keys.items()
        }
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(question(mine[number % len(mine)], name, number))
                for number in range(storm.requests)
                for name, mine in lines.items()
            ]
            await at(ends_at)
            for task in tasks:
                task.cancel()
    return KeyFinding(storm, answered)


def keys_of(storm: KeyStorm, make: Callable[..., str]) -> dict[str, list[str]]:
    """One key of one person, and several of another. `make(name, *options)` creates a key."""

    def made(name: str, owner: str) -> str:
        tier = storm.tier
        return make(f"{name}-{tier}", "--owner", f"{owner}-{tier}", "--tier", tier)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(made, "single", "owner-of-one")
        many = [pool.submit(made, f"several-{number}", "owner-of-many") for number in range(storm.keys)]
        return {"one key": [one.result()], "many keys": [key.result() for key in many]}


# the programs


def _outage(short: bool) -> list[Finding]:
    storm = OutageStorm(steady_s=12, outage_s=8, after_s=16, breaker_open_s=1) if short else OutageStorm()
    with Stage() as stage:
        place = stage.gateway(stage.simulator(storm.simulator_options()), storm.gateway_settings())
        return [asyncio.run(outage_storm(storm, place)).finding()]


def _crowding(short: bool) -> list[Finding]:
    with Stage() as stage:
        place = _crowded_place(stage)
        crowdings = [Crowding(for_s=15 if short else 60, own_limits=own_limits) for own_limits in (True, False)]
        return [asyncio.run(crowding_storm(crowding, place)).finding() for crowding in crowdings]


def _keys(short: bool) -> list[Finding]:
    findings = []
    with Stage() as stage:
        place = _crowded_place(stage)
        for own_limits in (True, False):
            storm = KeyStorm(for_s=8 if short else 20, own_limits=own_limits)
            keys = keys_of(storm, partial(stage.key, place))
            findings.append(asyncio.run(key_storm(storm, place, keys)).finding())
    return findings


def _crowded_place(stage: Stage) -> Place:
    simulator_url = stage.simulator(crowded_simulator_options(CROWDED_RPM))
    return stage.gateway(simulator_url, crowded_gateway_settings(CROWDED_RPM))


STORMS: dict[str, Callable[[bool], list[Finding]]] = {"outage": _outage, "crowding": _crowding, "keys": _keys}


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in counts.most_common())


def _finite(value: float | None) -> float | None:
    """JSON knows no infinity; null is what is never reached."""
    return None if value is None or math.isinf(value) else value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m load.storms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("storms", nargs="*", metavar="STORM", help=f"of {', '.join(STORMS)} (default: all)")
    parser.add_argument("--short", action="store_true", help="for a look, not for a record")
    parser.add_argument("--json", action="store_true", help="figures instead of a report")
    options = parser.parse_args(argv)
    unknown = [name for name in options.storms if name not in STORMS]
    if unknown:
        parser.error(f"there is no storm {unknown[0]!r}; there are {', '.join(STORMS)}")
    findings: list[Finding] = []
    try:
        with ended_by_signals():
            for name in options.storms or STORMS:
                for finding in STORMS[name](options.short):
                    findings.append(finding)
                    if not options.json:
                        print("\n".join([finding.name, *(f"  {line}" for line in finding.text)]))
                        print(bars_text(finding.bars), end="\n\n", flush=True)
    except StageError as error:
        print(f"storms: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False))
    return 0 if all(bar.met for finding in findings for bar in finding.bars) else 1


if __name__ == "__main__":
    sys.exit(main())
