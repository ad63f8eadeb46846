"""What docs/fifty-thousand-a-day.md says, on some minutes of its day, and its arithmetic by hand."""

from dataclasses import replace

import pytest
from load.fifty_thousand import (
    ARTICLE,
    COUNTED_ON,
    REQUESTS,
    SHORT,
    TARGET_USD,
    WAYS,
    App,
    Asked,
    Billed30,
    Way,
    asked_of_a_day,
    measure,
    over_sockets,
    run,
    system_text,
)

from headgate.simulator.tokens import count

HAIKU = "claude-haiku-5-5"
WAY = {way.name: way for way in WAYS}


def minutes_of_the_day(app: App, requests: int) -> list[Asked]:
    """So many requests, as close to one another as in the whole day."""
    return [replace(one, at_s=one.at_s * requests / REQUESTS) for one in asked_of_a_day(app, requests, seed=2)]


def billed(app: App, way: Way, model: str, requests: int = 400) -> Billed30:
    return run(app, minutes_of_the_day(app, requests), way, model)


def test_the_app_has_the_tokens_it_is_described_with() -> None:
    assert count(system_text(ARTICLE), "old") == 8_000
    asked = asked_of_a_day(ARTICLE, 50, seed=2)
    assert {(count(one.question, "old"), count(one.answer, "old")) for one in asked} == {(300, 250)}


@pytest.mark.parametrize(
    ("model", "usd_request"),
    [
        # System 8,000 read at 0.30, question and roles 304 at 3.00, answer 250 at 15.00 dollars a million.
        (COUNTED_ON, (8_008 * 0.30 + 304 * 3.00 + 250 * 15.00) / 1e6),
        # The same texts are 9,200, 324 and 267 tokens there.
        (HAIKU, (9_208 * 0.01 + 324 * 0.10 + 267 * 0.50) / 1e6),
    ],
)
def test_a_request_costs_what_the_page_reckons_by_hand(model: str, usd_request: float) -> None:
    one = billed(ARTICLE, WAY["planner"], model, 600)
    assert one.writes == 1
    # The first write is 0.7 % of what 600 requests cost, and nothing of 50,000.
    assert one.usd_request == pytest.approx(usd_request, rel=0.02)


def test_sonnet_is_many_times_above_the_target_and_haiku_below_it_when_short() -> None:
    everything = WAYS[-1]
    assert billed(ARTICLE, everything, COUNTED_ON).usd_month > 20 * TARGET_USD
    assert billed(ARTICLE, WAY["planner"], HAIKU).usd_month > TARGET_USD
    assert billed(SHORT, WAY["planner"], HAIKU).usd_month < TARGET_USD


def test_haiku_4_5_does_not_cache_three_thousand_tokens() -> None:
    one = billed(SHORT, WAY["planner"], "claude-haiku-4-5", 100)
    assert (one.read_tokens, one.writes) == (0, 0)


def test_a_batch_without_marks_costs_more_than_none() -> None:
    planned = billed(ARTICLE, WAY["planner"], HAIKU).nanousd
    assert billed(ARTICLE, WAY["planner, batch not marked"], HAIKU).nanousd > planned
    assert billed(ARTICLE, WAY["planner, batch"], HAIKU).nanousd < planned


@pytest.mark.drill
def test_every_claim_holds_for_a_whole_day() -> None:
    assert [bar for bar in measure(REQUESTS, seed=2).bars() if not bar.met] == []


@pytest.mark.drill
def test_sockets_and_virtual_time_agree() -> None:
    bars = [bar for one in over_sockets(500, seed=2) for bar in one.bars()]
    assert [bar for bar in bars if not bar.met] == []
