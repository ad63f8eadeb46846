"""The article's $80 in two hours, as a loop over sockets: held to one call at a time, told of once, stopped at its cap.

The dollars are the article's and the hours are seconds: $40 an hour is a call of a dear model with a long prompt every
few moments here. That it is so at the article's pace is shown in virtual time (tests/gateway/test_guards.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import pytest
from tests.system.callers import Desk, asking
from tests.system.conftest import Simulator, Stack, until
from tests.system.raw_http import ask
from tests.system.scripted import Reply, run

USD = 10**9
MODEL = "claude-fable-5"
LOOP = "khóa-lặp"
BODY = asking("[[sim: tokens=1000]] " + "a long tale told again and again, " * 3_000, model=MODEL, max_tokens=1000)
"""Some $0.3 of a dear model's."""
LANES = 4


@pytest.fixture(scope="module")
def simulator(shared_stack: Stack) -> Simulator:
    return shared_stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0.02", "--otps", "100000")


@pytest.fixture(scope="module")
def desk(shared_stack: Stack, simulator: Simulator) -> Desk:
    settings = {"VELOCITY__ENABLED": "true", "BUDGETS__ALERT_USD_DAY": "5"}
    return Desk.of(shared_stack.gateway(simulator.url, **settings))


@dataclass
class Runaway:
    """What was seen of the loop by who ran it, by Anthropic, and by the people beside it."""

    stopped: Reply | None = None
    others: list[Reply] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)
    """Its requests as the simulator had them, in order."""

    def at_once(self, number: int) -> int:
        """How many were under way when this one came."""
        came = self.sent[number]["received_s"]
        return sum(one["received_s"] <= came < one["ended_s"] for one in self.sent)


@pytest.fixture(scope="module")
def runaway(desk: Desk, simulator: Simulator) -> Runaway:
    """A loop of four lanes on a key with $20 a day, until it is refused, beside people who ask for something small."""
    (key,) = desk.keys({"name": LOOP, "budget_day_nanousd": 20 * USD})
    seen = Runaway()

    stopped: list[Reply] = []

    async def lane() -> None:
        while (reply := await desk.ask("", BODY, key=key)).status == 200:
            pass
        stopped.append(reply)

    async def others() -> None:
        number = 0
        while len(stopped) < LANES:
            number += 1
            seen.others.append(await desk.ask(f"khách-{number % 20}"))
            await asyncio.sleep(0.02)

    run(together(*(lane() for _ in range(LANES)), others()))
    seen.stopped = stopped[-1]
    seen.sent = [one for one in simulator.requests() if one["model"] == MODEL]
    return seen


def together(*coroutines: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, list[None]]:
    async def main() -> list[None]:
        return await asyncio.gather(*coroutines)

    return main()


def alerts(desk: Desk, kind: str, count: int = 1) -> list[dict[str, Any]]:
    """Those of a kind, once there are so many."""

    def read() -> list[dict[str, Any]] | None:
        found = [one for one in desk.get("/admin/alerts")["alerts"] if one["kind"] == kind]
        return found if len(found) >= count else None

    return list(until(read, what=f"an alert of {kind}"))


def test_it_is_held_to_one_call_at_a_time_before_four_dollars(runaway: Runaway) -> None:
    together_until = max(at for at in range(len(runaway.sent)) if runaway.at_once(at) > 1)
    nanousd = sum(one["cost_nanousd"] for one in runaway.sent[: together_until + 1])
    assert 1 * USD < nanousd < 4 * USD
    assert len(runaway.sent) - together_until > 20, "and it went on, one after another"


def test_it_is_stopped_at_its_budget(runaway: Runaway, desk: Desk) -> None:
    nanousd = sum(one["cost_nanousd"] for one in runaway.sent)
    reply = runaway.stopped
    assert reply is not None
    assert 18 * USD < nanousd <= 20 * USD
    assert (reply.status, reply.error["type"], reply.headers["x-should-retry"]) == (429, "billing_error", "false")
    assert "this key's budget of $20.00 a day" in reply.error["message"]
    (line,) = [one for one in desk.get("/admin/budgets")["budgets"] if one["account"].startswith("key:")]
    assert (line["spent_nanousd"], line["reserved_nanousd"]) == (nanousd, 0)


def test_others_do_not_feel_it(runaway: Runaway) -> None:
    assert len(runaway.others) > 20
    assert {one.status for one in runaway.others} == {200}
    assert max(int(one.headers["x-headgate-queue-ms"]) for one in runaway.others) == 0


def test_it_is_told_of_once_with_the_calls_that_caused_it(runaway: Runaway, desk: Desk) -> None:
    (alert,) = alerts(desk, "spend_velocity")
    assert (alert["subject"], alert["ended_at"]) == (f"user:{LOOP}", None)
    assert "It is held to one call at a time" in alert["message"]
    ledger = {one["call_id"]: one for one in desk.get("/admin/calls?limit=1000")["calls"]}
    assert alert["calls"]
    for call in alert["calls"]:
        assert ledger[call["call_id"]]["user"] == LOOP
        assert call["cost_nanousd"] == ledger[call["call_id"]]["cost_nanousd"] > 0
    assert len(desk.gateway.process.lines(event="alert", kind="spend_velocity")) == 1
    found = json.loads(desk.gateway.headgate("alerts", "--json").stdout)["alerts"]
    assert [one["id"] for one in found] == [one["id"] for one in desk.get("/admin/alerts")["alerts"]]


def test_the_same_request_over_and_over_is_told_as_a_loop(runaway: Runaway, desk: Desk) -> None:
    assert [one["subject"] for one in alerts(desk, "loop")] == [f"user:{LOOP}"]


def test_the_alert_line_of_a_day_is_told_once(runaway: Runaway, desk: Desk) -> None:
    (alert,) = alerts(desk, "budget_alert_line")
    assert "the alert line is $5.00" in alert["message"]


def test_an_operator_lets_it_go(runaway: Runaway, desk: Desk) -> None:
    subject = f"user:{LOOP}"
    (stands,) = [one for one in desk.get("/admin/velocity")["subjects"] if one["subject"] == subject]
    assert (stands["tripped"], stands["held_s"] > 3000) == (True, True)
    released = ask(
        desk.gateway.operator_url, "POST", f"/admin/velocity/{quote(subject)}/release", {"x-api-key": desk.key}
    )
    assert (released.status, released.json()) == (200, {"released": subject})
    (stands,) = [one for one in desk.get("/admin/velocity")["subjects"] if one["subject"] == subject]
    assert (stands["tripped"], stands["held_s"], stands["grace"]) == (False, 0, 2)
    (alert,) = until(
        lambda: [one for one in alerts(desk, "spend_velocity") if one["ended_at"]], what="the alert to be ended"
    )
    assert alert["ended_by"] == "desk"
    again = ask(desk.gateway.operator_url, "POST", f"/admin/velocity/{quote(subject)}/release", {"x-api-key": desk.key})
    assert again.status == 404
