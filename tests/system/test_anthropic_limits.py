"""What Anthropic allows, met and not exceeded: limits set, estimated, corrected and learned, and its 429s obeyed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest
from tests.system.callers import HAIKU, OPUS, SONNET, Desk, asking, crowd, queue_ms, so_many, soon, together, told_s
from tests.system.conftest import Simulator, Stack, until
from tests.system.scripted import (
    JSON_HEAD,
    WHOLE,
    WHOLE_MESSAGE,
    Act,
    Play,
    Reply,
    ScriptedUpstream,
    body_of,
    failing,
    fetch,
    run,
    sized,
)

PEOPLE = {"TIERS__FREE__RPM": "100000", "TIERS__FREE__WAITING_MAX": "1000", "ROUTING__FALLBACK": ""}
VIETNAMESE = "Chúng tôi muốn biết vì sao những dòng sông ở miền Trung lại ngắn và dốc như vậy. " * 60
LONG_WORDS = "internationalization " * 900


@pytest.fixture(scope="module")
def scripted(shared_stack: Stack) -> Iterator[tuple[Desk, ScriptedUpstream]]:
    """An upstream that plays what it is told, behind limits that are far. Each test has model classes of its own."""
    upstream = ScriptedUpstream()
    settings = {"PACING__TIER": "scale", "RETRY__BASE_DELAY_S": "0.1"}
    yield Desk.of(shared_stack.gateway(upstream.url, limits=True, **settings, **PEOPLE)), upstream
    upstream.close()


@pytest.fixture
def upstream() -> Iterator[ScriptedUpstream]:
    """One for a test with settings of its own."""
    playing = ScriptedUpstream()
    yield playing
    playing.close()


def limited(status: bytes, name: str = "retry-after") -> Play:
    """A 429 that names a wait."""
    return failing(429, "rate_limit_error", headers=b"%b: %b\r\n" % (name.encode(), status))


def statuses(simulator: Simulator) -> Counter[int]:
    return Counter(one["status"] for one in simulator.requests())


def test_limits_by_tier_by_number_and_by_line(stack: Stack, upstream: ScriptedUpstream) -> None:
    desk = Desk.of(
        stack.gateway(
            upstream.url,
            limits=True,
            PACING__TIER="tier1",
            PACING__OTPM="7000",
            PACING__CLASSES__OPUS__ITPM="25000",
            PACING__CLASSES__OPUS_4__RPM="40",
            **PEOPLE,
        )
    )
    for model in (SONNET, HAIKU, OPUS, "claude-opus-5"):
        assert run(desk.ask("an", asking(model=model))).status == 200
    found = {one["name"]: one["limit"] for one in desk.get("/admin/limits")["classes"]}
    names = ("requests", "input_tokens", "output_tokens")
    assert found == {
        "sonnet-4": dict(zip(names, (50, 30_000, 7000), strict=True)),
        "haiku-4-5": dict(zip(names, (50, 50_000, 7000), strict=True)),
        "opus-4": dict(zip(names, (40, 25_000, 7000), strict=True)),
        "opus-5": dict(zip(names, (50, 25_000, 7000), strict=True)),
    }


DEMANDS = {"rpm": (SONNET, 600, 1), "itpm": (HAIKU, 60_000, 400), "otpm": (OPUS, 30_000, 200)}
"""Limit: the model whose class meets it, a minute of it, and what one call takes."""


def test_twice_the_demand_meets_no_429(stack: Stack) -> None:
    """The simulator has the same limits and refuses what goes over; each class is at another one of them."""
    numbers = {what: str(number) for what, (_, number, _) in DEMANDS.items()}
    simulator = stack.simulator("--burst-s", "5", *(part for what in numbers for part in (f"--{what}", numbers[what])))
    settings = {f"PACING__{what.upper()}": number for what, number in numbers.items()}
    desk = Desk.of(stack.gateway(simulator.url, limits=True, PACING__BURST_S="2", **settings, **PEOPLE))
    calls = []
    for what, (model, number, each) in DEMANDS.items():
        says = f"[[sim: tokens={each if what == 'otpm' else 5}]] " + "word " * (370 if what == "itpm" else 1)
        # Two seconds of burst and three more. Before an answer was seen a guess of its length holds: it may be long.
        bodies = [asking(says, model=model, max_tokens=400)] * round(number / 60 * 5 / each)
        calls += [desk.ask(f"{what}-{n}", body, deadline_s=60) for n, body in enumerate(bodies)]
    replies = run(together(*calls))
    assert {one.status for one in replies} == {200}
    assert statuses(simulator) == {200: len(replies)}
    for what, (model, number, each) in DEMANDS.items():
        seen = [one for one in simulator.requests() if one["model"].startswith(model)]
        took_s = max(one["received_s"] for one in seen) - min(one["received_s"] for one in seen)
        field = {"rpm": "", "itpm": "input_tokens", "otpm": "output_tokens"}[what]
        spent = sum(one["usage"][field] if field else 1 for one in seen)
        # Within what was allowed, and most of it used: nothing lies idle while people wait.
        assert spent <= number / 60 * (took_s + 2) * 1.1 + 2 * each, what
        assert spent >= 0.8 * number / 60 * took_s, what


def test_estimates_are_drawn_to_what_anthropic_says(stack: Stack) -> None:
    simulator = stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0", "--otps", "100000")
    desk = Desk.of(stack.gateway(simulator.url, limits=True, PACING__ITPM="30000", PACING__BURST_S="60", **PEOPLE))

    def level() -> int:
        return int(desk.limits("sonnet-4")["level"]["input_tokens"])

    async def while_it_is_under_way(text: str) -> int:
        """What is taken for a prompt before Anthropic has said a word about it."""
        async with crowd() as sent:
            before = await asyncio.to_thread(level)
            sent(desk.ask("an", asking(f"[[sim: ttft_ms=1000]] {text}")))
            await soon(lambda: simulator.streams()["count"], what="it to be under way")
            taken = before - await asyncio.to_thread(level)
        await soon(lambda: not simulator.streams()["count"], what="its end")
        return taken

    run(desk.ask("an", asking("漢字")))
    vietnamese, first = run(while_it_is_under_way(VIETNAMESE)), run(while_it_is_under_way(LONG_WORDS))
    again = run(while_it_is_under_way(LONG_WORDS))
    used = [one["usage"]["input_tokens"] for one in simulator.requests()[-3:]]
    # The first is a guess by script; then what was seen is believed.
    assert vietnamese == pytest.approx(used[0], rel=0.5)
    assert first == pytest.approx(used[1], rel=0.5)
    assert abs(first - used[1]) > 0.15 * used[1], "a guess that was right shows nothing"
    assert again == pytest.approx(used[2], rel=0.1)


def test_cache_reads_are_free_so_that_more_pass(stack: Stack) -> None:
    """6,000 tokens each on 20,000 a minute: without the cache three pass, with it all do, and all at once."""
    simulator = stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0", "--otps", "100000")
    desk = Desk.of(
        stack.gateway(
            simulator.url, limits=True, PACING__TIER="scale", PACING__ITPM="20000", PACING__BURST_S="60", **PEOPLE
        )
    )
    system = [{"type": "text", "text": "word " * 5500, "cache_control": {"type": "ephemeral"}}]
    first = run(desk.ask("an", asking("Câu hỏi", system=system)))
    others = [asking(f"[[sim: ttft_ms=700]] Câu hỏi {number}", system=system) for number in range(19)]
    replies = [first, *run(together(*(desk.ask("an", body, deadline_s=5) for body in others)))]
    assert [one.status for one in replies] == [200] * 20
    assert [one.headers["x-headgate-cache"] for one in replies] == ["write", *["read"] * 19]
    # None waits for another's answer to show that it took nothing: that is expected of it.
    assert [queue_ms(one) for one in replies] == [0] * 20
    plain = [run(desk.ask("an", asking("word " * 5500), deadline_s=2)) for _ in range(4)]
    refused = next(one for one in plain if one.status != 200)
    assert (refused.status, refused.error["details"]["error_code"]) == (529, "queue_deadline")
    assert told_s(refused) > 2


def test_limits_are_learned_from_headers(stack: Stack) -> None:
    simulator = stack.simulator("--tier", "tier1")
    desk = Desk.of(stack.gateway(simulator.url, limits=True, **PEOPLE))
    assert run(desk.ask("an")).status == 200
    stands = desk.limits("sonnet-4")
    assert stands["learned"] == stands["limit"] == {"requests": 50, "input_tokens": 30_000, "output_tokens": 8000}
    # Nobody is refused by Anthropic once its limit is known: the rest waits here.
    replies = run(together(*(desk.ask(f"person-{n}", deadline_s=1) for n in range(40))))
    assert set(statuses(simulator)) == {200}
    answered, refused = ([one for one in replies if (one.status == 200) is well] for well in (True, False))
    assert 8 <= len(answered) <= 12
    assert {(one.status, one.error["details"]["error_code"]) for one in refused} == {(529, "queue_deadline")}
    # And what Anthropic says is left is what is left, when somebody else uses the same account.
    others = [asking("hello") for _ in range(30)]
    run(together(*(fetch(simulator.url, "theirs", body) for body in others)))
    until(lambda: run(desk.ask("probe")).status == 200, what="an answer")
    assert desk.limits("sonnet-4")["level"]["requests"] <= 50 - 30


def test_a_429_with_retry_after_holds_everybody_for_so_long(scripted: tuple[Desk, ScriptedUpstream]) -> None:
    desk, upstream = scripted
    name = upstream.plan(limited(b"2"), WHOLE)
    others = [upstream.plan(WHOLE) for _ in range(50)]

    async def main() -> tuple[Reply, list[Reply]]:
        async with crowd() as sent:
            first = sent(desk.ask("first", body_of(name, stream=False)))
            await soon(lambda: upstream.attempts(name), what="the 429")
            await soon(lambda: desk.limits("sonnet-4")["frozen_s"], what="the freeze")
            waiting = [sent(desk.ask(f"w-{n}", body_of(one, stream=False))) for n, one in enumerate(others)]
            return await first, await so_many(waiting, 50)

    first, waited = run(main())
    assert (first.status, first.headers["x-headgate-attempts"]) == (200, "2")
    assert {one.status for one in waited} == {200}
    began, again = (one.at for one in upstream.attempts(name))
    assert 2 <= again - began <= 2.5
    assert min(upstream.attempts(one)[0].at for one in others) - began >= 2
    assert {one["state"] for one in desk.get("/admin/limits")["breakers"]} <= {"closed"}


@pytest.mark.parametrize(
    ("model", "class_id", "wait"),
    [
        (HAIKU, "haiku-4-5", b"Fri, 01 Jan 2100 00:00:00 GMT"),
        (OPUS, "opus-4", b"4294967295"),
        ("claude-opus-5", "opus-5", b"90"),
    ],
)
def test_a_retry_after_beyond_the_deadline_is_told_at_once(
    scripted: tuple[Desk, ScriptedUpstream], model: str, class_id: str, wait: bytes
) -> None:
    desk, upstream = scripted
    name = upstream.plan(limited(wait))
    told = run(desk.ask("first", body_of(name, stream=False, model=model)))
    assert (told.status, told.error["type"]) == (429, "rate_limit_error")
    assert told.elapsed_s <= 0.2
    assert (told.headers["retry-after"], told.headers["x-should-retry"]) == ("60", "false")
    later = run(desk.ask("later", body_of(name, stream=False, model=model)))
    assert (later.status, later.error["type"]) == (529, "overloaded_error")
    assert later.error["details"]["error_code"] == "queue_deadline"
    assert told_s(later) == 60
    assert later.elapsed_s <= 0.2
    assert 80 < desk.limits(class_id)["frozen_s"] <= 300
    assert len(upstream.attempts(name)) == 1


def test_a_class_is_back_after_its_freeze(scripted: tuple[Desk, ScriptedUpstream]) -> None:
    desk, upstream = scripted
    name = upstream.plan(limited(b"2"), WHOLE)
    body = body_of(name, stream=False, model="claude-fable-5")
    told = run(desk.ask("first", body, deadline_s=1))
    assert (told.status, told.headers["retry-after"]) == (429, "2")
    later = run(desk.ask("later", body, deadline_s=1))
    assert (later.status, later.error["details"]["error_code"]) == (529, "queue_deadline")
    assert told_s(later) == pytest.approx(2, abs=0.3)
    back = run(desk.ask("patient", body, deadline_s=10))
    assert back.status == 200
    assert queue_ms(back) == pytest.approx(2000, abs=400)
    began, again = (one.at for one in upstream.attempts(name))
    assert again - began >= 2


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"retry-after: \r\n",
        b"retry-after: -5\r\n",
        b"retry-after: NaN\r\n",
        b"retry-after: 1e309\r\n",
        b"retry-after: soon\r\n",
        b"retry-after: 0.1\r\n",
        b"retry-after-ms: 150\r\n",
        b"retry-after: %b\r\n" % (b"9" * 10_000),
    ],
)
def test_whatever_retry_after_says_the_call_goes_on(scripted: tuple[Desk, ScriptedUpstream], header: bytes) -> None:
    desk, upstream = scripted
    name = upstream.plan(failing(429, "rate_limit_error", headers=header), WHOLE)
    reply = run(desk.ask("an", body_of(name, stream=False, model="claude-sonnet-5"), deadline_s=8))
    # A number of ten thousand digits may be believed, or be none; whoever believes it cannot wait so long.
    if reply.status == 429 and len(header) > 100:
        assert reply.headers["retry-after"] == "60"
        return
    assert reply.status == 200, reply.body
    first, second = upstream.attempts(name)
    assert second.at - first.at < 3


def test_a_ramp_limit_halves_the_pace(scripted: tuple[Desk, ScriptedUpstream]) -> None:
    desk, upstream = scripted
    ramp = failing(429, "rate_limit_error", code="ramp_limit_exceeded", headers=b"retry-after: 1\r\n")
    name = upstream.plan(ramp, WHOLE)
    reply = run(desk.ask("meets-it", body_of(name, stream=False, model="claude-mythos-5")))
    assert (reply.status, reply.headers["x-headgate-attempts"]) == (200, "2")
    began, again = (one.at for one in upstream.attempts(name))
    assert 1 <= again - began <= 1.4
    stands = desk.limits("mythos-5")
    assert 0 < stands["pace"] <= 0.5
    assert stands["burst"] == 1
    until(lambda: desk.limits("mythos-5")["pace"] > stands["pace"], what="the pace to regrow")


def test_output_is_counted_as_it_is_produced_and_not_as_max_tokens(stack: Stack) -> None:
    simulator = stack.simulator("--tier", "start")
    desk = Desk.of(
        stack.gateway(
            simulator.url, limits=True, PACING__TIER="scale", PACING__OTPM="6000", PACING__BURST_S="60", **PEOPLE
        )
    )
    body = asking("[[sim: tokens=20]] ngắn thôi", max_tokens=60_000)
    replies = [run(desk.ask("an", body)) for _ in range(20)]
    assert {one.status for one in replies} == {200}
    assert sum(queue_ms(one) for one in replies) == 0
    stands = desk.limits("sonnet-4")
    assert 6000 - 20 * 25 <= stands["level"]["output_tokens"] <= 6000
    # Of limits that were set only a lower one is believed.
    assert stands["learned"] == {"requests": 1000, "input_tokens": 2_000_000, "output_tokens": 400_000}
    assert stands["limit"] == {"requests": 1000, "input_tokens": 2_000_000, "output_tokens": 6000}


def test_headers_that_name_no_limit_teach_none(scripted: tuple[Desk, ScriptedUpstream]) -> None:
    desk, upstream = scripted
    odd = b"".join(
        b"anthropic-ratelimit-requests-%b: %b\r\n" % pair
        for pair in ((b"limit", b"-3"), (b"remaining", b"NaN"), (b"reset", b"yesterday"))
    )
    name = upstream.plan((sized(WHOLE_MESSAGE, head=JSON_HEAD + odd), Act.KEEP))
    assert run(desk.ask("an", body_of(name, stream=False, model="claude-3-5-haiku-20241022"))).status == 200
    stands = desk.limits("haiku-3-5")
    assert stands["learned"] == {"requests": None, "input_tokens": None, "output_tokens": None}
    assert stands["limit"]["requests"] == 10_000
