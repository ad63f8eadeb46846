"""Whom a call is paid from, and what is told when there is no money."""

from datetime import UTC, datetime

import pytest

from headgate.gateway.budgets import (
    COUNTED,
    NANOUSD,
    BudgetRules,
    Caps,
    SeedTimes,
    TierCaps,
    accounts_of,
    clamped_max_tokens,
    cut_error,
    nanousd,
    refused,
    spend_alert,
    tier_of,
)
from headgate.gateway.refusals import answer
from headgate.policy.budgets import Account, AccountUse, AlertLine, Budgets, MoneyAsk
from headgate.policy.pricing import upper_bound
from headgate.policy.records import Principal
from headgate.wire.catalog import packaged

NOON_NS = int(datetime(2026, 8, 7, 12, tzinfo=UTC).timestamp()) * 10**9
KEY = Principal("k1", "an")
RULES = BudgetRules(
    everybody=Caps(100, 1_000),
    tiers={"free": TierCaps(person=Caps(5, None)), "paid": TierCaps(total=Caps(None, 700))},
)


def test_a_person_is_one_account_whatever_key_is_shown():
    one, other = Principal("k1", "an"), Principal("k2", "an", budget_day_nanousd=50)
    assert accounts_of(one, "an", "free", RULES)[0] == Account("user:an", 5, None)
    assert accounts_of(other, "an", "free", RULES)[:2] == (Account("user:an", 5, None), Account("key:k2", 50, None))


def test_a_budget_of_a_key_bounds_it_and_lifts_nobody():
    key = Principal("k1", "an", budget_day_nanousd=1_000)
    budgets = Budgets()
    ask = MoneyAsk("a", accounts_of(key, "an", "free", RULES), 6, NOON_NS)
    verdict = budgets.reserve(ask, 0.0)
    assert (verdict.admitted, verdict.account) == (False, "user:an")


def test_who_pays_keeps_a_fifth_of_everybodys_cap():
    (_, tier, everybody) = accounts_of(KEY, "an", "free", RULES)
    assert (tier, everybody) == (Account("tier:free", 80, 800), Account("all", 100, 1_000))
    own = BudgetRules(everybody=Caps(100, None), tiers={"free": TierCaps(total=Caps(95, 400))})
    assert accounts_of(KEY, "an", "free", own)[0] == Account("tier:free", 95, 400)


def test_a_tier_that_nobody_has_named_is_the_free_one_together_with_it():
    assert accounts_of(KEY, "an", "gold", RULES) == accounts_of(KEY, "an", "free", RULES)
    assert [tier_of(RULES)(name) for name in ("gold", "free", "paid")] == ["free", "free", "paid"]
    assert accounts_of(KEY, "an", "paid", RULES) == (Account("tier:paid", None, 700), Account("all", 100, 1_000))


def test_without_caps_there_are_no_accounts_and_for_the_alert_line_everybody_is_counted():
    assert accounts_of(KEY, "an", "free", BudgetRules()) == ()
    rules = BudgetRules(alert_day_nanousd=20)
    assert accounts_of(KEY, "an", "free", rules) == (Account("all", COUNTED, None),)
    assert accounts_of(KEY, "an", "paid", BudgetRules(everybody=Caps(9, 90), alert_day_nanousd=20)) == (
        Account("tier:free", 7, 72),
        Account("all", 9, 90),
    )


def exhausted(*accounts: Account, upper: int = NANOUSD):
    return Budgets().reserve(MoneyAsk("a", accounts, upper, NOON_NS), 0.0)


def test_a_refusal_is_in_the_form_of_anthropics_own_gateway():
    told = refused(exhausted(Account("user:an", 0)), NOON_NS)
    assert (told.status, told.error_type, told.error_code) == (429, "billing_error", "budget_exceeded")
    assert told.message == (
        "spend limit reached (daily; resets 2026-08-08 00:00 UTC): your budget of $0.00 a day is used up."
    )
    assert (told.retryable, told.retry_after_s, told.limit) == (False, 12 * 3600.0, 0.0)
    assert b"x-should-retry: false\r\n" in answer(told, call_id="call_1").header_lines


@pytest.mark.parametrize(
    ("account", "text"),
    [
        (Account("key:k1", None, NANOUSD // 2), "(monthly; resets 2026-09-01 00:00 UTC): this key's budget of $0.50 a"),
        (Account("tier:free", 0), "the budget of the tier 'free' together of $0.00 a day"),
        (Account("all", 0), "the budget of everybody together of $0.00 a day"),
    ],
)
def test_a_refusal_names_the_budget(account, text):
    assert text in refused(exhausted(account), NOON_NS).message


def test_a_refusal_says_what_is_left_when_it_is_only_too_little():
    told = refused(exhausted(Account("user:an", NANOUSD // 4)), NOON_NS)
    assert told.message.endswith("a day has $0.2500 left, and this request may cost more.")


def test_what_is_left_pays_for_fewer_tokens_or_for_too_few():
    catalog = packaged()
    bound = lambda tokens: upper_bound(1_000, tokens, "claude-sonnet-4-6", NOON_NS, catalog)  # noqa: E731
    per_token = bound(2) - bound(1)
    for cap in (bound(300), bound(300) + per_token - 1, bound(400) - 1):
        verdict = exhausted(Account("user:an", cap), upper=bound(4_096))
        tokens = clamped_max_tokens(
            verdict, max_tokens=4_096, upper_nanousd=bound(4_096), output_nanousd=per_token, floor=256
        )
        assert tokens is not None
        assert bound(tokens) <= cap
        assert bound(tokens + 2) > cap
    poor = exhausted(Account("user:an", bound(255)), upper=bound(4_096))
    assert (
        clamped_max_tokens(poor, max_tokens=4_096, upper_nanousd=bound(4_096), output_nanousd=per_token, floor=256)
        is None
    )


def test_a_stream_that_is_cut_says_why():
    told = cut_error("key:k1", 2 * NANOUSD)
    assert (told.error_type, told.retryable, told.limit) == ("billing_error", False, 2.0)
    assert "this key's budget is used up" in told.message


def test_dollars_become_nano_dollars():
    assert [nanousd(usd) for usd in (None, 0, 0.1, 20.0, 1_000_000)] == [None, 0, 10**8, 2 * 10**10, 10**15]
    for wrong in (-1, 1_000_001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a budget is 0 to"):
            nanousd(wrong)


def test_the_alert_is_said_once_a_day_with_the_day_and_the_sum():
    line, rules = AlertLine(), BudgetRules(alert_day_nanousd=20 * NANOUSD)
    uses = (AccountUse("all", "day", 21 * NANOUSD, 3), AccountUse("all", "month", 300 * NANOUSD, 0))
    assert spend_alert(line, uses[1:], rules, NOON_NS) is None
    assert spend_alert(line, uses, rules, NOON_NS) == (
        "Everybody together has spent $21.00 on 2026-08-07 (UTC); the alert line is $20.00."
    )
    assert spend_alert(line, uses, rules, NOON_NS) is None


def test_the_ledger_is_read_at_once_then_every_ten_minutes_and_sooner_when_something_is_uncertain():
    times = SeedTimes()
    assert times.due(100.0, uncertain=False)
    assert not times.due(129.0, uncertain=True)
    assert times.due(130.0, uncertain=True)
    assert not times.due(729.0, uncertain=False)
    assert times.due(730.0, uncertain=False)
    times.soon()
    assert times.due(731.0, uncertain=False)
    assert not times.due(760.0, uncertain=False)
    assert times.due(761.0, uncertain=False), "once more, for what was under way"
    assert not times.due(1_360.0, uncertain=False)
    assert times.due(1_361.0, uncertain=False)
