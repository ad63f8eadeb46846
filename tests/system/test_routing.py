"""Which model answers: names, labels, tiers and experiments over HTTP; settings that change under an open stream."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from tests.system.callers import HAIKU, OPUS, SONNET, Desk, asking, crowd, on_behalf, queue_ms, so_many, soon, together
from tests.system.conftest import UPSTREAM_KEY, Simulator, Stack, base_environment, get_json, until
from tests.system.raw_http import ask
from tests.system.scripted import Reply, connect, fetch, head_of, read_body, read_head, run

FILE = """
[tiers.free]
rpm = 5000
[routing]
fallback = ""
[routing.aliases]
fast = "claude-haiku-4-5"
[routing.endpoints]
classify = "claude-haiku-4-5"
[[experiments]]
name = "cheaper"
model = "claude-sonnet-4-6"
endpoint = "chat"
[[experiments.arms]]
name = "as-it-was"
model = "claude-sonnet-4-6"
[[experiments.arms]]
name = "small"
model = "claude-haiku-4-5"
"""


def write(directory: Path, text: str = FILE, **changed: tuple[str, str]) -> Path:
    """A settings file, with some of its text changed."""
    for before, after in changed.values():
        assert before in text
        text = text.replace(before, after)
    file = directory / "headgate.toml"
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def simulator(shared_stack: Stack) -> Simulator:
    return shared_stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0", "--otps", "100000")


@pytest.fixture(scope="module")
def desk(shared_stack: Stack, simulator: Simulator) -> Desk:
    file = write(shared_stack.directory)
    return Desk.of(shared_stack.gateway(simulator.url, limits=True, CONFIG=str(file), PACING__TIER="scale"))


def sent(simulator: Simulator) -> dict[str, Any]:
    """The body of the last request that the simulator had."""
    last = simulator.requests()[-1]["number"]
    found: dict[str, Any] = get_json(f"{simulator.url}/sim/requests/{last}/body")
    return found


def reload(desk: Desk, event: str = "reloaded") -> dict[str, Any]:
    """Send SIGHUP; the log's line about it."""
    before = len(desk.gateway.process.lines(event=event))
    desk.gateway.process.popen.send_signal(signal.SIGHUP)
    lines = until(lambda: desk.gateway.process.lines(event=event)[before:], what=event)
    return dict(lines[0])


@pytest.mark.parametrize(
    ("asked", "whose", "answers"),
    [
        ("fast", {}, HAIKU),
        ("default", {}, SONNET),
        (SONNET, {"label": "classify"}, HAIKU),
        (OPUS, {"label": "classify"}, HAIKU),
        (SONNET, {"tier": "premium"}, OPUS),
        ("default", {"tier": "premium"}, OPUS),
        (HAIKU, {"tier": "premium"}, HAIKU),
        (SONNET, {"tier": "premium", "label": "classify"}, HAIKU),
        (SONNET, {"tier": "nobody-said"}, SONNET),
    ],
)
def test_a_name_a_label_and_a_tier_choose_the_model(
    desk: Desk, simulator: Simulator, asked: str, whose: dict[str, str], answers: str
) -> None:
    user = f"{asked}-{'-'.join(whose.values())}"
    # Opus 4.7 and Haiku 4.5 take no such pair: what the model that answers refuses is left out.
    body = asking(model=asked, temperature=0.5) if asked in (SONNET, "default") else asking(model=asked)
    reply = run(desk.ask(user, body, **whose))
    assert (reply.status, reply.headers["x-headgate-model"]) == (200, answers)
    assert "x-headgate-fallback" not in reply.headers
    body_sent = sent(simulator)
    assert body_sent["model"] == answers
    assert ("temperature" in body_sent) == (answers != OPUS and b"temperature" in body)
    (call,) = desk.calls([user], 1)
    assert (call["model_asked"], call["model"]) == (asked, answers)
    assert desk.log_line(reply)["model_asked"] == asked


def test_a_key_is_never_sent_to_a_model_that_it_may_not_use(desk: Desk) -> None:
    only_sonnet, only_haiku = desk.keys(
        {"name": "only-sonnet", "scopes": ("app",), "models": (SONNET,)},
        {"name": "only-haiku", "scopes": ("app",), "models": (HAIKU,)},
    )
    reply = run(desk.ask("bound", key=only_sonnet, tier="premium", label="classify"))
    assert (reply.status, reply.headers["x-headgate-model"]) == (200, SONNET)
    assert run(desk.ask("bound", asking(model="fast"), key=only_haiku)).status == 200
    refused = run(desk.ask("bound", asking(model="default"), key=only_haiku))
    assert (refused.status, refused.error["details"]["error_code"]) == (403, "model_not_allowed")


def test_an_alias_stands_for_its_model_in_token_counts(desk: Desk, simulator: Simulator) -> None:
    body = json.dumps({"model": "fast", "messages": [{"role": "user", "content": "đếm"}]}).encode()
    headers = {"x-api-key": desk.key, "anthropic-version": "2023-06-01"}
    counted = ask(desk.gateway.url, "POST", "/v1/messages/count_tokens", headers, body)
    assert counted.status == 200
    assert sent(simulator)["model"] == HAIKU


def test_the_default_model_is_what_claude_model_says(stack: Stack, simulator: Simulator) -> None:
    environment = base_environment() | {
        "ANTHROPIC_API_KEY": UPSTREAM_KEY,
        "CLAUDE_MODEL": HAIKU,
        "HEADGATE_DATA_DIR": str(stack.directory / "data"),
        "HEADGATE_UPSTREAM_URL": simulator.url,
        "HEADGATE_LISTEN": "127.0.0.1:0",
        "HEADGATE_OPERATOR_LISTEN": "127.0.0.1:0",
    }
    process = stack.start("gateway", "gateway", environment=environment)
    (line,) = until(lambda: process.lines(event="listening"), what="the gateway to listen")
    created = stack.start("keys", "keys", "create", "--name", "tester", "--json", environment=environment)
    assert created.popen.wait(30) == 0
    key = json.loads(created.text())["key"]
    reply = until(
        lambda: (one := run(fetch(line["gateway"], key, asking(model="default")))).status == 200 and one,
        what="an answer",
    )
    assert reply.headers["x-headgate-model"] == HAIKU


def test_an_experiment_deals_conversations_and_reports_its_arms(desk: Desk) -> None:
    talks = [f"talk-{number}" for number in range(24)]

    async def turn() -> list[Reply]:
        return await together(*(desk.ask("tester", conversation=talk, label="chat") for talk in talks))

    first, second = run(turn()), run(turn())
    models = [one.headers["x-headgate-model"] for one in first]
    assert [one.headers["x-headgate-model"] for one in second] == models, "a conversation stays with its arm"
    assert 4 <= Counter(models)[HAIKU] <= 20
    calls = desk.calls(["tester"], 48)
    arms: dict[str, set[str]] = defaultdict(set)
    for call in calls:
        arms[call["conversation"]].add(call["arm"])
        assert call["arm"] == ("cheaper:small" if call["model"] == HAIKU else "cheaper:as-it-was")
    assert {len(dealt) for dealt in arms.values()} == {1}
    assert {desk.log_line(one)["arm"] for one in first} == {"cheaper:small", "cheaper:as-it-was"}

    (report,) = desk.get("/admin/experiments?since=1h")["experiments"]
    by_arm = {one["arm"]: one for one in report["arms"]}
    assert (report["experiment"], list(by_arm)) == ("cheaper", ["as-it-was", "small"])
    for arm, model in (("as-it-was", SONNET), ("small", HAIKU)):
        mine = [call for call in calls if call["model"] == model]
        assert by_arm[arm]["requests"] == len(mine)
        assert by_arm[arm]["cost_nanousd"] == sum(call["cost_nanousd"] for call in mine)
        assert by_arm[arm]["output_tokens"] == sum(call["output_tokens"] for call in mine)
    # Without a conversation the person is dealt, and stays; another label takes no part.
    alone = run(together(*(desk.ask(f"alone-{n % 6}", label="chat") for n in range(12))))
    assert [one.headers["x-headgate-model"] for one in alone[:6]] == [
        one.headers["x-headgate-model"] for one in alone[6:]
    ]
    run(desk.ask("elsewhere", conversation="talk-0"))
    (call,) = desk.calls(["elsewhere"], 1)
    assert call["arm"] == ""


def test_settings_are_read_again_under_an_open_stream(desk: Desk, simulator: Simulator) -> None:
    streaming = asking("[[sim: tokens=80 otps=40]] Xin chào", stream=True, max_tokens=1000)

    async def main() -> None:
        headers = on_behalf("listener")
        reader, writer = await connect(desk.gateway.url)
        writer.write(head_of(desk.gateway.url, desk.key, len(streaming), headers) + streaming)
        status, found = await read_head(reader)
        assert status == 200
        begun = await reader.readuntil(b"\r\n")
        write(
            desk.gateway.process.log.parent,
            limit=("rpm = 5000", "rpm = 3"),
            alias=('fast = "claude-haiku-4-5"', 'fast = "claude-sonnet-4-6"\nbest = "claude-opus-4-7"'),
        )
        assert (await asyncio.to_thread(reload, desk))["need_restart"] == []
        for asked, model in (("fast", SONNET), ("best", OPUS)):
            reply = await desk.ask("after", asking(model=asked))
            assert (reply.status, reply.headers["x-headgate-model"]) == (200, model)
            assert reply.headers["anthropic-ratelimit-requests-limit"] == "3"
        assert (await asyncio.to_thread(simulator.streams))["count"] == 1, "the stream is still under way"
        size = int(begun, 16)
        rest = await reader.readexactly(size + 2)
        body, whole = await read_body(reader, found)
        writer.close()
        assert whole
        assert b"message_start" in rest
        assert body.endswith(b'data: {"type":"message_stop"}\n\n')

    run(main())
    # What is wrong changes nothing, and the log says what.
    write(desk.gateway.process.log.parent, wrong=("rpm = 5000", "rpm = 0"))
    refused = reload(desk, "reload_refused")
    assert "tiers.free.rpm" in refused["reason"]
    write(desk.gateway.process.log.parent, wrong=('fast = "claude-haiku-4-5"', 'fast = "claude-haku-4-5"'))
    refused = reload(desk, "reload_refused")
    assert "routing.aliases.fast" in refused["reason"]
    assert "claude-haiku-4-5" in refused["reason"]
    reply = run(desk.ask("still", asking(model="best")))
    assert (reply.status, reply.headers["x-headgate-model"]) == (200, OPUS)
    assert reply.headers["anthropic-ratelimit-requests-limit"] == "3"
    # What needs a restart is named.
    write(desk.gateway.process.log.parent, "listen = '127.0.0.1:1'\n[upstream]\nhold_s = 0.5\n" + FILE)
    assert set(reload(desk)["need_restart"]) == {"upstream.hold_s"}
    write(desk.gateway.process.log.parent)
    reload(desk)


def test_who_waits_gains_by_limits_that_are_raised(stack: Stack, simulator: Simulator) -> None:
    slow = "[pacing]\nrpm = 6\n"
    file = write(stack.directory, slow + FILE)
    desk = Desk.of(stack.gateway(simulator.url, limits=True, CONFIG=str(file)))

    async def main() -> list[Reply]:
        await desk.ask("first")
        async with crowd() as sending:
            tasks = [sending(desk.ask(f"person-{number}", deadline_s=100)) for number in range(4)]
            await soon(lambda: len(desk.waiting()) == 4, what="four to wait")
            write(stack.directory, slow.replace("6", "6000") + FILE)
            await asyncio.to_thread(reload, desk)
            return await so_many(tasks, 4)

    replies = run(main())
    assert {one.status for one in replies} == {200}
    assert max(queue_ms(one) for one in replies) < 5000, "the first alone would have waited ten seconds"


def test_settings_that_cannot_be_meant_stop_the_start_by_name(stack: Stack) -> None:
    values = """
[pacing]
rpm = 0
tier = "gold"
[tiers.free]
weight = -1
rpm = 0
[queue]
deadline_s = 0
[breaker]
failures = 0
[[experiments]]
name = "e"
model = "claude-sonnet-4-6"
arms = [{name = "a", model = "claude-sonnet-4-6", weight = -1}, {name = "b", model = "claude-haiku-4-5"}]
"""
    meanings = """
[pacing.classes.sonet]
rpm = 5
[routing]
fallback = "claude-sonnet-4-6"
[routing.aliases]
x = "claude-nonesuch"
[routing.fallbacks]
claude-haiku-4-5 = ["claude-opus-4-7"]
"""
    named = {
        values: [
            "pacing.rpm",
            "pacing.tier",
            "tiers.free.weight",
            "tiers.free.rpm",
            "queue.deadline_s",
            "breaker.failures",
            "experiments[0].arms[0].weight",
        ],
        meanings: [
            "pacing.classes.sonet",
            "routing.fallback",
            "routing.aliases.x",
            "routing.fallbacks.claude-haiku-4-5",
        ],
    }
    for number, (text, keys) in enumerate(named.items()):
        file = stack.directory / f"{number}.toml"
        file.write_text(text)
        environment = base_environment() | {"ANTHROPIC_API_KEY": UPSTREAM_KEY, "HEADGATE_CONFIG": str(file)}
        environment |= {"HEADGATE_DATA_DIR": str(stack.directory / "data"), "HEADGATE_LISTEN": "127.0.0.1:0"}
        process = stack.start("gateway", "gateway", environment=environment)
        assert process.popen.wait(30) != 0
        assert [key for key in keys if f"{key}:" not in process.text()] == [], process.text()
        assert len(process.text().splitlines()) == len(keys), process.text()
