"""Answers of several gateways together, kept in Redis.

What it is: `answers.Answers` over plain keys with an end (`SET` with `PX`), and an index beside them that keeps the
whole within its bytes: a sorted set by end, and a hash of sizes with their sum. What it is not: Redis' own eviction.
The same Redis holds the limits, for which `maxmemory-policy` must stay `noeviction`; were it another after all, the
index counts too much until what was evicted is over its time, and mends itself when a part of it is evicted.

All keys begin with `headgate:answers:` and end by themselves: nothing is left when reuse is switched off. The script
names keys that it finds in the index, so that a Redis Cluster cannot run it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable
from typing import Any, cast

from headgate.storage.answers import OVERHEAD_BYTES, AnswersUnavailable, Held
from headgate.storage.redis_limits import RedisMissing

try:
    import redis
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import NoScriptError, RedisError
except ImportError:  # an extra; who configures Redis without it is told at start
    redis = None  # type: ignore[assignment]

PREFIX = "headgate:answers:"
CONNECTIONS_MAX = 8
CONNECT_S = 0.5
ANSWER_S = 1.0
"""For what nobody waits for. Who looks for an answer gives up long before (`gateway/answer_reuse.py`)."""
PURGE_BATCH = 500

# Members of the index are `OWNER:KEY`, which is a record's name behind the prefix. Each `remove` is what one record
# takes with it; the sum is a field of the same hash, so that neither can be lost without the other.
_SCRIPT = """
local ends, sizes, prefix = KEYS[1], KEYS[2], ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function remove(member)
  local size = tonumber(redis.call('HGET', sizes, member) or '0')
  redis.call('DEL', prefix .. member)
  redis.call('ZREM', ends, member)
  redis.call('HDEL', sizes, member)
  if size > 0 then redis.call('HINCRBY', sizes, '', -size) end
end

local function expire(limit)
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', ends, '-inf', now, 'LIMIT', 0, limit)) do remove(member) end
end

if ARGV[2] == 'expire' then
  expire(5000)
  return 0
end
if ARGV[2] == 'remove' then
  for at = 3, #ARGV do remove(ARGV[at]) end
  return 0
end

local member, record, ttl, most, size = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
-- A server without memory refuses this. Behind a write that it takes, such as a DEL, it would refuse nothing more.
redis.call('HINCRBY', sizes, '', 0)
expire(500)
remove(member)
while tonumber(redis.call('HGET', sizes, '') or '0') + size > most do
  local first = redis.call('ZRANGE', ends, 0, 0)[1]
  if not first then
    redis.call('DEL', sizes)
    break
  end
  remove(first)
end
redis.call('SET', prefix .. member, record, 'PX', ttl)
redis.call('ZADD', ends, now + ttl, member)
redis.call('HSET', sizes, member, size)
redis.call('HINCRBY', sizes, '', size)
for _, key in ipairs({ends, sizes}) do
  if redis.call('PTTL', key) < ttl then redis.call('PEXPIRE', key, ttl) end
end
return 1
"""
_SHA = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()


class RedisAnswers:
    """See `Answers`. One script a write, one GET a look, the server's clock."""

    def __init__(self, url: str, *, bytes_max: int, prefix: str = PREFIX) -> None:
        """Connects when first asked. Raises RedisMissing: the package is not installed, or the URL cannot be meant."""
        if redis is None:
            raise RedisMissing(
                "HEADGATE_REDIS_URL is set, but the package `redis` is not installed.\n"
                "Install it with `pip install 'headgate[redis]'`, or unset HEADGATE_REDIS_URL to run one process."
            )
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                protocol=2,
                max_connections=CONNECTIONS_MAX,
                timeout=ANSWER_S,
                retry=Retry(NoBackoff(), 0),
                socket_connect_timeout=CONNECT_S,
                socket_timeout=ANSWER_S,
            )
        except (ValueError, TypeError) as problem:
            raise RedisMissing(f"HEADGATE_REDIS_URL cannot be read: {problem}") from problem
        self._client = Redis(connection_pool=pool)
        self._pool = pool
        self._bytes_max = bytes_max
        self._prefix = prefix
        self._ends = f"{prefix}ends"
        self._sizes = f"{prefix}sizes"

    async def get(self, key: str, *, owner: str) -> bytes | None:
        """See `Answers.get`."""
        found = await self._ask(self._client.get(f"{self._prefix}{owner}:{key}"))
        return found if isinstance(found, bytes) else None

    async def put(self, key: str, record: bytes, *, owner: str, ttl_s: float) -> bool:
        """See `Answers.put`."""
        size = len(record) + OVERHEAD_BYTES
        if size > self._bytes_max:
            return False
        await self._run("put", f"{owner}:{key}", record, max(int(ttl_s * 1000), 1), self._bytes_max, size)
        return True

    async def purge(self, owner: str | None) -> int:
        """See `Answers.purge`. What is put meanwhile by another gateway may stay."""
        members = [bytes(member) for member in await self._ask(self._client.zrange(self._ends, 0, -1))]
        if owner is not None:
            members = [member for member in members if member.rpartition(b":")[0] == owner.encode()]
        for at in range(0, len(members), PURGE_BATCH):
            await self._run("remove", *members[at : at + PURGE_BATCH])
        return len(members)

    async def expire(self) -> None:
        """See `Answers.expire`. Redis removes the answers by itself; this clears the index."""
        await self._run("expire")

    async def held(self) -> Held:
        """See `Answers.held`."""
        count = await self._ask(self._client.zcard(self._ends))
        total = await self._ask(self._client.hget(self._sizes, ""))
        return Held(int(count), int(total or 0))

    async def close(self) -> None:
        """See `Answers.close`."""
        try:
            await self._client.aclose()
            await self._pool.disconnect()
        except (RedisError, OSError):
            pass  # it went before us

    async def _run(self, *words: str | int | bytes) -> None:
        arguments = (self._ends, self._sizes, self._prefix, *words)
        try:
            await self._ask(self._client.evalsha(_SHA, 2, *arguments))
        except _NoScript:
            # A new server, or a proxy that knows no scripts by name.
            await self._ask(self._client.eval(_SCRIPT, 2, *arguments))

    async def _ask(self, answer: Any) -> Any:  # Any: the client types one method for both of its worlds
        try:
            return await cast(Awaitable[Any], answer)
        except NoScriptError as error:
            raise _NoScript from error
        except (RedisError, OSError, TimeoutError) as error:
            raise AnswersUnavailable(f"Redis: {type(error).__name__}: {error}"[:200]) from error


class _NoScript(Exception):
    """The server does not know the script yet."""
