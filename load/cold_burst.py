"""200 people at once behind one shared prompt of 12,000 tokens that is in nobody's cache, many times a day.

    python -m load.cold_burst                          a day of twelve bursts, four times: 6 minutes
    python -m load.cold_burst --people 40 --pauses 0,30    a look in 20 seconds

Everybody asks one question of their own, half of them streamed. The same crowd asks four times: through Headgate as
installed; straight, with nothing marked; straight, with one mark on the whole system prompt; and with that mark through
Headgate, which then leaves the body alone but still lets one go ahead. The clocks of simulator and gateway are put
forward between bursts, so that a day takes minutes (`later.py`).

The ideal is arithmetic over the simulator's own token counts: the first of a burst writes the prefix where it is not
alive and everybody else reads it, and whoever writes it knows when the next burst comes, and so whether an hour pays.
Exit code: 0 every bar is met, 1 one is not, 2 it could not be run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from math import inf
from pathlib import Path
from typing import Any

from load.crowd import Heard, Line, ask_streamed, quantile, sdk_client
from load.later import new_clock, put_forward
from load.report import Bar, bars_text, percent, seconds, table
from load.stage import Place, Stage, StageError, ended_by_signals, get_json, within

MODEL = "claude-sonnet-4-6"
INPUT, WRITE_5M, WRITE_1H, READ, OUTPUT = 3_000, 3_750, 6_000, 300, 15_000
"""Nano-dollars a token: Claude Sonnet 4.6 since March 2026 (platform.claude.com, pricing). Written down here so that
the ideal shares nothing with the gateway's catalogue."""
TTL_S = {"5m": 300.0, "1h": 3_600.0}
WRITES_MAX = 2
OVER_IDEAL_MAX = 0.03
PAUSES_MIN = (0, 3, 20, 4, 45, 90, 2, 10, 240, 30, 55, 120)
"""Minutes before each burst: within five minutes, within an hour, and longer."""
RULES = (
    "Answer in one short paragraph, kindly, and never invent a price, a date or a name. ",
    "A parcel that is three days late is apologised for and handed to the shipping desk the same hour. ",
    "Invoices go out by mail within two working days after the payment was booked. ",
    "A trial account keeps a thousand customers and three seats for fourteen days. ",
    "Whoever asks for a refund is told the thirty day rule before anything else. ",
    "Passwords are changed under settings once the phone number has been confirmed. ",
)
WAYS = ("headgate", "plain", "one mark", "one mark, headgate")


@dataclass(frozen=True)
class Day:
    """What is asked, and when."""

    people: int = 200
    tokens: int = 12_000
    """Of the shared prompt."""
    answer_tokens: int = 120
    pauses_min: tuple[float, ...] = PAUSES_MIN
    speed: float = 1.0
    """Of the simulator's answers; its cache lives as long as always."""

    def prompt(self) -> str:
        """The shared system prompt: 4.3 characters a token of English prose."""
        rules = "".join(f"Rule {number}. {RULES[number % len(RULES)]}" for number in range(self.tokens // 10))
        return rules[: round(self.tokens * 4.3)]

    def body(self, prompt: str, burst: int, number: int, *, marked: bool) -> dict[str, Any]:
        """One person's request."""
        system: Any = prompt
        if marked:
            system = [{"type": "text", "text": prompt, "cache_control": {"type": "ephemeral"}}]
        question = f"[{number}] When does order {burst}-{number:04} arrive? [[sim: tokens={self.answer_tokens}]]"
        return {
            "model": MODEL,
            "max_tokens": 1024,
            "system": system,
            "messages": [{"role": "user", "content": question}],
        }


@dataclass(frozen=True)
class Billed:
    """One request as the simulator billed it."""

    input_tokens: int
    read_tokens: int
    write_tokens: int
    output_tokens: int
    cost_nanousd: int

    @property
    def prompt_tokens(self) -> int:
        """Cached or not."""
        return self.input_tokens + self.read_tokens + self.write_tokens


@dataclass
class Burst:
    """One crowd at once."""

    at_s: float
    """Of the day's clock."""
    heard: list[Heard]
    billed: list[Billed]
    took_s: float

    def writes(self, prefix_tokens: int) -> int:
        """Requests that wrote the shared prefix."""
        return sum(one.write_tokens > prefix_tokens // 2 for one in self.billed)


@dataclass
class Outcome:
    """A day by one way."""

    way: str
    bursts: list[Burst] = field(default_factory=list)
    ledger_nanousd: int | None = None

    def cost_nanousd(self) -> int:
        """The simulator's bill."""
        return sum(one.cost_nanousd for burst in self.bursts for one in burst.billed)

    def answered(self) -> int:
        """Whole answers."""
        return sum(one.whole for burst in self.bursts for one in burst.heard)

    def errors(self) -> Counter[str]:
        """What came instead."""
        return Counter(one.error for burst in self.bursts for one in burst.heard if not one.whole)

    def writes_max(self, prefix_tokens: int) -> int:
        """Of any one burst."""
        return max(burst.writes(prefix_tokens) for burst in self.bursts)


def ideal_nanousd(bursts: Sequence[Burst], prefix_tokens: int) -> int:
    """The least that these requests can cost: each burst writes at most once, with the TTL that later bursts make best.

    `prefix_tokens` are those of the shared prefix, as the simulator counts them in its cache.
    """
    moments = [burst.at_s for burst in bursts]
    counts = [len(burst.billed) for burst in bursts]

    @cache
    def from_here(at: int, ttl_s: float) -> int:
        """Of the prefix alone; `ttl_s` of the entry that the burst before left, 0 for none."""
        if at == len(moments):
            return 0
        if at and ttl_s and moments[at] - moments[at - 1] < ttl_s:
            return counts[at] * READ * prefix_tokens + from_here(at + 1, ttl_s)
        rest = (counts[at] - 1) * READ
        return min(
            (WRITE_5M + rest) * prefix_tokens + from_here(at + 1, TTL_S["5m"]),
            (WRITE_1H + rest) * prefix_tokens + from_here(at + 1, TTL_S["1h"]),
            counts[at] * INPUT * prefix_tokens + from_here(at + 1, 0.0),
        )

    beside = sum(
        (one.prompt_tokens - prefix_tokens) * INPUT + one.output_tokens * OUTPUT
        for burst in bursts
        for one in burst.billed
    )
    return beside + from_here(0, 0.0)


def gateway_settings() -> dict[str, str]:
    """As installed, but for limits that let the crowd pass: what is measured is the cache."""
    return {"PACING__RPM": "100000", "PACING__ITPM": "100000000", "PACING__OTPM": "100000000"}


def prefix_of(simulator_url: str, day: Day) -> int:
    """Tokens of the shared prefix by the simulator's own count."""
    body = day.body(day.prompt(), 0, 0, marked=False)
    body.pop("max_tokens")
    whole = _counted(simulator_url, body)
    return whole - _counted(simulator_url, {name: value for name, value in body.items() if name != "system"})


def _counted(simulator_url: str, body: Mapping[str, Any]) -> int:
    headers = {"anthropic-version": "2023-06-01"}
    url = f"{simulator_url}/v1/messages/count_tokens"
    tokens: int = get_json(url, data=body, key="any", headers=headers)["input_tokens"]
    return tokens


async def spend(day: Day, way: str, place: Place, clock: Path, *, tell: bool = False) -> Outcome:
    """The day, by one way."""
    outcome, prompt, now_s = Outcome(way), day.prompt(), 0.0
    marked = way.startswith("one mark")
    for number, pause_min in enumerate(day.pauses_min):
        put_forward(clock, pause_min * 60)
        now_s += pause_min * 60
        if place.operator_url:
            # It finds its list of keys a day old, as a machine does that has slept, and reads it within a second.
            await asyncio.to_thread(within, 10.0, partial(_is_awake, place), "the gateway to know its keys again")
        since: int = (await asyncio.to_thread(get_json, f"{place.simulator_url}/sim/requests?limit=0"))["count"]
        bodies = [day.body(prompt, number, person, marked=marked) for person in range(day.people)]
        began_at = time.monotonic()
        heard = await _burst(place, bodies, headgate="headgate" in way)
        took_s = time.monotonic() - began_at
        burst = Burst(now_s, heard, await asyncio.to_thread(_billed, place.simulator_url, since), took_s)
        now_s += took_s
        outcome.bursts.append(burst)
        if tell:
            wrote = sum(one.write_tokens > day.tokens // 2 for one in burst.billed)
            print(f"{way}: burst {number + 1}, {wrote} writes, {seconds(took_s)}", file=sys.stderr, flush=True)
    if place.operator_url:
        outcome.ledger_nanousd = await asyncio.to_thread(_ledger, place, outcome.cost_nanousd())
    return outcome


async def _burst(place: Place, bodies: Sequence[dict[str, Any]], *, headgate: bool) -> list[Heard]:
    line = Line(place.url, place.key)
    async with sdk_client(place.url, place.key) as client:

        async def person(number: int, body: dict[str, Any]) -> Heard:
            headers = {"x-headgate-user": f"person-{number}"} if headgate else None
            if number % 2:
                return await ask_streamed(client, body, user=f"person-{number}", number=number, headers=headers)
            return await line.ask(body, user=f"person-{number}", number=number, headers=headers)

        try:
            return list(await asyncio.gather(*(person(number, body) for number, body in enumerate(bodies))))
        finally:
            line.close()


def _billed(simulator_url: str, since: int) -> list[Billed]:
    found = get_json(f"{simulator_url}/sim/requests?since={since}&limit=10000&body=0")["requests"]
    billed = []
    for one in found:
        if one["path"] == "/v1/messages" and one["usage"]:
            usage = one["usage"]
            write = usage["write_5m_tokens"] + usage["write_1h_tokens"]
            billed.append(
                Billed(usage["input_tokens"], usage["read_tokens"], write, usage["output_tokens"], one["cost_nanousd"])
            )
    return billed


def _is_awake(place: Place) -> bool:
    headers = {"x-api-key": place.key, "anthropic-version": "2023-06-01"}
    request = urllib.request.Request(f"{place.url}/v1/models", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except urllib.error.HTTPError:
        return False


def _ledger(place: Place, billed_nanousd: int) -> int:
    """The gateway's own bill. Its writer folds the journal into what is read within a second: it is given five."""
    give_up_at, cost = time.monotonic() + 5.0, -1
    while cost != billed_nanousd and time.monotonic() < give_up_at:
        time.sleep(0.05)
        usage = get_json(f"{place.operator_url}/admin/usage?group_by=model&since=48h", key=place.key)
        cost = usage["total"]["cost_nanousd"]
    return cost


def run(day: Day, ways: Sequence[str], *, logs: Path | None = None, tell: bool = False) -> tuple[list[Outcome], int]:
    """Each way with programs of its own, and the shared prefix's tokens."""
    outcomes, prefix_tokens = [], 0
    with tempfile.TemporaryDirectory(prefix="headgate-clock-") as folder:
        for way in ways:
            clock = new_clock(Path(folder) / way.replace(" ", "-"))
            with Stage(logs, run=("-m", "load.later", str(clock))) as stage:
                url = stage.simulator(["--tier", "none", "--speed", f"{day.speed:g}"])
                place = stage.gateway(url, gateway_settings()) if "headgate" in way else Place(url, url)
                prefix_tokens = prefix_of(url, day)
                outcomes.append(asyncio.run(spend(day, way, place, clock, tell=tell)))
    return outcomes, prefix_tokens


# the report


def bars(day: Day, outcome: Outcome, prefix_tokens: int) -> list[Bar]:
    """What the day through Headgate has to reach."""
    asked = day.people * len(day.pauses_min)
    writes = outcome.writes_max(prefix_tokens)
    ideal = ideal_nanousd(outcome.bursts, prefix_tokens)
    over = outcome.cost_nanousd() / ideal - 1
    ledger = (outcome.ledger_nanousd or 0) - outcome.cost_nanousd()
    return [
        Bar("answered", f"{asked}", f"{outcome.answered()}", outcome.answered() == asked),
        Bar("writes of the prefix in any burst", f"at most {WRITES_MAX}", f"{writes}", writes <= WRITES_MAX),
        Bar("the day's bill over the ideal", f"at most {percent(OVER_IDEAL_MAX)}", percent(over, 2), over <= 0.03),
        Bar("the ledger beside the simulator's bill", "the same", f"{ledger} nano-dollars off", ledger == 0),
    ]


def report_text(day: Day, outcomes: Sequence[Outcome], prefix_tokens: int) -> str:
    """For people."""
    pauses = ", ".join(f"{pause:g}" for pause in day.pauses_min)
    ideal = ideal_nanousd(outcomes[0].bursts, prefix_tokens)

    def latest(outcome: Outcome, share: float) -> str:
        heard = [one for burst in outcome.bursts for one in burst.heard if one.first_text_s is not None]
        return seconds(quantile([one.first_text_s or inf for one in heard], share))

    def waits(outcome: Outcome) -> str:
        found = [one.queue_ms / 1000 for burst in outcome.bursts for one in burst.heard if one.queue_ms is not None]
        return seconds(max(found, default=None))

    rows: list[list[str]] = [
        ["", *(one.way for one in outcomes), "ideal"],
        ["answered", *(f"{one.answered()}" for one in outcomes), ""],
        ["writes of the prefix", *(_total(one, prefix_tokens) for one in outcomes), ""],
        ["  most in a burst", *(f"{one.writes_max(prefix_tokens)}" for one in outcomes), ""],
        ["tokens written", *(_tokens(one, "write_tokens") for one in outcomes), ""],
        ["tokens read", *(_tokens(one, "read_tokens") for one in outcomes), ""],
        ["tokens at the full price", *(_tokens(one, "input_tokens") for one in outcomes), ""],
        ["first word (streamed), p50", *(latest(one, 0.5) for one in outcomes), ""],
        ["  latest", *(latest(one, 1.0) for one in outcomes), ""],
        ["longest wait in the gateway", *(waits(one) for one in outcomes), ""],
        ["bill", *(f"${one.cost_nanousd() / 1e9:.4f}" for one in outcomes), f"${ideal / 1e9:.4f}"],
        ["  over the ideal", *(percent(one.cost_nanousd() / ideal - 1) for one in outcomes), ""],
    ]
    lines = [
        f"{day.people} people at once behind one prompt of {prefix_tokens:,} tokens, {len(day.pauses_min)} times; "
        f"minutes before each: {pauses}.",
        "",
        table(rows),
    ]
    for one in outcomes:
        if one.errors():
            lines += ["", f"Errors by {one.way}: {dict(one.errors())}"]
    lines += ["", *(bars_text(bars(day, one, prefix_tokens)) for one in outcomes if one.way == "headgate")]
    return "\n".join(lines)


def _total(outcome: Outcome, prefix_tokens: int) -> str:
    return str(sum(burst.writes(prefix_tokens) for burst in outcome.bursts))


def _tokens(outcome: Outcome, name: str) -> str:
    return f"{sum(getattr(one, name) for burst in outcome.bursts for one in burst.billed):,}"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load.cold_burst", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    day = Day()
    add = parser.add_argument
    add("--people", type=int, default=day.people, help="at once (default: %(default)s)")
    add("--tokens", type=int, default=day.tokens, help="of the shared prompt (default: %(default)s)")
    add("--pauses", default=",".join(map(str, day.pauses_min)), help="minutes before each burst (default: %(default)s)")
    add("--speed", type=float, default=day.speed, help="of the simulator's answers (default: %(default)g)")
    add("--ways", default=";".join(WAYS), help="which of them, by semicolons (default: all)")
    add("--logs", type=Path, metavar="FOLDER", help="where the programs' logs are kept")
    add("--json", action="store_true", help="figures instead of a report")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    pauses = tuple(float(pause) for pause in options.pauses.split(","))
    day = Day(people=options.people, tokens=options.tokens, pauses_min=pauses, speed=options.speed)
    try:
        with ended_by_signals():
            outcomes, prefix_tokens = run(day, options.ways.split(";"), logs=options.logs, tell=not options.json)
    except StageError as error:
        print(f"cold_burst: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if options.json:
        told = [
            {
                "way": one.way,
                "answered": one.answered(),
                "writes": [burst.writes(prefix_tokens) for burst in one.bursts],
                "cost_nanousd": one.cost_nanousd(),
                "ideal_nanousd": ideal_nanousd(one.bursts, prefix_tokens),
                "ledger_nanousd": one.ledger_nanousd,
                "errors": dict(one.errors()),
            }
            for one in outcomes
        ]
        print(json.dumps({"day": asdict(day), "prefix_tokens": prefix_tokens, "runs": told}))
    else:
        print(report_text(day, outcomes, prefix_tokens))
    mine = [bar for one in outcomes if one.way == "headgate" for bar in bars(day, one, prefix_tokens)]
    return 0 if all(bar.met for bar in mine) else 1


if __name__ == "__main__":
    sys.exit(main())
