"""The store of answers in Redis, on a real redis-server: its bounds, several gateways, and a server that goes away."""

import asyncio
import functools
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest
from tests.storage.redis_server import RedisServer

from headgate.storage.answers import OVERHEAD_BYTES, AnswersUnavailable, Held
from headgate.storage.redis_answers import PREFIX, RedisAnswers
from headgate.storage.redis_limits import RedisMissing


def on_a_loop(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(**fixtures: object) -> None:
        asyncio.run(test(**fixtures))

    return run


prefixes = (f"{PREFIX}test-{number}:" for number in itertools.count())


@asynccontextmanager
async def opened(server: RedisServer, *, bytes_max: int = 1 << 20, prefix: str = "") -> AsyncIterator[RedisAnswers]:
    answers = RedisAnswers(server.url, bytes_max=bytes_max, prefix=prefix or next(prefixes))
    try:
        yield answers
    finally:
        await answers.close()


def sized(count: int) -> bytes:
    return b"a" * (count - OVERHEAD_BYTES)


@on_a_loop
async def test_a_record_is_given_back_as_it_was_and_only_to_its_owner(standing: RedisServer) -> None:
    async with opened(standing) as answers:
        assert await answers.get("k", owner="an") is None
        assert await answers.put("k", bytes(range(256)), owner="an", ttl_s=60)
        assert await answers.get("k", owner="an") == bytes(range(256))
        assert await answers.get("k", owner="binh") is None
        assert await answers.put("k", b"newer", owner="an", ttl_s=60)
        assert await answers.get("k", owner="an") == b"newer"
        assert await answers.held() == Held(1, 5 + OVERHEAD_BYTES)


@on_a_loop
async def test_everything_ends_by_itself(standing: RedisServer) -> None:
    prefix = next(prefixes)
    async with opened(standing, prefix=prefix) as answers:
        await answers.put("long", b"a", owner="an", ttl_s=100)
        await answers.put("short", b"a", owner="an", ttl_s=0.05)
        await answers.put("k", b"a", owner="an", ttl_s=50)
        deadline = time.monotonic() + 5
        while await answers.get("short", owner="an") is not None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        await answers.expire()
        assert await answers.held() == Held(2, 2 * (1 + OVERHEAD_BYTES))
        left_s = [int(standing.say("TTL", prefix + name)[1:]) for name in ("an:long", "an:k", "ends", "sizes")]
        assert [round(left / 10) * 10 for left in left_s] == [100, 50, 100, 100]


@on_a_loop
async def test_what_would_end_soonest_makes_room(standing: RedisServer) -> None:
    async with opened(standing, bytes_max=3_000) as answers:
        for number, name in enumerate(("first", "second", "third")):
            assert await answers.put(name, sized(1_000), owner="an", ttl_s=60 + number)
        assert await answers.put("fourth", sized(1_001), owner="an", ttl_s=70)
        there = [await answers.get(name, owner="an") is not None for name in ("first", "second", "third", "fourth")]
        assert there == [False, False, True, True]
        assert not await answers.put("too long", sized(3_001), owner="an", ttl_s=60)
        assert await answers.held() == Held(2, 2_001)


@on_a_loop
async def test_several_gateways_share_one_bound(standing: RedisServer) -> None:
    prefix = next(prefixes)
    async with (
        opened(standing, bytes_max=20_000, prefix=prefix) as one,
        opened(standing, bytes_max=20_000, prefix=prefix) as other,
    ):
        puts = [
            answers.put(f"k{number}", sized(1_000), owner=owner, ttl_s=60 + number)
            for number in range(100)
            for owner, answers in (("an", one), ("binh", other))
        ]
        assert all(await asyncio.gather(*puts))
        assert await one.held() == await other.held() == Held(20, 20_000)
        assert await one.get("k99", owner="binh") == sized(1_000)
        names = standing.say("KEYS", f"{prefix}*").count(b"$")
        assert names == 22, "twenty records and the index, nothing else"


@on_a_loop
async def test_a_purge_removes_one_owners_or_everybodys(standing: RedisServer) -> None:
    prefix = next(prefixes)
    async with opened(standing, prefix=prefix) as answers:
        for number in range(10):
            await answers.put(f"k{number}", b"a", owner="an", ttl_s=60)
            await answers.put(f"k{number}", b"b", owner="an:an", ttl_s=60)
        assert await answers.purge("nobody") == 0
        assert await answers.purge("an") == 10
        assert await answers.get("k1", owner="an") is None
        assert await answers.get("k1", owner="an:an") == b"b"
        assert await answers.purge(None) == 10
        assert await answers.held() == Held(0, 0)
        assert standing.say("KEYS", f"{prefix}an*").startswith(b"*0")


@pytest.mark.parametrize("lost", ["ends", "sizes", "an:k1"])
@on_a_loop
async def test_an_index_that_lost_a_part_mends_itself(standing: RedisServer, lost: str) -> None:
    prefix = next(prefixes)
    async with opened(standing, bytes_max=5_000, prefix=prefix) as answers:
        for number in range(5):
            await answers.put(f"k{number}", sized(1_000), owner="an", ttl_s=60 + number)
        standing.say("DEL", prefix + lost)
        for number in range(20):
            assert await answers.put(f"n{number}", sized(1_000), owner="an", ttl_s=100 + number)
            assert (await answers.held()).bytes <= 5_000
        assert await answers.held() == Held(5, 5_000)


@on_a_loop
async def test_a_value_that_is_no_record_is_weather_and_no_error(standing: RedisServer) -> None:
    prefix = next(prefixes)
    async with opened(standing, prefix=prefix) as answers:
        standing.say("LPUSH", f"{prefix}an:k", "list")
        with pytest.raises(AnswersUnavailable, match="WRONGTYPE"):
            await answers.get("k", owner="an")
        assert await answers.put("k", b"a", owner="an", ttl_s=60)
        assert await answers.get("k", owner="an") == b"a"


@on_a_loop
async def test_a_server_that_was_killed_is_told_at_once_and_found_again(server: RedisServer) -> None:
    async with opened(server) as answers:
        await answers.put("k", b"a", owner="an", ttl_s=60)
        server.kill()
        began = time.monotonic()
        with pytest.raises(AnswersUnavailable):
            await answers.get("k", owner="an")
        with pytest.raises(AnswersUnavailable):
            await answers.put("k", b"a", owner="an", ttl_s=60)
        assert time.monotonic() - began < 0.5
        server.start()
        assert await answers.get("k", owner="an") is None
        assert await answers.put("k", b"a", owner="an", ttl_s=60)
        assert await answers.get("k", owner="an") == b"a"


@on_a_loop
async def test_an_answer_that_came_too_late_is_never_anothers(server: RedisServer) -> None:
    async with opened(server) as answers:
        for number in range(10):
            await answers.put(f"k{number}", b"%d" % number, owner="an", ttl_s=60)
        server.freeze()
        for number in range(10):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await answers.get(f"k{number}", owner="an")
        server.thaw()
        found = await asyncio.gather(*(answers.get(f"k{number}", owner="an") for number in range(10)))
        assert found == [b"%d" % number for number in range(10)]


@on_a_loop
async def test_a_full_server_is_weather(server: RedisServer) -> None:
    async with opened(server) as answers:
        server.say("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(AnswersUnavailable, match=r"OOM|OutOfMemory"):
            await answers.put("k", b"a", owner="an", ttl_s=60)
        server.say("CONFIG", "SET", "maxmemory", "0")
        assert await answers.put("k", b"a", owner="an", ttl_s=60)


def test_an_url_that_cannot_be_meant_is_told() -> None:
    with pytest.raises(RedisMissing, match="HEADGATE_REDIS_URL"):
        RedisAnswers("http://somewhere", bytes_max=1)
