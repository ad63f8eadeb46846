"""The article's claim, measured: 50,000 requests a day for less than $200 a month.

    python -m load.fifty_thousand                       a day on four models under each policy, some minutes
    python -m load.fifty_thousand --requests 5000       a look; a month is told as if it were 50,000 all the same
    python -m load.fifty_thousand --sockets 500         and 500 requests through a real gateway and simulator

A virtual day of one app (one system prompt in Vietnamese and English, questions and answers in Vietnamese, busy by day
and quiet by night) goes through the real cache planner and the simulator's own prompt cache, token counts and bill. The
simulator shares no price and no line with the gateway. docs/fifty-thousand-a-day.md has the answer and what is assumed.
Exit code: 0 the claims of that page hold, 1 one does not, 2 the sockets' run could not be made.

What it is not: queues, retries and cut streams, but for those of the sockets' run.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import json
import math
import random
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from heapq import heappop, heappush
from typing import Any

import msgspec

from headgate.policy.answer_reuse import ReuseRule, answer_key
from headgate.policy.prompt_cache import CachePlan, PromptCache
from headgate.simulator import corpus
from headgate.simulator.bill import cost_nanousd
from headgate.simulator.cache import CacheUse, Scope
from headgate.simulator.cache import PromptCache as Upstream
from headgate.simulator.models import Model, load_catalogue
from headgate.simulator.prompt import build_prompt
from headgate.simulator.tokens import CHARS_PER_TOKEN, count, kind_of
from headgate.simulator.usage import Usage as Billed
from headgate.wire.catalog import day_start_ns, packaged
from headgate.wire.message import scan
from headgate.wire.usage import Usage
from load.crowd import Line
from load.report import Bar, bars_text, table
from load.stage import Place, Stage, StageError, ended_by_signals, get_json, within

REQUESTS = 50_000
DAY_S = 86_400.0
DAYS = 30
"""In a month."""
TARGET_USD = 200.0
COUNTED_ON = "claude-sonnet-4-6"
"""Whose tokens the app is described in."""
MODELS = (COUNTED_ON, "claude-haiku-4-5", "claude-sonnet-5-5", "claude-haiku-5-5")
HOURS = (2, 1, 1, 1, 1, 2, 4, 7, 10, 12, 13, 12, 10, 11, 12, 12, 11, 10, 11, 14, 15, 12, 8, 4)
"""How busy each hour of the day is, beside the others: one peak before noon and one in the evening."""
NIGHT_SHARE = 0.3
"""Of the requests that nobody waits for: summaries, tags, mails of the next morning."""
NIGHT_S = (2 * 3_600.0, 4 * 3_600.0)
"""When a batch of them is worked off."""
SUGGESTED_SHARE = 0.3
"""Of the questions of people that are one of SUGGESTIONS, word for word: a page that shows suggestions has them."""
SUGGESTIONS = 40
REUSE = ReuseRule(ttl_s=3_600.0, shared_by_users=True)
FIRST_BYTE_S = (0.4, 1.2)
WAIT_S = 2.0
"""For who writes a cold prefix: `cache.single_flight_wait_s`."""
TOKENS_PER_S = 80.0
SHORT_ANSWER_TOKENS = 80
AGREE = 0.03
"""How far a request over sockets may cost another sum than a virtual one."""
DAY_AGREE = 0.05
"""And than one of the whole day, among whose 50,000 the first write is lost."""
SOCKET_MODELS = (COUNTED_ON, "claude-haiku-5-5")
_SPACING_S = 0.05
_encode = msgspec.json.encode
_LEDGER_S = 20.0
_SIDE_BY_SIDE = 8

HANDBOOK = (
    "Answer in the customer's language, in at most three short paragraphs, and never invent an order number. ",
    "Khách hỏi về đơn hàng thì luôn kiểm tra mã đơn trước khi trả lời. ",
    "If a delivery is more than three days late, apologise once and offer to open a ticket with the carrier. ",
    "A refund goes back to the card it was paid with and takes three to five working days to arrive. ",
    "Hóa đơn được gửi qua email trong vòng hai ngày làm việc. ",
    "The trial plan holds up to one thousand contacts and three users for fourteen days, after which it is read only. ",
    "Tuyệt đối không hứa giảm giá; hãy nói rõ ai là người quyết định và khi nào khách sẽ nhận được câu trả lời. ",
    "When somebody asks for a person, hand the conversation over and stop answering. ",
    "Khách xưng hô thế nào thì trả lời theo cách ấy, và chỉ gọi tên riêng khi khách đã cho biết. ",
)


@dataclass(frozen=True)
class App:
    """What is sent and answered, in tokens of COUNTED_ON."""

    system_tokens: int = 8_000
    question_tokens: int = 300
    answer_tokens: int = 250

    @property
    def label(self) -> str:
        """`8,000 + 300 → 250`."""
        return f"{self.system_tokens:,} + {self.question_tokens:,} → {self.answer_tokens:,}"


@dataclass(frozen=True)
class Way:
    """How the day is run."""

    name: str
    plan: bool = True
    batch: bool = False
    """What nobody waits for goes into a batch at night, with marks that its author made: a batch passes the gateway as
    it is."""
    batch_marked: bool = True
    reuse: bool = False
    answer_tokens: int | None = None


WAYS = (
    Way("no caching", plan=False),
    Way("planner"),
    Way("planner, batch not marked", batch=True, batch_marked=False),
    Way("planner, batch", batch=True),
    Way("planner, batch, reuse", batch=True, reuse=True),
    Way("planner, batch, reuse, answers of 80", batch=True, reuse=True, answer_tokens=SHORT_ANSWER_TOKENS),
)
ARTICLE = App()
SHORT = App(3_000, 300, SHORT_ANSWER_TOKENS)
RUNS = (
    *((ARTICLE, way) for way in WAYS),
    *((SHORT, way) for way in (WAYS[1], WAYS[4])),
)


@dataclass(frozen=True)
class Asked:
    """A request of the day."""

    at_s: float
    question: str
    answer: str
    first_byte_s: float
    waits: bool
    """Whether somebody waits for the answer."""


@dataclass
class Billed30:
    """What the simulator billed for a run."""

    app: App
    way: str
    model: str
    requests: int = 0
    """All that came, whether or not they were sent."""
    reused: int = 0
    in_batch: int = 0
    writes: int = 0
    """Calls that wrote a prefix."""
    read_tokens: int = 0
    write_tokens: int = 0
    plain_tokens: int = 0
    output_tokens: int = 0
    nanousd: int = 0

    @property
    def usd_request(self) -> float:
        """Of each that came."""
        return self.nanousd / 1e9 / self.requests

    @property
    def usd_month(self) -> float:
        """Of DAYS days of REQUESTS."""
        return self.usd_request * REQUESTS * DAYS

    @property
    def read_share(self) -> float:
        """Of all prompt tokens that were sent."""
        return self.read_tokens / max(self.read_tokens + self.write_tokens + self.plain_tokens, 1)


@dataclass
class Outcome:
    """All runs, and whether what docs/fifty-thousand-a-day.md says of them is so."""

    billed: list[Billed30] = field(default_factory=list)

    def of(self, app: App, way: str, model: str) -> Billed30:
        """One run's."""
        return next(one for one in self.billed if (one.app, one.way, one.model) == (app, way, model))

    def holding(self) -> list[Billed30]:
        """What stays below the target, the dearest last."""
        return sorted((one for one in self.billed if one.usd_month < TARGET_USD), key=lambda one: one.usd_month)

    def bars(self) -> list[Bar]:
        """What the page claims."""
        everything = WAYS[-1].name
        sonnet = min(self._month(ARTICLE, way.name, COUNTED_ON) for way in WAYS)
        planned = self._month(ARTICLE, "planner", "claude-haiku-5-5")
        best = self._month(ARTICLE, everything, "claude-haiku-5-5")
        short = self._month(SHORT, "planner", "claude-haiku-5-5")
        short_all = self._month(SHORT, WAYS[4].name, "claude-haiku-5-5")
        old_haiku = self.of(SHORT, "planner", "claude-haiku-4-5")
        saved = 1 - self._month(ARTICLE, "planner", COUNTED_ON) / self._month(ARTICLE, "no caching", COUNTED_ON)
        unmarked = self._month(ARTICLE, "planner, batch not marked", "claude-haiku-5-5")
        return [
            Bar(
                "Sonnet 4.6 at its cheapest, times the target", "over 10", f"{sonnet / TARGET_USD:.1f}", sonnet > 2_000
            ),
            Bar("Sonnet 4.6: saved by the planner", "over 70 %", f"{saved:.0%}", saved > 0.7),
            Bar("Haiku 5.5, planner", "over the target", _usd(planned), planned > TARGET_USD),
            Bar("Haiku 5.5, everything", "under it", _usd(best), best < TARGET_USD),
            Bar("Haiku 5.5, 3,000 + 300 → 80, planner", "under it", _usd(short), short < TARGET_USD),
            Bar("the same with batch and reuse", "under it", _usd(short_all), short_all < TARGET_USD),
            Bar("Haiku 4.5 reads of 3,000 tokens", "none", str(old_haiku.read_tokens), not old_haiku.read_tokens),
            Bar("a batch without marks is dearer than no batch", "yes", _usd(unmarked), unmarked > planned),
        ]

    def _month(self, app: App, way: str, model: str) -> float:
        return self.of(app, way, model).usd_month


# the app


def system_text(app: App) -> str:
    """So many tokens of both languages."""
    return _of_tokens("".join(HANDBOOK) * 400, app.system_tokens)


@functools.lru_cache(maxsize=2)
def asked_of_a_day(app: App, requests: int, seed: int) -> list[Asked]:
    """The requests of a day, in the order of their time."""
    dice = random.Random(seed)
    sentences = corpus.VIETNAMESE

    def text(tokens: int) -> str:
        words = " ".join(dice.choices(sentences, k=tokens // 8 + 4))
        return _of_tokens(words, tokens)

    suggestions = [text(app.question_tokens) for _ in range(SUGGESTIONS)]
    answers = [text(app.answer_tokens) for _ in range(200)]
    popularity = [1 / (rank + 1) for rank in range(SUGGESTIONS)]
    found = []
    for hour in dice.choices(range(24), HOURS, k=requests):
        waits = dice.random() >= NIGHT_SHARE
        if waits and dice.random() < SUGGESTED_SHARE:
            question = dice.choices(suggestions, popularity)[0]
        else:
            question = text(app.question_tokens)
        found.append(
            Asked((hour + dice.random()) * 3_600, question, dice.choice(answers), dice.uniform(*FIRST_BYTE_S), waits)
        )
    return sorted(found, key=lambda one: one.at_s)


def _of_tokens(text: str, tokens: int) -> str:
    rate = CHARS_PER_TOKEN["old"][kind_of(text)]
    cut = text[: math.floor(tokens * rate + 0.01)]
    if count(cut, "old") > tokens:
        cut = cut[:-1]
    assert count(cut, "old") == tokens, "the text is too short, or of another kind when it is cut"
    return cut


# a virtual day


def run(app: App, asked: Sequence[Asked], way: Way, model_id: str) -> Billed30:
    """What the simulator bills for these requests."""
    catalogue, catalog = load_catalogue(), packaged()
    model = catalogue.find(model_id)
    assert model is not None
    began_ns = day_start_ns(catalog.as_of)
    planner, upstream, scope = PromptCache(catalog), Upstream(), Scope("org", "workspace")
    text = system_text(app)
    system = _encode(text)
    marked = _encode([{"type": "text", "text": text, "cache_control": {"type": "ephemeral", "ttl": "1h"}}])
    answers = {one.answer: _output(one.answer, way, model) for one in asked}
    begun: list[tuple[float, int, float, CacheUse, CachePlan | None, Usage]] = []
    kept: dict[str, float] = {}
    writing: dict[bytes, float] = {}
    total = Billed30(app, way.name, model_id)
    for number, one in enumerate(_order(asked, way)):
        in_batch = way.batch and not one.waits
        body = _body(marked if in_batch and way.batch_marked else system, one.question, model_id)
        total.requests += 1
        _begin(begun, one.at_s, planner, upstream, model)
        if way.reuse and not in_batch:
            key = answer_key(upstream="sim", key_id="key", user=None, model=model_id, query=b"", headers=b"", body=body)
            whole_at = kept.get(key, -math.inf)
            if whole_at <= one.at_s < whole_at + REUSE.ttl_s:
                total.reused += 1
                continue
            kept[key] = one.at_s + one.first_byte_s + answers[one.answer] / TOKENS_PER_S
        sent, start_s = body, one.at_s
        plan: CachePlan | None = None
        if way.plan and not in_batch:
            plan = planner.plan(
                scan(body),
                key_id="key",
                endpoint="app",
                model=model_id,
                at_ns=began_ns + round(one.at_s * 1e9),
                now=one.at_s,
                mark=True,
            )
            sent = plan.body
            if start_s < writing.get(plan.cold, 0.0) <= start_s + WAIT_S:
                start_s = writing[plan.cold]
                _begin(begun, start_s, planner, upstream, model)
            elif plan.cold:
                writing[plan.cold] = start_s + one.first_byte_s
        prompt = build_prompt(
            msgspec.json.decode(sent), model, thinking="disabled", effort="low", speed="standard", betas=frozenset()
        )
        use = upstream.look(prompt, scope, min_tokens=model.cache_min_tokens, now_s=start_s)
        upstream.begin(use, started_s=start_s)
        output = answers[one.answer]
        read = Usage(use.input_tokens, use.read_tokens, use.write_5m_tokens, use.write_1h_tokens, output)
        heappush(begun, (start_s + one.first_byte_s, number, start_s, use, plan, read))
        billed = Billed(
            input_tokens=use.input_tokens,
            read_tokens=use.read_tokens,
            write_5m_tokens=use.write_5m_tokens,
            write_1h_tokens=use.write_1h_tokens,
            output_tokens=output,
            service_tier="batch" if in_batch else "standard",
        )
        total.nanousd += cost_nanousd(catalogue, model, billed, catalog.as_of)
        total.in_batch += in_batch
        total.writes += bool(use.writes)
        total.read_tokens += use.read_tokens
        total.write_tokens += use.write_5m_tokens + use.write_1h_tokens
        total.plain_tokens += use.input_tokens
        total.output_tokens += output
    return total


def _begin(
    begun: list[tuple[float, int, float, CacheUse, CachePlan | None, Usage]],
    until_s: float,
    planner: PromptCache,
    upstream: Upstream,
    model: Model,
) -> None:
    """The answers whose first byte has come by then: what they wrote can be read, and the planner has heard of it."""
    while begun and begun[0][0] <= until_s:
        first_s, _, started_s, use, plan, read = heappop(begun)
        upstream.store(use, model=model.id, started_s=started_s)
        if plan is not None:
            planner.began(plan, model=model.id, usage=read, now=first_s)


def _order(asked: Sequence[Asked], way: Way) -> Sequence[Asked]:
    """As they come; with a batch, those that nobody waits for evenly over some hours of the night."""
    if not way.batch:
        return asked
    later = [one for one in asked if not one.waits]
    begin, end = NIGHT_S
    moved = [replace(one, at_s=begin + (end - begin) * at / len(later)) for at, one in enumerate(later)]
    return sorted([*(one for one in asked if one.waits), *moved], key=lambda one: one.at_s)


def _output(answer: str, way: Way, model: Model) -> int:
    text = answer if way.answer_tokens is None else _of_tokens(answer, way.answer_tokens)
    return count(text, model.tokenizer)


def _body(system: bytes, question: str, model: str) -> bytes:
    """`system` is JSON: it is the same a hundred thousand times."""
    asked = _encode([{"role": "user", "content": question}])
    return b'{"model":"%b","max_tokens":1024,"system":%b,"messages":%b}' % (model.encode(), system, asked)


def measure(
    requests: int, seed: int, runs: Iterable[tuple[App, Way]] = RUNS, *, jobs: int = 1, tell: bool = False
) -> Outcome:
    """All runs on all models, in so many processes."""
    outcome = Outcome()
    days = [(app, requests, seed, way, model) for app, way in runs for model in MODELS]
    with ProcessPoolExecutor(jobs) if jobs > 1 else nullcontext() as pool:
        for one in map(_run_day, days) if pool is None else pool.map(_run_day, days):
            outcome.billed.append(one)
            if tell:
                print(f"{one.app.label}, {one.way}, {one.model}: {_usd(one.usd_month)}", file=sys.stderr)
    return outcome


def _run_day(day: tuple[App, int, int, Way, str]) -> Billed30:
    app, requests, seed, way, model = day
    return run(app, asked_of_a_day(app, requests, seed), way, model)


# over sockets


@dataclass(frozen=True)
class Compared:
    """The same requests over sockets and in virtual time."""

    model: str
    requests: int
    answered: int
    usd_request: float
    ledger_usd_request: float
    virtual_usd_request: float
    day_usd_request: float

    def bars(self) -> list[Bar]:
        """What has to agree."""
        off = self.usd_request / self.virtual_usd_request - 1
        day_off = self.usd_request / self.day_usd_request - 1
        each = f"{self.model}: {self.answered} answered, ${self.usd_request:.7f} each"
        return [
            Bar(
                f"{each}, virtual ${self.virtual_usd_request:.7f}",
                f"within {AGREE:.0%}",
                f"{off:+.2%}",
                abs(off) <= AGREE,
            ),
            Bar(
                f"{self.model}: a request of the whole virtual day ${self.day_usd_request:.7f}",
                f"within {DAY_AGREE:.0%}",
                f"{day_off:+.2%}",
                abs(day_off) <= DAY_AGREE,
            ),
            Bar(
                f"{self.model}: the ledger",
                "the bill to the nano-dollar",
                f"${self.ledger_usd_request:.7f}",
                self.ledger_usd_request == self.usd_request,
            ),
            Bar(f"{self.model}: answered", "all", str(self.answered), self.answered == self.requests),
        ]


def over_sockets(requests: int, seed: int, models: Sequence[str] = SOCKET_MODELS) -> list[Compared]:
    """The article's app through a gateway and a simulator of their own, and the same in virtual time."""
    asked = [replace(one, at_s=at * _SPACING_S) for at, one in enumerate(asked_of_a_day(ARTICLE, requests, seed))]
    found = []
    settings = {"PACING__RPM": "1000000", "PACING__ITPM": "100000000", "PACING__OTPM": "100000000"}
    for model in models:
        with Stage() as stage:
            url = stage.simulator(["--tier", "none", "--speed", "0", "--seed", str(seed)])
            place = stage.gateway(url, settings)
            answered = asyncio.run(_ask_all(place, asked, model))
            bill = get_json(f"{url}/sim/bill?limit=0")["total"]
            ledger: Any = within(
                _LEDGER_S, functools.partial(_ledger, place, requests), "the ledger to have every call"
            )
        found.append(
            Compared(
                model,
                requests,
                answered,
                bill["cost_nanousd"] / 1e9 / requests,
                ledger["cost_nanousd"] / 1e9 / requests,
                run(ARTICLE, asked, WAYS[1], model).usd_request,
                run(ARTICLE, asked_of_a_day(ARTICLE, 5_000, seed), WAYS[1], model).usd_request,
            )
        )
    return found


def _ledger(place: Place, requests: int) -> dict[str, Any] | None:
    """The sums of the gateway's own bill, once every call is in it."""
    total: dict[str, Any] = get_json(f"{place.operator_url}/admin/usage?since=24h", key=place.key)["total"]
    return total if total["requests"] >= requests and total["output_tokens"] else None


async def _ask_all(place: Place, asked: Sequence[Asked], model: str) -> int:
    """How many heard a whole answer."""
    line = Line(place.url, place.key)
    system = _encode(system_text(ARTICLE))
    gate = asyncio.Semaphore(_SIDE_BY_SIDE)

    async def ask(number: int, one: Asked) -> bool:
        # The answer is ordered word for word, where it costs no token.
        words = base64.b64encode(one.answer.encode()).decode()
        body = json.loads(_body(system, one.question, model)) | {
            "thinking": {"type": "disabled"},
            "metadata": {"user_id": f"[[sim: text=base64:{words} thinking=0]]"},
        }
        async with gate:
            user = f"person-{number}"
            return (await line.ask(body, user=user, number=number, headers={"x-headgate-user": user})).whole

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(number, one)) for number, one in enumerate(asked)]
    line.close()
    return sum(task.result() for task in tasks)


# telling


def _usd(usd: float) -> str:
    return f"${usd:,.0f}"


def table_text(outcome: Outcome) -> str:
    """A row for each app and policy, a column for each model; then what is below the target."""
    rows: list[Sequence[str]] = [("a month of", *MODELS)]
    pairs = list(dict.fromkeys((one.app, one.way) for one in outcome.billed))
    for app, way in pairs:
        cells = [_usd(outcome.of(app, way, model).usd_month) for model in MODELS]
        rows.append((f"{app.label}: {way}", *cells))
    some = outcome.of(ARTICLE, WAYS[4].name, MODELS[-1])
    lines = [
        table(rows),
        "",
        f"Of {some.requests:,} requests {some.in_batch:,} went into a batch and {some.reused:,} were answered again.",
        "",
        "each request, on average",
        table(
            [
                ("", "read", "written", "plain", "output", "cost"),
                *(
                    (
                        f"{one.app.label}: {one.way}, {one.model}",
                        f"{one.read_tokens / one.requests:,.0f}",
                        f"{one.write_tokens / one.requests:,.1f}",
                        f"{one.plain_tokens / one.requests:,.0f}",
                        f"{one.output_tokens / one.requests:,.0f}",
                        f"${one.usd_request:.7f}",
                    )
                    for one in outcome.billed
                ),
            ]
        ),
        "",
        f"under {_usd(TARGET_USD)} a month: "
        + "; ".join(f"{one.model}, {one.app.label}, {one.way}: {_usd(one.usd_month)}" for one in outcome.holding()),
    ]
    return "\n".join(lines)


def main() -> int:
    """Run, print, and tell by the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sockets", type=int, default=0, metavar="N", help="requests through a real gateway as well")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes for the virtual days")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with ended_by_signals():
        try:
            compared = over_sockets(options.sockets, options.seed) if options.sockets else []
        except StageError as error:
            print(error, file=sys.stderr)
            return 2
        outcome = measure(options.requests, options.seed, jobs=options.jobs, tell=not options.json)
    bars = [*outcome.bars(), *(bar for one in compared for bar in one.bars())]
    if options.json:
        told = [asdict(one) | {"usd_month": one.usd_month, "read_share": one.read_share} for one in outcome.billed]
        print(json.dumps({"billed": told, "bars": [asdict(bar) for bar in bars]}, indent=1))
    else:
        print(table_text(outcome), "", bars_text(bars), sep="\n")
    return int(not all(bar.met for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
