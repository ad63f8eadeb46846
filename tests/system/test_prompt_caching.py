"""Prompt caching through the real gateway: what is marked and what is left alone, who writes a cold prefix, who waits.

Two upstreams: the simulator, which caches and bills, and a scripted one, which shows when each attempt came.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from load.cold_burst import Day, bars, ideal_nanousd
from load.cold_burst import run as run_day
from sqlalchemy import select
from tests.system.callers import HAIKU, SONNET, Desk, crowd, queue_ms, soon, together
from tests.system.conftest import Simulator, Stack, get_json
from tests.system.generated_bodies import bodies
from tests.system.scripted import (
    JSON_HEAD,
    STREAMED,
    WHOLE,
    WHOLE_MESSAGE,
    Act,
    Reply,
    ScriptedUpstream,
    failing,
    fetch,
    gather,
    run,
    sized,
)

from headgate.storage.database import open_database
from headgate.storage.tables import calls

ON: dict[str, Any] = {"CACHE__PLAN": "true", "CACHE__SINGLE_FLIGHT": "true", "CACHE__DIAGNOSTICS": "true"}
ASKED = re.compile(rb',"diagnostics":\{"previous_message_id":"msg_\w+"\}')
MARKS = re.compile(rb',"cache_control":\{"type":"ephemeral"(?:,"ttl":"1h")?\}')
WAIT_S = 2.0
"""`cache.single_flight_wait_s` as installed."""
CACHED_WHOLE = json.dumps(
    json.loads(WHOLE_MESSAGE)
    | {"usage": {"input_tokens": 9, "output_tokens": 13, "cache_creation_input_tokens": 6_000}}
).encode()
"""A whole answer that has written a prefix: without any such word the planner learns that a mark is in vain."""
WROTE = (sized(CACHED_WHOLE, head=JSON_HEAD), Act.KEEP)

_serials = itertools.count()


def prompt(tokens: int = 3_000) -> str:
    """A system prompt that nobody has sent before, of about so many tokens."""
    serial = f"handbook {next(_serials)} of this very moment {time.monotonic_ns()}: "
    return (serial + "answer kindly, and never invent a price, a date or a name. " * tokens)[: round(tokens * 4.3)]


def body(system: Any, text: str = "Xin chào", *, model: str = SONNET, messages: Any = None, **more: Any) -> bytes:
    """One question behind a system prompt."""
    said = messages or [{"role": "user", "content": text}]
    return json.dumps({"model": model, "max_tokens": 64, "system": system, "messages": said} | more).encode()


def unmarked(sent: bytes, raw_system: bytes = b"") -> bytes:
    """A body without what the planner puts in; `raw_system` is a system that came as a string."""
    bare = MARKS.sub(b"", sent)
    return bare.replace(b'[{"type":"text","text":%b}]' % raw_system, raw_system) if raw_system else bare


class Watcher:
    """What came to a simulator since now."""

    def __init__(self, simulator: Simulator) -> None:
        self._url = simulator.url
        self._since: int = get_json(f"{self._url}/sim/requests?limit=0")["count"]

    def messages(self) -> list[dict[str, Any]]:
        """Every message request, in order."""
        found = get_json(f"{self._url}/sim/requests?since={self._since}&limit=10000")["requests"]
        return [one for one in found if one["path"] == "/v1/messages"]

    def bodies(self) -> list[bytes]:
        """Their bodies, to the byte."""
        return [base64.b64decode(one["body_base64"]) for one in self.messages()]

    def writes(self) -> int:
        """How many of them wrote to the cache."""
        usages = [one["usage"] for one in self.messages() if one["usage"]]
        return sum(usage["write_5m_tokens"] + usage["write_1h_tokens"] > 0 for usage in usages)


@pytest.fixture(scope="module")
def simulator(shared_stack: Stack) -> Simulator:
    """One without limits, that answers at once unless a request says otherwise."""
    return shared_stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0", "--otps", "100000")


@pytest.fixture(scope="module")
def desk(shared_stack: Stack, simulator: Simulator) -> Desk:
    """The cache as it is installed."""
    return Desk.of(shared_stack.gateway(simulator.url, **ON))


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    """A scripted one."""
    with closing(ScriptedUpstream()) as playing:
        yield playing


@pytest.fixture(scope="module")
def scripted(shared_stack: Stack, upstream: ScriptedUpstream) -> Desk:
    """The same gateway in front of it."""
    return Desk.of(shared_stack.gateway(upstream.url, **ON, RETRY__BASE_DELAY_S="0.05"))


# Show 1 of the issue, in seconds


def test_a_cold_burst_writes_once_and_the_day_costs_what_it_must() -> None:
    day = Day(people=40, pauses_min=(0, 30), speed=20.0)
    (headgate, marked), prefix_tokens = run_day(day, ("headgate", "one mark"))
    assert [bar for bar in bars(day, headgate, prefix_tokens) if not bar.met] == []
    assert [burst.writes(prefix_tokens) for burst in headgate.bursts] == [1, 1]

    # The ideal is no more than what it cost, and far below what the same crowd costs by itself.
    assert ideal_nanousd(headgate.bursts, prefix_tokens) <= headgate.cost_nanousd()
    assert marked.bursts[0].writes(prefix_tokens) >= day.people / 4
    assert marked.cost_nanousd() > 2 * headgate.cost_nanousd()


@pytest.mark.drill
def test_the_whole_day_of_bursts() -> None:
    outcomes, prefix_tokens = run_day(Day(), ("headgate",))
    assert [bar for bar in bars(Day(), outcomes[0], prefix_tokens) if not bar.met] == []


# what is marked, and what is left alone


def test_every_byte_outside_of_our_marks_is_as_it_came(scripted: Desk, upstream: ScriptedUpstream) -> None:
    """Bodies in every spelling of the grammar, with a system and tools in front that are worth a mark."""
    words = prompt(6_000).replace("a", "\\u0061", 40).replace("kindly", 'kindly \\ud83d\\ude00 \\/ \\"cache_control\\"')
    raw_system = b'"%b"' % words.encode()
    tools = b'[ {"name":"t", "description":"cache_control","input_schema":{"type":"object"} } ,{"name":"u"}]'
    sent: dict[str, bytes] = {}
    for (written, streamed), shape in zip(bodies(200, seed=7), itertools.cycle("ssab")):
        if b'"system"' in written or b'"tools"' in written or streamed:
            continue
        name = upstream.plan(WROTE)
        system = {"s": raw_system, "a": b'[ {"text" : %b , "type":"text"} ]' % raw_system, "b": raw_system}[shape]
        front = b'{ "system" :%b,"x-note":"%b" ,' % (system, name.encode())
        front += b'\t"tools": %b ,' % tools if shape == "b" else b""
        sent[name] = front + written.lstrip()[1:]
    replies = run(gather([fetch(scripted.gateway.url, scripted.key, one) for one in sent.values()], at_once=1))
    marked = 0
    for (name, one), reply in zip(sent.items(), replies, strict=True):
        if reply.status != 200:
            assert not upstream.attempts(name)
            continue
        (seen,) = upstream.attempts(name)
        assert unmarked(seen.body, raw_system) == one
        marked += seen.body != one
    assert marked > 10


def left_alone(
    desk: Desk, simulator: Simulator, sent: bytes, *, key: str = "", headers: Any = (), asked: bool = False
) -> None:
    """Three times the same request arrives as it was sent; with `asked` it may ask Anthropic why it missed."""
    watcher = Watcher(simulator)
    for _ in range(3):
        reply = run(fetch(desk.gateway.url, key or desk.key, sent, headers=headers))
        assert reply.status == 200, reply.body
    assert [ASKED.sub(b"", one) if asked else one for one in watcher.bodies()] == [sent] * 3


def test_marks_of_the_caller_are_left_alone(desk: Desk, simulator: Simulator) -> None:
    mark: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
    block: dict[str, Any] = {"type": "text", "text": prompt()}
    left_alone(desk, simulator, body([block | mark]), asked=True)
    left_alone(
        desk, simulator, body([block, block | {"cache_control": {"type": "ephemeral", "ttl": "1h"}}]), asked=True
    )
    left_alone(desk, simulator, body(prompt(), messages=[{"role": "user", "content": [block | mark]}]), asked=True)
    left_alone(desk, simulator, body(prompt(), **mark), asked=True)
    # In another spelling of the same name.
    left_alone(desk, simulator, body([block | mark]).replace(b'"cache_control"', b'"cache\\u005fcontrol"'), asked=True)


def test_a_key_without_planning_and_claude_code_are_left_alone(desk: Desk, simulator: Simulator) -> None:
    key = desk.gateway.key("plain", "--no-plan-cache")
    left_alone(desk, simulator, body(prompt()), key=key)
    left_alone(desk, simulator, body(prompt()), headers=[("user-agent", "claude-cli/2.1.0 (external, cli)")])
    left_alone(desk, simulator, body(prompt()), headers=[("x-claude-code-session-id", "a")])


def test_a_planner_that_is_switched_off_leaves_everything_alone(stack: Stack, simulator: Simulator) -> None:
    off = Desk.of(stack.gateway(simulator.url, **(ON | {"CACHE__PLAN": "false"})))
    left_alone(off, simulator, body(prompt()))


def test_the_words_cache_control_in_a_text_are_no_mark(desk: Desk, simulator: Simulator) -> None:
    watcher = Watcher(simulator)
    sent = body('{"cache_control": {"type": "ephemeral"}} ' + prompt(), 'what is "cache_control"?')
    replies = [run(fetch(desk.gateway.url, desk.key, sent)) for _ in range(3)]
    assert [reply.headers["x-headgate-cache"] for reply in replies][1:] == ["read", "read"]
    assert all(MARKS.search(one) for one in watcher.bodies()[1:])


def test_the_reply_and_the_ledger_say_what_the_cache_did(desk: Desk) -> None:
    system = prompt()
    replies = [run(desk.ask("reader", body(system, f"question {n}"), label="faq")) for n in range(3)]
    assert [reply.headers["x-headgate-cache"] for reply in replies] == ["write", "read", "read"]
    none = run(desk.ask("reader", body("short")))
    assert none.headers["x-headgate-cache"] == "none"
    again = run(desk.ask("reader", body(system, "question 1"), label="faq"))

    desk.calls(["reader"], 5)
    engine = open_database(desk.gateway.data_dir, now_ns=time.time_ns)
    columns = (calls.c.family, calls.c.prefix, calls.c.prefix_tokens, calls.c.digest)
    with engine.connect() as connection:
        rows = {
            row.call_id: row
            for row in connection.execute(select(calls.c.call_id, *columns).where(calls.c.user_id == "reader"))
        }
    engine.dispose()
    first, second, third, short, repeated = (
        rows[reply.headers["x-headgate-call"]] for reply in [*replies, none, again]
    )
    assert first.family
    assert first.family == second.family == third.family != short.family
    assert len(first.prefix) == 32
    assert first.prefix == second.prefix == third.prefix != short.prefix
    assert 0.8 * 3_000 < second.prefix_tokens < 1.1 * 3_000
    assert len({first.digest, second.digest, third.digest, short.digest}) == 4
    assert repeated.digest == second.digest


def test_a_conversation_of_six_turns_reads_its_tail(desk: Desk, simulator: Simulator) -> None:
    watcher, said, system = Watcher(simulator), [], prompt()
    for turn in range(6):
        said.append({"role": "user", "content": f"turn {turn}: " + "some long story of mine, told again. " * 40})
        reply = run(fetch(desk.gateway.url, desk.key, body(system, messages=said)))
        said.append({"role": "assistant", "content": json.loads(reply.body)["content"]})
    usages = [one["usage"] for one in watcher.messages()]
    for before, after in itertools.pairwise(usages[1:]):
        whole = sum(before[name] for name in ("input_tokens", "read_tokens", "write_5m_tokens", "write_1h_tokens"))
        assert after["read_tokens"] >= whole - 8, (before, after)
        assert after["input_tokens"] < 50


def test_a_fallback_model_gets_no_mark_below_its_own_minimum(stack: Stack, simulator: Simulator) -> None:
    """2,000 tokens are worth a mark on Sonnet 4.6, and Haiku 4.5 takes no less than 4,096."""
    fallback = Desk.of(stack.gateway(simulator.url, **ON, ROUTING__FALLBACK=HAIKU, RETRY__BASE_DELAY_S="0.01"))
    sent = body(prompt(2_000), "[[sim: tokens=5]] hello")
    assert run(fetch(fallback.gateway.url, fallback.key, sent)).headers["x-headgate-cache"] == "write"
    simulator.fault(outage={"kind": "529", "model": SONNET})
    watcher = Watcher(simulator)
    try:
        for _ in range(3):
            reply = run(fetch(fallback.gateway.url, fallback.key, sent))
            assert reply.headers["x-headgate-model"] == HAIKU
            assert reply.headers["x-headgate-cache"] == "none"
    finally:
        get_json(f"{simulator.url}/sim/faults", method="DELETE")
    haiku = [one for one in watcher.bodies() if HAIKU.encode() in one]
    assert len(haiku) == 3
    assert not any(MARKS.search(one) for one in haiku)


# one writer


def sending(desk: Desk, upstream: ScriptedUpstream, system: str) -> Callable[..., tuple[str, Any]]:
    """Makes requests behind one prompt, each with a play of its own: its name and the coroutine."""

    def make(*plays: Any, stream: bool = False, **whose: Any) -> tuple[str, Any]:
        name = upstream.plan(*(plays or (STREAMED if stream else WHOLE,)))
        sent = body(system, "hello", metadata={"user_id": name}, stream=stream)
        return name, desk.ask(whose.pop("user", name), sent, **whose)

    return make


def came(upstream: ScriptedUpstream, names: list[str]) -> list[float]:
    """When each of these first came, in order of their coming; those that have not are left out."""
    return sorted(upstream.attempts(name)[0].at for name in names if upstream.attempts(name))


def test_a_writer_that_fails_is_followed_by_exactly_one(scripted: Desk, upstream: ScriptedUpstream) -> None:
    make = sending(scripted, upstream, prompt())
    failed = (0.3, *failing(529, "overloaded_error"))
    slow = (0.5, *WHOLE)

    async def story() -> tuple[list[Reply], list[str], str]:
        async with crowd() as send:
            writer, first = make(failed, WHOLE)
            tasks = [send(first)]
            await soon(lambda: upstream.attempts(writer), what="the writer at the upstream")
            names = []
            for _ in range(6):
                name, call = make(slow)
                names.append(name)
                tasks.append(send(call))
            return [await task for task in tasks], names, writer

    replies, names, writer = run(story())
    assert [reply.status for reply in replies] == [200] * 7
    moments = came(upstream, names)
    assert moments[0] - upstream.attempts(writer)[0].at >= 0.28, "nobody before the writer has failed"
    assert moments[1] - moments[0] >= 0.45, "one next writer, and the others when its answer has begun"
    assert moments[-1] - moments[1] < 0.4
    assert len(upstream.attempts(writer)) == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_writer_whose_client_leaves_holds_nobody_up(scripted: Desk, upstream: ScriptedUpstream, stream: bool) -> None:
    """A stream is closed, and the next writes. A whole answer is read on, and waited for as long as any other."""
    make = sending(scripted, upstream, prompt())

    async def story() -> tuple[list[Reply], list[str]]:
        async with crowd() as send:
            writer, first = make((Act.HANG,), stream=stream)
            leaving = send(first)
            await soon(lambda: upstream.attempts(writer), what="the writer at the upstream")
            made = [make((0.2, *WHOLE)) for _ in range(4)]
            tasks = [send(call) for _, call in made]
            await asyncio.sleep(0.1)
            assert not came(upstream, [name for name, _ in made])
            leaving.cancel()
            return [await task for task in tasks], [name for name, _ in made]

    replies, names = run(story())
    assert [reply.status for reply in replies] == [200] * 4
    assert max(reply.elapsed_s for reply in replies) < (1.5 if stream else WAIT_S + 1.0)
    if stream:
        moments = came(upstream, names)
        assert moments[1] - moments[0] >= 0.18


def test_a_slow_writer_is_waited_for_two_seconds_and_the_reply_says_so(
    scripted: Desk, upstream: ScriptedUpstream
) -> None:
    make = sending(scripted, upstream, prompt())

    async def story() -> tuple[Reply, list[Reply]]:
        async with crowd() as send:
            writer, first = make((3.0, *WHOLE))
            slow = send(first)
            await soon(lambda: upstream.attempts(writer), what="the writer at the upstream")
            others = [send(make()[1]) for _ in range(4)]
            found = [await task for task in others]
            return await slow, found

    slow, others = run(story())
    assert queue_ms(slow) < 100
    for reply in others:
        assert reply.status == 200
        assert WAIT_S * 1000 - 150 <= queue_ms(reply) <= WAIT_S * 1000 + 500
        assert reply.elapsed_s < WAIT_S + 0.8


def test_a_deadline_is_kept_while_others_write(scripted: Desk, upstream: ScriptedUpstream) -> None:
    make = sending(scripted, upstream, prompt())

    async def story() -> list[Reply]:
        async with crowd() as send:
            writer, first = make((1.5, *WHOLE))
            send(first)
            await soon(lambda: upstream.attempts(writer), what="the writer at the upstream")
            return await together(*(make(deadline_s=0.5)[1] for _ in range(3)))

    for reply in run(story()):
        assert reply.elapsed_s < 1.2
        assert reply.status == 200 or reply.error["details"]["error_code"] == "queue_deadline"


def test_bad_requests_of_one_prompt_are_not_refused_one_after_another(
    scripted: Desk, upstream: ScriptedUpstream
) -> None:
    make = sending(scripted, upstream, prompt())
    bad = (0.1, *failing(400, "invalid_request_error"))
    replies = run(together(*(make(bad)[1] for _ in range(60))))
    assert {reply.status for reply in replies} == {400}
    assert max(reply.elapsed_s for reply in replies) < 3.0, "6 s in a row"


def test_nobody_waits_for_a_prefix_that_is_alive(desk: Desk) -> None:
    system = prompt()
    for number in range(2):
        run(desk.ask("warm", body(system, f"first {number}")))
    slow = [desk.ask("warm", body(system, f"[[sim: ttft_ms=300]] {n}"), label="") for n in range(12)]
    replies = run(together(*slow))
    assert {reply.headers["x-headgate-cache"] for reply in replies} == {"read"}
    assert max(map(queue_ms, replies)) == 0
    assert max(reply.elapsed_s for reply in replies) < 1.5


def test_who_is_held_by_their_own_limit_holds_up_nobody_else(stack: Stack, simulator: Simulator) -> None:
    """The writer waits for a turn because its person has asked too much; the others have done nothing."""
    limited = Desk.of(
        stack.gateway(simulator.url, **ON, TIERS__QUICK__RPM="12", TIERS__QUICK__BURST_S="5", QUEUE__DEADLINE_S="20")
    )

    async def story() -> list[Reply]:
        async with crowd() as send:
            assert (await limited.ask("greedy", body("short"), tier="quick")).status == 200
            send(limited.ask("greedy", body(system := prompt(), "greedy"), tier="quick"))
            await soon(limited.waiting, what="the writer to wait for its own limit")
            return await together(*(limited.ask(f"other-{n}", body(system, f"{n}")) for n in range(5)))

    replies = run(story())
    assert [reply.status for reply in replies] == [200] * 5
    assert max(reply.elapsed_s for reply in replies) < WAIT_S + 0.8
    assert sum(reply.headers["x-headgate-cache"] == "write" for reply in replies) == 1


def test_who_goes_on_before_a_slow_writer_has_answered_is_expected_to_read(
    stack: Stack, upstream: ScriptedUpstream
) -> None:
    """Anthropic's limit lets three such prompts through at once, and then one each three seconds."""
    paced = Desk.of(stack.gateway(upstream.url, **ON, PACING__ITPM="60000"))
    make = sending(paced, upstream, prompt(3_000))

    async def story() -> list[Reply]:
        async with crowd() as send:
            writer, first = make((3.0, *WROTE))
            send(first)
            await soon(lambda: upstream.attempts(writer), what="the writer at the upstream")
            return await together(*(make((2.0, *WROTE))[1] for _ in range(8)))

    replies = run(story())
    assert [reply.status for reply in replies] == [200] * 8
    assert max(map(queue_ms, replies)) < WAIT_S * 1000 + 700


# the end of the process


@pytest.mark.parametrize("drain_s", ["30", "0.3"])
def test_a_gateway_that_stops_ends_those_who_wait(stack: Stack, upstream: ScriptedUpstream, drain_s: str) -> None:
    """Given time they are answered; without it they are told that the gateway restarts."""
    stopping = Desk.of(stack.gateway(upstream.url, **ON, SERVER__DRAIN_TIMEOUT_S=drain_s))
    make = sending(stopping, upstream, prompt())

    async def story() -> list[Reply]:
        async with crowd() as send:
            writer, first = make((0.8, *WHOLE) if drain_s == "30" else (Act.HANG,))
            tasks = [send(first)]
            await soon(lambda: upstream.attempts(writer), what="the writer at the upstream")
            tasks += [send(make()[1]) for _ in range(4)]
            await asyncio.sleep(0.2)
            stopping.gateway.process.popen.send_signal(signal.SIGTERM)
            return [await task for task in tasks]

    replies = run(story())
    assert [reply.status for reply in replies] == ([200] * 5 if drain_s == "30" else [529] * 5), replies
    assert stopping.gateway.process.stop(within_s=10.0) == 0
