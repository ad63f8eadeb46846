"""Whose prefix is warmed and when, what it may cost, and one warming request to its one row, on a clock that jumps."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
import structlog
from hypothesis import given
from hypothesis import strategies as st
from tests.simulation.world import BEGAN_NS, Books, JumpingLoop, ScriptedConnection, World

from headgate.gateway.keep_warm import (
    ENDPOINT,
    REST_S,
    RESTING_MAX,
    TURN_S,
    USER,
    DayCap,
    Warm,
    WarmKeeper,
    WarmTimes,
    spent_on_warming,
    warm_of,
)
from headgate.gateway.prompt_caching import KeptPrompt, KeptPrompts, PromptCaching
from headgate.gateway.settings import CacheSection, Settings
from headgate.gateway.traffic import Want
from headgate.gateway.upstream import Answer
from headgate.policy.cache_ttl import KeepWarm
from headgate.policy.limiter import Subject
from headgate.policy.pricing import price
from headgate.policy.prompt_cache import CachePlan, PromptCache
from headgate.policy.records import AttemptEnded, AttemptIntent, CallClosed, CallOpened, Failure, Principal
from headgate.storage.database import begin_write, open_database
from headgate.storage.interfaces import LedgerUnavailable
from headgate.storage.tables import calls
from headgate.wire.catalog import DAY_NS, packaged
from headgate.wire.message import scan
from headgate.wire.usage import Usage

MODEL = "claude-sonnet-4-6"
KEY = Principal("key00001", "an", "free")
SYSTEM = "You answer letters about broken kettles, politely and in two sentences. " * 300
MARK = {"type": "ephemeral"}
READ = Usage(input_tokens=8, cache_read_tokens=5_000)
WRITTEN = Usage(input_tokens=8, cache_write_5m_tokens=5_000)


def body(system: str = SYSTEM, **more: Any) -> dict[str, Any]:
    """A caller's own, with a mark on its system."""
    blocks = [{"type": "text", "text": system, "cache_control": MARK}]
    return {"model": MODEL, "max_tokens": 50, "system": blocks, "messages": [{"role": "user", "content": "Hi"}]} | more


def kept(
    used_at: float = 0.0, *, endpoint: str = "chat", family: str = "", lines: bytes = b"", **of: Any
) -> KeptPrompt:
    plan = PromptCache(packaged()).plan(
        scan(json.dumps(body(**of)).encode()),
        key_id=KEY.key_id,
        endpoint=endpoint,
        model=MODEL,
        at_ns=BEGAN_NS,
        now=used_at,
        mark=True,
    )
    if family:
        plan = msgspec.structs.replace(plan, family=family)
    return KeptPrompt(plan, KEY, endpoint, MODEL, lines, used_at)


# what warms a prompt


def test_what_is_sent_has_the_marks_of_tools_and_system_and_the_lines_that_belong_to_the_prompt():
    document = {"type": "text", "text": "A long page. " * 2_000, "cache_control": MARK}
    prompt = kept(
        messages=[{"role": "user", "content": [document, {"type": "text", "text": "What does it say?"}]}],
        stream=True,
        lines=b"anthropic-version: 2023-06-01\r\nAnthropic-Beta: a\r\ntraceparent: 00-1\r\naccept: */*\r\n",
    )
    warm = warm_of(prompt)
    assert warm is not None
    sent = json.loads(warm.body)
    assert (sent["max_tokens"], "stream" in sent, sent["messages"]) == (0, False, [{"role": "user", "content": "warm"}])
    assert sent["system"] == body()["system"]
    assert warm.header_lines == (
        b"anthropic-version: 2023-06-01\r\nAnthropic-Beta: a\r\ncontent-type: application/json\r\n"
    )
    assert (len(warm.plan.marked), warm.ttl, warm.plan.body) == (1, "5m", b"")


def test_a_mark_that_is_the_planners_in_a_document_is_not_said_to_live():
    """The document stands in the messages, which a warming request has not."""
    planner = PromptCache(packaged())
    document = {"type": "text", "text": "A long page of a manual. " * 2_000}

    def ask(question: str, now: float) -> CachePlan:
        content = [document, {"type": "text", "text": question}]
        raw = json.dumps(body() | {"system": SYSTEM, "messages": [{"role": "user", "content": content}]}).encode()
        return planner.plan(scan(raw), key_id="k", endpoint="e", model=MODEL, at_ns=BEGAN_NS, now=now, mark=True)

    plans = [ask(f"Question {number}?", float(number)) for number in range(12)]
    assert len(plans[-1].marked) == 2
    warm = warm_of(KeptPrompt(plans[-1], KEY, "e", MODEL, b"", 0.0))
    assert warm is not None
    assert warm.plan.marked == plans[-1].marked[:1]


@pytest.mark.parametrize(
    "more",
    [
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"tool_choice": {"type": "any"}},
        {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
        {"container": "container_1"},
    ],
)
def test_what_the_api_refuses_is_not_sent(more):
    assert warm_of(kept(**more)) is None


# who is warmed, and when


def worth(pings_max: int = 2, every_s: float = 270.0) -> Callable[[KeptPrompt], KeepWarm]:
    return lambda _: KeepWarm(pings_max > 0, every_s, pings_max, 1, 1, "")


def keys(found: tuple[list[Warm], list[str]]) -> int:
    return len(found[0])


def test_a_prefix_is_due_at_nine_tenths_of_its_ttl_and_gone_before_its_end():
    times, prompt = WarmTimes(), kept(used_at=1_000.0)
    assert keys(times.due([prompt], 1_269.0, worth())) == 0
    assert keys(times.due([prompt], 1_270.0, worth())) == 1
    assert keys(times.due([prompt], 1_294.9, worth())) == 1
    assert times.due([prompt], 1_295.0, worth()) == ([], [prompt.plan.family])


def test_it_is_warmed_as_often_as_pays_and_then_let_go():
    times, prompt = WarmTimes(), kept(used_at=0.0)
    sent_at = []
    for now in range(0, 3_000, 5):
        for warm in times.due([prompt], float(now), worth(pings_max=3))[0]:
            times.sent(warm)
            times.warmed(warm, now + 0.1)
            sent_at.append(now)
    assert sent_at == [270, 545, 820]


def test_a_use_begins_the_count_anew_and_puts_the_next_one_off():
    times, prompt = WarmTimes(), kept(used_at=0.0)
    (warm,), _ = times.due([prompt], 270.0, worth(pings_max=1))
    times.sent(warm)
    times.warmed(warm, 270.0)
    assert keys(times.due([prompt], 560.0, worth(pings_max=1))) == 0
    again = msgspec.structs.replace(prompt, used_at=400.0)
    assert keys(times.due([again], 560.0, worth(pings_max=1))) == 0
    assert keys(times.due([again], 670.0, worth(pings_max=1))) == 1


def test_one_that_failed_is_due_again_and_still_counts():
    times, prompt = WarmTimes(), kept(used_at=0.0)
    (warm,), _ = times.due([prompt], 270.0, worth(pings_max=2))
    times.sent(warm)
    assert keys(times.due([prompt], 275.0, worth(pings_max=2))) == 1
    times.sent(warm)
    assert keys(times.due([prompt], 280.0, worth(pings_max=2))) == 0


def test_the_same_prefix_of_two_families_is_warmed_once_and_lives_from_the_later_use():
    one, other = kept(0.0, endpoint="chat"), kept(100.0, endpoint="mail")
    assert one.plan.family != other.plan.family
    times = WarmTimes()
    assert times.due([one, other], 300.0, worth()) == ([], [])
    due, gone = times.due([one, other], 370.0, worth())
    assert (len(due), gone) == (1, [])


@pytest.mark.parametrize("said", [None, KeepWarm(False, 270.0, 0, 0, 0, ""), KeepWarm(True, 3240.0, 5, 1, 1, "")])
def test_what_does_not_pay_is_not_warmed_nor_what_pays_with_another_ttl(said):
    assert WarmTimes().due([kept(0.0)], 280.0, lambda _: said) == ([], [])


def test_an_hours_prefix_is_warmed_by_the_hour():
    hour = body()
    hour["system"][0]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
    plan = PromptCache(packaged()).plan(
        scan(json.dumps(hour).encode()), key_id="k", endpoint="e", model=MODEL, at_ns=BEGAN_NS, now=0.0, mark=True
    )
    prompt = KeptPrompt(plan, KEY, "e", MODEL, b"", 0.0)
    times = WarmTimes()
    assert keys(times.due([prompt], 3_235.0, worth(every_s=3_240.0))) == 0
    assert keys(times.due([prompt], 3_240.0, worth(every_s=3_240.0))) == 1
    assert keys(times.due([prompt], 3_240.0, worth(every_s=270.0))) == 0


def test_a_family_that_rests_is_left_alone():
    times, prompt = WarmTimes(), kept(0.0)
    times.rest(prompt.plan.family, 275.0)
    assert keys(times.due([prompt], 274.0, worth())) == 0
    assert keys(times.due([prompt], 275.0, worth())) == 1
    for number in range(RESTING_MAX + 10):
        times.rest(f"f{number}", 1e9)
    assert len(times._resting) == RESTING_MAX


def test_what_ends_first_is_warmed_first_and_nothing_is_remembered_of_what_is_no_longer_kept():
    early, late = kept(0.0, system="First. " * 3_000), kept(10.0, system="Other. " * 3_000)
    times = WarmTimes()
    due, _ = times.due([late, early], 282.0, worth())
    assert [warm.key for warm in due] == [early.plan.marked[-1].key, late.plan.marked[-1].key]
    times.due([], 283.0, worth())
    assert (times._warmth, times._prepared) == ({}, {})


# what it may cost


def test_the_cap_counts_what_is_under_way_and_begins_anew_with_the_day():
    cap, noon = DayCap(), 20_000 * DAY_NS + DAY_NS // 2
    cap.seed(noon, 700)
    assert cap.take(noon, 200, 1_000)
    assert not cap.take(noon, 200, 1_000)
    cap.settle(noon, 200, 10)
    assert (cap.spent_nanousd, cap.held_nanousd) == (710, 0)
    assert cap.take(noon, 290, 1_000)
    tomorrow = noon + DAY_NS
    assert cap.take(tomorrow, 700, 1_000)
    assert not cap.take(tomorrow, 11, 1_000)
    cap.settle(noon, 290, 290)
    assert cap.spent_nanousd == 0, "yesterday's is yesterday's"


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 100), st.booleans()), max_size=60))
def test_no_history_passes_the_cap(asks):
    cap, under_way = DayCap(), []
    for upper, percent, ends in asks:
        if cap.take(BEGAN_NS, upper, 1_000):
            under_way.append((upper, upper * percent // 100))
        if ends and under_way:
            cap.settle(BEGAN_NS, *under_way.pop(0))
        assert cap.spent_nanousd + cap.held_nanousd <= 1_000
    for one in under_way:
        cap.settle(BEGAN_NS, *one)
    assert cap.held_nanousd == 0


def test_a_restart_knows_what_this_day_has_cost(tmp_path):
    engine = open_database(tmp_path, now_ns=lambda: BEGAN_NS)
    day_ns = BEGAN_NS // DAY_NS * DAY_NS
    rows = [
        (day_ns, USER, ENDPOINT, 5),
        (BEGAN_NS, USER, ENDPOINT, 7),
        (day_ns - 1, USER, ENDPOINT, 100),
        (BEGAN_NS, "an", ENDPOINT, 100),
        (BEGAN_NS, USER, "chat", 100),
    ]
    with begin_write(engine) as connection:
        for number, (at_ns, user, endpoint, cost) in enumerate(rows):
            row = {"call_id": f"call_{number}", "at_ns": at_ns, "user_id": user, "endpoint": endpoint}
            connection.execute(sa.insert(calls).values(**row, cost_nanousd=cost))
    with engine.connect() as connection:
        assert spent_on_warming(connection, BEGAN_NS) == 12
        assert spent_on_warming(connection, BEGAN_NS + DAY_NS) == 0
    engine.dispose()


# what is remembered


def test_a_prompt_is_remembered_from_when_it_was_sent_once_its_answer_has_begun():
    prompts, prompt = KeptPrompts(), kept(0.0)
    prompts.planned(prompt)
    prompts.sent(prompt.plan, 5.0)
    assert prompts.prompts() == []
    prompts.began(msgspec.structs.replace(prompt.plan), READ)
    assert prompts.prompts() == [], "another request of the family"
    prompts.began(prompt.plan, READ)
    assert [one.used_at for one in prompts.prompts()] == [5.0]
    # One that never leaves takes nothing away.
    prompts.planned(msgspec.structs.replace(prompt, plan=msgspec.structs.replace(prompt.plan)))
    assert [one.used_at for one in prompts.prompts()] == [5.0]


def test_what_was_not_cached_or_has_no_mark_is_not_remembered():
    prompts, prompt = KeptPrompts(), kept(0.0)
    prompts.planned(prompt)
    prompts.began(prompt.plan, Usage(input_tokens=5_000))
    assert (prompts.prompts(), prompts.bytes) == ([], 0)
    prompts.planned(msgspec.structs.replace(prompt, plan=msgspec.structs.replace(prompt.plan, marked=())))
    assert prompts.bytes == 0


def test_memory_is_bounded_by_the_bytes():
    size = len(kept(0.0).plan.body)
    prompts = KeptPrompts(bytes_max=5 * size)
    for number in range(20):
        prompt = kept(0.0, family=f"f{number}")
        prompts.planned(prompt)
        prompts.began(prompt.plan, READ)
    assert [one.plan.family for one in prompts.prompts()] == [f"f{number}" for number in range(15, 20)]
    assert prompts.bytes <= 5 * size
    large = kept(0.0, family="large", system="x " * size)
    prompts.planned(large)
    prompts.began(large.plan, READ)
    assert "large" not in [one.plan.family for one in prompts.prompts()]


@pytest.mark.parametrize(("on", "plans", "count"), [(True, True, 1), (True, False, 0), (False, True, 0)])
def test_only_what_may_be_warmed_is_remembered_and_nothing_once_it_is_off(on, plans, count):
    caching = PromptCaching(CacheSection(keep_warm=on), packaged(), clock=lambda: 0.0, now_ns=lambda: BEGAN_NS)
    plan = caching.plan(
        scan(json.dumps(body()).encode()),
        msgspec.structs.replace(KEY, plan_cache=plans),
        endpoint="chat",
        user="an",
        model=MODEL,
        arm="",
        at_ns=BEGAN_NS,
        header_lines=b"",
    )
    caching.sent(plan, "call_1")
    caching.began(plan, model=MODEL, usage=READ, message_id="", diagnostics=b"")
    assert len(caching.kept.prompts()) == count
    caching.apply(CacheSection(keep_warm=False))
    assert caching.kept.prompts() == []


# one request to its one row


class Stove(World):
    """Anthropic in a world: answers to warming requests, one after another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: Settings) -> None:
        self.said: list[dict[str, Any]] = []
        super().__init__(loop, 1, settings, lambda model, now: "")
        self.answers: list[Usage | Failure | tuple[int, str]] = []
        """Of what comes; the last for all that follow."""
        self.heads: list[bytes] = []
        self.bodies: list[dict[str, Any]] = []
        self.sent_at: list[float] = []
        self.under_way = self.most_under_way = 0
        self.answer_s = 0.5
        self.events: list[Any] = []

    def _noted(self, logger: object, method: str, event: dict[str, Any]) -> dict[str, Any]:
        self.said.append(event)
        raise structlog.DropEvent

    async def send(self, head: bytes, body: bytes, track, *, first_byte_timeout_s=None):
        connection = ScriptedConnection(self, Books(MODEL))
        if not track(connection):
            return Failure(kind="connect", message="not wanted", sent=False)
        self.heads.append(head)
        self.bodies.append(json.loads(body))
        self.sent_at.append(self.clock())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        connection.play([(self.answer_s, lambda: self._reply(connection))])
        try:
            return await connection.waiting
        finally:
            self.under_way -= 1

    def _reply(self, connection: ScriptedConnection) -> None:
        said = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(said, Failure):
            connection.fail(said)
            return
        connection.done()
        answer = Answer(connection)
        if isinstance(said, tuple):
            answer.status, message = said
            answer.take(json.dumps({"type": "error", "error": {"type": "x", "message": message}}).encode())
        else:
            answer.status = 200
            usage = self._usage(connection.books, 0) | {
                "input_tokens": said.input_tokens,
                "cache_read_input_tokens": said.cache_read_tokens,
                "cache_creation_input_tokens": said.cache_write_5m_tokens,
                "cache_creation": {"ephemeral_5m_input_tokens": said.cache_write_5m_tokens},
            }
            message = {"model": MODEL, "content": [], "stop_reason": "max_tokens", "usage": usage}
            answer.take(json.dumps(message).encode())
        connection.respond(answer)


class Kitchen:
    """A gateway whose app comes every 500 s in threes, and what keeps it warm."""

    def __init__(self, loop: JumpingLoop, *, spent: int = 0, **sections: Any) -> None:
        self.loop = loop
        self.settings = Settings(**{"cache": {"keep_warm": True, "ttl": "5m"}} | sections)
        self.world = Stove(loop, self.settings)
        self.world.answers = [READ]
        self.written: list[Any] = []
        self.full = False
        ledger_write = self.world.tables.write

        def write(*events: Any) -> None:
            if self.full:
                raise LedgerUnavailable("the disk is full")
            self.written += events
            ledger_write(*events)

        self.world.pipeline.ledger.write = write
        self.spent = spent
        self.call_count = 0
        self.keeper = WarmKeeper(
            self.world.pipeline,
            self.settings.cache,
            new_call_id=self._call_id,
            read_spent=lambda at_ns: self.spent,
            shares=lambda: 1,
        )
        # The day's cost is read in a thread, for which a clock that jumps does not wait.
        self.keeper._cap.seed(self.world.now_ns(), spent)
        self.keeper._seeded = True

    def _call_id(self) -> str:
        self.call_count += 1
        return f"call_w{self.call_count}"

    def use(self, system: str = SYSTEM, *, principal: Principal = KEY) -> CachePlan:
        """One request of the app, as the pipeline tells of it; its answer begins at once."""
        caching = self.world.pipeline.caching
        plan = caching.plan(
            scan(json.dumps(body() | {"system": system}).encode()),
            principal,
            endpoint="chat",
            user="an",
            model=MODEL,
            arm="",
            at_ns=self.world.now_ns(),
            header_lines=b"anthropic-version: 2023-06-01\r\n",
        )
        caching.sent(plan, "call_p")
        caching.began(plan, model=MODEL, usage=READ, message_id="", diagnostics=b"")
        return plan

    async def burst(self, *systems: str, principal: Principal = KEY) -> CachePlan:
        """Three uses of each, a second apart: the planner's mark pays."""
        for number in range(3):
            await asyncio.sleep(1.0 if number else 0.0)
            plans = [self.use(system, principal=principal) for system in systems or (SYSTEM,)]
        return plans[-1]

    async def learn(self, *systems: str, principal: Principal = KEY) -> CachePlan:
        """Four bursts, 500 s apart, and one more: now it pays to warm it twice after each."""
        for _ in range(4):
            await self.burst(*systems, principal=principal)
            await asyncio.sleep(500.0)
        return await self.burst(*systems, principal=principal)

    async def pass_time(self, seconds: float) -> None:
        """The keeper at work."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.keeper.run())
            await asyncio.sleep(seconds)
            self.keeper.stop()
        self.keeper._stopping.clear()

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.written if isinstance(event, kind)]


def cook(scene: Callable[[Kitchen], Coroutine[Any, Any, None]], **sections: Any) -> Kitchen:
    """Play a scene; afterwards nothing is held by anybody, and each attempt has one end."""
    before = structlog.get_config()
    try:
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            loop = runner.get_loop()
            assert isinstance(loop, JumpingLoop)
            kitchen = Kitchen(loop, **sections)
            runner.run(scene(kitchen))
    finally:
        structlog.configure(**before)
    world = kitchen.world
    assert (world.laws.broken, world.crashes) == ({}, [])
    assert (len(world.limiter), world.traffic._live, world.pipeline.live) == (0, set(), {})
    assert kitchen.keeper.snapshot().held_nanousd == 0
    for begins, ends in ((AttemptIntent, AttemptEnded), (CallOpened, CallClosed)):
        assert sorted(event.call_id for event in kitchen.of(begins)) == sorted(
            event.call_id for event in kitchen.of(ends)
        )
    return kitchen


def test_a_warming_request_is_a_call_of_its_own_with_one_row_at_its_price():
    async def scene(kitchen: Kitchen) -> None:
        assert (await kitchen.learn()).marked
        await kitchen.pass_time(280.0)
        await asyncio.sleep(200.0)
        assert kitchen.use().cold == b"", "nobody is to wait for it: it lives"

    kitchen = cook(scene)
    (opened,) = kitchen.of(CallOpened)
    assert (opened.user, opened.endpoint, opened.key_id, opened.tier) == (USER, ENDPOINT, KEY.key_id, KEY.tier)
    assert (opened.streamed, opened.digest, bool(opened.family), bool(opened.prefix)) == (False, "", True, True)
    (ended,) = kitchen.of(AttemptEnded)
    cost = price(READ, MODEL, BEGAN_NS, packaged())
    assert (ended.state, ended.status, ended.usage, ended.cost_nanousd) == ("settled", 200, READ, cost.cost_nanousd)
    (closed,) = kitchen.of(CallClosed)
    assert (closed.outcome, closed.status) == ("completed", 200)
    view = kitchen.keeper.snapshot()
    assert (view.warmed, view.read_tokens, view.written_tokens, view.failed) == (1, 5_000, 0, 0)
    assert view.spent_nanousd == cost.cost_nanousd
    (said,) = [event for event in kitchen.world.said if event["event"] == "keep_warm"]
    assert (said["read_tokens"], said["cost_nanousd"]) == (5_000, cost.cost_nanousd)
    assert kitchen.world.heads[0].startswith(b"POST /v1/messages HTTP/1.1\r\n")
    assert b"\r\nanthropic-version: 2023-06-01\r\n" in kitchen.world.heads[0]


def test_an_app_that_goes_to_sleep_is_warmed_as_often_as_its_gaps_say_and_no_more():
    async def scene(kitchen: Kitchen) -> None:
        await kitchen.learn()
        began = kitchen.loop.time()
        await kitchen.pass_time(4 * 3600.0)
        kitchen.world.sent_at = [at - began for at in kitchen.world.sent_at]

    kitchen = cook(scene)
    # Gaps of up to 600 s are bridged by two.
    assert [270 <= at <= 276 or 540 <= at <= 552 for at in kitchen.world.sent_at] == [True, True]
    assert kitchen.keeper.snapshot().prompts == 0, "what is gone is forgotten"


def test_nothing_leaves_while_it_is_off():
    async def scene(kitchen: Kitchen) -> None:
        await kitchen.learn()
        await kitchen.pass_time(3600.0)

    assert cook(scene, cache={"keep_warm": False, "ttl": "5m"}).written == []


def test_switched_off_what_waits_does_not_leave_and_what_has_left_is_settled():
    async def scene(kitchen: Kitchen) -> None:
        kitchen.world.answer_s = 15.0
        await kitchen.learn()
        async with asyncio.TaskGroup() as group:
            group.create_task(kitchen.keeper.run())
            await asyncio.sleep(276.0)
            assert kitchen.world.under_way == 1
            off = CacheSection(keep_warm=False, ttl="5m")
            kitchen.world.pipeline.caching.apply(off)
            kitchen.keeper.apply(off)
            await asyncio.sleep(1_000.0)
            kitchen.keeper.stop()

    kitchen = cook(scene)
    assert [event.state for event in kitchen.of(AttemptEnded)] == ["settled"]
    assert kitchen.keeper.snapshot().on is False


def test_a_process_that_ends_in_the_middle_leaves_one_row_that_is_never_free():
    async def scene(kitchen: Kitchen) -> None:
        kitchen.world.answer_s = 1e6
        await kitchen.learn()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(kitchen.keeper.run())
            await asyncio.sleep(276.0)
            assert kitchen.world.under_way == 1
            running.cancel()

    kitchen = cook(scene)
    (ended,) = kitchen.of(AttemptEnded)
    assert ended.state == "estimated"
    assert ended.cost_nanousd > 0


def test_an_answer_that_does_not_come_is_given_up():
    async def scene(kitchen: Kitchen) -> None:
        kitchen.world.answer_s = 1e6
        await kitchen.learn()
        async with asyncio.TaskGroup() as group:
            ticking = group.create_task(kitchen.world.tick())
            await kitchen.pass_time(292.0)
            ticking.cancel()

    kitchen = cook(scene)
    (ended,) = kitchen.of(AttemptEnded)
    assert (ended.state, kitchen.of(CallClosed)[0].total_ms <= 25_000) == ("estimated", True)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_request_that_is_refused_is_not_sent_again_for_an_hour(status):
    async def scene(kitchen: Kitchen) -> None:
        kitchen.world.answers = [(status, "no"), READ]
        await kitchen.learn()
        began = kitchen.loop.time()
        # The app goes on as before.
        for _ in range(12):
            await kitchen.pass_time(500.0)
            await kitchen.burst()
        kitchen.world.sent_at = [at - began for at in kitchen.world.sent_at]

    kitchen = cook(scene)
    first, second, *_ = kitchen.world.sent_at
    assert second - first >= REST_S
    assert [event.state for event in kitchen.of(AttemptEnded)][:2] == ["void", "settled"]
    assert {event["event"] for event in kitchen.world.said} == {"keep_warm", "keep_warm_failed"}


@pytest.mark.parametrize(
    ("failure", "states"),
    [
        ((429, "slow down"), ["void", "settled"]),
        ((529, "overloaded"), ["void", "settled"]),
        ((500, "oh"), ["void", "settled"]),
        (Failure(kind="connect", message="refused", sent=False), ["void", "settled"]),
        (Failure(kind="reset", message="reset"), ["estimated", "settled"]),
    ],
)
def test_a_bad_moment_skips_a_round_and_says_nothing_about_the_model(failure, states):
    async def scene(kitchen: Kitchen) -> None:
        kitchen.world.answers = [failure, READ]
        await kitchen.learn()
        await kitchen.pass_time(290.0)

    kitchen = cook(scene)
    assert [event.state for event in kitchen.of(AttemptEnded)] == states
    assert kitchen.world.transitions == []


def test_a_prefix_that_was_not_there_is_not_written_again_and_again():
    async def scene(kitchen: Kitchen) -> None:
        kitchen.world.answers = [WRITTEN]
        await kitchen.learn()
        for _ in range(6):
            await kitchen.pass_time(500.0)
            await kitchen.burst()

    kitchen = cook(scene)
    assert len(kitchen.of(AttemptEnded)) == 1
    assert kitchen.keeper.snapshot().written_tokens == 5_000


def test_the_days_cap_holds_and_tomorrow_is_another_day():
    async def scene(kitchen: Kitchen) -> None:
        await kitchen.learn()
        await kitchen.pass_time(290.0)
        assert kitchen.written == []
        left_s = (DAY_NS - kitchen.world.now_ns() % DAY_NS) / 1e9
        await asyncio.sleep(left_s)
        kitchen.use()
        await kitchen.pass_time(290.0)

    kitchen = cook(scene, spent=10**9 - 1_000_000)
    assert len(kitchen.of(AttemptEnded)) == 1
    assert kitchen.keeper.snapshot().skipped["cap"] >= 1


def test_an_empty_budget_of_the_key_is_respected():
    poor = msgspec.structs.replace(KEY, budget_day_nanousd=1_000)

    async def scene(kitchen: Kitchen) -> None:
        await kitchen.learn(principal=poor)
        await kitchen.pass_time(290.0)

    kitchen = cook(scene)
    assert (kitchen.written, kitchen.world.heads) == ([], [])
    assert set(kitchen.keeper.snapshot().skipped) == {"budget"}


def test_what_it_costs_is_counted_in_the_keys_budget():
    rich = msgspec.structs.replace(KEY, budget_day_nanousd=10**12)

    async def scene(kitchen: Kitchen) -> None:
        await kitchen.learn(principal=rich)
        await kitchen.pass_time(280.0)
        uses = kitchen.world.pipeline.purses.money.snapshot([f"key:{KEY.key_id}"])
        (day,) = [use for use in uses if use.window == "day"]
        assert (day.spent_nanousd, day.reserved_nanousd) == (kitchen.keeper.snapshot().spent_nanousd, 0)
        assert day.spent_nanousd > 0

    cook(scene)


def test_it_takes_nobodys_turn():
    async def scene(kitchen: Kitchen) -> None:
        await kitchen.learn()
        await asyncio.sleep(268.0)
        traffic, pipeline = kitchen.world.traffic, kitchen.world.pipeline
        class_id = pipeline.class_id(MODEL)
        limits = pipeline.policies.class_limits(class_id)
        waiting = [
            traffic.join(
                Want(
                    f"ask{number}",
                    MODEL,
                    class_id,
                    limits,
                    (Subject("user:an", rpm=1),),
                    10,
                    10,
                    deadline=kitchen.loop.time() + 1_000.0,
                    user="an",
                )
            )
            for number in range(3)
        ]
        assert [one.result is None for one in waiting] == [False, True, True]
        await kitchen.pass_time(20.0)
        assert kitchen.written == []
        for one in waiting:
            if one.result is None:
                traffic.leave(one)
            else:
                traffic.neutral(one.result)
                traffic.ended(one.result, input_tokens=0, output_tokens=0)

    kitchen = cook(scene)
    assert set(kitchen.keeper.snapshot().skipped) == {"busy"}


def test_where_anthropics_limits_leave_no_room_it_waits_two_seconds_and_lets_it_be():
    async def scene(kitchen: Kitchen) -> None:
        await kitchen.learn()
        await asyncio.sleep(271.0)
        traffic, pipeline = kitchen.world.traffic, kitchen.world.pipeline
        class_id = pipeline.class_id(MODEL)
        limits = pipeline.policies.class_limits(class_id)
        traffic.limits.throttled(class_id, limits, retry_after_s=60.0, ramp=False)
        before = kitchen.loop.time()
        await kitchen.keeper.look()
        assert kitchen.loop.time() - before <= TURN_S + 0.1

    kitchen = cook(scene)
    assert set(kitchen.keeper.snapshot().skipped) == {"busy"}
    assert kitchen.written == []


def test_switched_off_one_that_waits_for_its_turn_leaves_the_line():
    async def scene(kitchen: Kitchen) -> None:
        await kitchen.learn()
        await asyncio.sleep(271.0)
        traffic, pipeline = kitchen.world.traffic, kitchen.world.pipeline
        class_id = pipeline.class_id(MODEL)
        traffic.limits.throttled(class_id, pipeline.policies.class_limits(class_id), retry_after_s=1.0, ramp=False)
        async with asyncio.TaskGroup() as group:
            group.create_task(kitchen.keeper.look())
            await asyncio.sleep(0.1)
            assert sum(len(queue) for _, _, queue in traffic.lanes()) == 1
            kitchen.keeper.stop()
        await asyncio.sleep(60.0)

    kitchen = cook(scene)
    assert kitchen.written == []
    assert set(kitchen.keeper.snapshot().skipped) == {"stopped"}


def test_a_model_that_is_out_is_left_alone():
    async def scene(kitchen: Kitchen) -> None:
        await kitchen.learn()
        await asyncio.sleep(268.0)
        breakers = kitchen.world.traffic.breakers
        for _ in range(5):
            now = kitchen.loop.time()
            breakers.failed(MODEL, breakers.started(MODEL, now), now)
        await kitchen.pass_time(20.0)

    kitchen = cook(scene)
    assert kitchen.written == []
    assert set(kitchen.keeper.snapshot().skipped) == {"breaker"}


def test_without_a_ledger_nothing_leaves():
    async def scene(kitchen: Kitchen) -> None:
        await kitchen.learn()
        kitchen.full = True
        await kitchen.pass_time(290.0)

    kitchen = cook(scene)
    assert kitchen.world.heads == []
    assert set(kitchen.keeper.snapshot().skipped) == {"ledger"}


def test_several_prefixes_are_warmed_together_but_four_at_once_and_each_once():
    words = ("Ash", "Bay", "Cod", "Dew", "Elm", "Fir", "Gum")

    async def scene(kitchen: Kitchen) -> None:
        await kitchen.learn(*(f"{word} is a word of letters. " * 1_000 for word in words))
        await kitchen.pass_time(290.0)

    kitchen = cook(scene)
    sent = [one["system"][0]["text"][:3] for one in kitchen.world.bodies]
    assert tuple(sorted(sent)) == words
    assert kitchen.world.most_under_way == 4


def test_nothing_is_spent_before_it_is_known_what_was_spent(tmp_path):
    async def scene() -> None:
        def unread(at_ns: int) -> int:
            raise TimeoutError("the fold is behind")

        world = Stove(asyncio.get_running_loop(), Settings(cache={"keep_warm": True}))
        keeper = WarmKeeper(
            world.pipeline,
            CacheSection(keep_warm=True),
            new_call_id=lambda: "call_1",
            read_spent=unread,
            shares=lambda: 1,
        )
        await keeper.look()
        assert [event["event"] for event in world.said] == ["keep_warm_unread"]
        keeper._read_spent = lambda at_ns: 77
        await keeper.look()
        assert keeper.snapshot().spent_nanousd == 77

    before = structlog.get_config()
    try:
        asyncio.run(scene())
    finally:
        structlog.configure(**before)
