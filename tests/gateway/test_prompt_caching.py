"""Prompt caching as calls drive it: nothing of a call is left behind, whatever becomes of it."""

import json
import random
from typing import Any

import pytest

from headgate.gateway.prompt_caching import PromptCaching
from headgate.gateway.settings import CacheSection
from headgate.policy.prompt_cache import CachePlan
from headgate.policy.records import Principal
from headgate.wire.catalog import packaged
from headgate.wire.message import scan
from headgate.wire.usage import Usage

SONNET = "claude-sonnet-4-6"
NOW_NS = 1_795_000_000 * 10**9


class Town:
    """One `PromptCaching` with a clock that a test moves, and who was woken."""

    def __init__(self, **section: Any) -> None:
        self.now = 100.0
        self.woken: list[str] = []
        self.caching = PromptCaching(
            CacheSection(**section), packaged(), clock=lambda: self.now, now_ns=lambda: NOW_NS + round(self.now * 1e9)
        )

    def plan(self, system: str, *, key_plans: bool = True, header_lines: bytes = b"", **more: Any) -> CachePlan:
        body = {"model": SONNET, "max_tokens": 9, "system": system, "messages": [{"role": "user", "content": "?"}]}
        principal = Principal(
            key_id="k", user="u", tier="free", scopes=frozenset({"messages"}), models=(), plan_cache=key_plans
        )
        return self.caching.plan(
            scan(json.dumps(body | more).encode()),
            principal,
            endpoint="",
            user="u",
            model=SONNET,
            arm="",
            at_ns=NOW_NS,
            header_lines=header_lines,
        )

    def goes(self, plan: CachePlan, call_id: str) -> bool:
        return self.caching.goes_ahead(plan, call_id, lambda: self.woken.append(call_id))

    def began(self, plan: CachePlan, message_id: str = "msg_1") -> None:
        usage = Usage(input_tokens=5, cache_write_5m_tokens=3_000)
        self.caching.began(plan, model=SONNET, usage=usage, message_id=message_id, diagnostics=b"")


def handbook(number: int = 0, tokens: int = 3_000) -> str:
    return (f"handbook {number}: " + "answer kindly and never invent a price or a name. " * tokens)[: tokens * 4]


def test_one_call_writes_and_the_others_go_on_when_its_answer_begins() -> None:
    town = Town()
    plans = [town.plan(handbook()) for _ in range(3)]
    assert [town.goes(plan, f"call_{n}") for n, plan in enumerate(plans)] == [True, False, False]
    town.caching.sent(plans[0], "call_0")
    town.woken.clear()
    town.began(plans[0])
    assert town.woken == ["call_1", "call_2"]
    assert town.caching.wait_until(plans[1], "call_1") is None
    for number, plan in enumerate(plans):
        town.caching.leave(plan, f"call_{number}")
    assert len(town.caching) == 0
    assert town.plan(handbook()).cold == b"", "it is in the cache now"


def test_a_writer_without_a_turn_is_not_waited_for() -> None:
    town = Town(single_flight_wait_s=2.0)
    plans = [town.plan(handbook()) for _ in range(2)]
    assert town.goes(plans[0], "held")
    assert not town.goes(plans[1], "free")
    assert town.caching.wait_until(plans[1], "free") == 102.0
    town.now = 102.0
    assert town.caching.wait_until(plans[1], "free") is None
    assert town.goes(plans[1], "free"), "it writes"


def test_who_goes_on_before_the_writer_has_answered_will_read_what_it_writes() -> None:
    town = Town(single_flight_wait_s=2.0)
    plans = [town.plan(handbook()) for _ in range(2)]
    assert town.goes(plans[0], "writer")
    assert not town.goes(plans[1], "other")
    assert town.caching.to_be_read(plans[1], "other") == 0
    town.caching.sent(plans[0], "writer")
    town.now += 2.0
    assert town.caching.wait_until(plans[1], "other") is None
    assert 2_000 < town.caching.to_be_read(plans[1], "other") <= plans[1].prefix_tokens
    assert town.caching.to_be_read(plans[0], "writer") == 0


@pytest.mark.parametrize("single_flight", [True, False])
def test_nothing_is_left_of_a_thousand_prefixes_whatever_becomes_of_their_calls(single_flight: bool) -> None:
    """Each call ends in `leave`, as the pipeline promises: after an answer, a failure, a retry, or nothing at all."""
    town, dice = Town(single_flight=single_flight), random.Random(7)
    under_way: list[tuple[CachePlan, str]] = []
    for number in range(1_200):
        plan = town.plan(handbook(number % 1_000, 1_500))
        call_id = f"call_{number}"
        town.goes(plan, call_id)
        under_way.append((plan, call_id))
        for what in dice.sample(["sent", "began", "leave", "goes", "wait", "later"], 3):
            some, its = dice.choice(under_way)
            match what:
                case "sent":
                    town.caching.sent(some, its)
                case "began":
                    town.began(some)
                case "leave":
                    town.caching.leave(some, its)
                case "goes":
                    town.goes(some, its)
                case "wait":
                    town.caching.wait_until(some, its)
                case "later":
                    town.now += dice.random()
    if single_flight:
        assert len(town.caching) > 100
    for plan, call_id in under_way:
        town.caching.leave(plan, call_id)
        town.caching.leave(plan, call_id)
    assert len(town.caching) == 0


def test_only_bodies_that_are_ours_to_change_ask_why_they_missed() -> None:
    """A key without planning and Claude Code get what they sent, also where a prompt of the family missed."""
    town = Town()
    for number in range(4):
        town.began(town.plan(f"It is {number}:00 o'clock. " + handbook()), f"msg_{number}")
        town.now += 10
    assert b'"diagnostics":{"previous_message_id":"msg_3"}' in town.plan("It is 5:00 o'clock. " + handbook()).body
    for untouched in (
        town.plan("It is 6:00 o'clock. " + handbook(), key_plans=False),
        town.plan("It is 7:00 o'clock. " + handbook(), header_lines=b"user-agent: claude-cli/2.1.0\r\n"),
        town.plan("It is 8:00 o'clock. " + handbook(), header_lines=b"X-Claude-Code-Session-Id: a\r\n"),
    ):
        assert b"diagnostics" not in untouched.body
        assert b"cache_control" not in untouched.body


def test_a_retry_waits_for_nobody_where_its_prefix_is_warm_by_then() -> None:
    town = Town()
    plans = [town.plan(handbook()) for _ in range(3)]
    assert [town.goes(plan, f"call_{n}") for n, plan in enumerate(plans)] == [True, False, False]
    town.caching.sent(plans[0], "call_0")
    town.began(plans[0])
    for number, plan in enumerate(plans):
        town.caching.leave(plan, f"call_{number}")
    assert [town.goes(plan, f"call_{n}") for n, plan in enumerate(plans)] == [True, True, True]
    assert len(town.caching) == 0
