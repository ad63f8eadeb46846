"""An outage of every model, one person who asks a thousand times, one person with several keys.

Failure-model §2.7 and §4.4, shortened; the drills are as long as the issue has them, and have the bars that a busy
machine could break.
"""

from __future__ import annotations

import asyncio

import pytest
from load.crowd import quantile
from load.stage import Place
from load.storms import (
    ARRIVALS_RATIO_MAX,
    ATTEMPTS_MAX,
    ATTEMPTS_RATIO,
    ATTEMPTS_START,
    CROWDED_RPM,
    WAIT_P95_S_MAX,
    Crowding,
    KeyStorm,
    OutageStorm,
    crowded_gateway_settings,
    crowded_simulator_options,
    crowding_storm,
    key_storm,
    keys_of,
    outage_storm,
)
from tests.system.conftest import Gateway, Stack

SHORT_OUTAGE = OutageStorm(rate_per_s=25, steady_s=10.5, outage_s=2, after_s=7.5, breaker_open_s=0.5, people=200)


def started(stack: Stack, simulator_options: list[str], settings: dict[str, str]) -> tuple[Gateway, Place]:
    """A simulator, a gateway and an app's key."""
    simulator = stack.simulator("--speed", "1", *simulator_options)
    gateway = stack.gateway(simulator.url, limits=True, **settings)
    key = gateway.key("app", "--scope", "app", "--scope", "messages", "--scope", "admin:read")
    return gateway, Place(simulator.url, gateway.url, key, gateway.operator_url, gateway.environment)


@pytest.fixture(scope="module")
def crowded(shared_stack: Stack) -> tuple[Gateway, Place]:
    """Where ten requests a second pass, and everybody may wait for as long as it takes."""
    return started(shared_stack, crowded_simulator_options(CROWDED_RPM), crowded_gateway_settings(CROWDED_RPM))


def test_an_outage_of_everything_makes_no_storm_of_retries_nor_a_herd_after_it(stack: Stack) -> None:
    storm = SHORT_OUTAGE
    _, place = started(stack, storm.simulator_options(), storm.gateway_settings())
    found = asyncio.run(outage_storm(storm, place))

    assert found.attempts_in_outage() <= ATTEMPTS_RATIO * found.requests_in_outage() + ATTEMPTS_START
    assert found.attempts_max() <= ATTEMPTS_MAX
    # What a busy machine lets go at once is no herd of ours.
    assert found.arrivals_peak() <= ARRIVALS_RATIO_MAX * max(storm.rate_per_s, found.asked_peak())
    after = [one for one in found.heard if one.asked_at >= found.end]
    assert [one.error for one in after if not one.whole] == []
    last = [one.total_s for one in after if one.asked_at >= found.end + storm.after_s - 2]
    assert max(last) < 5


@pytest.mark.parametrize("own_limits", [True, False])
def test_twenty_people_hardly_notice_one_who_asks_a_thousand_times(
    crowded: tuple[Gateway, Place], own_limits: bool
) -> None:
    crowding = Crowding(for_s=4, every_s=2, own_limits=own_limits)
    found = asyncio.run(crowding_storm(crowding, crowded[1]))

    assert len(found.others) >= 2 * crowding.others - 1
    assert [one.error for one in found.others if not one.whole] == []
    p95_s = quantile(found.waits_s(), 0.95)
    assert p95_s is not None
    assert p95_s <= WAIT_P95_S_MAX
    if own_limits:
        assert {one.error for one in found.greedy if not one.whole} == {"429 user_queue_full"}


@pytest.mark.parametrize("own_limits", [True, False])
def test_several_keys_of_one_person_gain_nothing(crowded: tuple[Gateway, Place], own_limits: bool) -> None:
    storm = KeyStorm(keys=2, requests=100, for_s=4, own_limits=own_limits)
    found = asyncio.run(key_storm(storm, crowded[1], keys_of(storm, crowded[0].key)))
    assert found.answered["one key"] > 10
    assert abs(found.answered["many keys"] - found.answered["one key"]) <= 2, found.answered


@pytest.mark.drill
def test_the_outage_at_its_full_length(stack: Stack) -> None:
    storm = OutageStorm()
    _, place = started(stack, storm.simulator_options(), storm.gateway_settings())
    found = asyncio.run(outage_storm(storm, place))
    assert [bar for bar in found.bars() if not bar.met] == []


@pytest.mark.drill
@pytest.mark.parametrize("own_limits", [True, False])
def test_the_crowding_at_its_full_length(crowded: tuple[Gateway, Place], own_limits: bool) -> None:
    found = asyncio.run(crowding_storm(Crowding(own_limits=own_limits), crowded[1]))
    assert [bar for bar in found.bars() if not bar.met] == []


@pytest.mark.drill
@pytest.mark.parametrize("own_limits", [True, False])
def test_ten_keys_at_their_full_length(crowded: tuple[Gateway, Place], own_limits: bool) -> None:
    storm = KeyStorm(own_limits=own_limits)
    found = asyncio.run(key_storm(storm, crowded[1], keys_of(storm, crowded[0].key)))
    assert [bar for bar in found.bars() if not bar.met] == []
