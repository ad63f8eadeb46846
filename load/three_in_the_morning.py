"""The night of the article: 200 people at once, 50 more each minute, and Claude Sonnet gone for the middle third.

    python -m load.three_in_the_morning                      six minutes through Headgate
    python -m load.three_in_the_morning --direct             and six more: the same crowd by the article's own loop
    python -m load.three_in_the_morning --scale 0.2 --speedup 20    a look in 20 seconds

Each person asks one short question in Vietnamese behind 4,500 tokens of context, which nobody has marked for the cache,
and hears the answer streamed. The limits are the article's: 1,000 requests, 450,000 input and 90,000 output tokens a
minute. 5 % of the calls fail. Exit code: 0 every bar is met, 1 one is not, 2 it could not be run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from load.crowd import Heard, ask_streamed, at, quantile, sdk_client
from load.report import Bar, bars_text, percent, seconds, table
from load.stage import Place, Stage, StageError, ended_by_signals, get_json
from load.witness import Arrival, Watch, arrivals, count_of, tokens_within

SONNET, HAIKU = "claude-sonnet-4-6", "claude-haiku-4-5"
CLASSES = {SONNET: "sonnet-4", HAIKU: "haiku-4-5"}
SIMULATOR_NAMES = {"sonnet-4": (SONNET,), "haiku-4-5": (HAIKU, "claude-haiku-4-5-20251001")}
FAULT_KINDS = ("529", "500", "reset", "cut", "429")
"""In equal parts. A reset comes before any byte of an answer; a cut within `message_start`, before the first word."""
CUT_AT_BYTE = 300
LIMITED_SHARE_MAX = 0.005
USED_SHARE_MIN = 0.9
DRAIN_TOKENS = 180_000
"""Of one request that empties a bucket: what fits into the context of either model."""

Faults = Literal["dice", "spaced", "none"]

QUESTIONS = (
    "Làm sao để đổi mật khẩu tài khoản?",
    "Đơn hàng của tôi bao giờ thì giao tới?",
    "Tôi muốn xuất hóa đơn cho công ty thì làm thế nào?",
    "Gói dùng thử có giới hạn số khách hàng không?",
    "Vì sao tin nhắn gửi đi không thấy báo đã nhận?",
)
HANDBOOK = (
    "Nhân viên chăm sóc khách hàng trả lời ngắn gọn, thân thiện và không bao giờ bịa thông tin. ",
    "Khách hàng có thể đổi mật khẩu trong phần cài đặt tài khoản, sau khi xác nhận số điện thoại đã đăng ký. ",
    "Hóa đơn điện tử được gửi qua thư trong vòng hai ngày làm việc kể từ khi thanh toán thành công. ",
    "Gói dùng thử cho phép lưu tối đa một nghìn khách hàng và ba người dùng trong mười bốn ngày. ",
    "Nếu đơn hàng giao chậm quá ba ngày, hãy xin lỗi khách và chuyển yêu cầu tới bộ phận vận chuyển. ",
    "Tin nhắn gửi đi được lưu lại đầy đủ và có thể tìm theo tên khách, số điện thoại hoặc nội dung. ",
)


@dataclass(frozen=True)
class Night:
    """What happens in it. Rates are a minute of the night, which `speedup` makes shorter than one of the clock's."""

    people: int = 200
    """At once, at the start."""
    arrivals_per_min: float = 50.0
    minutes: float = 6.0
    context_tokens: int = 4_500
    rpm: int = 1_000
    itpm: int = 450_000
    otpm: int = 90_000
    speedup: float = 1.0
    """How many times faster than life all of it goes: arrivals, answers, limits, pauses."""
    fault_share: float = 0.05
    faults: Faults = "spaced"
    """`spaced`: every 20th call, unless it could be the failure after which nobody tries again: what comes out is the
    gateway's doing and not luck. `dice`: each call by itself, so that chance may strike one person three times.
    """
    seed: int = 1

    def scaled(self, scale: float) -> Night:
        """The same proportions for fewer people."""
        return replace(
            self,
            people=round(self.people * scale),
            arrivals_per_min=self.arrivals_per_min * scale,
            rpm=round(self.rpm * scale),
            itpm=round(self.itpm * scale),
            otpm=round(self.otpm * scale),
        )

    @property
    def plain(self) -> bool:
        """Whether the limits are the article's own, at their own pace."""
        return self.speedup == 1 and (self.rpm, self.itpm, self.otpm) == (1_000, 450_000, 90_000)

    @property
    def duration_s(self) -> float:
        """Of the clock's seconds."""
        return self.minutes * 60 / self.speedup

    @property
    def outage(self) -> tuple[float, float]:
        """When Sonnet is gone: seconds since the start."""
        return self.duration_s / 3, self.duration_s * 2 / 3

    @property
    def deadline_s(self) -> float:
        """How long somebody may wait in the queue.

        450,000 tokens a minute are 100 people a minute, so the last of 200 who come at once waits two minutes whatever
        the gateway does: with the default of 20 s most of them would rightly be turned away at the door. Twice that,
        and a minute for the outage. A fast run keeps some seconds for the machine.
        """
        crowd_min = self.people * self.context_tokens / self.itpm
        return max((2 * crowd_min + 1) * 60 / self.speedup, 20.0)

    def arrivals_s(self) -> list[float]:
        """When each person comes, in seconds since the start."""
        every_s = 60 / self.arrivals_per_min / self.speedup if self.arrivals_per_min else self.duration_s
        later = round(self.arrivals_per_min * self.minutes)
        return [0.0] * self.people + [(number + 0.5) * every_s for number in range(later)]

    def simulator_options(self) -> list[str]:
        """Of `headgate simulator`."""
        options = ["--tier", "tier2", "--speed", f"{self.speedup:g}", "--seed", str(self.seed)]
        if not self.plain:
            for name, limit in zip(("--rpm", "--itpm", "--otpm"), self.limits_per_min(), strict=True):
                options += [name, str(limit)]
        return options

    def gateway_settings(self) -> dict[str, str]:
        """As variables, without the prefix. At its own pace the gateway is as it is installed, with two settings."""
        settings = {"PACING__TIER": "tier2", "QUEUE__DEADLINE_S": f"{self.deadline_s:g}"}
        if not self.plain:
            for name, limit in zip(("RPM", "ITPM", "OTPM"), self.limits_per_min(), strict=True):
                settings[f"PACING__{name}"] = str(limit)
        if self.speedup != 1:
            settings |= {
                "PACING__BURST_S": f"{max(10 / self.speedup, 0.1):g}",
                "RETRY__BASE_DELAY_S": f"{1 / self.speedup:g}",
                "BREAKER__OPEN_S": f"{10 / self.speedup:g}",
                "BREAKER__OPEN_S_MAX": f"{120 / self.speedup:g}",
                "BREAKER__WINDOW_S": f"{30 / self.speedup:g}",
            }
        return settings

    def limits_per_min(self) -> tuple[int, int, int]:
        """RPM, ITPM, OTPM of the clock's minutes."""
        return tuple(round(limit * self.speedup) for limit in (self.rpm, self.itpm, self.otpm))  # type: ignore[return-value]


@dataclass
class Outcome:
    """One run: what people heard, and what the simulator saw of it."""

    way: str
    night: Night
    heard: list[Heard]
    calls: list[Arrival]
    took_s: float
    started_at: float
    demand_s: float | None = None
    """While somebody waited for a model that was up. Of a fast night, without its last third."""
    used_share: float | None = None
    """Of the input tokens that the limits would have let through in that time."""
    used_by_third: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of demand in each third of the night, over all models, and the share used in them."""
    waiting_max: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    """The gateway's own bill."""

    def answered(self) -> int:
        """People who heard a whole answer."""
        return sum(one.whole for one in self.heard)

    def errors(self) -> Counter[str]:
        """What the others heard, by kind."""
        return Counter(one.error for one in self.heard if not one.whole)

    def models(self) -> Counter[str]:
        """Who answered."""
        return Counter(one.model for one in self.heard if one.whole)

    def limited(self) -> int:
        """Calls that Anthropic's limits refused, those not counted that were ordered to fail so."""
        return sum(call.limited for call in self.calls)

    def limited_share(self) -> float:
        """Of all calls."""
        return self.limited() / max(len(self.calls), 1)

    def faulty(self) -> Counter[str]:
        """Calls that were made to fail, by kind; the outage apart."""
        return Counter(call.fault for call in self.calls if call.fault and not self._in_outage(call))

    def cost_nanousd(self) -> int:
        """What Anthropic would bill."""
        return sum(call.cost_nanousd for call in self.calls)

    def wasted_share(self) -> float:
        """Of the bill, for calls that gave no whole answer."""
        whole = sum(call.cost_nanousd for call in self.calls if call.complete)
        return 1 - whole / max(self.cost_nanousd(), 1)

    def waits_s(self) -> list[float]:
        """In the gateway's queue, of those who were answered."""
        return [one.queue_ms / 1000 for one in self.heard if one.whole and one.queue_ms is not None]

    def first_texts_s(self) -> list[float]:
        """From the question to the first word."""
        return [one.first_text_s for one in self.heard if one.whole and one.first_text_s is not None]

    def bars(self) -> list[Bar]:
        """Those of a run through the gateway."""
        asked, answered = len(self.heard), self.answered()
        used = self.used_share
        return [
            Bar("people answered", "100 %", f"{percent(answered / asked)} ({answered} of {asked})", answered == asked),
            Bar("raw errors", "none", _counted(self.errors()) or "none", not self.errors()),
            Bar(
                "429s of Anthropic's limits, of all calls",
                f"at most {percent(LIMITED_SHARE_MAX)}",
                f"{percent(self.limited_share(), 2)} ({self.limited()} of {len(self.calls)})",
                self.limited_share() <= LIMITED_SHARE_MAX,
            ),
            Bar(
                "of the input limit used while there was demand",
                f"at least {percent(USED_SHARE_MIN)}",
                f"{percent(used)} over {seconds(self.demand_s)}",
                used is not None and used >= USED_SHARE_MIN,
            ),
        ]

    def as_dict(self) -> dict[str, Any]:
        """For other programs."""
        waits, first = self.waits_s(), self.first_texts_s()
        return {
            "way": self.way,
            "asked": len(self.heard),
            "answered": self.answered(),
            "errors": dict(self.errors()),
            "calls": len(self.calls),
            "calls_limited": self.limited(),
            "calls_limited_share": self.limited_share(),
            "calls_faulty": dict(self.faulty()),
            "calls_of_each_question": len(self.calls) / max(len(self.heard), 1),
            "queue_s": {name: quantile(waits, share) for name, share in _SHARES},
            "first_text_s": {name: quantile(first, share) for name, share in _SHARES},
            "waiting_max": self.waiting_max,
            "demand_s": self.demand_s,
            "used_share": self.used_share,
            "used_by_third": self.used_by_third,
            "answers_by_model": dict(self.models()),
            "cost_nanousd": self.cost_nanousd(),
            "cost_wasted_share": self.wasted_share(),
            "ledger": self.usage,
            "took_s": self.took_s,
            "bars": [asdict(bar) for bar in self.bars()] if self.way == "headgate" else [],
        }

    def _in_outage(self, call: Arrival) -> bool:
        begin, end = (self.started_at + moment for moment in self.night.outage)
        return call.model == SONNET and call.fault == "529" and begin <= call.received_at < end + 0.5


_SHARES = (("p50", 0.5), ("p95", 0.95), ("max", 1.0))


# the night


async def through_headgate(night: Night, place: Place, *, tell: bool = False) -> Outcome:
    """The crowd asks the gateway, each a person of the app's."""
    client = sdk_client(place.url, place.key, timeout_s=night.deadline_s + 120)
    watch = Watch(place, min(0.25, 2.5 / night.speedup), CLASSES)
    async with client, asyncio.TaskGroup() as group:
        watching = group.create_task(watch.run())
        outcome = await _run("headgate", night, place, client, tell=tell)
        watching.cancel()
    itps = night.limits_per_min()[1] / 60
    bounds = [0.0, *night.outage, outcome.took_s]
    for since, until in pairwise(bounds):
        tokens, span_s = 0, 0.0
        for class_id, names in SIMULATOR_NAMES.items():
            spans = watch.demand(class_id, outcome.started_at + since, outcome.started_at + until)
            tokens += tokens_within(outcome.calls, names, spans)
            span_s += sum(end - begin for begin, end in spans)
        outcome.used_by_third.append((span_s, tokens / (span_s * itps) if span_s else 1.0))
    # After an outage the gateway goes by the load it knew. Of a fast night it has seen too little, and is careful.
    judged = outcome.used_by_third if night.speedup == 1 else outcome.used_by_third[:2]
    outcome.demand_s = sum(span_s for span_s, _ in judged)
    if outcome.demand_s:
        outcome.used_share = sum(span_s * share for span_s, share in judged) / outcome.demand_s
    outcome.waiting_max = watch.waiting_max()
    outcome.usage = await asyncio.to_thread(_ledger, place)
    return outcome


async def by_the_plain_loop(night: Night, simulator_url: str, *, tell: bool = False) -> Outcome:
    """The article's own client, straight to Anthropic: `Anthropic(max_retries=3, timeout=60.0)`."""
    async with sdk_client(simulator_url, "any", max_retries=3, timeout_s=60.0) as client:
        return await _run("plain SDK", night, Place(simulator_url, simulator_url), client, tell=tell)


async def _run(way: str, night: Night, place: Place, client: Any, *, tell: bool) -> Outcome:
    since = await asyncio.to_thread(_set, night, place.simulator_url)
    context = await asyncio.to_thread(_context, night, place.simulator_url)
    dice = random.Random(night.seed)
    started_at = time.monotonic()
    heard: list[Heard] = []

    async def person(number: int, comes_at: float) -> None:
        await at(started_at + comes_at)
        body = _body(number, context, dice.choice(QUESTIONS))
        headers = {"x-headgate-user": f"person-{number}", "x-headgate-tier": "free"} if way == "headgate" else None
        heard.append(await ask_streamed(client, body, user=f"person-{number}", number=number, headers=headers))

    async with asyncio.TaskGroup() as group:
        beside = [group.create_task(_outage(night, place.simulator_url, started_at))]
        if night.faults == "spaced":
            beside.append(group.create_task(_spaced_faults(night, place.simulator_url, since, heard)))
        if tell:
            beside.append(group.create_task(_tell(way, night, started_at, heard)))
        async with asyncio.TaskGroup() as people:
            for number, comes_at in enumerate(night.arrivals_s()):
                people.create_task(person(number, comes_at))
        took_s = time.monotonic() - started_at
        for task in beside:
            task.cancel()
    calls = await asyncio.to_thread(arrivals, place.simulator_url, since=since)
    return Outcome(way, night, heard, calls, took_s, started_at)


def _set(night: Night, simulator_url: str) -> int:
    """Order the faults, empty the buckets as far as a fast run needs it, and say how many requests came before."""
    if night.speedup != 1:
        _drain(night, simulator_url)
    if night.faults == "dice":
        share = night.fault_share / len(FAULT_KINDS)
        order: dict[str, Any] = {"rate": dict.fromkeys(FAULT_KINDS, share), "at": CUT_AT_BYTE}
        if night.speedup != 1:
            order["retry_after"] = f"{1 / night.speedup:g}"
        get_json(f"{simulator_url}/sim/faults", data=order)
    return count_of(simulator_url)


def _drain(night: Night, simulator_url: str) -> None:
    """Leave what a minute of the night is: a full bucket is one of the clock's, which is more than a whole fast run."""
    itpm = night.limits_per_min()[1]
    for model in CLASSES:
        left = round(itpm * (1 - 1 / night.speedup))
        while left > 0:
            # 4.3 characters a token of English prose.
            text = "[[sim: tokens=1 ttft_ms=0]] " + "the quick brown fox " * (min(left, DRAIN_TOKENS) * 43 // 200)
            body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": text}]}
            usage = _post(f"{simulator_url}/v1/messages", body)["usage"]
            left -= usage["input_tokens"]


def _context(night: Night, simulator_url: str) -> str:
    """A handbook that makes a whole prompt of so many tokens, by Anthropic's own count."""

    def counted(text: str) -> int:
        body = _body(100, text, QUESTIONS[0])
        body.pop("max_tokens")
        tokens: int = _post(f"{simulator_url}/v1/messages/count_tokens", body)["input_tokens"]
        return tokens

    book = "".join(HANDBOOK)
    book *= 10 * night.context_tokens // len(book)
    chars = night.context_tokens
    for _ in range(4):
        tokens = counted(book[:chars])
        chars = max(chars + round((night.context_tokens - tokens) * chars / max(tokens, 1)), 1)
    return book[:chars]


def _body(number: int, context: str, question: str) -> dict[str, Any]:
    """One request. The person's number stands first, so that no two contexts begin alike: nothing is for any cache."""
    return {
        "model": SONNET,
        "max_tokens": 1024,
        "system": f"Hồ sơ khách hàng số {number:05}. {context}",
        "messages": [{"role": "user", "content": f"[{number}] {question}"}],
    }


async def _outage(night: Night, simulator_url: str, started_at: float) -> None:
    begin, end = night.outage
    await at(started_at + begin)
    order = {"outage": {"kind": "529", "model": SONNET}}
    await asyncio.to_thread(get_json, f"{simulator_url}/sim/faults", data=order)
    await at(started_at + end)
    await asyncio.to_thread(get_json, f"{simulator_url}/sim/faults/outages?model={SONNET}", method="DELETE")


async def _spaced_faults(night: Night, simulator_url: str, since: int, heard: Sequence[Heard]) -> None:
    """One fault each time so many calls have come, while nobody is at their last attempt."""
    every, given, seen = round(1 / night.fault_share), 0, since
    due, told = since + every, 0
    failures: Counter[int | None] = Counter()
    while True:
        for call in await asyncio.to_thread(arrivals, simulator_url, since=seen, bodies=True):
            seen = call.serial
            if not call.fault:
                failures.pop(call.number, None)
            else:
                # A call that may have been billed is repeated once only.
                failures[call.number] += 2 if call.fault in ("reset", "cut") else 1
        for one in heard[told:]:
            failures.pop(one.number, None)
        told = len(heard)
        if seen >= due and max(failures.values(), default=0) < 2:
            kind = FAULT_KINDS[given % len(FAULT_KINDS)]
            order: dict[str, Any] = {"kind": kind}
            if kind == "cut":
                order["at"] = CUT_AT_BYTE
            if kind == "429":
                order["retry_after"] = f"{1 / night.speedup:g}"
            await asyncio.to_thread(get_json, f"{simulator_url}/sim/faults", data=order)
            given += 1
            # In step with what was missed would be several at once: an outage, and not scattered faults.
            due = max(due + every, seen + every // 2)
        else:
            await asyncio.sleep(0.5 / night.speedup)


async def _tell(way: str, night: Night, started_at: float, heard: Sequence[Heard]) -> None:
    comes = night.arrivals_s()
    while True:
        await asyncio.sleep(max(10.0 / night.speedup, 2.0))
        now = time.monotonic() - started_at
        asked, whole = sum(moment <= now for moment in comes), sum(one.whole for one in heard)
        line = f"{way}, {now:5.0f} s: {asked} asked, {whole} answered, {len(heard) - whole} errors"
        print(line, file=sys.stderr, flush=True)


def _ledger(place: Place) -> dict[str, Any]:
    time.sleep(1.0)  # for the writer, which folds the journal into what is read
    usage = get_json(f"{place.operator_url}/admin/usage?group_by=model&since=2h", key=place.key)
    total: dict[str, Any] = usage["total"]
    return total


def _post(url: str, body: dict[str, Any]) -> Any:
    return get_json(url, data=body, key="any", headers={"anthropic-version": "2023-06-01"})


# the report


def report_text(night: Night, outcomes: Sequence[Outcome]) -> str:
    """For people."""
    first, last = (f"{moment / 60 * night.speedup:.1f}" for moment in night.outage)
    whose = {"dice": "by dice", "spaced": "evenly spaced", "none": "none"}[night.faults]
    fast = f" All of it {night.speedup:g} times faster than life." if night.speedup != 1 else ""
    lines = [
        f"{night.people} people at once and {night.arrivals_per_min:g} more each minute for {night.minutes:g} minutes: "
        f"{len(night.arrivals_s())} in all, each with {night.context_tokens:,} tokens.",
        f"Limits: {night.rpm:,} requests, {night.itpm:,} input and {night.otpm:,} output tokens a minute. "
        f"{percent(night.fault_share, 0)} of calls faulty, {whose}.",
        f"{SONNET} gone from minute {first} to {last}. Wait allowed: {night.deadline_s:g} s.{fast}",
        "",
        table([["", *(outcome.way for outcome in outcomes)], *_rows(outcomes)]),
    ]
    for outcome in outcomes:
        if outcome.errors():
            lines += ["", f"Errors by {outcome.way}: {_counted(outcome.errors())}"]
    lines += ["", *(bars_text(outcome.bars()) for outcome in outcomes if outcome.way == "headgate")]
    return "\n".join(lines)


def _rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    rows: list[tuple[str, Any]] = [
        ("answered", lambda one: f"{one.answered()} of {len(one.heard)}"),
        ("raw errors", lambda one: str(sum(one.errors().values()))),
        ("calls to Anthropic", lambda one: str(len(one.calls))),
        ("  for each question", lambda one: f"{len(one.calls) / max(len(one.heard), 1):.2f}"),
        ("  made to fail", lambda one: str(sum(one.faulty().values()))),
        ("  refused by the limits (429)", lambda one: f"{one.limited()} ({percent(one.limited_share())})"),
        ("longest queue", lambda one: str(one.waiting_max) if one.waits_s() else "–"),
        ("wait in the queue, p50", lambda one: seconds(quantile(one.waits_s(), 0.5))),
        ("  p95", lambda one: seconds(quantile(one.waits_s(), 0.95))),
        ("  longest", lambda one: seconds(quantile(one.waits_s(), 1.0))),
        ("first word, p50", lambda one: seconds(quantile(one.first_texts_s(), 0.5))),
        ("  p95", lambda one: seconds(quantile(one.first_texts_s(), 0.95))),
        ("  latest", lambda one: seconds(quantile(one.first_texts_s(), 1.0))),
        ("somebody waits, limit used: first third", lambda one: _used(one, 0)),
        ("  Sonnet gone", lambda one: _used(one, 1)),
        ("  Sonnet back", lambda one: _used(one, 2)),
        ("answered by Sonnet", lambda one: str(sum(n for name, n in one.models().items() if "sonnet" in name))),
        ("answered by Haiku", lambda one: str(sum(n for name, n in one.models().items() if "haiku" in name))),
        ("bill", lambda one: f"${one.cost_nanousd() / 1e9:.4f}"),
        ("  of it for no answer", lambda one: percent(one.wasted_share())),
        ("  by the ledger", lambda one: f"${one.usage['cost_nanousd'] / 1e9:.4f}" if one.usage else "–"),
        ("until the last was told", lambda one: seconds(one.took_s)),
    ]
    return [[name, *(tell(outcome) for outcome in outcomes)] for name, tell in rows]


def _used(outcome: Outcome, third: int) -> str:
    if not outcome.used_by_third:
        return "–"
    span_s, share = outcome.used_by_third[third]
    return f"{span_s:.0f} s, {percent(share)}" if span_s else "0 s"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in counts.most_common())


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load.three_in_the_morning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    night = Night()
    add = parser.add_argument
    add("--people", type=int, default=night.people, help="at once (default: %(default)s)")
    add("--arrivals", type=float, default=night.arrivals_per_min, help="more each minute (default: %(default)g)")
    add("--minutes", type=float, default=night.minutes, help="of the night (default: %(default)g)")
    add("--scale", type=float, default=1.0, help="people and limits together, e.g. 0.2")
    add("--speedup", type=float, default=1.0, help="the whole night so many times faster, limits and all")
    add("--faults", choices=("dice", "spaced", "none"), default=night.faults, help="how 5 %% of calls are chosen")
    add("--seed", type=int, default=night.seed, help="of the simulator's dice")
    add("--direct", action="store_true", help="run the article's own loop beside it, straight to the simulator")
    add("--direct-only", action="store_true", help="run only that")
    add("--logs", type=Path, metavar="FOLDER", help="where the programs' logs are kept")
    add("--json", action="store_true", help="figures instead of a report")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    night = Night(
        people=options.people,
        arrivals_per_min=options.arrivals,
        minutes=options.minutes,
        speedup=options.speedup,
        faults=options.faults,
        seed=options.seed,
    ).scaled(options.scale)
    outcomes: list[Outcome] = []
    try:
        with ended_by_signals():
            if not options.direct_only:
                with Stage(options.logs) as stage:
                    place = stage.gateway(stage.simulator(night.simulator_options()), night.gateway_settings())
                    outcomes.append(asyncio.run(through_headgate(night, place, tell=not options.json)))
            if options.direct or options.direct_only:
                with Stage(options.logs) as stage:
                    url = stage.simulator(night.simulator_options())
                    outcomes.append(asyncio.run(by_the_plain_loop(night, url, tell=not options.json)))
    except StageError as error:
        print(f"three_in_the_morning: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps({"night": asdict(night), "runs": [one.as_dict() for one in outcomes]}, ensure_ascii=False))
    else:
        print(report_text(night, outcomes))
    return 0 if all(bar.met for one in outcomes if one.way == "headgate" for bar in one.bars()) else 1


if __name__ == "__main__":
    sys.exit(main())
