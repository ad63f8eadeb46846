"""A model that is down: who answers instead, at what price, who waits, how it comes back. Money that has run out."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from tests.system.callers import HAIKU, OPUS, SONNET, Desk, asking, crowd, queue_ms, so_many, soon, together
from tests.system.conftest import Simulator, Stack, get_json, until
from tests.system.raw_http import ask
from tests.system.scripted import WHOLE, Act, Reply, ScriptedUpstream, body_of, failing, run

OLD_OPUS = "claude-opus-4-5"
SETTINGS = {
    "PACING__TIER": "scale",
    "PACING__BURST_S": "60",
    "TIERS__FREE__RPM": "100000",
    "RETRY__BASE_DELAY_S": "0.05",
    "BREAKER__OPEN_S": "1",
    "BREAKER__OPEN_S_MAX": "1",
    # No prefill there: what it does not take stays with the model that it was asked of.
    "ROUTING__FALLBACKS__CLAUDE_OPUS_4_5": "claude-sonnet-5",
}


def start(stack: Stack, **settings: str) -> tuple[Desk, Simulator]:
    """A gateway whose outages are short, and its simulator."""
    simulator = stack.simulator("--tier", "none")
    return Desk.of(stack.gateway(simulator.url, limits=True, **SETTINGS | settings)), simulator


@pytest.fixture
def pair(stack: Stack) -> tuple[Desk, Simulator]:
    return start(stack)


@pytest.fixture(scope="module")
def spending(shared_stack: Stack) -> tuple[Desk, Simulator]:
    return start(shared_stack)


@pytest.fixture
def upstream():
    """An upstream that plays what it is told."""
    playing = ScriptedUpstream()
    yield playing
    playing.close()


def outage(simulator: Simulator, model: str = SONNET, kind: str = "529") -> None:
    simulator.fault(outage={"kind": kind, "model": model})


def over(simulator: Simulator) -> None:
    """All faults are over."""
    get_json(f"{simulator.url}/sim/faults", method="DELETE")


def breaker(desk: Desk, model: str = SONNET) -> dict[str, Any]:
    found = [one for one in desk.get("/admin/limits")["breakers"] if one["model"] == model]
    return found[0] if found else {"state": "none"}


def of_model(simulator: Simulator, model: str) -> list[dict[str, Any]]:
    """Every request for a model that the simulator had."""
    return [one for one in simulator.requests() if (one["model"] or "").startswith(model)]


def who(reply: Reply) -> tuple[int, str, str, str]:
    """Status, who answered, after how many attempts, and why not who was asked."""
    headers = reply.headers
    return (
        reply.status,
        headers.get("x-headgate-model", ""),
        headers.get("x-headgate-attempts", ""),
        headers.get("x-headgate-fallback", ""),
    )


def test_three_failures_in_a_row_open_the_breaker_and_the_fallback_answers_at_once(
    pair: tuple[Desk, Simulator],
) -> None:
    desk, simulator = pair
    outage(simulator)
    replies = [run(desk.ask(f"person-{number}", asking(stream=number == 2))) for number in range(4)]
    came = f"from={SONNET}; reason="
    assert [who(one) for one in replies] == [
        (200, HAIKU, "3", came + "overloaded"),
        (200, HAIKU, "2", came + "overloaded"),
        (200, HAIKU, "1", came + "breaker_open"),
        (200, HAIKU, "1", came + "breaker_open"),
    ]
    assert replies[3].elapsed_s < 0.3
    assert b"message_stop" in replies[2].body
    assert breaker(desk)["state"] == "open"
    (opened,) = desk.gateway.process.lines(event="breaker")
    assert (opened["model"], opened["before"], opened["after"]) == (SONNET, "closed", "open")

    calls = desk.calls([f"person-{number}" for number in range(4)], 4)
    tried = [[(one["model"], one["state"], one["status"]) for one in call["attempts"]] for call in calls]
    failed, served = (SONNET, "void", 529), (HAIKU, "settled", 200)
    assert tried == [[failed, failed, served], [failed, served], [served], [served]]
    for call in calls:
        assert (call["model_asked"], call["model"], call["outcome"]) == (SONNET, HAIKU, "completed")
        assert call["cost_nanousd"] == call["attempts"][-1]["cost_nanousd"] > 0
    # The bill is that of the model which served.
    assert sum(call["cost_nanousd"] for call in calls) == simulator.bill()["total"]["cost_nanousd"]

    over(simulator)
    back = until(lambda: who(run(desk.ask("returned"))) == (200, SONNET, "1", "") and breaker(desk), what="Sonnet")
    assert back["state"] in ("half_open", "closed")
    until(lambda: run(desk.ask("returned")) and breaker(desk)["state"] == "closed", what="the breaker to close")
    assert breaker(desk)["transitions"] == 3
    changes = [(one["before"], one["after"]) for one in desk.gateway.process.lines(event="breaker")]
    assert changes == [("closed", "open"), ("open", "half_open"), ("half_open", "closed")]


def test_who_waits_for_the_model_is_diverted_when_its_breaker_opens(stack: Stack) -> None:
    # One at once, two a second: the third failure comes after a second.
    desk, simulator = start(
        stack,
        PACING__CLASSES__SONNET__RPM="120",
        PACING__CLASSES__SONNET__ITPM="10000000",
        BREAKER__OPEN_S="60",
        BREAKER__OPEN_S_MAX="60",
        PACING__BURST_S="0.5",
    )
    outage(simulator)

    async def main() -> list[Reply]:
        return await together(*(desk.ask(f"person-{number}") for number in range(12)))

    replies = run(main())
    assert {who(one)[:2] for one in replies} == {(200, HAIKU)}
    diverted = [one for one in replies if who(one)[2] == "1"]
    assert len(diverted) >= 9
    assert {who(one)[3] for one in diverted} == {f"from={SONNET}; reason=breaker_open"}
    assert all(queue_ms(one) > 0 for one in diverted)
    assert len(of_model(simulator, SONNET)) == 3
    assert max(one.elapsed_s for one in replies) < 4, "twelve at two a second would be six"


def test_the_body_is_made_to_fit_or_the_original_error_stands(pair: tuple[Desk, Simulator]) -> None:
    desk, simulator = pair
    outage(simulator)
    outage(simulator, OLD_OPUS)
    thinking = asking(
        max_tokens=100_000,
        thinking={"type": "adaptive"},
        output_config={"effort": "high"},
        temperature=1,
    )
    assert who(run(desk.ask("thinker", thinking)))[:2] == (200, HAIKU)
    number = of_model(simulator, HAIKU)[-1]["number"]
    sent = get_json(f"{simulator.url}/sim/requests/{number}/body")
    assert sent["model"] == HAIKU
    assert sent["max_tokens"] <= 64_000
    assert "effort" not in sent.get("output_config", {})
    assert sent["thinking"]["type"] != "adaptive" if "thinking" in sent else True
    assert sent["messages"] == json.loads(thinking)["messages"]

    messages = [{"role": "user", "content": "Viết tiếp"}, {"role": "assistant", "content": "Ngày xưa"}]
    prefilled = run(desk.ask("prefiller", asking(model=OLD_OPUS, messages=messages)))
    assert who(prefilled) == (529, OLD_OPUS, "3", "")
    assert prefilled.error["type"] == "overloaded_error"
    assert prefilled.headers["x-should-retry"] == "false"
    # The same without it goes elsewhere.
    assert who(run(desk.ask("prefiller", asking(model=OLD_OPUS))))[:2] == (200, "claude-sonnet-5")
    assert any(reason.startswith("unfit:prefill") for reason in desk.log_line(prefilled)["reasons"])


def test_state_at_anthropic_is_never_rerouted_and_a_dearer_model_never_used(stack: Stack) -> None:
    desk, simulator = start(stack, ROUTING__FALLBACK=OPUS)
    outage(simulator)
    outage(simulator, HAIKU)
    held = run(desk.ask("container", asking(container="container_01")))
    assert held.status in (400, 529)
    assert who(held)[1] == SONNET
    cheap = run(desk.ask("cheap", asking(model=HAIKU)))
    assert who(cheap) == (529, HAIKU, "3", "")
    assert of_model(simulator, OPUS) == []


def test_without_a_fallback_requests_wait_for_the_model_and_are_answered(stack: Stack) -> None:
    desk, simulator = start(stack, ROUTING__FALLBACK="")
    outage(simulator)
    assert run(desk.ask("first")).status == 529
    assert breaker(desk)["state"] == "open"

    async def main() -> list[Reply]:
        async with crowd() as sent:
            tasks = [sent(desk.ask(f"waiter-{number}")) for number in range(3)]
            await soon(lambda: len(desk.waiting()) >= 2, what="two to wait")
            await soon(lambda: over(simulator) or True, what="the end")
            return await so_many(tasks, 3)

    replies = run(main())
    assert {who(one)[:2] for one in replies} == {(200, SONNET)}
    assert all(queue_ms(one) > 0 for one in replies)
    until(lambda: run(desk.ask("later")).status == 200 and breaker(desk)["state"] == "closed", what="closed")


def test_a_model_that_stays_away_is_told_at_the_deadline(stack: Stack) -> None:
    desk, simulator = start(stack, ROUTING__FALLBACK="", BREAKER__OPEN_S="5", BREAKER__OPEN_S_MAX="5")
    outage(simulator)
    assert run(desk.ask("first")).status == 529
    hopeless = run(desk.ask("hopeless", deadline_s=1))
    assert hopeless.status == 529
    assert hopeless.error["details"]["error_code"] == "upstream_unavailable"
    assert 2 < float(hopeless.error["details"]["retry_after_s"]) <= 6
    assert hopeless.elapsed_s < 0.5
    assert len(simulator.requests()) == 3


def test_one_poisonous_request_is_refused_and_opens_nothing(stack: Stack, upstream: ScriptedUpstream) -> None:
    desk = Desk.of(stack.gateway(upstream.url, limits=True, **SETTINGS))
    name = upstream.plan((Act.RESET,))
    poison = body_of(name, stream=False)
    replies = [run(desk.ask("poisoner", poison)) for _ in range(6)]
    assert {one.status for one in replies} == {502}
    codes = [one.error["details"]["error_code"] for one in replies]
    assert codes[-3:] == ["poison_prompt"] * 3
    assert 3 <= len(upstream.attempts(name)) <= 5
    assert replies[-1].headers["x-should-retry"] == "false"
    assert breaker(desk)["state"] in ("none", "closed")
    assert who(run(desk.ask("bystander", body_of(upstream.plan(WHOLE), stream=False)))) == (200, SONNET, "1", "")


@pytest.mark.parametrize("kind", ["429-spend", "402", "400-spend"])
def test_money_that_has_run_out_is_asked_for_once_and_resumed_by_the_operator(
    spending: tuple[Desk, Simulator], kind: str
) -> None:
    desk, simulator = spending
    over(simulator)
    resume(desk)
    calls, alerts = len(simulator.requests()), len(desk.gateway.process.lines(event="spend_cap"))
    simulator.fault(outage={"kind": kind})
    first = run(desk.ask("first"))
    assert first.headers["x-should-retry"] == "false"
    later = run(together(*(desk.ask(f"later-{n}", asking(model=(SONNET, HAIKU)[n % 2])) for n in range(10))))
    assert len(simulator.requests()) == calls + 1, "exactly one call"
    for one in later:
        assert (one.status, one.error["type"]) == (429, "billing_error")
        assert one.headers["x-should-retry"] == "false"
        assert int(one.headers["retry-after"]) <= 60
    assert len(desk.gateway.process.lines(event="spend_cap")) == alerts + 1
    assert desk.get("/admin/limits")["spend_cap"]
    over(simulator)
    assert run(desk.ask("still")).status == 429
    assert resume(desk) == {"resumed": True}
    assert run(desk.ask("resumed")).status == 200
    assert desk.get("/admin/limits")["spend_cap"] == ""
    assert resume(desk) == {"resumed": False}


def resume(desk: Desk) -> Any:
    return ask(desk.gateway.operator_url, "POST", "/admin/limits/resume", {"x-api-key": desk.key}).json()


def test_a_crowd_that_meets_the_spend_cap_makes_no_second_round(stack: Stack, upstream: ScriptedUpstream) -> None:
    desk = Desk.of(stack.gateway(upstream.url, limits=True, **SETTINGS, BREAKER__SPEND_CAP_PROBE_S="1"))
    capped = upstream.plan(failing(429, "rate_limit_error", code="enforced_spend_limit_reached"), WHOLE)
    assert run(desk.ask("first", body_of(capped, stream=False))).status == 429
    # After a second one call asks again, and its answer ends it for all.
    reply = until(
        lambda: (one := run(desk.ask("probe", body_of(capped, stream=False)))).status == 200 and one, what="the probe"
    )
    assert reply.headers["x-headgate-attempts"] == "1"
    assert len(upstream.attempts(capped)) == 2
    gap_s = upstream.attempts(capped)[1].at - upstream.attempts(capped)[0].at
    assert 0.95 <= gap_s < 2
    assert len(desk.gateway.process.lines(event="spend_cap_over")) == 1


def test_the_fallbacks_own_limits_hold(stack: Stack) -> None:
    desk, simulator = start(
        stack, PACING__CLASSES__HAIKU__RPM="240", PACING__BURST_S="1", BREAKER__OPEN_S="60", BREAKER__OPEN_S_MAX="60"
    )
    outage(simulator)
    run(together(*(desk.ask(f"opener-{number}") for number in range(2))))
    assert breaker(desk)["state"] == "open"
    before = len(of_model(simulator, HAIKU))
    replies = run(together(*(desk.ask(f"person-{number}") for number in range(8))))
    assert {who(one)[:2] for one in replies} == {(200, HAIKU)}
    times = sorted(one["received_s"] for one in of_model(simulator, HAIKU)[before:])
    # Four a second with a burst of four, of which the openers took two.
    assert times[-1] - times[0] > 0.8


def test_no_request_makes_more_than_three_attempts_whatever_fails(stack: Stack) -> None:
    desk, simulator = start(stack, BREAKER__OPEN_S="60", BREAKER__OPEN_S_MAX="60", QUEUE__DEADLINE_S="2")
    simulator.fault(rate={"529": 0.1, "500": 0.05, "reset": 0.05, "429-no-retry-after": 0.05})
    requests = 120
    replies = [
        one
        for start_at in range(0, requests, 20)
        for one in run(together(*(desk.ask(f"person-{start_at + n}") for n in range(20))))
    ]
    over(simulator)
    users = [f"person-{number}" for number in range(requests)]
    attempts = [len(call["attempts"]) for call in desk.calls(users, requests)]
    assert max(attempts) <= 3
    assert sum(attempts) == len(simulator.requests()) <= 1.2 * requests + 10
    for one in replies:
        if one.status != 200:
            assert one.error["type"]
            assert one.headers["x-should-retry"] in ("true", "false")
    assert Counter(one.status for one in replies)[200] >= 0.8 * requests
