"""The limits of several processes, kept in Redis: one script, one round trip, the server's clock.

What it is: `interfaces.Limits` over `limiter.lua`, which repeats `policy/limiter.py`. Operations that come while a call
is under way go together in the next one. What it is not: a place that must be there. When Redis is refused, frozen,
slow or out of its senses, everything is decided here at once, by a limiter of this process with its share of every
limit: configured × 0.8 / replicas, so that all of them together stay below the whole (failure-model §2.5). Nothing is
ever let through because something failed, and no caller sees an error.

Lost reservations do no harm in either direction: what was taken in Redis ends by its lease, and what was taken here
while Redis was away is told to it when it is back.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import structlog

from headgate.policy.limiter import (
    MINUTE_S,
    Ask,
    ClassLimits,
    ClassSnapshot,
    Limiter,
    Subject,
    Verdict,
)
from headgate.policy.token_bucket import refilled
from headgate.wire.headers import RateLimit, RateLimits

try:
    import redis
    from redis import exceptions as redis_exceptions
    from redis.asyncio import ConnectionPool
    from redis.asyncio.connection import AbstractConnection
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
except ImportError:  # an extra; who configures Redis without it is told at start
    redis = None  # type: ignore[assignment]

SCRIPT = (Path(__file__).parent / "limiter.lua").read_text()
TAG = "{headgate}"
"""What every key begins with."""

TIMEOUT_S = 0.1
"""A call that takes longer has failed, and Redis with it."""
ANSWER_S = 0.14
"""What an ask may take in all, with the call that was under way before its own."""
CALL_S_MIN = 0.02
SECOND_LOOK_S = 0.005
"""When the loop itself was late, an answer may lie in the socket: it is read before it counts as missing."""
GATHER_S = 0.005
"""How long what needs no answer waits for company."""
BATCH_MAX = 200
"""Operations in one call: some 3 ms of Redis."""
HEARTBEAT_S = 1.0
SHARE = 0.8
"""Of its part of each limit, what a process uses that cannot ask the others."""
CONNECT_S = 1.0
START_S = 1.0
PING_S = 0.2
AWAY_S = 0.5
"""Between two tries to reach Redis."""
PINGS = 3
"""Good answers in a row before Redis is trusted again; twice as many each time that trust was wrong, to PINGS_MAX."""
PINGS_MAX = 24
TRUSTED_S = 60.0
"""After which a loss is news again."""
LINES_A_MINUTE = 10
KNOWN_S = 60.0
"""How long a class that nobody asks for is still looked at."""
LATE_MAX = 2_000
"""Ends of attempts that are kept for Redis' return: ten calls. Others end there by their lease."""
LEVELS_MAX = 10_000
"""Subjects whose last known level is remembered."""

_ADMIT, _CORRECT, _SETTLE, _RENEW, _OBSERVE, _THROTTLED, _OWE, _SNAPSHOT = range(1, 9)

Sent = tuple[object, ...]
"""An operation as the script takes it."""

_log = structlog.get_logger(__name__)
_encode = msgspec.msgpack.Encoder().encode


class RedisMissing(Exception):
    """Redis is configured, and cannot be used as it is: the text says what to mend. Only ever raised at start."""


class _Reply(msgspec.Struct, array_like=True):
    """What the script answers."""

    replicas: int
    answers: list[msgspec.Raw]


class _Told(msgspec.Struct, array_like=True):
    """A class as the script knows it; 0 and infinite are without limit."""

    limits: list[float]
    levels: list[float]
    learned: list[float]
    frozen_s: float
    pace: float
    burst: float


_read_reply = msgspec.msgpack.Decoder(_Reply).decode
_read_verdict = msgspec.msgpack.Decoder(list[float | str]).decode
_read_class = msgspec.msgpack.Decoder(_Told).decode


class _Operation:
    """One operation on its way: what is sent, and who waits for what of it."""

    __slots__ = ("answered", "ask", "at", "class_id", "freeze_s", "limits", "sent")

    def __init__(
        self,
        sent: Sent,
        at: float,
        *,
        ask: Ask | None = None,
        answered: Callable[[Verdict], None] | None = None,
        class_id: str = "",
        limits: ClassLimits | None = None,
        freeze_s: float = 0.0,
    ) -> None:
        self.sent = sent
        self.at = at
        self.ask = ask
        self.answered = answered
        self.class_id = class_id
        self.limits = limits
        self.freeze_s = freeze_s


class _Known:
    """What was last heard of a class."""

    __slots__ = ("asked_at", "at", "limits", "snapshot")

    def __init__(self, limits: ClassLimits) -> None:
        self.limits = limits
        self.asked_at = -math.inf
        self.at = -math.inf
        self.snapshot: ClassSnapshot | None = None


class RedisLimits:
    """See `interfaces.Limits`. Make it in the loop's thread, `start` it before the first ask, `close` it at the end."""

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float],
        replicas_expected: int = 1,
        tag: str = TAG,
    ) -> None:
        """`clock` gives monotonic seconds; `replicas_expected` counts before the first heartbeat was heard.

        Raises RedisMissing when the package is not installed or the URL cannot be meant.
        """
        if redis is None:
            raise RedisMissing(
                "HEADGATE_REDIS_URL is set, but the package `redis` is not installed.\n"
                "Install it with `pip install 'headgate[redis]'`, or unset HEADGATE_REDIS_URL to run one process."
            )
        try:
            self._pool = ConnectionPool.from_url(
                url, protocol=2, retry=Retry(NoBackoff(), 0), socket_connect_timeout=CONNECT_S, socket_timeout=None
            )
        except (ValueError, TypeError) as problem:
            raise RedisMissing(
                f"HEADGATE_REDIS_URL cannot be read: {problem}\nIt looks like redis://:password@host:6379/0, "
                "rediss://… for TLS, or unix:///path/to/socket."
            ) from problem
        self._clock = clock
        self._tag = tag
        self._id = secrets.token_hex(8)
        self._sha = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
        self._shared = False
        self._replicas = deque([replicas_expected], maxlen=5)
        self._replicas_expected = replicas_expected
        self._pending: list[_Operation] = []
        self._flight: list[_Operation] = []
        self._late: deque[_Operation] = deque(maxlen=LATE_MAX)
        self._doubtful: set[str] = set()
        """Asks that may have been admitted there as well as here."""
        self._share = _Share(SHARE / max(replicas_expected, 1), self._learned)
        self._known: dict[str, _Known] = {}
        self._levels: dict[str, tuple[float, float]] = {}
        self._wake: asyncio.Future[None] | None = None
        self._urgent = False
        self._gather: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._looked = False
        self._cancelled = False
        self._beat_at = -math.inf
        self._expire_at = -math.inf
        self._pings = 1
        self._back_at = -math.inf
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._reached = asyncio.Event()
        self._lines: deque[float] = deque(maxlen=LINES_A_MINUTE)
        self._lines_dropped = 0
        self._policy_told = False

    @property
    def shared(self) -> bool:
        """See `Limits.shared`."""
        return self._shared

    @property
    def replicas(self) -> int:
        """See `Limits.replicas`."""
        return max(self._replicas[-1], 1)

    async def start(self) -> None:
        """Returns when Redis answers, or after a second without it: then this process begins with its share."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        try:
            async with asyncio.timeout(START_S):
                await self._reached.wait()
        except TimeoutError:
            self._tell("redis_limits_away", reason="not reached at start", share=self._share.factor)

    async def close(self) -> None:
        """Stop. Who still waits is answered."""
        self._closing = True
        self._go_local()
        for timer in (self._gather, self._watch):
            if timer is not None:
                timer.cancel()
        if self._task is not None:
            self._task.cancel()
            try:
                await self._task
            except asyncio.CancelledError:
                pass

    # The operations

    def admit(self, ask: Ask, answered: Callable[[Verdict], None]) -> None:
        """See `Limits.admit`."""
        if not self._shared:
            answered(self._share.admit(ask, self._clock()))
            return
        now = self._clock()
        known = self._known.get(ask.class_id)
        if known is None:
            known = self._known[ask.class_id] = _Known(ask.limits)
        known.asked_at, known.limits = now, ask.limits
        self._pending.append(_Operation(asked(ask), now, ask=ask, answered=answered))
        self._kick()

    def correct(self, ask_id: str, *, input_tokens: int, output_tokens: int) -> None:
        """See `Limits.correct`."""
        if self._share.busy:
            self._share.limiter.correct(
                ask_id, input_tokens=input_tokens, output_tokens=output_tokens, now=self._clock()
            )
        if self._shared:
            self._add(_Operation((_CORRECT, ask_id, input_tokens, output_tokens), self._clock()))

    def settle(self, ask_id: str, *, input_tokens: int, output_tokens: int) -> None:
        """See `Limits.settle`."""
        now = self._clock()
        operation = _Operation((_SETTLE, ask_id, input_tokens, output_tokens), now)
        if self._shared:
            self._add(operation)
        elif ask_id in self._doubtful or not self._share.limiter.holds(ask_id, now):
            self._late.append(operation)
        if self._share.busy:
            self._share.limiter.settle(ask_id, input_tokens=input_tokens, output_tokens=output_tokens, now=now)

    def renew(self, ask_id: str, *, lease_s: float) -> None:
        """See `Limits.renew`."""
        if self._share.busy:
            self._share.limiter.renew(ask_id, lease_s=lease_s, now=self._clock())
        if self._shared:
            self._add(_Operation((_RENEW, ask_id, lease_s), self._clock()))

    def observe(self, ask_id: str, rate_limits: RateLimits) -> None:
        """See `Limits.observe`."""
        if not self._shared:
            self._share.observe(ask_id, rate_limits, self._clock())
            return
        self._add(_Operation(observed(ask_id, rate_limits), self._clock()))

    def throttled(self, class_id: str, limits: ClassLimits, *, retry_after_s: float | None, ramp: bool) -> None:
        """See `Limits.throttled`."""
        if not self._shared:
            self._share.throttled(class_id, limits, retry_after_s, ramp, self._clock())
            return
        self._pending.append(_throttled(class_id, limits, retry_after_s, ramp, self._clock()))
        self._kick()

    def snapshot(self, class_id: str, limits: ClassLimits) -> ClassSnapshot:
        """See `Limits.snapshot`."""
        now = self._clock()
        if not self._shared:
            return self._share.limiter.snapshot(class_id, self._share.of_class(class_id, limits), now)
        known = self._known.get(class_id)
        if known is None:
            known = self._known[class_id] = _Known(limits)
        known.asked_at = now
        if known.snapshot is None:
            return Limiter().snapshot(class_id, limits, now)
        return msgspec.structs.replace(
            known.snapshot, frozen_s=max(known.snapshot.frozen_s - max(now - known.at, 0.0), 0.0)
        )

    def subject_level(self, subject: Subject) -> float | None:
        """See `Limits.subject_level`."""
        if subject.rpm is None:
            return None
        now = self._clock()
        if not self._shared:
            return self._share.limiter.subject_level(self._share.of_subject(subject), now)
        capacity = max(subject.rpm / MINUTE_S * subject.burst_s, 1.0)
        level, at = self._levels.get(subject.id, (capacity, now))
        return refilled(level, at=at, now=now, rate_s=subject.rpm / MINUTE_S, capacity=capacity)

    def effective(self, class_id: str, limits: ClassLimits) -> ClassLimits:
        """See `Limits.effective`."""
        return self._learned(class_id, limits) if self._shared else self._share.of_class(class_id, limits)

    def tick(self, now: float) -> None:
        """See `Limits.tick`."""
        if self._share.busy and now >= self._expire_at:
            self._expire_at = now + HEARTBEAT_S
            self._share.limiter.expire(now)
        if self._shared and self._clock() >= self._beat_at:
            self._kick()

    # On the way to Redis

    def _add(self, operation: _Operation) -> None:
        """For operations without an answer: they go with the next ask, or after a moment."""
        self._pending.append(operation)
        if self._gather is None:
            self._gather = asyncio.get_running_loop().call_later(GATHER_S, self._kick)

    def _kick(self) -> None:
        self._stop_gathering()
        self._urgent = True
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _stop_gathering(self) -> None:
        if self._gather is not None:
            self._gather.cancel()
            self._gather = None

    async def _run(self) -> None:
        while True:
            try:
                await self._session()
            except asyncio.CancelledError:
                if self._closing or not self._cancelled:
                    raise
                # By the watch over a call: who waited for it has been answered.
                self._cancelled = False
                task = asyncio.current_task()
                if task is not None:
                    task.uncancel()
            except Exception as error:
                # A fault of ours while it was being lost. This task must not end: nobody would look for Redis again.
                self._shared = False
                _log.error("redis_limits_failed", error=repr(error))
            await asyncio.sleep(AWAY_S)

    async def _session(self) -> None:
        """One connection, from its first word to its failure."""
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            await self._search(connection)
            await self._serve(connection)
        except Exception as error:
            # Whatever it was, it was while Redis was asked: an answer is owed to all who wait for one.
            self._lose(_reason(error), dropped=_is_our_fault(error))
        finally:
            await _drop(connection)

    async def _search(self, connection: AbstractConnection) -> None:
        """Returns when Redis can be trusted. A ping is the script itself: a replica that refuses to write is no use."""
        async with asyncio.timeout(CONNECT_S):
            await connection.connect()  # type: ignore[no-untyped-call]
            await self._check_policy(connection)
        good = 0
        while good < self._pings:
            started_at = self._clock()
            async with asyncio.timeout(CONNECT_S):
                reply = await self._call(connection, [], beat=True)
            self._note_replicas(reply.replicas)
            good = good + 1 if self._clock() - started_at <= TIMEOUT_S else 0
            if good < self._pings:
                await asyncio.sleep(PING_S)

    async def _check_policy(self, connection: AbstractConnection) -> None:
        if self._policy_told:
            return
        try:
            await connection.send_command("CONFIG", "GET", "maxmemory-policy")
            answer = await connection.read_response()
        except redis_exceptions.ResponseError:
            return  # a hosted Redis that keeps its configuration to itself
        self._policy_told = True
        policy = bytes(answer[1]).decode() if isinstance(answer, list) and len(answer) == 2 else "noeviction"
        if policy != "noeviction":
            _log.warning("redis_limits_may_be_evicted", maxmemory_policy=policy, mend="set it to noeviction")

    async def _serve(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        self._come_back()
        while True:
            if not self._urgent:
                self._wake = loop.create_future()
                await self._wake
                self._wake = None
            self._flight, self._pending = self._pending[:BATCH_MAX], self._pending[BATCH_MAX:]
            self._urgent = bool(self._pending)
            self._stop_gathering()
            now = self._clock()
            beat = now >= self._beat_at
            if beat:
                self._beat_at = now + HEARTBEAT_S
                self._flight += self._looks(now)
            waiting_s = now - min((one.at for one in self._flight if one.ask is not None), default=now)
            self._looked = False
            self._watch = loop.call_later(max(min(TIMEOUT_S, ANSWER_S - waiting_s), CALL_S_MIN), self._late_answer)
            reply = await self._call(connection, [one.sent for one in self._flight], beat=beat)
            self._watch.cancel()
            self._deliver(reply, beat)

    async def _call(self, connection: AbstractConnection, operations: Sequence[Sent], *, beat: bool) -> _Reply:
        arguments = (1, self._tag, _encode(operations), self._id if beat else "")
        try:
            await connection.send_command("EVALSHA", self._sha, *arguments, check_health=False)
            answer = await connection.read_response()
        except redis_exceptions.NoScriptError:
            # A new server, or a proxy that knows no scripts by name.
            await connection.send_command("EVAL", SCRIPT, *arguments, check_health=False)
            answer = await connection.read_response()
        return _read_reply(answer)

    def _looks(self, now: float) -> list[_Operation]:
        """A look at every class that was asked for lately."""
        for class_id in [class_id for class_id, known in self._known.items() if known.asked_at < now - KNOWN_S]:
            del self._known[class_id]
        return [
            _Operation((_SNAPSHOT, class_id, class_limits(known.limits)), now, class_id=class_id, limits=known.limits)
            for class_id, known in self._known.items()
        ]

    def _deliver(self, reply: _Reply, beat: bool) -> None:
        now = self._clock()
        answers = iter(reply.answers)
        verdicts: list[tuple[Callable[[Verdict], None], Verdict]] = []
        for one in self._flight:
            if one.ask is not None and one.answered is not None:
                verdict, levels = verdict_of(next(answers))
                self._note_levels(one.ask.subjects, levels, now)
                verdicts.append((one.answered, verdict))
            elif one.limits is not None and one.sent[0] == _SNAPSHOT:
                self._note_class(one.class_id, one.limits, next(answers), now)
        # From here on nothing fails: whoever is not answered below was answered by a failure.
        self._flight = []
        if beat:
            self._note_replicas(reply.replicas)
        loop = asyncio.get_running_loop()
        for answered, verdict in verdicts:
            # Through the loop, so that one that raises takes none of the others with it.
            loop.call_soon(answered, verdict)

    def _note_replicas(self, count: int) -> None:
        if count:
            self._replicas.append(count)

    def _note_levels(self, subjects: tuple[Subject, ...], levels: Sequence[float], now: float) -> None:
        for subject, level in zip(subjects, levels, strict=True):
            if subject.rpm is not None:
                self._levels.pop(subject.id, None)
                self._levels[subject.id] = level, now
        if len(self._levels) > LEVELS_MAX:
            for subject_id in list(self._levels)[: LEVELS_MAX // 2]:
                del self._levels[subject_id]

    def _note_class(self, class_id: str, limits: ClassLimits, told: msgspec.Raw, now: float) -> None:
        known = self._known.get(class_id)
        if known is not None:
            known.at, known.limits = now, limits
            known.snapshot = snapshot_of(told)

    # Away and back

    def _late_answer(self) -> None:
        if not self._looked:
            self._looked = True
            self._watch = asyncio.get_running_loop().call_later(SECOND_LOOK_S, self._late_answer)
            return
        self._lose(f"no answer in {TIMEOUT_S * 1000:.0f} ms")
        if self._task is not None:
            self._cancelled = True
            self._task.cancel()

    def _lose(self, reason: str, *, dropped: bool = False) -> None:
        """Redis is not to be relied on. `dropped`: what was under way is not to be sent again."""
        if self._watch is not None:
            self._watch.cancel()
        if not self._shared:
            return
        now = self._clock()
        trusted = now - self._back_at >= TRUSTED_S
        self._pings = PINGS if trusted else min(self._pings * 2, PINGS_MAX)
        self._go_local(dropped=dropped)
        self._tell("redis_limits_lost", reason=reason, replicas=max(self._replicas), share=self._share.factor)

    def _go_local(self, *, dropped: bool = False) -> None:
        """Answer all who wait, from here."""
        now = self._clock()
        self._shared = False
        under_way, self._flight = self._flight, []
        queued, self._pending = self._pending, []
        self._share.begin(SHARE / max(*self._replicas, self._replicas_expected), now)
        for class_id, known in self._known.items():
            frozen_s = known.snapshot.frozen_s - (now - known.at) if known.snapshot is not None else 0.0
            if frozen_s > 0:
                self._share.freeze(class_id, known.limits, frozen_s, now)
        for number, one in enumerate([*under_way, *queued]):
            sent = number < len(under_way)
            if one.ask is not None and one.answered is not None:
                verdict = self._share.admit(one.ask, now)
                if sent and verdict.admitted:
                    self._doubtful.add(one.ask.id)
                elif sent:
                    self._late.append(_Operation((_SETTLE, one.ask.id, 0, 0), now))
                asyncio.get_running_loop().call_soon(one.answered, verdict)
            elif one.sent[0] == _THROTTLED and one.limits is not None:
                self._share.freeze(one.class_id, one.limits, one.freeze_s, now)
            elif one.sent[0] in (_SETTLE, _OWE) and not (dropped and sent):
                self._late.append(one)

    def _come_back(self) -> None:
        now = self._clock()
        owed = []
        for class_id, limits, amounts, frozen_s in self._share.taken(now):
            if any(amounts):
                owed.append(_Operation((_OWE, class_id, class_limits(limits), *amounts), now))
            if frozen_s > 0:
                owed.append(_throttled(class_id, limits, frozen_s, False, now))
        self._pending = [*owed, *self._late, *self._pending]
        self._urgent = True
        self._late.clear()
        self._doubtful.clear()
        self._shared = True
        self._beat_at = -math.inf
        if self._reached.is_set():
            self._back_at = now
        else:
            self._reached.set()
            self._pings = PINGS
        self._tell("redis_limits_shared", replicas=self.replicas)

    def _learned(self, class_id: str, limits: ClassLimits) -> ClassLimits:
        known = self._known.get(class_id)
        if known is None or known.snapshot is None or known.limits != limits or not any(known.snapshot.learned):
            return limits
        rpm, itpm, otpm = known.snapshot.limits
        return ClassLimits(rpm=rpm, itpm=itpm, otpm=otpm, burst_s=limits.burst_s, learn=limits.learn)

    def _tell(self, event: str, **fields: str | float) -> None:
        """One line for a transition, ten a minute."""
        now = self._clock()
        if len(self._lines) == LINES_A_MINUTE and now - self._lines[0] < 60.0:
            self._lines_dropped += 1
            return
        self._lines.append(now)
        if self._lines_dropped:
            fields["lines_dropped"] = self._lines_dropped
            self._lines_dropped = 0
        (_log.info if self._shared else _log.warning)(event, **fields)


class _Share:
    """The limits of a process that is alone for now: a part of each, in a limiter of its own.

    The limiter outlives an outage, or each of many short ones would begin with a burst.
    """

    def __init__(
        self, factor: float, learned: Callable[[str, ClassLimits], ClassLimits] = lambda _class_id, limits: limits
    ) -> None:
        self.factor = factor
        self.limiter = Limiter()
        self._learned = learned
        self._classes: dict[str, tuple[ClassLimits, ClassLimits]] = {}
        """The whole and the part."""
        self._subjects: dict[Subject, Subject] = {}
        self._begun: dict[str, tuple[tuple[int | None, ...], tuple[float, ...]]] = {}
        """Levels when this time alone began, and what had ever been taken by then."""

    @property
    def busy(self) -> bool:
        """Whether an attempt holds a reservation here."""
        return len(self.limiter) > 0

    def begin(self, factor: float, now: float) -> None:
        """From now on this process is alone, with this part of everything."""
        self.factor = factor
        self._subjects.clear()
        seen = [(class_id, whole) for class_id, (whole, _) in self._classes.items()]
        self._classes.clear()
        for class_id, whole in seen:
            snapshot = self.limiter.snapshot(class_id, self.of_class(class_id, whole), now)
            self._begun[class_id] = snapshot.levels, self.limiter.taken(class_id)

    def admit(self, ask: Ask, now: float) -> Verdict:
        """See `Limiter.admit`."""
        part = msgspec.structs.replace(
            ask,
            limits=self.of_class(ask.class_id, ask.limits),
            subjects=tuple(self.of_subject(subject) for subject in ask.subjects),
        )
        return self.limiter.admit(part, now)

    def observe(self, ask_id: str, told: RateLimits, now: float) -> None:
        """What Anthropic says is left is left for all; of the limit only a part is ours."""
        parts = [
            None if one is None else RateLimit(int(one.limit * self.factor), one.remaining)
            for one in (told.requests, told.input_tokens, told.output_tokens)
        ]
        self.limiter.observe(ask_id, RateLimits(*parts), now)

    def throttled(
        self, class_id: str, limits: ClassLimits, retry_after_s: float | None, ramp: bool, now: float
    ) -> None:
        """See `Limiter.throttled`."""
        part = self.of_class(class_id, limits)
        self.limiter.throttled(class_id, part, retry_after_s=retry_after_s, ramp=ramp, now=now)

    def freeze(self, class_id: str, limits: ClassLimits, seconds: float, now: float) -> None:
        """Keep to a freeze that was known before."""
        self.throttled(class_id, limits, max(seconds, 0.0), False, now)

    def taken(self, now: float) -> list[tuple[str, ClassLimits, tuple[float, float, float], float]]:
        """For each class what was taken alone, as far as Redis has gained by it, and for how long it is frozen.

        What came from the burst is owed in full. What came from the refill is too, up to a bucket: while nobody asked,
        Redis gained the same at most once, as its bucket overflows.
        """
        found = []
        for class_id, (whole, part) in self._classes.items():
            snapshot = self.limiter.snapshot(class_id, part, now)
            taken = self.limiter.taken(class_id)
            levels, before = self._begun.get(class_id, ((None, None, None), (0.0, 0.0, 0.0)))
            owed = [0.0, 0.0, 0.0]
            for dimension, (limit, level) in enumerate(zip(snapshot.limits, snapshot.levels, strict=True)):
                if limit is not None and level is not None:
                    capacity = max(limit / MINUTE_S * part.burst_s, 1.0)
                    begun = levels[dimension]
                    lost = (capacity if begun is None else begun) - level
                    owed[dimension] = max(min(taken[dimension] - before[dimension], lost + capacity), 0.0)
            found.append((class_id, whole, (owed[0], owed[1], owed[2]), snapshot.frozen_s))
        return found

    def of_class(self, class_id: str, limits: ClassLimits) -> ClassLimits:
        """This process's part of a class's limits."""
        known = self._classes.get(class_id)
        if known is not None and known[0] == limits:
            return known[1]
        held = self._learned(class_id, limits)
        part = ClassLimits(
            rpm=_part(held.rpm, self.factor),
            itpm=_part(held.itpm, self.factor),
            otpm=_part(held.otpm, self.factor),
            burst_s=limits.burst_s,
        )
        self._classes[class_id] = limits, part
        return part

    def of_subject(self, subject: Subject) -> Subject:
        """This process's part of a person's or a key's limits: one call at once in any case."""
        part = self._subjects.get(subject)
        if part is None:
            if len(self._subjects) >= LEVELS_MAX:
                self._subjects.clear()
            part = self._subjects[subject] = Subject(
                subject.id,
                rpm=_part(subject.rpm, self.factor),
                otpm=_part(subject.otpm, self.factor),
                concurrency=subject.concurrency and max(int(subject.concurrency * self.factor), 1),
                burst_s=subject.burst_s,
            )
        return part


def _part(limit: float | None, factor: float) -> float | None:
    return None if limit is None else limit * factor


def class_limits(limits: ClassLimits) -> tuple[float, float, float, float, bool]:
    """A class's limits as the script takes them."""
    return limits.rpm or 0, limits.itpm or 0, limits.otpm or 0, limits.burst_s, limits.learn


def asked(ask: Ask) -> Sent:
    """An ask as the script takes it."""
    subjects = [(one.id, one.rpm or 0, one.otpm or 0, one.concurrency or 0, one.burst_s) for one in ask.subjects]
    limits = class_limits(ask.limits)
    return _ADMIT, ask.id, ask.class_id, limits, subjects, ask.input_tokens, ask.output_tokens, ask.lease_s


def observed(ask_id: str, told: RateLimits) -> Sent:
    """Headers as the script takes them. Also those that say nothing: that there was an answer lets others go."""
    numbers: list[int] = []
    for one in (told.requests, told.input_tokens, told.output_tokens):
        numbers += (0, 0) if one is None else (one.limit, one.remaining)
    return _OBSERVE, ask_id, *numbers


def was_throttled(class_id: str, limits: ClassLimits, retry_after_s: float | None, ramp: bool) -> Sent:
    """A 429 as the script takes it."""
    return _THROTTLED, class_id, class_limits(limits), -1.0 if retry_after_s is None else retry_after_s, ramp


def verdict_of(answer: msgspec.Raw) -> tuple[Verdict, list[float]]:
    """What the script answered to an ask, and what each subject has left."""
    wait_s, reason, pace, *levels = _read_verdict(answer)
    return Verdict(not reason, float(wait_s), str(reason), float(pace)), [float(level) for level in levels]


def snapshot_of(answer: msgspec.Raw) -> ClassSnapshot:
    """How the script says a class stands."""
    told = _read_class(answer)
    return ClassSnapshot(
        limits=tuple(limit or None for limit in told.limits),
        levels=tuple(None if math.isinf(level) else round(level) for level in told.levels),
        learned=tuple(limit or None for limit in told.learned),
        frozen_s=told.frozen_s,
        pace=told.pace,
        burst=told.burst,
    )


def _throttled(class_id: str, limits: ClassLimits, retry_after_s: float | None, ramp: bool, now: float) -> _Operation:
    sent = was_throttled(class_id, limits, retry_after_s, ramp)
    return _Operation(sent, now, class_id=class_id, limits=limits, freeze_s=retry_after_s or 0.0)


def _reason(error: Exception) -> str:
    """For the log: the error's text, which names the server and never a password."""
    return f"{type(error).__name__}: {error}"[:200]


def _is_our_fault(error: Exception) -> bool:
    """Whether the script itself failed: what it was given is not given to it again."""
    return type(error) is redis_exceptions.ResponseError and "user_script" in str(error)


async def _drop(connection: AbstractConnection) -> None:
    """Close without a goodbye: an answer that comes too late must never be taken for another's."""
    try:
        await connection.disconnect(nowait=True)
    except Exception as error:
        _log.debug("redis_limits_close_failed", error=repr(error))
