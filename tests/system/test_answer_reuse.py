"""Whole answers given again, through the real gateway: same bytes, no call, nothing billed, and never to another."""

import asyncio
import functools
import json

import pytest
from tests.system.callers import HAIKU, Desk, asking, together
from tests.system.conftest import Stack, until

REUSING = {"REUSE__ENDPOINTS__FAQ__TTL_S": "600", "CACHE__PLAN": "true"}


def on_a_loop(scene):
    """Runs a scene to its end."""

    @functools.wraps(scene)
    def run(**fixtures):
        asyncio.run(scene(**fixtures))

    return run


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A simulator and a gateway for all tests."""
    running = Stack(tmp_path_factory.mktemp("reuse"))
    simulator = running.simulator()
    yield simulator, Desk.of(running.gateway(simulator.url, **REUSING))
    running.stop()


@pytest.fixture
def simulator(everything):
    return everything[0]


@pytest.fixture
def desk(everything):
    return everything[1]


def sent(simulator) -> int:
    return len(simulator.requests())


def row_of(desk: Desk, call_id: str) -> dict:
    """The ledger's row of this call."""

    def found() -> dict | None:
        return next((one for one in desk.get("/admin/calls?limit=1000")["calls"] if one["call_id"] == call_id), None)

    return until(found, what="the call in the ledger")


async def kept(desk: Desk, user: str, body: bytes, *, label: str = "faq"):
    """An answer that was made, and how it was given again. It is kept in the background, so there may be several."""
    made = []
    for _ in range(100):
        reply = await desk.ask(user, body, label=label)
        assert reply.status == 200, reply.body
        if "x-headgate-reuse" in reply.headers:
            return next(one for one in made if one.body == reply.body), reply
        made.append(reply)
        await asyncio.sleep(0.02)
    raise AssertionError("never given again")


@pytest.mark.parametrize("streamed", [True, False])
@on_a_loop
async def test_the_same_question_gets_the_same_bytes_for_nothing(desk, simulator, streamed):
    body = asking("Giờ mở cửa?", max_tokens=4000, stream=streamed)
    user = f"an-{streamed}"
    first, again = await kept(desk, user, body)
    before = sent(simulator)
    once_more = await desk.ask(user, body, label="faq")
    assert sent(simulator) == before
    assert once_more.body == again.body == first.body
    assert once_more.headers["content-type"] == first.headers["content-type"]
    assert once_more.headers["request-id"] == first.headers["request-id"]
    assert once_more.headers["x-headgate-cost-usd"] == "0.000000000"
    assert once_more.headers["x-headgate-call"] != first.headers["x-headgate-call"]
    line = desk.log_line(once_more)
    cost = desk.log_line(first)["cost_nanousd"]
    assert (line["reused"], line["cost_nanousd"], line["saved_nanousd"], line["attempts"]) == (True, 0, cost, 0)
    assert cost > 0
    row = await asyncio.to_thread(row_of, desk, line["call_id"])
    assert (row["reused"], row["cost_nanousd"], row["saved_nanousd"], row["attempts"]) == (True, 0, cost, [])
    assert (row["outcome"], row["status"], row["stop_reason"]) == ("completed", 200, "end_turn")


@on_a_loop
async def test_nobody_else_gets_it(desk, simulator):
    body = asking("Số dư của tôi?", max_tokens=4000)
    await kept(desk, "chi", body)
    before = sent(simulator)
    others = await together(
        desk.ask("dung", body, label="faq"),
        desk.ask("chi", asking("Số dư của tôi? ", max_tokens=4000), label="faq"),
        desk.ask("chi", asking("Số dư của tôi?", max_tokens=4000, model=HAIKU), label="faq"),
        desk.ask("chi", body, label="chat"),
        desk.ask("chi", body),
    )
    assert sent(simulator) == before + len(others)
    assert not any("x-headgate-reuse" in one.headers for one in others)
    (another_key,) = await asyncio.to_thread(desk.keys, {"name": "another", "scopes": ("messages", "app")})
    assert "x-headgate-reuse" not in (await desk.ask("chi", body, label="faq", key=another_key)).headers


@on_a_loop
async def test_what_is_no_whole_answer_is_not_given_again(desk, simulator):
    body = asking("Kể một câu chuyện dài", max_tokens=3)
    for _ in range(3):
        reply = await desk.ask("em", body, label="faq")
        assert json.loads(reply.body)["stop_reason"] == "max_tokens"
        assert "x-headgate-reuse" not in reply.headers


def test_it_counts_as_a_request_of_its_person(stack, simulator):
    desk = Desk.of(stack.gateway(simulator.url, limits=True, TIERS__FREE__RPM="6", QUEUE__DEADLINE_S="1", **REUSING))
    body = asking("Một câu hỏi", max_tokens=4000)

    async def nine_times():
        return [await desk.ask("giang", body, label="faq") for _ in range(9)]

    replies = asyncio.run(nine_times())
    statuses = [one.status for one in replies]
    assert statuses.count(200) == 6, statuses
    assert replies[-1].error["details"]["error_code"] == "user_rpm_exceeded"


def test_where_no_endpoint_wants_it_nothing_is_kept(stack, simulator):
    desk = Desk.of(stack.gateway(simulator.url, **REUSING))
    asyncio.run(kept(desk, "hoa", asking("Có gì mới?", max_tokens=4000)))
    file = desk.gateway.data_dir / "answers.sqlite"
    assert file.exists()
    assert file.stat().st_mode & 0o077 == 0
    assert desk.gateway.process.stop() == 0
    stack.gateway(simulator.url, data_dir=desk.gateway.data_dir)
    assert not file.exists()
