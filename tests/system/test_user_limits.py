"""What a person may ask, an app and its people: limits by tier and key, waits that are told, the line for a turn."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from datetime import datetime
from typing import Any

import pytest
from tests.system.callers import (
    HAIKU,
    OPUS,
    SONNET,
    Desk,
    asking,
    crowd,
    hang_up,
    on_behalf,
    queue_ms,
    so_many,
    soon,
    together,
    told_s,
)
from tests.system.conftest import Simulator, Stack
from tests.system.raw_http import request, send
from tests.system.scripted import Reply, run

QUICK_RPM, QUICK_BURST = 120, 4
"""Of a tier whose limit is met, and over, within a test: four at once, then one each half second."""
QUICK_S = 60 / QUICK_RPM
CLASS_RATE_S, CLASS_BURST = 5, 5
"""Of Haiku at Anthropic, here: five at once, then five a second."""


@pytest.fixture(scope="module")
def simulator(shared_stack: Stack) -> Simulator:
    """One without limits, that answers at once unless a request says otherwise."""
    return shared_stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0", "--otps", "100000")


@pytest.fixture(scope="module")
def desk(shared_stack: Stack, simulator: Simulator) -> Desk:
    """In front of it: Anthropic's limits are far, but for Haiku's and Opus's."""
    settings = {
        "PACING__TIER": "scale",
        "PACING__BURST_S": "1",
        "PACING__COUNT_TOKENS_RPM": "1000000",
        "PACING__CLASSES__HAIKU__RPM": str(CLASS_RATE_S * 60),
        "PACING__CLASSES__OPUS__RPM": "60",
        "QUEUE__WAITING_MAX": "60",
        "TIERS__QUICK__RPM": str(QUICK_RPM),
        "TIERS__QUICK__BURST_S": str(QUICK_BURST * QUICK_S),
        "TIERS__HEAVY__WEIGHT": "5",
        "TIERS__NIGHT__BACKGROUND": "true",
    }
    for tier in ("MANY", "HEAVY", "NIGHT"):
        settings |= {f"TIERS__{tier}__RPM": "100000", f"TIERS__{tier}__WAITING_MAX": "1000"}
    return Desk.of(shared_stack.gateway(simulator.url, limits=True, **settings))


def slow(seconds: float) -> bytes:
    """A message that takes so long to be answered."""
    return asking(f"[[sim: ttft_ms={seconds * 1000:.0f} tokens=3]] Xin chào")


def split(replies: list[Reply]) -> tuple[list[Reply], list[Reply], list[Reply]]:
    """Those answered at once, those answered after a wait, those refused."""
    answered = [one for one in replies if one.status == 200]
    at_once = [one for one in answered if queue_ms(one) == 0]
    return at_once, [one for one in answered if queue_ms(one) > 0], [one for one in replies if one.status != 200]


def refusal(reply: Reply) -> tuple[int, str, int]:
    """Status, code and limit."""
    details = reply.error["details"]
    return reply.status, details["error_code"], details["limit"]


async def in_line(desk: Desk, user: str, count: int) -> list[dict[str, Any]]:
    """This person's requests that wait, once there are so many."""

    def read() -> tuple[list[dict[str, Any]]] | None:
        found = [one for one in desk.waiting() if one["user"] == user]
        return (found,) if len(found) == count else None

    (found,) = await soon(read, what=f"{count} of {user} to wait")
    return list(found)


@pytest.mark.parametrize(
    ("tier", "rpm", "asked", "deadline_s", "waits_s"), [("free", 20, 25, 4, [3]), ("paid", 100, 104, 1.5, [0.6, 1.2])]
)
def test_a_tier_is_its_requests_at_once_then_a_wait_then_a_refusal(
    desk: Desk, tier: str, rpm: int, asked: int, deadline_s: float, waits_s: list[float]
) -> None:
    user = f"{tier}-person"
    replies = run(together(*(desk.ask(user, tier=tier, deadline_s=deadline_s) for _ in range(asked))))
    at_once, waited, refused = split(replies)
    assert len(at_once) == rpm
    assert sorted(queue_ms(one) / 1000 for one in waited) == pytest.approx(waits_s, rel=0.2, abs=0.2)
    assert len(refused) == asked - rpm - len(waits_s)
    for one in refused:
        assert refusal(one) == (429, "user_rpm_exceeded", rpm)
        assert (one.error["type"], one.error["details"]["window_s"]) == ("rate_limit_error", 60)
        assert told_s(one) == pytest.approx(60 / rpm * (len(waits_s) + 1), rel=0.25)
        assert (one.headers["x-should-retry"], one.headers["x-headgate-attempts"]) == ("true", "0")
        assert one.elapsed_s < 1, "refused at arrival, not at the deadline"
    calls = desk.calls([user], asked)
    assert Counter(one["outcome"] for one in calls) == {"completed": asked - len(refused), "refused": len(refused)}
    assert sum(len(one["attempts"]) for one in calls) == asked - len(refused)
    assert {one["error_code"] for one in calls if one["outcome"] == "refused"} == {"user_rpm_exceeded"}


def test_the_wait_that_a_refusal_tells_is_true(desk: Desk) -> None:
    async def main() -> tuple[Reply, Reply]:
        await together(*(desk.ask("truth", tier="quick") for _ in range(QUICK_BURST)))
        async with crowd() as sent:
            line = [sent(desk.ask("truth", tier="quick", deadline_s=1.3)) for _ in range(2)]
            await in_line(desk, "truth", 2)
            refused = await desk.ask("truth", tier="quick", deadline_s=1.3)
            patient = await desk.ask("truth", tier="quick")
            await so_many(line, 2)
        return refused, patient

    refused, patient = run(main())
    assert (refused.status, patient.status) == (429, 200)
    assert told_s(refused) == pytest.approx(queue_ms(patient) / 1000, rel=0.25)


def test_every_person_of_an_app_has_a_bucket_and_the_key_bounds_them_all(desk: Desk) -> None:
    (key,) = desk.keys({"name": "small-app", "scopes": ("app",), "rpm": 12})
    people = [f"guest-{number}" for number in range(4)]
    # Twenty are each one's own, twelve are all that the key gives them together.
    replies = run(together(*(desk.ask(user, key=key, deadline_s=0.5) for user in people for _ in range(5))))
    at_once, waited, refused = split(replies)
    assert (len(at_once), len(waited), len(refused)) == (12, 0, 8)
    for one in refused:
        assert refusal(one) == (429, "key_rpm_exceeded", 12)
        assert told_s(one) == pytest.approx(5, rel=0.25)
    # What the key refused cost nobody a request of their own.
    spent = Counter(one["user"] for one in desk.calls(people, 20) if one["outcome"] == "completed")
    for user in people:
        remaining = int(run(desk.ask(user)).headers["anthropic-ratelimit-requests-remaining"])
        assert remaining in (19 - spent[user], 20 - spent[user])


def test_ten_keys_of_one_person_are_one_person(desk: Desk) -> None:
    keys = desk.keys(*({"name": f"one-of-ten-{number}", "owner": "owner"} for number in range(10)))

    async def main() -> list[Reply]:
        async with crowd() as sent:
            tasks = [sent(desk.ask("", key=key)) for key in keys for _ in range(3)]
            # Of the ten beyond twenty six have their turn within the deadline of 20 s, in one line whatever their key.
            waiting = await in_line(desk, "owner", 6)
            assert sorted(one["position"] for one in waiting) == [1, 2, 3, 4, 5, 6]
            return await so_many(tasks, 24)

    at_once, waited, refused = split(run(main()))
    assert (len(at_once), len(waited), len(refused)) == (20, 0, 4)
    assert {refusal(one) for one in refused} == {(429, "user_rpm_exceeded", 20)}


def test_numbers_that_a_key_carries(desk: Desk) -> None:
    rpm, otpm, concurrency, beside_it = desk.keys(
        {"name": "own-rpm", "rpm": 4},
        {"name": "own-otpm", "otpm": 60},
        {"name": "own-concurrency", "concurrency": 2},
        {"name": "beside", "owner": "own-rpm"},
    )

    answered = run(together(*(desk.ask("", key=rpm) for _ in range(4))))
    assert [one.headers["anthropic-ratelimit-requests-limit"] for one in answered] == ["4"] * 4
    # The owner's own twenty are as they were, but for these four.
    beside = run(desk.ask("", key=beside_it))
    assert int(beside.headers["anthropic-ratelimit-requests-remaining"]) in (15, 16)

    async def of_rpm() -> Reply:
        async with crowd() as sent:
            sent(desk.ask("", key=rpm))
            (waiting,) = await in_line(desk, "own-rpm", 1)
            assert 10 < waiting["expected_wait_s"] <= 15
            return await desk.ask("", key=rpm)

    refused = run(of_rpm())
    assert refusal(refused) == (429, "key_rpm_exceeded", 4)
    assert told_s(refused) == pytest.approx(30, rel=0.25)

    # An answer that is longer than what was left is given, and made up for before the next.
    long = asking("[[sim: tokens=90]] Xin chào")
    assert run(desk.ask("", long, key=otpm)).status == 200
    refused = run(desk.ask("", long, key=otpm))
    assert refusal(refused) == (429, "key_otpm_exceeded", 60)
    assert told_s(refused) == pytest.approx(31, rel=0.25)

    at_once, waited, _ = split(run(together(*(desk.ask("", slow(0.6), key=concurrency) for _ in range(3)))))
    assert (len(at_once), len(waited)) == (2, 1)
    assert queue_ms(waited[0]) == pytest.approx(600, rel=0.5)


def test_calls_at_once_beyond_the_deadline_are_told_which_limit_it_is(desk: Desk, simulator: Simulator) -> None:
    (key,) = desk.keys({"name": "one-at-once", "scopes": ("app",), "concurrency": 1})

    async def main() -> tuple[Reply, Reply]:
        async with crowd() as sent:
            first = sent(desk.ask("an", slow(1.5), key=key))
            await soon(lambda: simulator.streams()["count"], what="the first to be under way")
            second = await desk.ask("bình", key=key, deadline_s=0.3)
            return await first, second

    first, second = run(main())
    assert first.status == 200
    assert refusal(second) == (429, "key_concurrency_exceeded", 1)
    assert "window_s" not in second.error["details"]
    assert 0 < told_s(second) <= 60


def test_the_rate_limit_headers_are_the_callers_own(desk: Desk) -> None:
    replies = [run(desk.ask("header-reader")) for _ in range(3)]
    calls = desk.calls(["header-reader"], 3)
    for number, (one, call) in enumerate(zip(replies, calls, strict=True), 1):
        limits = {
            name.removeprefix("anthropic-ratelimit-"): value
            for name, value in one.headers.items()
            if "ratelimit" in name
        }
        assert set(limits) == {"requests-limit", "requests-remaining", "requests-reset"}
        assert (limits["requests-limit"], limits["requests-remaining"]) == ("20", str(20 - number))
        full_in = datetime.fromisoformat(limits["requests-reset"]) - datetime.fromisoformat(call["at"])
        assert full_in.total_seconds() == pytest.approx(3 * number, abs=2.5)
    assert run(desk.ask("somebody-else")).headers["anthropic-ratelimit-requests-remaining"] == "19"
    streamed = run(desk.ask("header-reader", asking(stream=True)))
    assert streamed.headers["anthropic-ratelimit-requests-remaining"] == "16"


def test_the_wait_is_the_same_in_the_header_the_ledger_and_the_log(desk: Desk) -> None:
    replies = run(together(*(desk.ask("waiter", tier="quick") for _ in range(QUICK_BURST + 1))))
    (waited,) = split(replies)[1]
    assert queue_ms(waited) == pytest.approx(QUICK_S * 1000, rel=0.25)
    calls = {one["call_id"]: one for one in desk.calls(["waiter"], QUICK_BURST + 1)}
    for one in replies:
        line = desk.log_line(one)
        assert queue_ms(one) == line["queue_ms"] == calls[one.headers["x-headgate-call"]]["queue_ms"]
        assert line["total_ms"] >= line["queue_ms"]


def test_who_leaves_the_queue_costs_nothing_and_frees_the_place(desk: Desk, simulator: Simulator) -> None:
    before = len(simulator.requests())

    async def main() -> Reply:
        await together(*(desk.ask("leaver", tier="quick") for _ in range(QUICK_BURST)))
        async with crowd() as sent:
            line = [sent(desk.ask("leaver", tier="quick")) for _ in range(10)]
            await in_line(desk, "leaver", 10)
            full = await desk.ask("leaver", tier="quick")
            assert (full.status, full.error["details"]["error_code"]) == (429, "user_queue_full")
            assert 0 < told_s(full) <= 60
            hang_up(line)
            await in_line(desk, "leaver", 0)
            return await desk.ask("leaver", tier="quick")

    last = run(main())
    # The places of ten who waited are free, and so is what they would have taken of the limit.
    assert last.status == 200
    assert queue_ms(last) < 3 * QUICK_S * 1000
    calls = desk.calls(["leaver"], QUICK_BURST + 12)
    outcomes = Counter(one["outcome"] for one in calls)
    left = [one for one in calls if one["outcome"] == "abandoned"]
    assert outcomes["refused"] == 1
    # One or two had their turn while the line was looked at.
    assert len(left) >= 7
    for one in left:
        assert (one["attempts"], one["cost_nanousd"], one["error_code"]) == ([], 0, "client_left")
    assert len(simulator.requests()) - before == outcomes["completed"]


def test_a_person_and_an_app_can_read_their_places(desk: Desk) -> None:
    own, other = desk.keys({"name": "reader", "rpm": 4}, {"name": "another-app", "scopes": ("app",)})

    async def main() -> None:
        await together(*(desk.ask("", key=own) for _ in range(4)))
        await together(*(desk.ask("guest", tier="quick") for _ in range(QUICK_BURST)))
        async with crowd() as sent:
            sent(desk.ask("", key=own))
            for number in range(8):
                sent(desk.ask("guest", tier="quick", conversation=f"talk-{number}"))
            await in_line(desk, "guest", 8)

            await asyncio.to_thread(look)

    def read(key: str, query: str = "") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = desk.get(f"/v1/queue{query}", key=key, public=True)["waiting"]
        return found

    def look() -> None:
        (mine,) = read(own)
        assert (mine["user"], mine["model"]) == ("reader", SONNET)
        # Served after the guests, who came later: their own limit lets them go sooner.
        assert 1 <= mine["position"] <= 9
        assert 10 < mine["expected_wait_s"] <= 15
        guests = read(desk.key, "?user=guest")
        assert [one["position"] for one in guests] == list(range(1, len(guests) + 1))
        steps = [b["expected_wait_s"] - a["expected_wait_s"] for a, b in itertools.pairwise(guests)]
        assert steps == pytest.approx([QUICK_S] * len(steps), abs=0.11)
        (talk,) = read(desk.key, "?user=guest&conversation=talk-7")
        assert (talk["user"], talk["conversation"]) == ("guest", "talk-7")
        # An app sees what it sent, a person what is theirs.
        assert read(other) == read(own, "?user=guest") == []
        stands = desk.limits("sonnet-4")
        assert len(guests) - 1 <= stands["waiting"] <= len(guests) + 1
        assert stands["people"] == 2

    run(main())


def test_a_full_queue_sheds_the_light_for_the_heavy(desk: Desk) -> None:
    """One of Opus passes at once, and one each second: sixty fill the queue."""
    body = asking(model=OPUS)

    async def main() -> tuple[list[Reply], Reply]:
        await desk.ask("first", body, tier="many")
        async with crowd() as sent:
            light = [sent(desk.ask(f"light-{n % 3}", body, tier="many", deadline_s=600)) for n in range(60)]
            await soon(lambda: len(desk.waiting()) == 60, what="sixty to wait")
            one_more = await desk.ask("light-9", body, tier="many", deadline_s=600)
            assert (one_more.status, one_more.error["details"]["error_code"]) == (529, "queue_full")
            # A person who was not here has four to wait for: the next of three others, and one's own.
            assert told_s(one_more) == pytest.approx(4, abs=1.1)
            heavy = await desk.ask("heavy", body, tier="heavy", deadline_s=600)
            return [task.result() for task in light if task.done() and task.result().status != 200], heavy

    shed, heavy = run(main())
    assert [(one.status, one.error["type"], one.error["details"]["error_code"]) for one in shed] == [
        (529, "overloaded_error", "queue_full")
    ]
    assert heavy.status == 200


def test_the_background_waits_behind_people_and_has_a_tenth(desk: Desk) -> None:
    people, jobs, body = 14, 4, asking(model=HAIKU)

    async def main() -> list[Reply]:
        await together(*(desk.ask("opener", body, tier="many") for _ in range(CLASS_BURST)))
        async with crowd() as sent:
            night = [sent(desk.ask("job", body, tier="night")) for _ in range(jobs)]
            await in_line(desk, "job", jobs)
            day = [sent(desk.ask(f"day-{number}", body, tier="many")) for number in range(people)]
            return await so_many([*night, *day], jobs + people)

    assert {one.status for one in run(main())} == {200}
    calls = desk.calls(["job", *(f"day-{number}" for number in range(people))], people + jobs)
    waits = {kind: [one["queue_ms"] for one in calls if one["user"].startswith(kind)] for kind in ("job", "day")}
    before_the_last_of_people = sum(wait < max(waits["day"]) for wait in waits["job"])
    assert 1 <= before_the_last_of_people <= 3, waits


def test_token_counts_have_a_bucket_of_their_own(desk: Desk) -> None:
    """Eighteen at once, as Claude Code sends them, from a person whose messages are used up; the ledger has none."""
    run(together(*(desk.ask("counter", deadline_s=0.5) for _ in range(20))))
    assert run(desk.ask("counter", deadline_s=0.5)).status == 429
    headers = [("x-api-key", desk.key), ("anthropic-version", "2023-06-01"), *on_behalf("counter", deadline_s=0.2)]
    body = json.dumps({"model": SONNET, "messages": [{"role": "user", "content": "đếm"}]}).encode()
    count = request("POST", "/v1/messages/count_tokens", headers, body)
    counted = send(desk.gateway.url, *[count] * 18, connections=18)
    assert [one.status for one in counted] == [200] * 18
    assert all(one.json()["input_tokens"] > 0 for one in counted)
    # The bucket is one of 200 a minute for the free.
    more = Counter((one.status, one.status != 200 and one.error_code) for one in send(desk.gateway.url, *[count] * 190))
    assert set(more) == {(200, False), (429, "count_rpm_exceeded")}
    assert 182 <= more[200, False] <= 188
    assert len(desk.calls(["counter"], 21)) == 21


def test_whoever_is_no_app_is_the_keys_owner(desk: Desk) -> None:
    (key,) = desk.keys({"name": "plain-key", "rpm": 2})
    replies = [run(desk.ask(f"forged-{number}", key=key, tier="many")) for number in range(2)]
    assert [one.headers["anthropic-ratelimit-requests-remaining"] for one in replies] == ["1", "0"]
    assert {one["user"] for one in desk.calls(["plain-key", "forged-0", "forged-1"], 2)} == {"plain-key"}


def test_a_retry_costs_its_person_nothing(desk: Desk, simulator: Simulator) -> None:
    simulator.fault(kind="500", count=1)
    reply = run(desk.ask("unlucky"))
    assert (reply.status, reply.headers["x-headgate-attempts"]) == (200, "2")
    assert reply.headers["anthropic-ratelimit-requests-remaining"] == "19"
