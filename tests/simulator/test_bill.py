"""Charges worked out by hand from the published prices, to the nano-dollar."""

from datetime import date
from typing import Any

import pytest

from headgate.simulator.bill import Bill, cost_nanousd
from headgate.simulator.models import load_catalogue
from headgate.simulator.usage import Usage

CATALOGUE = load_catalogue()
TODAY = date(2026, 11, 22)


def cost(name: str, day: date = TODAY, **usage: Any) -> int:
    model = CATALOGUE.find(name)
    assert model is not None
    return cost_nanousd(CATALOGUE, model, Usage(**usage), day)


ALL: dict[str, Any] = {
    "input_tokens": 1_000,
    "read_tokens": 10_000,
    "write_5m_tokens": 100,
    "write_1h_tokens": 10,
    "output_tokens": 500,
}


@pytest.mark.parametrize(
    ("name", "nanousd"),
    [
        # 1,000 x $3 + 10,000 x $0.30 + 100 x $3.75 + 10 x $6 + 500 x $15, a million tokens each
        ("claude-sonnet-4-6", 13_935_000),
        ("claude-opus-4-7", 23_225_000),
        ("claude-haiku-4-5", 4_645_000),
        ("claude-sonnet-5-5", 8_290_000),
        ("claude-opus-5-5", 16_580_000),
        ("claude-fable-5-2", 31_160_000),
        ("claude-fable-5-1", 38_950_000),
        ("claude-fable-5", 46_450_000),
        ("claude-haiku-5-5", 464_500),
        ("claude-3-5-haiku-20241022", 3_716_000),
    ],
)
def test_every_kind_of_token_has_its_price(name: str, nanousd: int) -> None:
    assert cost(name, **ALL) == nanousd


def test_the_band_of_haiku_5_5_counts_the_whole_prompt_and_prices_the_whole_request() -> None:
    assert cost("claude-haiku-5-5", input_tokens=50_000, read_tokens=50_000, output_tokens=1_000) == 6_000_000
    assert cost("claude-haiku-5-5", input_tokens=50_000, read_tokens=50_001, output_tokens=1_000) == 30_000_050


def test_modifiers_stack() -> None:
    assert cost("claude-sonnet-4-6", service_tier="batch", **ALL) == 6_967_500
    assert cost("claude-sonnet-4-6", inference_geo="us", **ALL) == 15_328_500
    assert cost("claude-sonnet-4-6", inference_geo="us", service_tier="batch", **ALL) == 7_664_250
    assert cost("claude-haiku-4-5", inference_geo="us", **ALL) == 4_645_000


def test_fast_mode_has_its_own_row() -> None:
    assert cost("claude-opus-5-5", speed="fast", **ALL) == 33_160_000
    assert cost("claude-opus-5-5", speed="standard", **ALL) == 16_580_000


def test_the_price_of_the_day_is_charged() -> None:
    assert cost("claude-sonnet-5-5", date(2026, 10, 6), read_tokens=1_000) == 200_000
    assert cost("claude-sonnet-5-5", date(2026, 10, 7), read_tokens=1_000) == 100_000
    assert cost("claude-sonnet-4-6", date(2026, 3, 12), input_tokens=200_001) == 1_200_006_000
    assert cost("claude-sonnet-4-6", date(2026, 3, 13), input_tokens=200_001) == 600_003_000


def test_searches_cost_a_cent_and_are_never_halved() -> None:
    assert cost("claude-sonnet-4-6", web_searches=3) == 30_000_000
    assert cost("claude-sonnet-4-6", web_searches=3, service_tier="batch") == 30_000_000


def test_half_a_nano_dollar_rounds_up_once() -> None:
    assert cost("claude-haiku-5-5", input_tokens=3, read_tokens=1, service_tier="batch") == 155
    assert cost("claude-haiku-5-5", read_tokens=1, service_tier="batch", inference_geo="us") == 6


def test_the_total_is_the_sum_of_the_lines() -> None:
    bill = Bill(CATALOGUE)
    for number, name in enumerate(("claude-sonnet-4-6", "claude-haiku-4-5", "claude-sonnet-4-6"), start=1):
        model = CATALOGUE.find(name)
        assert model is not None
        bill.charge(
            model,
            Usage(**ALL),
            request=number,
            message_id="",
            request_id="",
            organization="org",
            workspace="w",
            wall_s=1_795_000_000.0 + number,
            complete=True,
        )
    assert bill.total.cost_nanousd == sum(line.cost_nanousd for line in bill.lines) == 32_515_000
    assert bill.by_model["claude-sonnet-4-6"].requests == 2
    assert bill.month_nanousd("org", 1_795_000_000.0) == 32_515_000
    assert bill.month_nanousd("other", 1_795_000_000.0) == 0
