"""Limits over several processes: the script held to the policy, a Redis that goes away in every way, and what it costs.

All on a real redis-server; what needs exact times gives them to the script, or drives the pure parts.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import redis
import structlog
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.storage.redis_server import RedisServer

from headgate.policy.limiter import Ask, ClassLimits, ClassSnapshot, Limiter, Subject, Verdict
from headgate.storage import redis_limits
from headgate.storage.redis_limits import (
    ANSWER_S,
    LINES_A_MINUTE,
    SCRIPT,
    SHARE,
    RedisLimits,
    RedisMissing,
    asked,
    class_limits,
    observed,
    snapshot_of,
    verdict_of,
    was_throttled,
)
from headgate.wire.headers import RateLimit, RateLimits

SONNET = ClassLimits(rpm=60.0, itpm=6_000.0, otpm=600.0, burst_s=10.0)
SLOW = ClassLimits(rpm=6.0, burst_s=100.0)
"""Ten at once, and in the time that a test takes none more."""
BUSY = ClassLimits(rpm=12_000.0, burst_s=1.0)
"""200 a second, and 200 at once."""


tags = (f"{{test-{number}}}" for number in itertools.count())


async def asked_of(limits: RedisLimits, ask_id: str, class_limits: ClassLimits = SLOW, **fields) -> Verdict:
    answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
    limits.admit(Ask(ask_id, "sonnet", class_limits, **fields), answer.set_result)
    async with asyncio.timeout(5.0):
        return await answer


async def admitted_of(limits: RedisLimits, count: int, prefix: str = "a", **fields) -> int:
    verdicts = await asyncio.gather(*(asked_of(limits, f"{prefix}{number}", **fields) for number in range(count)))
    return sum(verdict.admitted for verdict in verdicts)


async def until(condition: Callable[[], object], *, within_s: float = 8.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def opened(server: RedisServer, **options) -> AsyncIterator[RedisLimits]:
    """Limits that are started, ticked as a gateway does, and closed."""
    limits = RedisLimits(server.url, clock=time.monotonic, **options)
    await limits.start()

    async def tick() -> None:
        while True:
            limits.tick(time.monotonic())
            await asyncio.sleep(0.25)

    ticking = asyncio.get_running_loop().create_task(tick())
    try:
        yield limits
    finally:
        ticking.cancel()
        await limits.close()


# P14: the script and the policy, with one history


class Script:
    """The script, with times that a test gives."""

    def __init__(self, server: RedisServer) -> None:
        self._client = redis.Redis(port=server.port)
        self._tag = next(tags)

    def run(self, operations: list[tuple[object, ...]], now: float) -> list[msgspec.Raw]:
        packed = msgspec.msgpack.encode(operations)
        reply = self._client.eval(SCRIPT, 1, self._tag, packed, "", repr(now))
        _, answers = msgspec.msgpack.decode(reply, type=tuple[int, list[msgspec.Raw]])
        return answers

    def kept_s(self) -> dict[str, int]:
        """What is stored, by kind, and for how long."""
        return {key.decode().split(":")[2]: self._client.ttl(key) for key in self._client.scan_iter(f"{self._tag}*")}

    def spoil(self, kind: str, name: str, value: bytes) -> None:
        """Puts something else where the script will look."""
        self._client.set(f"{self._tag}:1:{kind}:{name}", value)

    def close(self) -> None:
        self._client.close()


CLASSES = (
    SONNET,
    ClassLimits(rpm=30.0, itpm=9_000.0, burst_s=20.0, learn=True),
    ClassLimits(itpm=6_000.0),
    ClassLimits(),
)
SUBJECTS = (
    Subject("user:an", rpm=20.0, otpm=60.0, concurrency=2),
    Subject("user:an", rpm=20.0),
    Subject("key:1", rpm=6.0, burst_s=10.0),
    Subject("key:2", otpm=60.0, concurrency=1),
    Subject("user:binh"),
    Subject("user:chi", rpm=4.0, burst_s=30.0),
    Subject("key:3", rpm=4.0, burst_s=30.0),
)
told = st.one_of(
    st.none(),
    st.builds(RateLimit, st.sampled_from([0, 30, 60, 600, 5_000]), st.integers(-5, 7_000)),
)
some_id = st.integers(0, 6)
moves = st.one_of(
    st.tuples(
        st.just("admit"),
        st.sampled_from(["sonnet", "sonnet", "haiku"]),
        st.sampled_from(CLASSES),
        st.lists(st.sampled_from(SUBJECTS), max_size=2, unique_by=lambda subject: subject.id),
        st.sampled_from([0, 1, 333, 1_000, 7_000]),
        st.sampled_from([0, 7, 90]),
        st.sampled_from([0.3, 10.0, 600.0]),
    ),
    st.tuples(st.just("correct"), some_id, st.integers(0, 2_000), st.integers(0, 300)),
    st.tuples(st.just("settle"), some_id, st.integers(0, 2_000), st.integers(0, 300)),
    st.tuples(st.just("renew"), some_id, st.sampled_from([0.5, 60.0])),
    st.tuples(st.just("observe"), some_id, told, told, told),
    st.tuples(
        st.just("throttled"),
        st.sampled_from(["sonnet", "haiku"]),
        st.sampled_from(CLASSES),
        st.sampled_from([None, 0.0, 0.1, 3.0, 25.0, 4_294_967_295.0]),
        st.booleans(),
    ),
    st.tuples(
        st.just("owe"), st.sampled_from(["sonnet", "haiku"]), st.sampled_from(CLASSES), st.integers(0, 20).map(float)
    ),
)
waits = st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.37, 1.0, 5.3, 61.0, 700.0, -0.2, -40.0])
histories = st.lists(st.tuples(waits, moves), max_size=50)


class Twins:
    """The policy and the script, told the same."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.limiter = Limiter()
        self.now = 1_000.0
        self.asked = 0
        self.ids: list[str] = []
        """Who was admitted."""
        self.batch: list[tuple[object, ...]] = []
        self.expected: list[tuple[Verdict, list[float]]] = []
        self.blocked: set[str] = set()
        self.looked = {"sonnet": SONNET, "haiku": SONNET}
        """Under which limits each class was last asked: it is looked at under the same."""

    def move(self, wait_s: float, move: tuple) -> None:
        if wait_s:
            self.compare()
            self.now += wait_s
        getattr(self, move[0])(*move[1:])

    def compare(self) -> None:
        """Sends what has come together in one call, and compares every answer, and how the classes stand."""
        looks = [(8, class_id, class_limits(limits)) for class_id, limits in self.looked.items()]
        answers = self.script.run([*self.batch, *looks], self.now)
        for answer, (verdict, levels) in zip(answers, self.expected, strict=False):
            got, got_levels = verdict_of(answer)
            assert (got.admitted, got.reason) == (verdict.admitted, verdict.reason)
            assert got.wait_s == pytest.approx(verdict.wait_s, rel=1e-9, abs=1e-9)
            assert got.pace == pytest.approx(verdict.pace, rel=1e-9)
            assert got_levels == pytest.approx(levels, abs=1e-9)
        for answer, (class_id, limits) in zip(answers[len(self.expected) :], self.looked.items(), strict=True):
            same(snapshot_of(answer), self.limiter.snapshot(class_id, limits, self.now))
        self.batch, self.expected, self.blocked = [], [], set()

    def admit(self, class_id, limits, subjects, input_tokens, output_tokens, lease_s) -> None:
        if class_id in self.blocked:
            self.compare()
        self.asked += 1
        ask = Ask(f"a{self.asked}", class_id, limits, tuple(subjects), input_tokens, output_tokens, lease_s)
        verdict = self.limiter.admit(ask, self.now)
        if verdict.admitted:
            self.ids.append(ask.id)
        if verdict.reason.startswith("class") or verdict.reason == "frozen":
            self.blocked.add(class_id)
        self.batch.append(asked(ask))
        levels = [self.limiter.subject_level(subject, self.now) or 0.0 for subject in subjects]
        self.expected.append((verdict, levels))
        self.looked[class_id] = limits

    def _id(self, number: int) -> str:
        return self.ids[-1 - number] if number < len(self.ids) else "never seen"

    def correct(self, number, input_tokens, output_tokens) -> None:
        ask_id = self._id(number)
        self.limiter.correct(ask_id, input_tokens=input_tokens, output_tokens=output_tokens, now=self.now)
        self.batch.append((2, ask_id, input_tokens, output_tokens))

    def settle(self, number, input_tokens, output_tokens) -> None:
        ask_id = self._id(number)
        self.limiter.settle(ask_id, input_tokens=input_tokens, output_tokens=output_tokens, now=self.now)
        self.batch.append((3, ask_id, input_tokens, output_tokens))

    def renew(self, number, lease_s) -> None:
        self.limiter.renew(self._id(number), lease_s=lease_s, now=self.now)
        self.batch.append((4, self._id(number), lease_s))

    def observe(self, number, *limits) -> None:
        headers = RateLimits(*limits)
        self.limiter.observe(self._id(number), headers, self.now)
        self.batch.append(observed(self._id(number), headers))

    def throttled(self, class_id, limits, retry_after_s, ramp) -> None:
        self.limiter.throttled(class_id, limits, retry_after_s=retry_after_s, ramp=ramp, now=self.now)
        self.batch.append(was_throttled(class_id, limits, retry_after_s, ramp))

    def owe(self, class_id, limits, amount) -> None:
        self.limiter.owe(class_id, limits, (amount, 100 * amount, 10 * amount), self.now)
        self.batch.append((7, class_id, class_limits(limits), amount, 100 * amount, 10 * amount))


def same(script: ClassSnapshot, policy: ClassSnapshot) -> None:
    assert (script.limits, script.levels, script.learned) == (policy.limits, policy.levels, policy.learned)
    assert script.frozen_s == pytest.approx(policy.frozen_s, abs=1e-9)
    assert (script.pace, script.burst) == pytest.approx((policy.pace, policy.burst), rel=1e-9)


@settings(max_examples=200)
@given(history=histories)
def test_the_script_decides_as_the_policy_does(standing, history):
    script = Script(standing)
    twins = Twins(script)
    for wait_s, move in history:
        twins.move(wait_s, move)
    twins.compare()
    script.close()


@settings(max_examples=250)
@given(seed=st.integers(0, 1 << 32))
def test_the_script_decides_as_the_policy_does_over_long_histories(standing, seed):
    # Of what happens to one class one after the other, which short histories hardly meet: probes, leases that end,
    # limits that were learned.
    script = Script(standing)
    twins = Twins(script)
    for wait_s, move in long_history(random.Random(seed)):
        twins.move(wait_s, move)
    twins.compare()
    script.close()


def long_history(dice: random.Random) -> Iterator[tuple[float, tuple]]:
    class_id, limits = "sonnet", dice.choice(CLASSES[:2])
    pairs = [[SUBJECTS[0]], [SUBJECTS[5], SUBJECTS[6]], [SUBJECTS[3]], [SUBJECTS[0], SUBJECTS[2]], []]
    leases = dice.choice([[0.4, 3.0, 50.0], [60.0]])

    def ask() -> tuple:
        tokens = dice.choice([0, 10, 10, 333, 900]), dice.choice([0, 7, 7, 60])
        return ("admit", class_id, limits, dice.choice(pairs), *tokens, dice.choice(leases))

    def ending() -> tuple:
        number = dice.choice([0, 1, 2])
        requests, tokens = RateLimit(dice.choice([30, 60, 90]), dice.randint(0, 9)), RateLimit(6_000, 1_000)
        return dice.choice(
            [
                ("correct", number, dice.randint(0, 900), dice.choice([0, 3, 5, 60])),
                ("settle", number, dice.randint(0, 900), dice.choice([0, 3, 5, 60])),
                ("renew", number, dice.choice(leases)),
                ("observe", number, None, None, None),
                ("observe", number, requests, dice.choice([None, tokens]), None),
            ]
        )

    for _ in range(40):
        kind = dice.random()
        if kind < 0.08:
            yield 0.0, ("throttled", class_id, limits, dice.choice([None, 0.5, 2.0, 25.0]), dice.random() < 0.5)
        elif kind < 0.18:
            # A probe, what it meets, and who waited for it.
            yield 0.0, ("throttled", class_id, limits, 25.0, dice.random() < 0.5)
            yield 26.0, ask()
            yield dice.choice([0.0, 2.0]), dice.choice([ending(), ("throttled", class_id, limits, 3.0, True)])
            yield dice.choice([0.0, 3.0, 31.0]), ask()
        elif kind < 0.23:
            yield dice.choice([-0.4, -2.0, -50.0]), ask()
        elif kind < 0.26:
            yield 0.0, ("owe", class_id, limits, dice.choice([1.0, 5.0]))
        elif kind < 0.6:
            yield dice.choice([0.0, 0.0, 0.05, 0.4, 2.6, 8.0, 70.0]), ask()
        else:
            yield dice.choice([0.0, 0.0, 0.4]), ending()


def test_in_one_call_nobody_passes_who_was_denied_for_the_class(standing):
    script = Script(standing)
    first, small, other, limited = (
        Ask("first", "sonnet", SONNET, input_tokens=900),
        Ask("small", "sonnet", SONNET, input_tokens=1),
        Ask("other", "haiku", SONNET, input_tokens=1),
        Ask("limited", "sonnet", SONNET, (Subject("user:an", rpm=6.0, concurrency=1),)),
    )
    script.run([asked(Ask("before", "sonnet", SONNET, (Subject("user:an", rpm=6.0, concurrency=1),), 200))], 1_000.0)
    answers = [
        verdict_of(answer)[0] for answer in script.run([asked(a) for a in (first, small, other, limited)], 1_000.0)
    ]
    assert answers == [
        Verdict(False, 1.0, "class_itpm"),
        Verdict(False, 1.0, "class_itpm"),
        Verdict(True),
        Verdict(False, math.inf, "user_concurrency"),
    ]
    assert verdict_of(script.run([asked(small)], 1_000.0)[0])[0].admitted
    script.close()


def test_what_says_nothing_new_any_more_leaves_redis_by_itself(standing):
    script = Script(standing)
    script.run([asked(Ask("a", "sonnet", SONNET, SUBJECTS[:1], 100, 10, 60.0))], 1_000.0)
    ttls = script.kept_s()
    assert ttls.keys() == {"class", "subject", "ask", "slots"}
    assert 60 < ttls["subject"] <= 90
    assert 60 < ttls["ask"] <= 120
    assert 60 < ttls["slots"] <= 120
    script.run([(3, "a", 0, 0)], 1_000.0)
    assert script.kept_s().keys() == {"class", "subject"}
    script.close()


def test_what_cannot_be_read_counts_as_lost(standing):
    script = Script(standing)
    for junk in (b"", b"\xc1", b"\x01", b"\xdc\xff\xff"):
        script.spoil("class", "sonnet", junk)
        assert verdict_of(script.run([asked(Ask("a", "sonnet", SONNET))], 1_000.0)[0])[0].admitted
    script.close()


# In one gateway


def test_all_that_happens_to_an_attempt_reaches_the_limiter(standing):
    an = Subject("user:an", rpm=6.0, concurrency=2)
    limits_of = ClassLimits(rpm=6.0, itpm=600.0, burst_s=100.0)

    async def scenario() -> None:
        async with opened(standing, tag=next(tags)) as limits:
            assert limits.shared
            verdict = await asked_of(limits, "a", limits_of, subjects=(an,), input_tokens=900)
            assert verdict == Verdict(True)
            assert limits.subject_level(an) == pytest.approx(5.0, abs=0.2)
            limits.correct("a", input_tokens=500, output_tokens=3)
            limits.observe("a", RateLimits(input_tokens=RateLimit(limit=300, remaining=50)))
            await until(lambda: limits.effective("sonnet", limits_of).itpm == 300)
            assert limits.snapshot("sonnet", limits_of).levels[1] <= 460
            limits.renew("a", lease_s=100.0)
            limits.throttled("sonnet", limits_of, retry_after_s=5.0, ramp=False)
            verdict = await asked_of(limits, "b", limits_of)
            assert (verdict.reason, verdict.wait_s) == ("frozen", pytest.approx(5.0, abs=0.5))
            await until(lambda: limits.snapshot("sonnet", limits_of).frozen_s > 0)
            limits.settle("a", input_tokens=500, output_tokens=3)

    asyncio.run(scenario())


def test_several_gateways_share_one_limit_and_learn_of_each_other(standing):
    async def scenario() -> None:
        tag = next(tags)
        async with opened(standing, tag=tag) as one, opened(standing, tag=tag) as other:
            got = await asyncio.gather(admitted_of(one, 20, "a"), admitted_of(other, 20, "b"))
            assert sum(got) == 10
            assert other.snapshot("sonnet", SLOW).limits == (6.0, None, None)
            await until(lambda: (one.replicas, other.replicas) == (2, 2))
        async with opened(standing, tag=tag) as third:
            await until(lambda: third.replicas == 1)

    asyncio.run(scenario())


def test_what_is_asked_in_one_turn_goes_in_one_call(standing):
    async def scenario() -> int:
        async with opened(standing, tag=next(tags)) as limits:
            before = calls(standing)
            assert await admitted_of(limits, 50) == 10
            return calls(standing) - before

    def calls(server: RedisServer) -> int:
        statistics = server.say("INFO", "commandstats").decode()
        return int(statistics.partition("cmdstat_evalsha:calls=")[2].partition(",")[0] or 0)

    assert 1 <= asyncio.run(scenario()) <= 3, "one, and a heartbeat"


def test_a_script_that_was_lost_is_sent_again_and_the_limit_holds(standing):
    async def scenario() -> None:
        async with opened(standing, tag=next(tags)) as limits:
            assert await admitted_of(limits, 7, "a") == 7
            standing.say("SCRIPT", "FLUSH")
            assert await admitted_of(limits, 7, "b") == 3
            assert limits.shared

    asyncio.run(scenario())


def test_a_server_that_forgets_everything_lets_one_more_burst_through(standing):
    async def scenario() -> None:
        async with opened(standing, tag=next(tags)) as limits:
            assert await admitted_of(limits, 30, "a") == 10
            standing.say("FLUSHALL")
            assert await admitted_of(limits, 30, "b") == 10
            limits.settle("a1", input_tokens=5, output_tokens=5)
            assert await admitted_of(limits, 30, "c") == 0
            assert limits.shared

    asyncio.run(scenario())


# Without Redis


def test_without_the_package_the_start_says_what_to_install(monkeypatch):
    monkeypatch.setattr(redis_limits, "redis", None)
    with pytest.raises(RedisMissing, match=r"pip install 'headgate\[redis\]'"):
        RedisLimits("redis://127.0.0.1", clock=time.monotonic)


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost/0?socket_timeout=x", ""])
def test_an_address_that_cannot_be_meant_stops_the_start(url):
    with pytest.raises(RedisMissing, match="looks like redis://"):
        RedisLimits(url, clock=time.monotonic)


def test_not_reached_at_start_it_begins_with_its_share_and_finds_redis_later(server):
    server.kill()

    async def scenario() -> None:
        with structlog.testing.capture_logs() as lines:
            started_at = time.monotonic()
            async with opened(server, replicas_expected=4) as limits:
                assert time.monotonic() - started_at < 1.5
                assert not limits.shared
                assert limits.effective("sonnet", BUSY).rpm == pytest.approx(BUSY.rpm * SHARE / 4)
                assert await admitted_of(limits, 30) == 2, "a fourth of 0.8 of ten"
                server.start()
                await until(lambda: limits.shared)
                assert await admitted_of(limits, 30, "b") == 8, "what was taken alone has been told"
        assert [line["event"] for line in lines] == ["redis_limits_away", "redis_limits_shared"]

    asyncio.run(scenario())


def kill(server: RedisServer) -> None:
    server.kill()


def freeze(server: RedisServer) -> None:
    server.freeze()


def stall(server: RedisServer) -> None:
    server.say("CLIENT", "PAUSE", "1000", "ALL")


def no_memory(server: RedisServer) -> None:
    server.say("CONFIG", "SET", "maxmemory", "1")


def read_only(server: RedisServer) -> None:
    server.say("REPLICAOF", "127.0.0.1", "1")


def restart(server: RedisServer) -> None:
    server.start()


def thaw(server: RedisServer) -> None:
    server.thaw()


def wait(server: RedisServer) -> None:
    """It ends by itself."""


def memory(server: RedisServer) -> None:
    server.say("CONFIG", "SET", "maxmemory", "0")


def writable(server: RedisServer) -> None:
    server.say("REPLICAOF", "NO", "ONE")


FAULTS = [(kill, restart), (freeze, thaw), (stall, wait), (no_memory, memory), (read_only, writable)]


@pytest.mark.alone
@pytest.mark.parametrize(("fault", "mend"), FAULTS)
def test_whatever_redis_does_everybody_is_answered_from_a_share_until_it_can_be_trusted(server, fault, mend):
    async def scenario() -> None:
        with structlog.testing.capture_logs() as lines:
            async with opened(server) as limits:
                subjects = (Subject("user:an", concurrency=4),)
                assert await admitted_of(limits, 4, "before", subjects=subjects) == 4
                fault(server)
                started_at = time.monotonic()
                assert await admitted_of(limits, 30, "first") == 8
                assert time.monotonic() - started_at < 0.25
                assert not limits.shared
                started_at = time.monotonic()
                assert await admitted_of(limits, 30, "then") == 0
                assert time.monotonic() - started_at < 0.02
                for number in range(4):
                    limits.settle(f"before{number}", input_tokens=0, output_tokens=0)
                mend(server)
                await until(lambda: limits.shared)
                # Told: the slots that are free again, and what was taken meanwhile.
                assert await admitted_of(limits, 30, "after") == (2 if fault is kill else 0)
                verdict = await asked_of(limits, "slot", ClassLimits(), subjects=subjects)
                assert verdict.admitted
        assert [line["event"] for line in lines] == ["redis_limits_shared", "redis_limits_lost", "redis_limits_shared"]

    asyncio.run(scenario())


def test_who_was_admitted_by_a_frozen_server_and_denied_here_keeps_no_slot(server):
    async def scenario() -> None:
        async with opened(server) as limits:
            people = [(Subject(f"user:{number}", concurrency=1),) for number in range(30)]
            server.freeze()
            verdicts = await asyncio.gather(
                *(asked_of(limits, f"a{number}", subjects=one) for number, one in enumerate(people))
            )
            assert sum(verdict.admitted for verdict in verdicts) == 8
            # It wakes and reads what was sent to it, and admits ten.
            server.thaw()
            await until(lambda: limits.shared)
            again = [
                await asked_of(limits, f"b{number}", ClassLimits(), subjects=one)
                for number, one in enumerate(people)
                if not verdicts[number].admitted
            ]
            assert all(verdict.admitted for verdict in again)

    asyncio.run(scenario())


def test_redis_is_trusted_again_after_three_good_answers_and_later_each_time_it_was_wrong(server, monkeypatch):
    async def scenario() -> None:
        async with opened(server) as limits:
            away = []
            for _ in range(2):
                server.kill()
                await until(lambda: not limits.shared)
                server.start()
                up_at = time.monotonic()
                await until(lambda: limits.shared)
                away.append(time.monotonic() - up_at)
            assert away[0] > 2 * redis_limits.PING_S
            assert away[1] > 5 * redis_limits.PING_S

    asyncio.run(scenario())


def test_a_fault_of_the_script_answers_from_the_share_and_is_not_repeated(standing, monkeypatch):
    async def scenario() -> None:
        async with opened(standing, tag=next(tags)) as limits:
            assert (await asked_of(limits, "a")).admitted
            limits.settle("a", input_tokens="not a number", output_tokens=0)
            assert (await asked_of(limits, "b")).admitted
            assert not limits.shared
            await until(lambda: limits.shared)
            for number in range(3):
                assert (await asked_of(limits, f"c{number}")).admitted
            assert limits.shared

    asyncio.run(scenario())


def test_transitions_are_told_and_at_most_ten_lines_a_minute(standing):
    clock = iter(range(1_000))
    limits = RedisLimits(standing.url, clock=lambda: float(next(clock)))
    with structlog.testing.capture_logs() as lines:
        for _ in range(100):
            limits._tell("redis_limits_lost", reason="refused")
    assert len(lines) == 2 * LINES_A_MINUTE
    assert [line["lines_dropped"] for line in lines if "lines_dropped" in line] == [50]


@pytest.mark.parametrize(("policy", "events"), [("allkeys-lru", ["redis_limits_may_be_evicted"]), ("noeviction", [])])
def test_a_server_that_may_throw_counts_away_is_named_once(tmp_path, policy, events):
    async def scenario(server: RedisServer) -> None:
        async with opened(server):
            pass

    server = RedisServer(tmp_path)
    server.start("--maxmemory", "100mb", "--maxmemory-policy", policy)
    with structlog.testing.capture_logs() as lines:
        asyncio.run(scenario(server))
    server.kill()
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == events


def test_who_waits_when_it_closes_is_answered(standing):
    async def scenario() -> None:
        async with opened(standing, tag=next(tags)) as limits:
            answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
            limits.admit(Ask("a", "sonnet", SLOW), answer.set_result)
        assert (await answer).admitted
        limits.admit(Ask("b", "sonnet", SLOW), lambda verdict: None)

    asyncio.run(scenario())


def test_a_callback_that_raises_takes_no_other_with_it(standing):
    async def scenario() -> None:
        async with opened(standing, tag=next(tags)) as limits:
            raised: list[object] = []
            asyncio.get_running_loop().set_exception_handler(lambda _loop, context: raised.append(context["exception"]))

            def bad(verdict: Verdict) -> None:
                raise RuntimeError("a fault of the caller")

            limits.admit(Ask("a", "sonnet", SLOW), bad)
            assert (await asked_of(limits, "b")).admitted
            assert (await asked_of(limits, "c")).admitted
            assert limits.shared
            assert len(raised) == 1

    asyncio.run(scenario())


def test_a_freeze_outlives_the_server_that_knew_of_it(server):
    async def scenario() -> None:
        async with opened(server) as limits:
            assert (await asked_of(limits, "a")).admitted
            limits.throttled("sonnet", SLOW, retry_after_s=30.0, ramp=False)
            assert (await asked_of(limits, "b")).reason == "frozen"
            await until(lambda: limits.snapshot("sonnet", SLOW).frozen_s > 0)
            server.kill()
            assert (await asked_of(limits, "c")).reason == "frozen"
            server.start()
            await until(lambda: limits.shared)
            assert (await asked_of(limits, "d")).reason == "frozen"

    asyncio.run(scenario())


# P12: Redis lost at any step


class Fleet:
    """Gateways in virtual time: one Redis, and the share of each while it is away. The pure parts, no network."""

    def __init__(self, replicas: int) -> None:
        self.redis = Limiter()
        self.shares = [redis_limits._Share(SHARE / replicas) for _ in range(replicas)]
        self.away = [False] * replicas
        self.now = 1_000.0
        self.asks = 0

    def ask(self, replica: int) -> bool:
        self.asks += 1
        ask = Ask(f"a{self.asks}", "sonnet", SONNET)
        if self.away[replica]:
            return self.shares[replica].admit(ask, self.now).admitted
        return self.redis.admit(ask, self.now).admitted

    def lose(self, replica: int) -> None:
        if not self.away[replica]:
            self.away[replica] = True
            self.shares[replica].begin(SHARE / len(self.shares), self.now)

    def find(self, replica: int) -> None:
        if self.away[replica]:
            self.away[replica] = False
            for class_id, limits, amounts, _ in self.shares[replica].taken(self.now):
                self.redis.owe(class_id, limits, amounts, self.now)


@example(replicas=1, flushed_at=None, steps=[(20.0, "lose"), (20.0, "find")] * 10)
@example(replicas=2, flushed_at=None, steps=[(3.0, "lose"), (10.0, "find")] * 20)
@given(
    replicas=st.integers(1, 4),
    flushed_at=st.one_of(st.none(), st.integers(0, 60)),
    steps=st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 3.0, 20.0]), st.sampled_from(["lose", "find", "lose one", "find one"])),
        max_size=60,
    ),
)
def test_redis_lost_at_any_step_lets_through_at_most_a_burst_a_replica_more(replicas, flushed_at, steps):
    fleet, admitted = Fleet(replicas), 0
    for number, (seconds, event) in enumerate(steps):
        fleet.now += seconds
        if number == flushed_at:
            fleet.redis = Limiter()
        for replica in range(replicas):
            admitted += sum(fleet.ask(replica) for _ in range(30))
        concerned = range(replicas) if " " not in event else range(1)
        for replica in concerned:
            (fleet.lose if event.startswith("lose") else fleet.find)(replica)
        for replica in range(replicas):
            admitted += sum(fleet.ask(replica) for _ in range(30))
    allowed = 10.0 + (fleet.now - 1_000.0) * 1.0
    flushed = 10.0 if flushed_at is not None and flushed_at < len(steps) else 0.0
    assert admitted <= allowed + 10.0 * replicas + flushed


# Under load


class Load:
    """Twice what is allowed, asked of some gateways: what was admitted, and how long each ask took."""

    def __init__(self, fleet: list[RedisLimits], *, per_s: float) -> None:
        self._fleet = fleet
        self._per_s = per_s
        self.admitted = 0
        self.taken: list[tuple[float, float]] = []
        """When each ask was made, and how long its answer took."""
        self.lags: list[float] = []
        """How late the loop was: what a busy machine adds to any answer."""
        self.unanswered = 0

    async def run(self, seconds: float) -> float:
        """Asks for so long, evenly; returns for how long it really was."""
        started_at = time.monotonic()
        asked_for = 0
        while (passed := time.monotonic() - started_at) < seconds:
            while asked_for < passed * self._per_s:
                self._ask(self._fleet[asked_for % len(self._fleet)])
                asked_for += 1
            before = time.monotonic()
            await asyncio.sleep(0.004)
            self.lags.append(time.monotonic() - before - 0.004)
        await until(lambda: self.unanswered == 0, within_s=1.0)
        return time.monotonic() - started_at

    def _ask(self, limits: RedisLimits) -> None:
        asked_at = time.monotonic()
        ask = Ask(f"{id(self)}-{len(self.taken) + self.unanswered}-{asked_at}", "sonnet", BUSY, lease_s=30.0)
        self.unanswered += 1

        def answered(verdict: Verdict) -> None:
            self.unanswered -= 1
            self.admitted += verdict.admitted
            self.taken.append((asked_at, time.monotonic() - asked_at))

        limits.admit(ask, answered)

    def slowest(self, share: float, *, since: float = 0.0) -> float:
        """The wait that `share` of the asks were within, less what the machine itself was late by."""
        waits = sorted(wait for at, wait in self.taken if at >= since)
        lags = sorted(self.lags)
        return max(waits[int((len(waits) - 1) * share)] - lags[int((len(lags) - 1) * share)], 0.0)


def test_two_gateways_under_twice_the_demand_admit_what_is_allowed(standing):
    async def scenario() -> None:
        tag = next(tags)
        async with opened(standing, tag=tag) as one, opened(standing, tag=tag) as other:
            load = Load([one, other], per_s=800.0)
            seconds = await load.run(3.0)
            assert one.shared
            assert other.shared
        assert load.admitted == pytest.approx(200.0 + 200.0 * seconds, rel=0.02)
        assert load.slowest(0.99) < 0.05

    asyncio.run(scenario())


def flush(server: RedisServer) -> None:
    server.say("FLUSHALL")


@pytest.mark.drill
@pytest.mark.parametrize(("fault", "mend"), [(kill, restart), (freeze, thaw), (flush, wait)])
def test_redis_lost_under_load_is_felt_for_one_call_and_costs_at_most_a_burst_a_gateway(server, fault, mend):
    async def scenario() -> None:
        with structlog.testing.capture_logs() as lines:
            async with opened(server, replicas_expected=2) as one, opened(server, replicas_expected=2) as other:
                load = Load([one, other], per_s=800.0)
                running = asyncio.get_running_loop().create_task(load.run(6.0))
                await asyncio.sleep(1.5)
                fault(server)
                lost_at = time.monotonic()
                await asyncio.sleep(2.0)
                mend(server)
                seconds = await running
                await until(lambda: one.shared and other.shared)
        assert load.slowest(1.0) <= ANSWER_S + 0.01
        assert load.slowest(0.99, since=lost_at + 1.0) <= 0.05
        allowed = 200.0 + 200.0 * seconds
        assert 0.75 * allowed <= load.admitted <= allowed + 2 * 200.0
        assert len(lines) <= LINES_A_MINUTE

    asyncio.run(scenario())


@pytest.mark.drill
def test_a_server_that_comes_and_goes_is_not_told_of_in_every_line(server):
    async def scenario() -> None:
        with structlog.testing.capture_logs() as lines:
            async with opened(server) as limits:
                load = Load([limits], per_s=100.0)
                running = asyncio.get_running_loop().create_task(load.run(4.0))
                for _ in range(8):
                    server.freeze()
                    await asyncio.sleep(0.25)
                    server.thaw()
                    await asyncio.sleep(0.25)
                await running
        assert len(lines) <= LINES_A_MINUTE
        assert load.slowest(0.99) <= ANSWER_S

    asyncio.run(scenario())
