"""What a workload costs a month on each model, which policy holds it under a target, and the rate limits it needs.

What it is: arithmetic over the catalogue's prices of one day. What it is not: a measurement of your traffic (that is
the replay), nor advice on which model is good enough.

Assumptions, which the command prints: a month is 30 days; requests come at random (Poisson) at one rate all day; all
share one system prompt; the turns of a conversation are `turn_gap_s` apart, and its end is kept for 5 minutes; every
token count is of the model named in the workload and is converted for the other tokenizer. Money is exact fractions,
rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from headgate.policy.records import Record
from headgate.policy.replay import TTL_NS, Ttl
from headgate.policy.tokenizer_change import Text, scaled, tokens_ratio
from headgate.wire.catalog import Catalog, Model
from headgate.wire.tiers import TIER_NAMES, TierLimits, TierName, tier_limits

MONTH_DAYS = 30
DAY_S = 86_400
TIERS: tuple[TierName, ...] = tuple(name for name in TIER_NAMES if not name.startswith("tier"))
"""Those that hold today; an organization of before has other names for its limits."""
TURNS_MAX = 1_000
_PARTS = 10**9
"""Shares that are not rational (of a Poisson process) are taken to a billionth."""

Caching = Literal["off"] | Ttl


class InvalidWorkload(ValueError):
    """A workload cannot be like that; the text says why."""


class Workload(Record, frozen=True):
    """What is asked of the models. Counts of tokens are of `counted_on`."""

    requests_per_day: int
    system_tokens: int
    """Shared by all: instructions, knowledge, tools."""
    question_tokens: int
    answer_tokens: int
    counted_on: Model
    conversation_turns: int = 1
    """Requests of one conversation; each turn sends all turns before it again."""
    turn_gap_s: int = 60
    hit_rate: Fraction | None = None
    """Part of the requests that find the system prompt in the cache, 0 to 1; None: by the arrivals."""
    peak_factor: Fraction = Fraction(10)
    """The busiest minute, as a multiple of the mean one."""
    text: Text = "english"


class Levers(Record, frozen=True):
    """One policy."""

    caching: Caching
    batch_share: Fraction = Fraction(0)
    """Part of the requests that nobody waits for."""
    reuse_share: Fraction = Fraction(0)
    """Part of the requests that an answer kept from before answers."""
    answer_share: Fraction = Fraction(1)
    """Length of an answer, as a part of the workload's."""

    @property
    def label(self) -> str:
        """`5m`, `1h + 30% batch + 50% shorter`."""
        parts = ["no caching" if self.caching == "off" else f"{self.caching} cache"]
        for share, what in (
            (self.batch_share, "batch"),
            (self.reuse_share, "reused"),
            (1 - self.answer_share, "shorter"),
        ):
            if share:
                parts.append(f"{float(share):.0%} {what}")
        return " + ".join(parts)


class Request(Record, frozen=True):
    """A mean request, in tokens of the model that is asked: exact fractions."""

    input: Fraction
    cache_read: Fraction
    cache_write: Fraction
    """Of the system prompt, at the policy's TTL."""
    tail_write: Fraction
    """Of a conversation's end, for 5 minutes."""
    output: Fraction
    prompt_tokens_max: int
    """Of the longest prompt: that of a conversation's last turn."""
    write_share: Fraction
    """Part of the requests that must write the system prompt."""


class Priced(Record, frozen=True):
    """A policy and what it costs a month."""

    levers: Levers
    month_nanousd: int


class Needs(Record, frozen=True):
    """Of Anthropic's limits in the busiest minute, without batches and reused answers left out."""

    rpm: int
    itpm: int
    """Uncached tokens: reads are free."""
    otpm: int
    tier: TierName | None
    """The first that has it; None: more than any."""


class ModelPlan(Record, frozen=True):
    """A workload on one model."""

    model: str
    tokens_ratio: Fraction
    """Of this model, for each token of the workload."""
    fits: bool
    """Whether the longest prompt and its answer fit the context."""
    caches: bool
    """Whether the system prompt, or a conversation, is long enough for the model's cache."""
    request: Request
    """With the cheaper TTL."""
    prices: tuple[Priced, ...]
    """In the order the policies were given."""
    needs: Needs
    answer_tokens_max: int | None
    """Longest answer, in the workload's tokens, that holds the target with caching alone; None: no length does."""
    requests_per_day_max: int
    """That hold the target with caching alone."""


def levers(*, batch_share: Fraction, reuse_share: Fraction, answer_share: Fraction) -> tuple[Levers, ...]:
    """The policies that are compared: caching by itself, with each lever, and with all that there are, for both TTLs.

    Raises InvalidWorkload for a share that is not between 0 and 1.
    """
    for name, share in {"batch": batch_share, "reuse": reuse_share, "answers": answer_share}.items():
        if not 0 <= share <= 1:
            raise InvalidWorkload(f"the share of {name} is between 0 and 1")
    found: list[Levers] = [Levers("off")]
    cachings: tuple[Caching, ...] = ("5m", "1h")
    for caching in cachings:
        found += [
            Levers(caching),
            Levers(caching, batch_share=batch_share),
            Levers(caching, reuse_share=reuse_share),
            Levers(caching, answer_share=answer_share),
            Levers(caching, batch_share, reuse_share, answer_share),
        ]
    return tuple(dict.fromkeys(found))


def plan(
    workload: Workload, policies: Sequence[Levers], catalog: Catalog, *, at_ns: int, target_nanousd: int
) -> tuple[ModelPlan, ...]:
    """The workload on every active model that is sold at `at_ns`, the cheapest with caching first.

    Raises InvalidWorkload.
    """
    _check(workload)
    found = [
        _model_plan(workload, policies, model, catalog, at_ns=at_ns, target_nanousd=target_nanousd)
        for model in catalog.models
        if model.status == "active" and model.line != "mythos"  # which only verified organizations may call
    ]
    return tuple(sorted(found, key=lambda one: min(priced.month_nanousd for priced in one.prices)))


def holding(plans: Sequence[ModelPlan], target_nanousd: int) -> list[tuple[str, Priced]]:
    """Models and policies under the target: those with the fewest levers first, then the cheapest."""
    return sorted(
        (
            (one.model, priced)
            for one in plans
            if one.fits
            for priced in one.prices
            if priced.month_nanousd <= target_nanousd
        ),
        key=lambda pair: (_levers_used(pair[1].levers), pair[1].month_nanousd),
    )


def request_of(workload: Workload, model: Model, used: Levers) -> Request:
    """A mean request of the workload on this model under this policy (reused answers left out)."""
    ratio = tokens_ratio(workload.text, workload.counted_on, model)
    system, question = scaled(workload.system_tokens, ratio), scaled(workload.question_tokens, ratio)
    full_answer = scaled(workload.answer_tokens, ratio)
    answer = full_answer * used.answer_share
    turns = workload.conversation_turns
    pair = question + answer
    prompt_max = math.ceil(system + question + (turns - 1) * pair)
    history = Fraction(turns - 1, 2) * pair
    fresh = Request(system + question + history, Fraction(0), Fraction(0), Fraction(0), answer, prompt_max, Fraction(0))
    if used.caching == "off" or prompt_max < model.cache_min_tokens:
        return fresh
    ttl_s = TTL_NS[used.caching] // 10**9
    is_alive = turns > 1 and workload.turn_gap_s * 10**9 < TTL_NS["5m"]
    shares_system = system >= model.cache_min_tokens
    if not shares_system and not is_alive:
        return fresh
    write_share = _write_share(workload, ttl_s, used)
    # First turns share the system prompt with everybody; later ones read all of the turn before.
    firsts = Fraction(1, turns)
    read = write = tail_write = Fraction(0)
    if shares_system:
        read += system * (1 - write_share) * (firsts if is_alive else 1)
        write += system * write_share * (firsts if is_alive else 1)
    if is_alive:
        for turn in range(2, turns + 1):
            before = system + question + (turn - 2) * pair
            now = before + pair
            if before >= model.cache_min_tokens:
                read += Fraction(before) / turns
                tail_write += Fraction(now - before) / turns
            elif now >= model.cache_min_tokens:
                # The conversation has just become long enough.
                tail_write += Fraction(now) / turns
        if system + question >= model.cache_min_tokens:
            # The first turn's tail is written for the second to read.
            tail = question if shares_system else system + question
            tail_write += tail * firsts
    return Request(fresh.input - read - write - tail_write, read, write, tail_write, answer, prompt_max, write_share)


def month_nanousd(workload: Workload, model: Model, used: Levers, catalog: Catalog, *, at_ns: int) -> int:
    """What the workload costs in 30 days."""
    return round(_request_nanousd(workload, model, used, catalog, at_ns=at_ns) * _month_requests(workload))


def _request_nanousd(workload: Workload, model: Model, used: Levers, catalog: Catalog, *, at_ns: int) -> Fraction:
    """Of a mean request, those that are reused counted as nothing."""
    one = request_of(workload, model, used)
    row = catalog.price_row(model.id, at_ns, "standard", one.prompt_tokens_max)
    write_nanousd = row.cache_write_1h_nanousd if used.caching == "1h" else row.cache_write_5m_nanousd
    nanousd = (
        one.input * row.input_nanousd
        + one.cache_read * row.cache_read_nanousd
        + one.cache_write * write_nanousd
        + one.tail_write * row.cache_write_5m_nanousd
        + one.output * row.output_nanousd
    )
    batch = Fraction(catalog.factors[False][True], catalog.factor_scale)
    return nanousd * (1 - used.batch_share * (1 - batch)) * (1 - used.reuse_share)


def _month_requests(workload: Workload) -> int:
    return workload.requests_per_day * MONTH_DAYS


def _write_share(workload: Workload, ttl_s: int, used: Levers) -> Fraction:
    """Part of the requests that come later than a TTL after the one before: of a Poisson process exp(-rate · TTL)."""
    if workload.hit_rate is not None:
        return 1 - workload.hit_rate
    rate = workload.requests_per_day * float(1 - used.reuse_share) / DAY_S
    return Fraction(round(math.exp(-rate * ttl_s) * _PARTS), _PARTS)


def _model_plan(
    workload: Workload, policies: Sequence[Levers], model: Model, catalog: Catalog, *, at_ns: int, target_nanousd: int
) -> ModelPlan:
    prices = tuple(Priced(used, month_nanousd(workload, model, used, catalog, at_ns=at_ns)) for used in policies)
    five, hour = Levers("5m"), Levers("1h")
    best = min((five, hour), key=lambda used: _request_nanousd(workload, model, used, catalog, at_ns=at_ns))
    request = request_of(workload, model, best)
    cost = _request_nanousd(workload, model, best, catalog, at_ns=at_ns)
    longest = request.prompt_tokens_max + math.ceil(request.output)
    return ModelPlan(
        model=model.id,
        tokens_ratio=tokens_ratio(workload.text, workload.counted_on, model),
        fits=longest <= model.context_tokens,
        caches=bool(request.cache_read),
        request=request,
        prices=prices,
        needs=_needs(workload, model, request),
        answer_tokens_max=_answer_tokens_max(workload, model, (five, hour), catalog, at_ns, target_nanousd),
        requests_per_day_max=int(target_nanousd / (cost * MONTH_DAYS)) if cost else workload.requests_per_day,
    )


def _answer_tokens_max(
    workload: Workload,
    model: Model,
    cachings: Sequence[Levers],
    catalog: Catalog,
    at_ns: int,
    target_nanousd: int,
) -> int | None:
    """By halving, for the cost grows with the answer: up to 64 times the workload's length, or None where not even an
    empty one holds."""

    def holds(answer_tokens: int) -> bool:
        shorter = _with_answer(workload, answer_tokens)
        return any(month_nanousd(shorter, model, used, catalog, at_ns=at_ns) <= target_nanousd for used in cachings)

    if not holds(0):
        return None
    low, high = 0, max(workload.answer_tokens, 1) * 64
    if holds(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _with_answer(workload: Workload, answer_tokens: int) -> Workload:
    fields = {name: getattr(workload, name) for name in Workload.__struct_fields__}
    return Workload(**{**fields, "answer_tokens": answer_tokens})


def _needs(workload: Workload, model: Model, request: Request) -> Needs:
    rpm = Fraction(workload.requests_per_day, 1_440) * workload.peak_factor
    counted = request.input + request.cache_write + request.tail_write
    if model.counts_cache_reads_in_itpm:
        counted += request.cache_read
    needs = TierLimits(math.ceil(rpm), math.ceil(rpm * counted), math.ceil(rpm * request.output))
    tier = next((name for name in TIERS if _has(tier_limits(name, model.line), needs)), None)
    return Needs(needs.rpm, needs.itpm, needs.otpm, tier)


def _has(limits: TierLimits, needs: TierLimits) -> bool:
    return limits.rpm >= needs.rpm and limits.itpm >= needs.itpm and limits.otpm >= needs.otpm


def _levers_used(used: Levers) -> int:
    return (used.caching != "off") + bool(used.batch_share) + bool(used.reuse_share) + (used.answer_share != 1)


def _check(workload: Workload) -> None:
    if workload.requests_per_day < 1:
        raise InvalidWorkload("a workload has at least one request a day")
    if not 1 <= workload.conversation_turns <= TURNS_MAX:
        raise InvalidWorkload(f"a conversation has 1 to {TURNS_MAX} turns")
    if min(workload.system_tokens, workload.question_tokens, workload.answer_tokens, workload.turn_gap_s) < 0:
        raise InvalidWorkload("tokens and seconds are not below 0")
    if workload.system_tokens + workload.question_tokens == 0:
        raise InvalidWorkload("a prompt has at least one token")
    if workload.hit_rate is not None and not 0 <= workload.hit_rate <= 1:
        raise InvalidWorkload("the hit rate is between 0 and 1")
    if workload.peak_factor < 1:
        raise InvalidWorkload("the busiest minute is at least the mean one: the peak factor is 1 or more")
