"""Laws of the replay: figures reckoned by hand, a second and simpler reckoning on random histories, and what breaks."""

import random
from fractions import Fraction

import msgspec
import pytest

from headgate.policy.pricing import price
from headgate.policy.replay import AS_RECORDED, ENTRIES_MAX, Policy, Replay, ReplayRow
from headgate.wire.catalog import packaged
from headgate.wire.usage import IterationUsage, Usage

CATALOG = packaged()
SONNET, HAIKU, SONNET_55, HAIKU_55 = "claude-sonnet-4-6", "claude-haiku-4-5", "claude-sonnet-5-5", "claude-haiku-5-5"
S = 10**9
BEGAN_NS = 1_795_000_000 * S  # 2026-11-18


def row(at_s: float, usage: Usage, model: str = SONNET, **given) -> ReplayRow:
    """A call at that second after the beginning, priced as the ledger prices it."""
    at_ns = BEGAN_NS + round(at_s * S)
    facts = {
        "call_id": f"call_{at_s}",
        "priced_at_ns": at_ns,
        "key_id": "k",
        "endpoint": "chat",
        "conversation": "",
        "cost_nanousd": price(usage, model, at_ns, CATALOG).cost_nanousd,
        "prefix": "aa",
        "first_byte_ms": 500,
    }
    return ReplayRow(at_ns=at_ns, usage=usage, model=model, **{**facts, **given})


def replayed(policy: Policy, rows, *, since_ns: int = 0):
    replay = Replay(policy, CATALOG, since_ns=since_ns, now_ns=BEGAN_NS)
    for one in rows:
        replay.add(one)
    return replay.projection()


def tokens(side) -> tuple[int, ...]:
    return msgspec.structs.astuple(side.tokens)


def test_as_recorded_is_the_recorded_bill_whatever_it_holds() -> None:
    odd = [
        row(0, Usage(input_tokens=10, cache_write_1h_tokens=7, output_tokens=3)),
        row(1, Usage(input_tokens=5), cost_nanousd=123),  # corrected by a reconciliation
        row(2, Usage(), cost_nanousd=0),
        row(3, Usage(), cost_nanousd=0, reused=True, reused_nanousd=99),
        row(4, Usage(input_tokens=9, output_tokens=1), model="claude-of-tomorrow"),
    ]
    found = replayed(AS_RECORDED, odd)
    assert found.recorded == msgspec.structs.replace(found.projected)
    assert found.recorded.cost_nanousd == sum(one.cost_nanousd for one in odd)
    assert replayed(Policy(model=SONNET), [odd[0]]).saved_nanousd == 0


def test_caching_off_makes_everything_input() -> None:
    usage = Usage(input_tokens=300, cache_read_tokens=8_000, output_tokens=250)
    found = replayed(Policy(cache=False), [row(0, usage)])
    # $3 and $15 a million: 8,300 * 3,000 + 250 * 15,000 nano-dollars.
    assert found.projected.cost_nanousd == 28_650_000
    assert tokens(found.projected) == (8_300, 0, 0, 0, 250)


def test_a_prefix_is_written_once_read_while_it_lives_and_written_again_after() -> None:
    plain = Usage(input_tokens=8_300, output_tokens=0)
    facts = {"prefix_tokens": 8_000}
    rows = [row(at_s, plain, **facts) for at_s in (0, 100, 399, 700)]
    five = replayed(Policy(cache=True), rows)
    # Read at 100 s and, refreshed by that, at 399 s; at 700 s it has been unused for 301 s.
    assert tokens(five.projected) == (1_200, 16_000, 16_000, 0, 0)
    hour = replayed(Policy(cache=True, ttl="1h"), rows)
    assert tokens(hour.projected) == (1_200, 24_000, 0, 8_000, 0)
    assert hour.projected.cost_nanousd == 1_200 * 3_000 + 24_000 * 300 + 8_000 * 6_000


def test_what_did_not_pay_to_be_marked_is_marked_when_a_ttl_is_asked_for() -> None:
    rows = [row(at_s, Usage(input_tokens=8_300), prefix_tokens=8_000) for at_s in (0, 1_800)]
    assert tokens(replayed(Policy(ttl="1h"), rows).projected) == (600, 8_000, 0, 8_000, 0)
    assert tokens(replayed(Policy(model=HAIKU_55), rows).projected)[1:4] == (0, 0, 0)


def test_who_comes_before_the_first_byte_writes_too_unless_it_may_wait() -> None:
    plain = Usage(input_tokens=8_300)
    facts = {"prefix_tokens": 8_000}
    rows = [row(at_s, plain, **facts) for at_s in (0, 0.4, 0.5)]
    assert tokens(replayed(Policy(cache=True), rows).projected)[1:3] == (8_000, 16_000)
    assert tokens(replayed(Policy(cache=True, wait_s=2.0), rows).projected)[1:3] == (16_000, 8_000)


def test_a_later_turn_reads_the_turn_before() -> None:
    usages = [Usage(cache_write_5m_tokens=2_100), Usage(cache_read_tokens=2_100, cache_write_5m_tokens=300)]
    facts = {"conversation": "c", "prefix_tokens": 2_000}
    turns = [row(60 * number, usage, **facts) for number, usage in enumerate(usages)]
    turns.append(row(1_000, Usage(cache_write_5m_tokens=2_700), **facts))
    five = replayed(Policy(ttl="5m"), turns)
    assert tokens(five.projected) == (0, 2_100, 5_100, 0, 0)
    hour = replayed(Policy(ttl="1h"), turns)
    # The prefix lives for an hour, as long as it was estimated and then seen to be; the turns live for 5 minutes.
    assert tokens(hour.projected) == (0, 2_100 + 2_100, 100 + 300 + 600, 2_000, 0)


def test_another_generation_takes_more_tokens_of_prompt_and_answer() -> None:
    # claude-api §10: 8,000 read, 300 fresh, 250 of answer.
    usage = Usage(input_tokens=300, cache_read_tokens=8_000, output_tokens=250)
    warm = row(-10, Usage(input_tokens=300, cache_write_5m_tokens=8_000, output_tokens=250))
    found = replayed(Policy(model=HAIKU_55), [warm, row(0, usage)], since_ns=BEGAN_NS)
    assert found.requests == 1
    assert tokens(found.projected) == (379, 10_118, 0, 0, 316)
    assert found.projected.cost_nanousd == 379 * 100 + 10_118 * 10 + 316 * 500
    assert found.recorded.cost_nanousd == 7_050_000


def test_a_prompt_below_the_other_models_minimum_loses_caching_and_is_counted() -> None:
    usage = Usage(input_tokens=100, cache_read_tokens=2_000, output_tokens=10)
    found = replayed(Policy(model=HAIKU), [row(0, usage), row(1, usage)])
    assert tokens(found.projected) == (4_200, 0, 0, 0, 20)
    assert [(one.code, one.calls) for one in found.breaks if one.calls] == [("below_cache_minimum", 2)]
    # The other way: what Haiku 4.5 could not cache, 5.5 does.
    short = [row(at, Usage(input_tokens=2_100), model=HAIKU, prefix_tokens=2_000) for at in (0, 9)]
    assert tokens(replayed(Policy(model=HAIKU_55), short).projected)[1] == round(2_000 * 43 / 34)


def test_haiku_5_5_costs_five_times_above_its_band() -> None:
    usage = Usage(input_tokens=90_000, output_tokens=100)
    found = replayed(Policy(model=HAIKU_55), [row(0, usage, prefix="")])
    assert found.projected.cost_nanousd == 113_824 * 500 + 126 * 2_500
    assert [one.code for one in found.breaks if one.calls] == ["dearer_band"]


def test_every_nth_call_that_nobody_streams_goes_into_a_batch() -> None:
    usage = Usage(input_tokens=1_000, output_tokens=10)
    rows = [row(number, usage, streamed=number % 2 == 1) for number in range(20)]
    found = replayed(Policy(batch_share=Fraction(3, 10)), rows)
    assert found.batched == 3
    assert found.saved_nanousd == 3 * rows[0].cost_nanousd // 2
    assert [(one.code, one.calls) for one in found.breaks] == [("not_batchable", 10)]
    named = replayed(Policy(batch_share=Fraction(1), batch_endpoints=frozenset({"chat"})), rows)
    assert (named.batched, named.saved_nanousd * 2) == (20, named.recorded.cost_nanousd)
    with pytest.raises(ValueError, match="between 0 and 1"):
        replayed(Policy(batch_share=Fraction(2)), [])


def test_an_equal_call_of_one_key_is_free_while_the_answer_is_kept() -> None:
    usage = Usage(input_tokens=1_000, output_tokens=10)
    facts = {"digest": "d", "total_ms": 2_000}
    rows = [
        row(0, usage, **facts),
        row(1, usage, **facts),  # the first is not whole yet
        row(2, usage, **facts),
        row(3, usage, **facts | {"key_id": "another"}),
        row(61.5, usage, **facts),
        row(62, usage, **facts),  # the answer was kept for a minute
    ]
    found = replayed(Policy(reuse=True, reuse_ttl_s=60), rows)
    assert (found.reused, found.saved_nanousd) == (2, 2 * rows[0].cost_nanousd)
    only = Policy(reuse=True, reuse_endpoints=frozenset({"faq"}))
    assert replayed(only, rows).saved_nanousd == 0


def test_without_reuse_what_was_given_again_costs_what_the_first_did() -> None:
    usage = Usage(input_tokens=1_000, output_tokens=10)
    again = {"reused": True, "cost_nanousd": 0, "digest": "d"}
    rows = [
        row(0, usage, digest="d"),
        row(5, Usage(), **again),
        row(6, Usage(), **again | {"digest": "old"}, reused_nanousd=7),
    ]
    found = replayed(Policy(reuse=False), rows)
    assert found.projected.cost_nanousd == 2 * rows[0].cost_nanousd + 7
    assert [one.code for one in found.breaks] == ["reused_unknown"]


def test_what_a_model_is_not_is_said() -> None:
    usage = Usage(input_tokens=300_000, output_tokens=90)
    rows = [row(0, usage, max_tokens=100, prefix="")]
    assert "context_too_small" in {one.code for one in replayed(Policy(model=HAIKU), rows).breaks}
    codes = {one.code for one in replayed(Policy(model=SONNET_55), rows).breaks}
    assert {"answer_cut", "parameters_unknown"} <= codes
    assert replayed(Policy(model="gpt"), rows).breaks[0].code == "unknown_model"
    assert replayed(Policy(model="claude-3-5-haiku-20241022"), rows).breaks[0].code == "retired_model"
    assert replayed(Policy(model="claude-sonnet-4-5"), rows).breaks[0].code == "retires_soon"


def test_several_passes_keep_their_caching_and_take_the_other_tokenizer() -> None:
    one = IterationUsage(input_tokens=34, cache_read_tokens=3_400, output_tokens=34)
    found = replayed(Policy(model=SONNET_55), [row(0, Usage(input_tokens=34, iterations=(one, one)))])
    assert found.projected.cost_nanousd == 2 * (43 * 2_000 + 4_300 * 100 + 43 * 10_000)


def test_rows_out_of_order_are_refused_and_memory_is_bounded() -> None:
    with pytest.raises(ValueError, match="order"):
        replayed(AS_RECORDED, [row(1, Usage()), row(0, Usage())])
    replay = Replay(Policy(cache=True, reuse=True), CATALOG, since_ns=0, now_ns=BEGAN_NS)
    template = row(0, Usage(input_tokens=9_000), prefix_tokens=8_000)
    for number in range(ENTRIES_MAX // 50):
        replay.add(msgspec.structs.replace(template, prefix=str(number), digest=str(number), conversation=str(number)))
    assert len(replay._shared) == len(replay._answers) == len(replay._last_turn) == ENTRIES_MAX // 50


# A second reckoning: every call looks back over all calls before it, with floats and no state.


def oracle(rows, model: str, ttl_s: float, *, old: bool) -> int:
    """The bill in nano-dollars of calls without conversations, all of one prefix each, under caching."""
    factor = 4.3 / 3.4 if old else 1.0
    read_price, write_price, in_price, out_price = {
        (HAIKU_55, 300): (10, 125, 100, 500),
        (HAIKU_55, 3600): (10, 200, 100, 500),
        (SONNET, 300): (300, 3_750, 3_000, 15_000),
        (SONNET, 3600): (300, 6_000, 3_000, 15_000),
    }[model, ttl_s]
    total, reads = 0, []
    for number, one in enumerate(rows):
        at = one.at_ns - BEGAN_NS
        reads.append(False)
        for before in range(number - 1, -1, -1):
            other = rows[before]
            if other.prefix != one.prefix:
                continue
            if one.at_ns - other.at_ns >= ttl_s * S:
                break
            # A reader's entry was usable already; a writer's is from its first byte on.
            if reads[before] or at >= other.at_ns - BEGAN_NS + other.first_byte_ms * 1_000_000:
                reads[-1] = True
                break
        prompt = round(one.usage.prompt_tokens * factor)
        prefix = round(one.prefix_tokens * factor)
        output = round(one.usage.output_tokens * factor)
        total += prefix * (read_price if reads[-1] else write_price) + (prompt - prefix) * in_price + output * out_price
    return total


@pytest.mark.parametrize("model", [SONNET, HAIKU_55])
@pytest.mark.parametrize("ttl", ["5m", "1h"])
@pytest.mark.parametrize("seed", range(4))
def test_a_simpler_reckoning_comes_to_the_same_bill(model, ttl, seed) -> None:
    dice = random.Random(seed)
    lengths = [dice.randrange(5_000, 20_000, 100) for _ in range(6)]
    at_s, rows = 0.0, []
    for _ in range(300):
        at_s += dice.choice([0.05, 0.3, 5.0, 80.0, 299.0, 301.0, 2_000.0])
        prefix = dice.randrange(6)
        usage = Usage(input_tokens=lengths[prefix] + dice.randrange(100, 900), output_tokens=dice.randrange(1, 500))
        facts = {"prefix_tokens": lengths[prefix]}
        rows.append(row(at_s, usage, prefix=f"p{prefix}", first_byte_ms=dice.choice([100, 400, 6_000]), **facts))
    found = replayed(Policy(model=model, cache=True, ttl=ttl), rows)
    own = oracle(rows, model, 300 if ttl == "5m" else 3_600, old=model == HAIKU_55)
    # Roundings of single counts part by a token at most.
    assert found.projected.cost_nanousd == pytest.approx(own, rel=2e-5)
