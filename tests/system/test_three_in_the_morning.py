"""The night of the article in twenty seconds, and the article's own loop beside it. `load/` has it at its own pace.

40 people at once and 60 after them, 4,500 tokens each, on limits that let 6.7 a second through; every 20th call fails,
and Sonnet is gone for the middle third.
"""

from __future__ import annotations

import asyncio

import pytest
from load.stage import Place
from load.three_in_the_morning import (
    HAIKU,
    LIMITED_SHARE_MAX,
    SONNET,
    USED_SHARE_MIN,
    Night,
    Outcome,
    by_the_plain_loop,
    through_headgate,
)
from tests.system.conftest import Stack

SHORT = Night(speedup=20).scaled(0.2)


def through(stack: Stack, night: Night) -> tuple[Place, str]:
    """A gateway for the night, and a simulator for the plain loop."""
    options = night.simulator_options()
    simulator, beside = stack.simulator(*options), stack.simulator(*options)
    gateway = stack.gateway(simulator.url, limits=True, **night.gateway_settings())
    key = gateway.key("app", "--scope", "app", "--scope", "messages", "--scope", "admin:read")
    return Place(simulator.url, gateway.url, key, gateway.operator_url, gateway.environment), beside.url


async def both(night: Night, place: Place, simulator_url: str) -> tuple[Outcome, Outcome]:
    """The same crowd twice, at the same time."""
    return await asyncio.gather(through_headgate(night, place), by_the_plain_loop(night, simulator_url))


def test_everybody_is_answered_while_the_plain_loop_fails(stack: Stack) -> None:
    place, simulator_url = through(stack, SHORT)
    headgate, plain = asyncio.run(both(SHORT, place, simulator_url))

    # The night is as hard as it is meant to be: without a queue the limits refuse, and an outage is an error.
    assert plain.limited() > 0.05 * len(plain.calls)
    assert plain.answered() < 0.95 * len(plain.heard)
    faulty = sum(headgate.faulty().values())
    assert 0.02 * len(headgate.calls) <= faulty <= 0.07 * len(headgate.calls)

    assert dict(headgate.errors()) == {}
    assert headgate.answered() == len(headgate.heard) == len(SHORT.arrivals_s())
    assert headgate.limited_share() <= LIMITED_SHARE_MAX
    assert {SONNET, HAIKU} == set(headgate.models())
    # All wait, since 40 came at once; nobody longer than the crowd and the outage need, with time for a busy machine.
    assert max(headgate.waits_s()) < SHORT.deadline_s
    assert headgate.waiting_max >= SHORT.people / 2
    assert headgate.used_share is not None
    assert headgate.used_share >= USED_SHARE_MIN


@pytest.mark.drill
def test_the_whole_night(stack: Stack) -> None:
    night = Night()
    place, _ = through(stack, night)
    headgate = asyncio.run(through_headgate(night, place))
    assert [bar for bar in headgate.bars() if not bar.met] == []
