"""Laws of the plan: the known figures come out, the replay agrees, and what is said of a target is true."""

import math
from fractions import Fraction

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from headgate.policy.replay import Policy, Replay, ReplayRow
from headgate.policy.workload import (
    InvalidWorkload,
    Levers,
    Workload,
    holding,
    levers,
    month_nanousd,
    plan,
    request_of,
)
from headgate.wire.catalog import Model, packaged
from headgate.wire.usage import Usage

CATALOG = packaged()
AT_NS = 1_795_500_000 * 10**9  # 2026-11-24
USD = 10**9
POLICIES = levers(batch_share=Fraction(3, 10), reuse_share=Fraction(1, 5), answer_share=Fraction(3, 5))


def model(name: str) -> Model:
    found = CATALOG.resolve(name)
    assert found is not None
    return found


SONNET = model("claude-sonnet-4-6")
ARTICLE = Workload(
    requests_per_day=50_000, system_tokens=8_000, question_tokens=300, answer_tokens=250, counted_on=SONNET
)


def changed(**given) -> Workload:
    return msgspec.structs.replace(ARTICLE, **given)


@pytest.mark.parametrize(
    ("name", "usd"),
    [
        ("claude-sonnet-4-6", 10_575),
        ("claude-haiku-4-5", 3_525),
        # (10,118 · 10 + 379 · 100 + 316 · 500) nano-dollars, 1.5 million times.
        ("claude-haiku-5-5", Fraction(297_080 * 1_500_000, USD)),
    ],
)
def test_fifty_thousand_requests_a_day_cost_what_the_table_says(name, usd) -> None:
    assert month_nanousd(changed(hit_rate=Fraction(1)), model(name), Levers("5m"), CATALOG, at_ns=AT_NS) == usd * USD
    # At this rate there is always somebody within five minutes.
    assert month_nanousd(ARTICLE, model(name), Levers("5m"), CATALOG, at_ns=AT_NS) == usd * USD


def test_the_articles_claim_is_true_of_no_sonnet_and_of_haiku_5_5_with_levers_only() -> None:
    plans = plan(ARTICLE, POLICIES, CATALOG, at_ns=AT_NS, target_nanousd=200 * USD)
    by_name = {one.model: one for one in plans}
    assert plans[0].model == "claude-haiku-5-5"
    assert by_name["claude-sonnet-4-6"].answer_tokens_max is None
    assert holding(plans, 200 * USD) == []  # 8,000 tokens of system prompt: not even with all levers
    short = changed(system_tokens=3_000, answer_tokens=80)
    held = holding(plan(short, POLICIES, CATALOG, at_ns=AT_NS, target_nanousd=200 * USD), 200 * USD)
    assert held
    assert {name for name, _ in held} == {"claude-haiku-5-5"}
    assert held[0][1].levers == Levers("5m")


def test_rare_requests_write_as_often_as_a_poisson_process_leaves_gaps() -> None:
    hundred = changed(requests_per_day=100)
    one = request_of(hundred, SONNET, Levers("5m"))
    assert float(one.write_share) == pytest.approx(math.exp(-100 * 300 / 86_400), abs=1e-8)
    assert one.cache_read + one.cache_write == 8_000
    assert request_of(hundred, SONNET, Levers("1h")).write_share < one.write_share


def test_below_the_minimum_nothing_is_cached_and_a_conversation_may_grow_over_it() -> None:
    short = changed(system_tokens=900)
    assert request_of(short, SONNET, Levers("5m")).cache_read == 0
    long = msgspec.structs.replace(short, conversation_turns=6)
    assert request_of(long, SONNET, Levers("5m")).cache_read > 0
    slow = msgspec.structs.replace(long, turn_gap_s=300)
    assert request_of(slow, SONNET, Levers("1h")).cache_read == 0


@pytest.mark.parametrize("turns", [1, 2, 5, 12])
@pytest.mark.parametrize("system", [500, 3_000])
@pytest.mark.parametrize("ttl", ["5m", "1h"])
def test_the_replay_of_such_conversations_comes_to_the_same_bill(turns, system, ttl) -> None:
    workload = changed(system_tokens=system, conversation_turns=turns, hit_rate=Fraction(1), turn_gap_s=60)
    replay = Replay(Policy(cache=True, ttl=ttl), CATALOG, since_ns=AT_NS, now_ns=AT_NS)
    template = ReplayRow("c", 0, AT_NS, "k", "chat", "", SONNET.id, Usage(), -1, prefix="p", prefix_tokens=system)
    for number in range(-1, turns):  # somebody else came before
        prompt = system + 300 + max(number, 0) * 550
        one = msgspec.structs.replace(
            template,
            at_ns=AT_NS + number * 60 * 10**9,
            conversation=("own" if number >= 0 else "other") if turns > 1 else "",
            usage=Usage(
                input_tokens=0 if turns > 1 else 300,
                cache_write_5m_tokens=prompt if turns > 1 else system,
                output_tokens=250,
            ),
        )
        replay.add(one)
    monthly = month_nanousd(workload, SONNET, Levers(ttl), CATALOG, at_ns=AT_NS)
    assert monthly == pytest.approx(replay.projection().projected.cost_nanousd * 1_500_000 / turns, rel=1e-9)


@given(st.integers(1, 10**6), st.integers(0, 30_000), st.integers(1, 2_000), st.integers(0, 2_000), st.integers(1, 9))
@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_a_request_is_its_parts_and_what_holds_the_target_holds_it(rate, system, question, answer, turns) -> None:
    workload = changed(
        requests_per_day=rate,
        system_tokens=system,
        question_tokens=question,
        answer_tokens=answer,
        conversation_turns=turns,
    )
    target = 200 * USD
    for one in plan(workload, POLICIES, CATALOG, at_ns=AT_NS, target_nanousd=target):
        asked = model(one.model)
        whole = request_of(workload, asked, Levers("off"))
        for used in POLICIES[:3]:
            parts = request_of(workload, asked, used)
            kinds = (parts.input, parts.cache_read, parts.cache_write, parts.tail_write)
            assert min(kinds) >= 0
            if used.answer_share == 1:
                assert sum(kinds) == whole.input

        def costs(changes, used, asked=asked):
            return month_nanousd(msgspec.structs.replace(workload, **changes), asked, used, CATALOG, at_ns=AT_NS)

        caching = (Levers("5m"), Levers("1h"))
        if one.answer_tokens_max is None:
            assert min(costs({"answer_tokens": 0}, used) for used in caching) > target
        else:
            assert min(costs({"answer_tokens": one.answer_tokens_max}, used) for used in caching) <= target


def test_the_limits_that_the_busiest_minute_needs() -> None:
    needs = {one.model: one.needs for one in plan(ARTICLE, POLICIES, CATALOG, at_ns=AT_NS, target_nanousd=USD)}
    # 50,000 a day are 34.7 a minute; ten times that at the peak, with 300 uncached tokens and 250 of answer each.
    sonnet = needs["claude-sonnet-4-6"]
    assert (sonnet.rpm, sonnet.itpm, sonnet.otpm, sonnet.tier) == (348, 104_167, 86_806, "start")
    many = changed(requests_per_day=50_000_000)
    assert plan(many, POLICIES, CATALOG, at_ns=AT_NS, target_nanousd=USD)[0].needs.tier is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests_per_day": 0},
        {"conversation_turns": 0},
        {"answer_tokens": -1},
        {"system_tokens": 0, "question_tokens": 0},
        {"hit_rate": Fraction(2)},
        {"peak_factor": Fraction(1, 2)},
    ],
)
def test_what_is_no_workload_is_refused(wrong) -> None:
    with pytest.raises(InvalidWorkload):
        plan(changed(**wrong), POLICIES, CATALOG, at_ns=AT_NS, target_nanousd=USD)


def test_a_share_is_a_share_and_a_policy_has_a_name() -> None:
    with pytest.raises(InvalidWorkload):
        levers(batch_share=Fraction(2), reuse_share=Fraction(0), answer_share=Fraction(1))
    assert len(levers(batch_share=Fraction(0), reuse_share=Fraction(0), answer_share=Fraction(1))) == 3
    assert POLICIES[5].label == "5m cache + 30% batch + 20% reused + 40% shorter"
