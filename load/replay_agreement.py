"""Whether a replay of the ledger tells what Anthropic would have billed: both are done, and compared.

    python -m load.replay_agreement [--requests N] [--seed N] [--json]

Three virtual days of traffic (a chat, an FAQ, a nightly job; several system prompts, conversations, repeated questions)
go through the real cache planner, and through the simulator's own prompt cache, token counts and bill, once as recorded
and once under each policy. The rows of the first run are replayed under the same policies. Time is virtual, so that it
takes a minute; the simulator shares no price and no line with the replay. Exit code 1 when one is off by more than 3 %.

What it is not: the gateway over sockets. Queues, retries and cut streams do not occur here.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from math import ceil
from typing import Any

from headgate.policy.pricing import price
from headgate.policy.prompt_cache import PromptCache
from headgate.policy.replay import Policy, Replay, ReplayRow
from headgate.simulator.bill import cost_nanousd
from headgate.simulator.cache import CacheUse, Scope
from headgate.simulator.cache import PromptCache as Upstream
from headgate.simulator.models import load_catalogue
from headgate.simulator.prompt import build_prompt
from headgate.simulator.tokens import count
from headgate.simulator.usage import Usage as Billed
from headgate.wire.catalog import day_start_ns, packaged
from headgate.wire.message import scan
from headgate.wire.usage import Usage
from load.report import Bar, bars_text

BAR = 0.03
DAYS = 3
DAY_S = 86_400
WAIT_S = 2.0
REUSE_TTL_S = 3_600
SONNET, HAIKU = "claude-sonnet-4-6", "claude-haiku-5-5"
_WORDS = ("order", "invoice", "the", "customer", "asks", "for", "delivery", "and", "a", "refund", "in", "three", "days")


@dataclass(frozen=True)
class Arrival:
    """A request as it comes, without a model."""

    at_s: float
    endpoint: str
    conversation: str
    streamed: bool
    system: str
    messages: tuple[str, ...]
    """Questions and answers in turn; a question is the last."""
    answer: str
    first_byte_s: float


POLICIES: dict[str, tuple[Policy, Policy]] = {
    "another model": (Policy(), Policy(model=HAIKU)),
    "one hour": (Policy(), Policy(ttl="1h")),
    "no caching": (Policy(), Policy(cache=False)),
    "half in batches": (Policy(), Policy(batch_share=Fraction(1, 2))),
    "answers reused": (Policy(), Policy(reuse=True, reuse_ttl_s=REUSE_TTL_S)),
    "caching on": (Policy(cache=False), Policy(cache=True, ttl="5m", wait_s=WAIT_S)),
}
"""What was recorded, and what it is replayed under."""


def traffic(requests: int, seed: int) -> list[Arrival]:
    """So many requests in three days, in the order of their time."""
    dice = random.Random(seed)

    def words(number: int) -> str:
        return " ".join(dice.choices(_WORDS, k=number))

    systems = {"chat": [words(4_000), words(2_500)], "faq": [words(3_000)], "nightly": [words(5_000)]}
    repeated = [words(30) for _ in range(40)]
    found: list[Arrival] = []
    while len(found) < requests:
        endpoint = dice.choices(["chat", "faq", "nightly"], [3, 2, 2])[0]
        system = dice.choice(systems[endpoint])
        at_s = dice.uniform(0, DAYS * DAY_S)
        if endpoint == "nightly":
            at_s = dice.randrange(DAYS) * DAY_S + dice.uniform(2 * 3_600, 5 * 3_600)
        turns = dice.choice([1, 2, 4, 8]) if endpoint == "chat" else 1
        conversation = f"conv_{len(found)}" if endpoint == "chat" else ""
        said: tuple[str, ...] = ()
        for _ in range(turns):
            question = (
                dice.choice(repeated) if endpoint == "faq" and dice.random() < 0.5 else words(dice.randint(20, 90))
            )
            answer = words(dice.randint(30, 200))
            found.append(
                Arrival(
                    at_s,
                    endpoint,
                    conversation,
                    endpoint == "chat",
                    system,
                    (*said, question),
                    answer,
                    dice.uniform(0.3, 1.5),
                )
            )
            said = (*said, question, answer)
            at_s += dice.choice([20.0, 60.0, 120.0, 400.0])
    return sorted(found[:requests], key=lambda one: one.at_s)


def run(arrivals: list[Arrival], policy: Policy) -> tuple[int, list[ReplayRow]]:
    """What the simulator bills for running these under the policy, and the rows that the ledger would keep."""
    catalogue, catalog = load_catalogue(), packaged()
    model = catalogue.find(policy.model or SONNET)
    assert model is not None
    began_ns = day_start_ns(catalog.as_of) - DAYS * DAY_S * 10**9
    planner, upstream = PromptCache(catalog, ttl=policy.ttl or "5m"), Upstream()
    scope = Scope("org", "workspace")
    stores: list[tuple[float, int, CacheUse, float]] = []
    writing: dict[bytes, float] = {}
    answers: dict[tuple[str, str], float] = {}
    rows: list[ReplayRow] = []
    bill = eligible = 0
    for number, one in enumerate(arrivals):
        body = _body(one, model.id)
        plan = planner.plan(
            scan(body),
            key_id="key",
            endpoint=one.endpoint,
            model=model.id,
            at_ns=began_ns + round(one.at_s * 1e9),
            now=one.at_s,
            mark=policy.cache is not False,
        )
        key = (one.endpoint, plan.digest)
        if policy.reuse and answers.get(key, -1e9) <= one.at_s < answers.get(key, -1e9) + REUSE_TTL_S:
            continue
        start_s = one.at_s
        first_s = writing.get(plan.cold, 0.0) if plan.cold else 0.0
        if start_s < first_s <= start_s + WAIT_S:
            start_s = first_s
        while stores and stores[0][0] <= start_s:
            _, _, use, started_s = heappop(stores)
            upstream.store(use, model=model.id, started_s=started_s)
        sent: dict[str, Any] = json.loads(plan.body)
        prompt = build_prompt(sent, model, thinking="disabled", effort="high", speed="standard", betas=frozenset())
        use = upstream.look(prompt, scope, min_tokens=model.cache_min_tokens, now_s=start_s)
        upstream.begin(use, started_s=start_s)
        heappush(stores, (start_s + one.first_byte_s, number, use, start_s))
        if plan.cold:
            writing[plan.cold] = start_s + one.first_byte_s
        output = count(one.answer, model.tokenizer)
        total_s = one.first_byte_s + output / 80
        is_batch = False
        if policy.batch_share and not one.streamed:
            eligible += 1
            is_batch = ceil(eligible * policy.batch_share) > ceil((eligible - 1) * policy.batch_share)
        billed = Billed(
            input_tokens=use.input_tokens,
            read_tokens=use.read_tokens,
            write_5m_tokens=use.write_5m_tokens,
            write_1h_tokens=use.write_1h_tokens,
            output_tokens=output,
            service_tier="batch" if is_batch else "standard",
        )
        bill += cost_nanousd(catalogue, model, billed, catalog.as_of)
        if policy.reuse:
            answers[key] = start_s + total_s
        usage = Usage(use.input_tokens, use.read_tokens, use.write_5m_tokens, use.write_1h_tokens, output)
        planner.began(plan, model=model.id, usage=usage, now=start_s + one.first_byte_s)
        at_ns = began_ns + round(start_s * 1e9)
        rows.append(
            ReplayRow(
                call_id=f"call_{number}",
                at_ns=at_ns,
                priced_at_ns=at_ns,
                key_id="key",
                endpoint=one.endpoint,
                conversation=one.conversation,
                model=model.id,
                usage=usage,
                cost_nanousd=price(usage, model.id, at_ns, catalog).cost_nanousd,
                prefix=plan.prefix,
                prefix_tokens=plan.prefix_tokens,
                digest=plan.digest,
                streamed=one.streamed,
                first_byte_ms=round(one.first_byte_s * 1000),
                total_ms=round(total_s * 1000),
            )
        )
    return bill, sorted(rows, key=lambda row: row.at_ns)


def _body(one: Arrival, model: str) -> bytes:
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(one.messages)]
    body = {"model": model, "max_tokens": 1024, "system": [{"type": "text", "text": one.system}], "messages": messages}
    return json.dumps(body).encode()


def compare(requests: int, seed: int) -> dict[str, dict[str, float]]:
    """For each policy: as recorded, as billed, as replayed, and how far the replay is off."""
    arrivals = traffic(requests, seed)
    recorded: dict[Policy, tuple[int, list[ReplayRow]]] = {}
    found: dict[str, dict[str, float]] = {}
    for name, (before, after) in POLICIES.items():
        if before not in recorded:
            recorded[before] = run(arrivals, before)
        was_nanousd, rows = recorded[before]
        replay = Replay(after, packaged(), since_ns=0, now_ns=day_start_ns(packaged().as_of))
        for row in rows:
            replay.add(row)
        told = replay.projection()
        assert told.recorded.cost_nanousd == was_nanousd, "the ledger and the simulator's bill part"
        true_nanousd, _ = run(arrivals, after)
        found[name] = {
            "recorded_usd": was_nanousd / 1e9,
            "billed_usd": true_nanousd / 1e9,
            "replayed_usd": told.projected.cost_nanousd / 1e9,
            "off": told.projected.cost_nanousd / true_nanousd - 1,
        }
    return found


def main() -> int:
    """Compare, print, and tell by the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = compare(options.requests, options.seed)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        bars = [
            Bar(
                f"{name}: recorded ${one['recorded_usd']:.2f}, billed ${one['billed_usd']:.2f}, "
                f"replayed ${one['replayed_usd']:.2f}",
                f"within {BAR:.0%}",
                f"{one['off']:+.2%}",
                abs(one["off"]) <= BAR,
            )
            for name, one in found.items()
        ]
        print(bars_text(bars))
    return int(any(abs(one["off"]) > BAR for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
