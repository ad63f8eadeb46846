"""One call's money: the bound it reserves, what is lowered, cut, kept over a diversion, and given back."""

import asyncio
import json

import pytest

from headgate.gateway.budgets import BudgetRules, Caps
from headgate.gateway.guards import AlertSink, SpendGuard, velocity_policy
from headgate.gateway.purse import Purse, Purses
from headgate.policy.budgets import NANOUSD_MAX, Budgets, Spent
from headgate.policy.pricing import price, upper_bound
from headgate.policy.records import Plan, Principal, Refused
from headgate.policy.token_estimate import input_tokens
from headgate.storage.money import LocalMoney
from headgate.wire.catalog import packaged
from headgate.wire.message import scan
from headgate.wire.usage import Usage

USD = 10**9
NOON_NS = 1_785_000_000 * USD
CATALOG = packaged()
SONNET, OPUS, HAIKU = "claude-sonnet-4-6", "claude-opus-4-7", "claude-haiku-4-5"


class Bank:
    """A count, and calls that are paid from it."""

    def __init__(self, **rules) -> None:
        async def read(_ids: object, at_ns: int) -> Spent:
            return Spent(at_ns, {})

        self.alerts = AlertSink(None, now_ns=lambda: NOON_NS)
        guard = SpendGuard(
            velocity_policy(usd_per_10_min=2, history_factor=5, hold_s=60),
            self.alerts,
            clock=lambda: 0.0,
        )
        self.money = LocalMoney(Budgets(), clock=lambda: 0.0, now_ns=lambda: NOON_NS, read=read)
        self.purses = Purses(self.money, guard, CATALOG)
        self.rules = BudgetRules(**rules)
        self.numbers = iter(range(1000))

    def purse(self, *, day_nanousd: int | None = USD) -> Purse:
        key = Principal("k1", "an", budget_day_nanousd=day_nanousd)
        call_id = f"call_{next(self.numbers)}"
        return Purse(self.purses, self.rules, key, user="an", tier="free", call_id=call_id, at_ns=NOON_NS)

    def stands(self, account: str = "key:k1") -> tuple[int, int]:
        """Spent and reserved today."""
        use = self.money.snapshot([account])[0]
        return use.spent_nanousd, use.reserved_nanousd


def body_of(*, model: str = SONNET, max_tokens: object = 1_000, **more) -> bytes:
    fields = {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": "Xin chào"}]}
    return json.dumps(fields | more).encode()


def plan_of(body: bytes, *models: str) -> Plan:
    request = scan(body)
    return Plan(
        models=models or (request.model,),
        body=body,
        streamed=False,
        input_tokens_estimate=input_tokens(request),
        max_tokens=request.max_tokens,
        deadline=20.0,
    )


def reserve(purse: Purse, body: bytes, *models: str, number: int = 1, speed: str = "standard") -> bytes | Refused:
    return asyncio.run(purse.reserve(number, plan_of(body, *models), body, 0.0, speed=speed))


def held(body: bytes, *models: str, speed: str = "standard") -> int:
    """What a call with this body holds."""
    bank = Bank()
    reserved = reserve(bank.purse(day_nanousd=NANOUSD_MAX), body, *models, speed=speed)
    assert not isinstance(reserved, Refused)
    return bank.stands()[1]


def test_what_is_held_is_never_less_than_the_dearest_way_to_answer():
    for model in (SONNET, OPUS, HAIKU, "claude-opus-4-8", "claude-of-tomorrow"):
        for kind, more in {
            "cache_write_1h_tokens": {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
            "cache_write_5m_tokens": {"cache_control": {"type": "ephemeral"}},
            "input_tokens": {},
        }.items():
            usage = Usage(**{kind: 1_050}, output_tokens=1_000, inference_geo="us")
            cost = price(usage, model, NOON_NS, CATALOG).cost_nanousd
            assert cost <= held(body_of(model=model, **more)) < 1.3 * cost, (model, kind)


def test_a_plan_with_a_dearer_model_holds_enough_for_that_one():
    assert held(body_of(model=HAIKU), HAIKU, SONNET) == held(body_of(model=HAIKU), SONNET)


def test_speed_is_paid_by_the_model_that_has_it():
    fast = held(body_of(model="claude-opus-4-8"), "claude-opus-4-8", SONNET, speed="fast")
    assert fast == held(body_of(model="claude-opus-4-8"), speed="fast") > held(body_of(model="claude-opus-4-8"))


@pytest.mark.parametrize("max_tokens", [10**12, 10**30, 32_000.5, "many", -5, None, 128_000.0])
def test_a_number_that_no_model_takes_holds_no_more_than_the_most_a_model_puts_out(max_tokens):
    most = CATALOG.resolve(SONNET).max_output_tokens
    assert held(body_of(max_tokens=max_tokens)) == pytest.approx(held(body_of(max_tokens=most)), rel=0.01)
    unknown = held(body_of(model="claude-of-tomorrow", max_tokens=max_tokens))
    assert unknown < 100 * USD


def test_a_prompt_that_is_to_be_kept_warm_holds_no_output():
    assert held(body_of(max_tokens=0)) < held(body_of(max_tokens=1))


def test_without_a_cap_nobody_is_refused_whatever_they_ask_for():
    bank = Bank(alert_day_nanousd=20 * USD)
    for number in range(50):
        purse = bank.purse(day_nanousd=None)
        assert isinstance(reserve(purse, body_of(max_tokens=10**17), number=number + 1), bytes)


def test_where_all_is_only_counted_the_body_is_not_looked_through():
    bank = Bank(alert_day_nanousd=20 * USD)
    purse = bank.purse(day_nanousd=None)
    url = {"type": "document", "source": {"type": "url", "url": "https://shop.vn/a.pdf"}}
    body = body_of(messages=[{"role": "user", "content": [url]}])
    assert reserve(purse, body) == body
    assert 0 < bank.stands("all")[1] < held(body)
    purse.settle(5 * USD)
    assert bank.stands("all") == (5 * USD, 0)


def test_a_lowered_max_tokens_is_kept_when_the_attempt_is_diverted():
    bank = Bank(clamp=True)
    purse = bank.purse(day_nanousd=held(body_of(max_tokens=1_000)))
    first = reserve(purse, body_of(max_tokens=50_000), SONNET, HAIKU)
    assert isinstance(first, bytes)
    assert 900 <= scan(first).max_tokens <= 1_000
    diverted = reserve(purse, body_of(model=HAIKU, max_tokens=50_000), SONNET, HAIKU)
    assert isinstance(diverted, bytes)
    assert scan(diverted).max_tokens == scan(first).max_tokens
    assert bank.stands()[1] <= held(body_of(max_tokens=1_000))


def test_a_thinking_budget_that_would_not_fit_is_refused_here():
    bank = Bank(clamp=True)
    cap = held(body_of(max_tokens=3_000))
    thinking = {"type": "enabled", "budget_tokens": 4_000}
    assert isinstance(reserve(bank.purse(day_nanousd=cap), body_of(max_tokens=50_000, thinking=thinking)), Refused)
    thinking["budget_tokens"] = 1_024
    lowered = reserve(bank.purse(day_nanousd=cap), body_of(max_tokens=50_000, thinking=thinking))
    assert isinstance(lowered, bytes)
    assert scan(lowered).max_tokens > 1_024


def test_an_attempt_that_was_not_sent_gives_back_what_it_held():
    bank = Bank()
    purse = bank.purse()
    reserve(purse, body_of())
    purse.close(0, sent=0)
    assert bank.stands() == (0, 0)


def test_what_a_broken_call_sent_is_left_to_the_lease():
    bank = Bank()
    purse = bank.purse()
    reserve(purse, body_of())
    purse.close(0, sent=1)
    assert bank.stands()[1] > 0


def test_a_cut_names_the_account_that_is_empty_and_its_cap():
    bank = Bank(everybody=Caps(day_nanousd=100 * USD))
    purse = bank.purse(day_nanousd=USD // 10)
    reserve(purse, body_of())
    cuts: list[int] = []
    purse.progressed(Usage(output_tokens=5_000), SONNET, lambda: cuts.append(1))
    assert cuts == []
    purse.progressed(Usage(output_tokens=50_000), SONNET, lambda: cuts.append(1))
    purse.progressed(Usage(output_tokens=60_000), SONNET, lambda: cuts.append(1))
    assert cuts == [1]
    assert purse.cut is not None
    assert (purse.cut.error_code, purse.cut.limit) == ("budget_exceeded", 0.1)
    assert "this key's budget" in purse.cut.message


def test_a_verdict_about_an_attempt_that_is_over_cuts_nobody():
    bank = Bank()
    late = []
    bank.money.spend = lambda identity, nanousd, over: late.append(over)  # as Redis does: the answer comes later
    purse = bank.purse()
    reserve(purse, body_of())
    purse.progressed(Usage(output_tokens=5), SONNET, lambda: pytest.fail("it was over"))
    purse.settle(5)
    reserve(purse, body_of(), number=2)
    late[0]()
    assert purse.cut is None


def test_the_bound_is_what_pricing_says_it_is():
    body = body_of()
    assert held(body) == upper_bound(
        min(len(body), 2 * input_tokens(scan(body))) + 1_000, 1_000, SONNET, NOON_NS, CATALOG, cache_writes="none"
    )


def test_an_empty_budget_is_told_to_the_operator_once():
    bank = Bank()
    refusals = [reserve(bank.purse(day_nanousd=1), body_of()) for _ in range(3)]
    assert [one.error_code for one in refusals] == ["budget_exceeded"] * 3
    assert bank.alerts.repeats("budget_exhausted", "key:k1") == 2
    assert bank.alerts.end("budget_exhausted", "key:k1", by="test"), "it was raised"


def test_a_question_of_our_own_in_the_body_holds_nothing_more():
    bank, body = Bank(), body_of()
    asking = body[:-1] + b',"diagnostics":{"previous_message_id":"msg_1"}}'
    purse = bank.purse(day_nanousd=NANOUSD_MAX)
    assert asyncio.run(purse.reserve(1, plan_of(body), asking, 0.0, speed="standard")) == asking
    assert bank.stands()[1] == held(body)
