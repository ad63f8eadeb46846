"""Money end to end: what a budget lets through, what the simulator bills for it, and what stands in the books after."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from tests.system.callers import HAIKU, OPUS, SONNET, Desk, asking, together
from tests.system.conftest import Simulator, Stack, until
from tests.system.raw_http import ask
from tests.system.scripted import (
    STREAMED,
    WHOLE_MESSAGE,
    Act,
    Play,
    Reply,
    ScriptedUpstream,
    body_of,
    chunked_head,
    chunks,
    connect,
    failing,
    fetch,
    gather,
    head_of,
    read_head,
    run,
)

from headgate.policy.pricing import upper_bound
from headgate.policy.prompt_bound import prompt_tokens_max
from headgate.policy.token_estimate import input_tokens
from headgate.wire.catalog import packaged
from headgate.wire.message import scan

USD = 10**9
CENT = USD // 100
TIERS = {
    "TIERS__PERSON__BUDGET_USD_DAY": "0.2",
    "TIERS__CROWD__TOTAL_USD_DAY": "0.2",
    "TIERS__MONTHLY__BUDGET_USD_MONTH": "0.2",
    **{f"TIERS__{tier}__RPM": "100000" for tier in ("PERSON", "CROWD", "MONTHLY")},
}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
REFUSED = re.compile(r"spend limit reached \((daily|monthly); resets \d{4}-\d\d-\d\d 00:00 UTC\): .+")


@pytest.fixture(scope="module")
def simulator(shared_stack: Stack) -> Simulator:
    return shared_stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0", "--otps", "100000")


@pytest.fixture(scope="module")
def desk(shared_stack: Stack, simulator: Simulator) -> Desk:
    return Desk.of(shared_stack.gateway(simulator.url, **TIERS))


def answers(tokens: int, *, model: str = SONNET, max_tokens: int = 1000, says: str = "", **more: Any) -> bytes:
    """A message whose answer has so many tokens, at $15 a million."""
    return asking(f"[[sim: tokens={tokens} {says}]]", model=model, max_tokens=max_tokens, **more)


def billed(simulator: Simulator) -> int:
    """Nano-dollars, over all."""
    total: int = simulator.bill()["total"]["cost_nanousd"]
    return total


def budget(desk: Desk, account: str, window: str = "day", *, tier: str = "") -> dict[str, Any]:
    """How one window of an account stands; `tier` of a person whose first call may not be in the ledger yet."""
    user = account.removeprefix("user:") if account.startswith("user:") else ""
    lines = desk.get(f"/admin/budgets?user={quote(user)}&tier={tier}")["budgets"]
    return next(one for one in lines if (one["account"], one["window"]) == (account, window))


def with_budget(desk: Desk, day_nanousd: int = USD, **more: Any) -> tuple[str, str]:
    """A fresh key with a budget, and its account."""
    (key,) = desk.keys({"name": "spender", "budget_day_nanousd": day_nanousd, **more})
    return key, f"key:{key[3:11]}"


def split(replies: list[Reply]) -> tuple[list[Reply], list[Reply]]:
    """Those that were answered, and those that a budget refused, as it is to refuse."""
    refused = [one for one in replies if one.status != 200]
    for one in refused:
        told = (one.status, one.error["type"], one.error["details"]["error_code"], one.headers["x-should-retry"])
        assert told == (429, "billing_error", "budget_exceeded", "false")
        assert REFUSED.fullmatch(one.error["message"])
        assert 0 < int(one.headers["retry-after"]) <= 60
        assert one.headers["x-headgate-attempts"] == "0"
    return [one for one in replies if one.status == 200], refused


def held_for(body: bytes) -> int:
    """What is held for a message of text: twice the estimate and 1,000 tokens, and `max_tokens`, all in the US."""
    request = scan(body)
    tokens = prompt_tokens_max(body, input_tokens(request))
    return upper_bound(tokens, request.max_tokens, request.model, time.time_ns(), packaged(), cache_writes="none")


def spent_dry(desk: Desk, key: str, body: bytes, *, more: int = 200) -> int:
    """Ask one after another until refused; how many were answered."""

    async def main() -> int:
        for number in range(more):
            reply = await desk.ask("", body, key=key)
            if reply.status != 200:
                split([reply])
                return number
        raise AssertionError(f"{more} answers, and no end")

    return run(main())


def test_two_hundred_at_once_never_pass_a_dollar(desk: Desk, simulator: Simulator) -> None:
    key, account = with_budget(desk)
    before = billed(simulator)
    answered, refused = split(run(together(*(desk.ask("", answers(1000), key=key) for _ in range(200)))))
    assert len(answered) + len(refused) == 200
    assert len(answered) >= 40, "a fortieth of a dollar is held for each, and the others do not wait"
    later = spent_dry(desk, key, answers(1000))
    bill = billed(simulator) - before
    stands = budget(desk, account)
    assert bill <= USD
    assert (stands["spent_nanousd"], stands["reserved_nanousd"]) == (bill, 0)
    assert stands["left_nanousd"] == USD - bill <= held_for(answers(1000)), f"{len(answered)} at once, {later} after"


def test_people_who_leave_a_hundred_streams_use_up_their_budget(desk: Desk, simulator: Simulator) -> None:
    cap = 30 * CENT
    key, account = with_budget(desk, cap)
    body = asking("[[sim: tokens=1000 otps=200]] " + "nghe rồi đi " * 300, model=OPUS, stream=True)
    before = billed(simulator)

    async def leave() -> int:
        reader, writer = await connect(desk.gateway.url)
        writer.write(head_of(desk.gateway.url, key, len(body)) + body)
        status, _ = await read_head(reader)
        if status == 200:
            await reader.readuntil(b"content_block_delta")
        writer.transport.abort()
        return status

    statuses = run(gather((leave() for _ in range(100)), at_once=1))
    assert 10 < statuses.count(200) < 100
    assert set(statuses) == {200, 429}
    stands = until(lambda: settled(desk, account), what="all to be settled")
    assert cap - held_for(body) < stands["spent_nanousd"] <= cap
    assert billed(simulator) - before <= cap


def settled(desk: Desk, account: str) -> dict[str, Any] | None:
    """How an account stands, once nothing is held."""
    stands = budget(desk, account)
    return stands if stands["reserved_nanousd"] == 0 else None


def test_a_person_with_ten_keys_is_one_person(desk: Desk, simulator: Simulator) -> None:
    keys = desk.keys(*({"name": f"k{at}", "owner": "mười-khóa", "tier": "person"} for at in range(10)))
    before = billed(simulator)
    replies = run(together(*(desk.ask("", answers(1000), key=keys[at % 10]) for at in range(40))))
    answered, refused = split(replies)
    assert answered
    assert all("your budget of $0.20 a day" in one.error["message"] for one in refused)
    stands = budget(desk, "user:mười-khóa", tier="person")
    assert stands["cap_nanousd"] == 20 * CENT
    assert stands["spent_nanousd"] == billed(simulator) - before <= 20 * CENT


def test_an_app_pays_for_each_of_its_people_from_their_own_budget(desk: Desk) -> None:
    people = [f"khách-{at}" for at in range(5)]
    replies = run(together(*(desk.ask(user, answers(1000), tier="person") for user in people for _ in range(15))))
    answered, refused = split(replies)
    assert len(refused) > 5
    for user in people:
        assert 5 * CENT < budget(desk, f"user:{user}", tier="person")["spent_nanousd"] <= 20 * CENT
    assert len(answered) * 1.5 > 5 * 8


def test_all_of_a_tier_have_a_budget_together(desk: Desk, simulator: Simulator) -> None:
    before = billed(simulator)
    replies = run(together(*(desk.ask(f"đám-{at}", answers(1000), tier="crowd") for at in range(40))))
    _, refused = split(replies)
    assert "the budget of the tier 'crowd' together of $0.20 a day" in refused[0].error["message"]
    assert budget(desk, "tier:crowd")["spent_nanousd"] == billed(simulator) - before <= 20 * CENT
    assert run(desk.ask("đám-1", answers(1000), tier="person")).status == 200, "of another tier"


def test_a_month_has_a_budget_of_its_own(desk: Desk) -> None:
    _, refused = split(run(together(*(desk.ask("tháng", answers(1000), tier="monthly") for _ in range(20)))))
    assert re.search(r"\(monthly; resets \d{4}-\d\d-01 00:00 UTC\)", refused[0].error["message"])
    assert budget(desk, "user:tháng", "month", tier="monthly")["spent_nanousd"] <= 20 * CENT


@pytest.mark.parametrize(
    "body",
    [
        answers(50, max_tokens=10**15),
        answers(50, max_tokens=-5),
        asking("Xin chào").replace(b'"max_tokens": 100, ', b""),
        answers(50, model="claude-of-tomorrow"),
        answers(50, model=OPUS, speed="fast"),
    ],
    ids=["huge", "negative", "missing", "unknown model", "fast where it is not sold"],
)
def test_what_anthropic_refuses_costs_nothing_and_is_refused_by_anthropic(desk: Desk, body: bytes) -> None:
    key, account = with_budget(desk, 100 * USD)
    reply = run(desk.ask("", body, key=key))
    assert reply.status in (400, 404)
    assert reply.error["type"] in ("invalid_request_error", "not_found_error")
    stands = budget(desk, account)
    assert (stands["spent_nanousd"], stands["reserved_nanousd"]) == (0, 0)


@pytest.mark.parametrize(
    ("whose", "more"),
    [
        ("us", {"model": OPUS, "inference_geo": "us"}),
        ("fast", {"model": "claude-opus-4-8", "speed": "fast"}),
        (
            "1h",
            {"system": [{"type": "text", "text": "Luật " * 2000, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]},
        ),
        ("searches", {"tools": [{"type": "web_search_20250305", "name": "web_search"}], "says": "searches=8"}),
        ("image", {"model": OPUS}),
    ],
)
def test_what_makes_a_call_dear_is_held_before_it_is_sent(
    desk: Desk, simulator: Simulator, whose: str, more: dict[str, Any]
) -> None:
    body = answers(200, max_tokens=200, **more)
    if whose == "image":
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
        fields = json.loads(body)
        fields["messages"][0]["content"] = [image, {"type": "text", "text": "[[sim: tokens=200]]"}]
        body = json.dumps(fields).encode()
    headers = [("anthropic-beta", "fast-mode-2026-02-01")] if whose == "fast" else []
    before = billed(simulator)
    reply = run(fetch(desk.gateway.url, desk.key, body, headers=headers))
    assert reply.status == 200, reply.body
    cost = billed(simulator) - before
    poor, account = with_budget(desk, cost - 1)
    _, refused = split([run(fetch(desk.gateway.url, poor, body, headers=headers))])
    assert refused, "one nano-dollar is missing"
    assert budget(desk, account)["spent_nanousd"] == 0


# What the bound does not know


def scripted_stream(input_tokens: int, *, deltas: int, text: str, every_s: float) -> Play:
    """A stream that says what its prompt had, and then so many pieces of text."""
    start = {"type": "message_start", "message": json.loads(WHOLE_MESSAGE) | {"content": [], "stop_reason": None}}
    start["message"]["usage"] = {"input_tokens": input_tokens, "output_tokens": 1}
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
    play: list[bytes | float | Act] = [chunked_head(), chunks(event_of(start), event_of(block))]
    for _ in range(deltas):
        play += [chunks(event_of(delta)), every_s]
    return (*play, Act.HANG)


def event_of(data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode(), json.dumps(data).encode())


@pytest.fixture(scope="module")
def scripted(shared_stack: Stack) -> Iterator[ScriptedUpstream]:
    upstream = ScriptedUpstream()
    yield upstream
    upstream.close()


@pytest.fixture(scope="module")
def strict(shared_stack: Stack, scripted: ScriptedUpstream) -> Desk:
    """In front of an upstream that answers as it is told: one failure opens a breaker, a budget lowers max_tokens."""
    return Desk.of(
        shared_stack.gateway(
            scripted.url,
            BREAKER__FAILURES="1",
            BUDGETS__CLAMP="true",
            ROUTING__FALLBACK=HAIKU,
            BUDGETS__USD_DAY="1",
            UPSTREAM__HOLD_S="0.2",
            TIERS__PAID__RPM="100000",
        )
    )


def breakers(desk: Desk) -> list[str]:
    return [one["state"] for one in desk.get("/admin/limits")["breakers"]]


def cut_error(reply: Reply) -> dict[str, Any]:
    error = reply.error
    assert (error["type"], error["details"]["error_code"]) == ("billing_error", "budget_exceeded")
    assert "this key's budget is used up" in error["message"]
    return error


def test_a_stream_that_says_more_than_was_asked_for_is_cut_at_the_budget(
    strict: Desk, scripted: ScriptedUpstream
) -> None:
    name = scripted.plan(scripted_stream(20, deltas=60, text="dài dòng " * 400, every_s=0.1), STREAMED)
    key, account = with_budget(strict, 2 * CENT, tier="paid")
    reply = run(fetch(strict.gateway.url, key, body_of(name)))
    assert (reply.status, reply.whole) == (200, True)
    assert reply.sends(b"message_start") == 1
    assert reply.sends(b"message_stop") == 0
    cut_error(reply)
    assert 1.5 < reply.elapsed_s < 4.5, "metered every two seconds"
    (seen,) = scripted.attempts(name)
    until(lambda: seen.closed_at, what="the upstream to be closed")
    line = strict.log_line(reply)
    assert (line["outcome"], line["error_code"], line["estimated"]) == ("cut", "budget_exceeded", True)
    assert set(breakers(strict)) <= {"closed"}
    stands = budget(strict, account)
    assert (stands["spent_nanousd"], stands["reserved_nanousd"]) == (line["cost_nanousd"], 0)
    split([run(fetch(strict.gateway.url, key, body_of(name)))])


def test_a_prompt_larger_than_its_bound_is_cut_before_it_is_answered(strict: Desk, scripted: ScriptedUpstream) -> None:
    name = scripted.plan(scripted_stream(100_000, deltas=60, text="a", every_s=0.1))
    key, _ = with_budget(strict, 2 * CENT, tier="paid")
    reply = run(fetch(strict.gateway.url, key, body_of(name)))
    assert (reply.status, reply.headers["x-should-retry"]) == (429, "false")
    cut_error(reply)
    assert reply.elapsed_s < 1
    assert len(scripted.attempts(name)) == 1
    line = strict.log_line(reply)
    assert (line["outcome"], line["error_code"]) == ("failed", "budget_exceeded")
    assert line["cost_nanousd"] == 100_000 * 3_000 + 15_000, "what Anthropic said it read is paid"
    assert set(breakers(strict)) <= {"closed"}


def test_max_tokens_is_lowered_to_what_is_left_where_that_is_wanted(strict: Desk, scripted: ScriptedUpstream) -> None:
    name = scripted.plan(STREAMED)
    key, account = with_budget(strict, 5 * CENT, tier="paid")
    reply = run(fetch(strict.gateway.url, key, body_of(name, max_tokens=100_000)))
    assert reply.status == 200
    (seen,) = scripted.attempts(name)
    lowered = json.loads(seen.body)["max_tokens"]
    assert 2_000 < lowered < 3_000, "$0.05 less the prompt's bound, at $16.50 a million"
    assert seen.body == body_of(name, max_tokens=lowered), "nothing else is touched"
    assert budget(strict, account)["reserved_nanousd"] == 0


def test_who_does_not_pay_can_use_four_fifths_of_everybodys_budget(strict: Desk) -> None:
    lines = {one["account"]: one for one in strict.get("/admin/budgets")["budgets"]}
    assert (lines["all"]["cap_nanousd"], lines["tier:free"]["cap_nanousd"]) == (USD, 80 * CENT)
    assert "tier:paid" not in lines


def test_each_attempt_is_paid_for_and_none_is_held_when_all_is_over(strict: Desk, scripted: ScriptedUpstream) -> None:
    """Half of the calls meet an overloaded model and go on with another; one has nothing but bad luck."""
    overloaded = failing(529, "overloaded_error")
    names = [scripted.plan(overloaded, STREAMED) for _ in range(10)] + [scripted.plan(STREAMED) for _ in range(10)]
    names.append(scripted.plan(overloaded))
    cap = 40 * CENT
    key, account = with_budget(strict, cap, tier="paid")
    replies = run(together(*(fetch(strict.gateway.url, key, body_of(name)) for name in names)))
    assert {one.status for one in replies} == {200, 529}, "of many that fail at once not all are tried again"
    assert any(one.headers["x-headgate-model"] == HAIKU for one in replies)
    assert max(int(one.headers["x-headgate-attempts"]) for one in replies) > 1
    nanousd = sum(strict.log_line(one)["cost_nanousd"] for one in replies)
    stands = budget(strict, account)
    assert (stands["spent_nanousd"], stands["reserved_nanousd"]) == (nanousd, 0)


def test_no_batch_passes_a_budget_by(desk: Desk, simulator: Simulator) -> None:
    (free,) = desk.keys({"name": "nightly", "scopes": ("batch",)})
    key, _ = with_budget(desk, scopes=("batch",))
    batch = json.dumps({"requests": [{"custom_id": "a", "params": json.loads(answers(5))}]}).encode()
    path = "/v1/messages/batches"
    taken = ask(desk.gateway.url, "POST", path, {"x-api-key": free, "anthropic-version": "2023-06-01"}, batch)
    assert taken.status == 200, taken.body
    before = len(simulator.requests())
    refused = ask(desk.gateway.url, "POST", path, {"x-api-key": key, "anthropic-version": "2023-06-01"}, batch)
    assert (refused.status, refused.error_code) == (403, "batch_with_budget")
    assert refused.header(b"x-should-retry") == b"false"
    assert len(simulator.requests()) == before
    seen = ask(desk.gateway.url, "GET", path, {"x-api-key": key, "anthropic-version": "2023-06-01"})
    assert seen.status == 200, "what was made before is theirs to read"


def test_what_costs_no_tokens_needs_no_money(strict: Desk, desk: Desk) -> None:
    key, _ = with_budget(desk, 1)
    split([run(desk.ask("", key=key))])
    body = json.dumps({"model": SONNET, "messages": [{"role": "user", "content": "đếm"}]}).encode()
    headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
    assert ask(desk.gateway.url, "POST", "/v1/messages/count_tokens", headers, body).status == 200


# What outlives a process


FILE = """
[tiers.free]
rpm = 100000
[budgets]
usd_day = 0.5
[velocity]
enabled = false
[cache]
plan = false
"""


@pytest.mark.drill
def test_a_budget_outlives_a_restart_and_a_process_that_was_killed(stack: Stack, simulator: Simulator) -> None:
    config = stack.directory / "headgate.toml"
    config.write_text(FILE)
    desk = Desk.of(stack.gateway(simulator.url, CONFIG=str(config)))
    data_dir = desk.gateway.data_dir
    key, account = with_budget(desk, 40 * CENT)
    assert run(desk.ask("", answers(1000), key=key)).status == 200
    before = budget(desk, account)["spent_nanousd"]
    desk.gateway.process.stop()

    again = Desk(stack.gateway(simulator.url, CONFIG=str(config), data_dir=data_dir), desk.key)
    assert budget(again, account)["spent_nanousd"] == before > CENT
    slow = answers(1000, says="otps=100", stream=True)

    async def die() -> None:
        writers = []
        for _ in range(4):
            reader, writer = await connect(again.gateway.url)
            writer.write(head_of(again.gateway.url, key, len(slow)) + slow)
            await read_head(reader)
            await reader.readuntil(b"content_block_delta")
            writers.append(writer)
        again.gateway.process.popen.send_signal(signal.SIGKILL)
        again.gateway.process.popen.wait()
        for writer in writers:
            writer.transport.abort()

    run(die())
    third = Desk(stack.gateway(simulator.url, CONFIG=str(config), data_dir=data_dir), desk.key)
    started_at = time.monotonic()
    stands = budget(third, account)
    assert stands["reserved_nanousd"] == 0
    assert stands["spent_nanousd"] > before, "what was under way is counted from the first moment on"
    ledger = until(lambda: of_key(third, account, 5), what="the orphans to be ended")
    until(lambda: budget(third, account)["spent_nanousd"] == ledger, within_s=60, what="the count to be the ledger's")
    assert time.monotonic() - started_at < 60


def test_a_cap_that_is_new_counts_what_was_spent_before_it(stack: Stack, simulator: Simulator) -> None:
    config = stack.directory / "headgate.toml"
    config.write_text(FILE)
    desk = Desk.of(stack.gateway(simulator.url, CONFIG=str(config)))
    split(run(together(*(desk.ask("mới", answers(1000), tier="free") for _ in range(6)))))
    config.write_text(FILE.replace("rpm", "budget_usd_day = 0.1\nrpm") + "[tiers.gold]\nbudget_usd_day = 0.05\n")
    desk.gateway.process.popen.send_signal(signal.SIGHUP)
    until(lambda: desk.gateway.process.lines(event="reloaded"), what="the settings to be read")
    stands = until(lambda: spent(desk, "user:mới"), within_s=5, what="the ledger to be read")
    assert stands["cap_nanousd"] == 10 * CENT
    assert stands["spent_nanousd"] > 8 * CENT
    _, refused = split(run(together(desk.ask("mới", answers(1000)))))
    assert refused


def spent(desk: Desk, account: str) -> dict[str, Any] | None:
    """How an account stands, once something is counted."""
    stands = budget(desk, account)
    return stands if stands["spent_nanousd"] else None


def of_key(desk: Desk, account: str, count: int) -> int | None:
    """What the ledger has for a key, once so many calls have ended."""
    calls = [one for one in desk.get("/admin/calls")["calls"] if f"key:{one['key_id']}" == account]
    if len(calls) < count or any(one["state"] == "open" for one in calls):
        return None
    return sum(one["cost_nanousd"] for one in calls)
