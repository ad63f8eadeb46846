"""Five minutes or an hour, and whether to keep warm: against sums done by hand."""

import json
from datetime import date

import pytest

from headgate.policy.cache_ttl import GAPS_MIN, Gaps, choose_ttl, keep_warm_worth, usd, warm_body
from headgate.wire.catalog import day_start_ns, packaged

PRICE = packaged().price_row("claude-sonnet-4-6", day_start_ns(date(2026, 11, 22)))
MARK = {"cache_control": {"type": "ephemeral"}}
SYSTEM = [{"type": "text", "text": "x", **MARK}]


def gaps(*seconds, span_s=86_400.0):
    found = Gaps(span_s=span_s)
    for each in seconds:
        found.add(each)
    return found


def test_an_hour_is_chosen_where_enough_gaps_lie_between():
    choice = choose_ttl(gaps(*[60] * 60, *[900] * 37, *[9_999] * 3), prefix_tokens=12_000, price=PRICE)
    assert choice.ttl == "1h"
    # 5m: 60 reads at 300 and 40 writes at 3,750 nano-dollars a token; 1h: 97 reads and 3 writes at 6,000.
    assert choice.saved_nanousd_day == (60 * 300 + 40 * 3_750 - 97 * 300 - 3 * 6_000) * 12_000
    assert choice.reason == "1h: 37% of gaps lie between 5 and 60 min, 3% are longer or first uses; saves $1.45 a day"


@pytest.mark.parametrize(("between", "beyond", "ttl"), [(60, 100, "5m"), (90, 100, "1h"), (0, 100, "5m"), (0, 0, "5m")])
def test_the_break_even_is_where_the_prices_put_it(between, beyond, ttl):
    seen = gaps(*[10] * 20, *[600] * between, *[7_000] * beyond)
    assert choose_ttl(seen, prefix_tokens=5_000, price=PRICE).ttl == ttl


def test_few_gaps_say_nothing_and_a_setting_says_all():
    few = gaps(*[900] * (GAPS_MIN - 1))
    assert choose_ttl(few, prefix_tokens=9, price=PRICE).ttl == "5m"
    assert choose_ttl(few, prefix_tokens=9, price=PRICE, setting="1h").ttl == "1h"


def test_old_gaps_fade_and_memory_stays():
    seen = gaps(*[900.0] * 5_000)
    assert seen.total <= 1_024
    for _ in range(5_000):
        seen.add(1.0)
    assert seen.hits("5m") / seen.total > 0.95


def test_keeping_warm_pays_where_gaps_are_a_little_longer_than_the_ttl():
    warm = keep_warm_worth(gaps(*[550] * 50), prefix_tokens=12_000, price=PRICE, ttl="5m")
    # Gaps of up to 600 s need two warming requests of a read and 16 tokens each, and spare a write less a read.
    assert (warm.worth, warm.pings_max, warm.every_s) == (True, 2, 270.0)
    assert warm.cost_nanousd_day == 50 * 2 * (300 * 12_000 + 16 * 3_000)
    assert warm.saved_nanousd_day == 50 * (3_750 - 300) * 12_000 - warm.cost_nanousd_day


@pytest.mark.parametrize("seconds", [[10] * 50, [90_000] * 50, [float("inf")] * 50, [550] * 3])
def test_keeping_warm_does_not_pay_where_nothing_would_be_bridged(seconds):
    warm = keep_warm_worth(gaps(*seconds), prefix_tokens=12_000, price=PRICE, ttl="5m")
    assert (warm.worth, warm.pings_max, warm.cost_nanousd_day) == (False, 0, 0)


def test_a_budget_bounds_what_keeping_warm_costs():
    seen = gaps(*[550] * 50)
    free = keep_warm_worth(seen, prefix_tokens=12_000, price=PRICE, ttl="5m")
    within = keep_warm_worth(
        seen, prefix_tokens=12_000, price=PRICE, ttl="5m", budget_nanousd_day=free.cost_nanousd_day - 1
    )
    assert not within.worth


def body(**more):
    base = {"model": "m", "max_tokens": 500, "system": SYSTEM, "messages": [{"role": "user", "content": "Hi"}]}
    return json.dumps(base | more, indent=1).encode()


def test_a_warming_request_has_the_marked_prefix_and_asks_for_nothing():
    warm = warm_body(
        body(stream=True, cache_control={"type": "ephemeral"}, diagnostics=None, thinking={"type": "adaptive"})
    )
    assert json.loads(warm) == {
        "model": "m",
        "max_tokens": 0,
        "system": SYSTEM,
        "messages": [{"role": "user", "content": "warm"}],
        "thinking": {"type": "adaptive"},
    }


@pytest.mark.parametrize(
    "more",
    [
        {"thinking": {"type": "enabled", "budget_tokens": 2_000}},
        {"tool_choice": {"type": "any"}},
        {"tool_choice": {"type": "tool", "name": "x"}},
        {"output_config": {"format": {"type": "json_schema"}}},
        {"system": "no mark"},
        {"container": "c"},
    ],
)
def test_what_the_api_refuses_is_not_warmed(more):
    assert warm_body(body(**more)) is None


@pytest.mark.parametrize("raw", [b"{}", b"[]", b"", b"nonsense"])
def test_no_request_is_not_warmed(raw):
    assert warm_body(raw) is None


def test_dollars_are_readable():
    assert [usd(0), usd(1_234_000), usd(1_450_000_000)] == ["$0.0000", "$0.0012", "$1.45"]
