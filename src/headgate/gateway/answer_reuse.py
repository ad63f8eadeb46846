"""Answers given a second time, for the endpoints whose owner asked for it: look, give back, record, keep.

What it is: the driver between a call and the store of answers. What it is not: a rule of what may be kept or given
back (`policy/answer_reuse.py`). Nothing here can make a call fail or wait: a store that is down, damaged or slower than
50 ms is a miss, and is left alone for a second. Keeping happens after the answer, in the background.

A call goes: `key` (None: not for reuse), `find` (an answer: `Delivery` gives it back, and the call is over), else
`recorder`, which is told every byte the client gets and, at the end, to `keep` or to `drop`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping

import structlog

from headgate.gateway.server import Exchange
from headgate.gateway.tasks import Tasks
from headgate.policy.answer_reuse import (
    ANSWER_BYTES_MAX,
    KeptAnswer,
    ReuseRule,
    age_s,
    answer_key,
    anthropic_lines,
    head_lines,
    pack,
    pieces,
    unkeepable_answer,
    unkeepable_end,
    unkeepable_request,
    unpack,
)
from headgate.policy.records import ClientRequest, Plan, Record
from headgate.storage.answers import Answers, AnswersUnavailable
from headgate.wire.catalog import Catalog
from headgate.wire.message import MessageRequest
from headgate.wire.usage import Usage

log = structlog.get_logger()

FIND_S = 0.05
"""What a look may take, store and way together: a call to Anthropic takes twenty times as long."""
KEEP_S = 2.0
AWAY_S = 1.0
"""How long a store that failed is not asked again: a request a second pays the 50 ms, not each of them."""
RECORDING_BYTES_MAX = 16 << 20
"""Of answers that are being recorded or put away, in the whole process; beyond it they are not kept."""
SWEEP_EVERY_S = 60.0
PIECE_BYTES = 32 << 10
"""Of an answer that is given back, between two looks at how the client reads."""


class ReuseKey(Record, frozen=True, gc=False):
    """Under what a request's answer is looked for and kept."""

    digest: str
    key_id: str
    model: str
    streamed: bool
    ttl_s: float


class Reusable(Record, frozen=True, gc=False):
    """An answer that may be given back now."""

    answer: KeptAnswer
    age_s: float


class ReuseCounts(Record, frozen=True, gc=False):
    """What was counted since the start, for metrics."""

    hits: int
    misses: int
    """Those of a store that could not be asked, and damaged records, among them."""
    unavailable: int
    """Times that the store failed or was too slow."""
    damaged: int
    """Records that could not be read, or were of another version."""
    stored: int
    stored_bytes: int
    """Bytes of records that were put away; not what the store holds now."""
    saved_nanousd: int
    not_kept: tuple[tuple[str, int], ...]
    """By reason; the reasons are a closed list."""
    recording_bytes: int


class AnswerReuse:
    """What all calls share. `rules` by endpoint label; assign another mapping when the settings are read again."""

    def __init__(
        self,
        answers: Answers,
        rules: Mapping[str, ReuseRule],
        *,
        upstream: str,
        catalog: Catalog,
        tasks: Tasks,
        clock: Callable[[], float],
        now_ns: Callable[[], int],
    ) -> None:
        """`upstream` is the API's URL; `clock` gives monotonic seconds, `now_ns` UTC nanoseconds."""
        self.rules = rules
        self._answers = answers
        self._upstream = upstream
        self._catalog = catalog
        self._tasks = tasks
        self._clock = clock
        self.now_ns = now_ns
        self._away_until = 0.0
        self._sweep_at = clock()
        self._sweeping = False
        self._purges = 0
        self._hits = self._misses = self._unavailable = self._damaged = 0
        self._stored = self._stored_bytes = self._saved_nanousd = 0
        self._not_kept: defaultdict[str, int] = defaultdict(int)
        self.recording_bytes = 0

    def wanted(self, endpoint: str) -> bool:
        """Whether this endpoint's owner has switched reuse on."""
        return endpoint in self.rules

    def key(
        self, endpoint: str, request: ClientRequest, scanned: MessageRequest, plan: Plan, *, key_id: str, user: str
    ) -> ReuseKey | None:
        """The key of a request; None when its endpoint does not want it, or the request is none for reuse.

        `plan` as the router made it, before cache marks: what the planner has learned must not change the key.
        """
        rule = self.rules.get(endpoint)
        if rule is None:
            return None
        reason = unkeepable_request(scanned, plan.body)
        if reason:
            self._not_kept[reason] += 1
            return None
        digest = answer_key(
            upstream=self._upstream,
            key_id=key_id,
            user=None if rule.shared_by_users else user,
            model=plan.models[0],
            query=request.query,
            headers=anthropic_lines(request.forwarded),
            body=plan.body,
        )
        return ReuseKey(digest, key_id, plan.models[0], plan.streamed, rule.ttl_s)

    async def find(self, key: ReuseKey) -> Reusable | None:
        """An answer that may be given back, within 50 ms; None is a miss, whatever the reason. Never raises."""
        found = await self._look(key)
        if found is None:
            self._misses += 1
            return None
        self._hits += 1
        self._saved_nanousd += found.answer.cost_nanousd
        return found

    def recorder(self, key: ReuseKey) -> Recorder:
        """For the answer of a call that missed. Its owner must end it by `keep` or `drop`."""
        return Recorder(self, key, self._purges)

    async def purge(self, key_id: str | None) -> int:
        """For an operator: remove what is kept for a key (None: for all); returns how many answers there were.

        Answers that are on their way in this process are not kept either. Raises AnswersUnavailable.
        """
        self._purges += 1
        return await self._answers.purge(key_id)

    def tick(self, now: float) -> None:
        """To be called now and then with monotonic seconds: once a minute what is over its time is removed."""
        if now >= self._sweep_at and not self._sweeping:
            self._sweep_at = now + SWEEP_EVERY_S
            self._sweeping = True
            self._tasks.start(self._sweep())

    def counts(self) -> ReuseCounts:
        """For metrics."""
        return ReuseCounts(
            hits=self._hits,
            misses=self._misses,
            unavailable=self._unavailable,
            damaged=self._damaged,
            stored=self._stored,
            stored_bytes=self._stored_bytes,
            saved_nanousd=self._saved_nanousd,
            not_kept=tuple(sorted(self._not_kept.items())),
            recording_bytes=self.recording_bytes,
        )

    async def close(self) -> None:
        """After the last call and its tasks."""
        await self._answers.close()

    # for the recorder

    def not_kept(self, reason: str) -> None:
        """Count an answer that was not kept."""
        self._not_kept[reason] += 1

    def put_away(self, key: ReuseKey, answer: KeptAnswer, purges: int, size: int) -> None:
        """Judge and store in the background; `size` of `recording_bytes` is given back when it is done."""
        self._tasks.start(self._put_away(key, answer, purges, size))

    # inside

    async def _look(self, key: ReuseKey) -> Reusable | None:
        if self._clock() < self._away_until:
            return None
        try:
            async with asyncio.timeout(FIND_S):
                record = await self._answers.get(key.digest, owner=key.key_id)
        except (AnswersUnavailable, TimeoutError) as error:
            self._failed("find", error)
            return None
        if record is None:
            return None
        answer = unpack(key.digest, record)
        if answer is None:
            self._damaged += 1
            return None
        age = age_s(answer, streamed=key.streamed, ttl_s=key.ttl_s, now_ns=self.now_ns())
        return None if age is None else Reusable(answer, age)

    async def _put_away(self, key: ReuseKey, answer: KeptAnswer, purges: int, size: int) -> None:
        try:
            # In a thread: reading a whole answer again takes milliseconds.
            reason, record = await asyncio.to_thread(_judged, key, answer, self._catalog)
            if not reason and purges != self._purges:
                reason = "purged"
            if not reason and self._clock() < self._away_until:
                reason = "store_away"
            if reason:
                self.not_kept(reason)
                return
            async with asyncio.timeout(KEEP_S):
                kept = await self._answers.put(key.digest, record, owner=key.key_id, ttl_s=key.ttl_s)
            if kept:
                self._stored += 1
                self._stored_bytes += len(record)
            else:
                self.not_kept("answer_too_large")
        except (AnswersUnavailable, TimeoutError) as error:
            self._failed("keep", error)
            self.not_kept("store_away")
        finally:
            self.recording_bytes -= size

    async def _sweep(self) -> None:
        try:
            async with asyncio.timeout(KEEP_S):
                await self._answers.expire()
        except (AnswersUnavailable, TimeoutError) as error:
            self._failed("expire", error)
        finally:
            self._sweeping = False

    def _failed(self, what: str, error: Exception) -> None:
        self._unavailable += 1
        now = self._clock()
        if now >= self._away_until:
            log.warning("answers_unavailable", doing=what, reason=str(error) or type(error).__name__)
        self._away_until = now + AWAY_S


class Recorder:
    """One answer as the client gets it. Bounded: what is too long, alone or with all others, is let go at once."""

    __slots__ = ("_key", "_over", "_parts", "_purges", "_reuse", "_size")

    def __init__(self, reuse: AnswerReuse, key: ReuseKey, purges: int) -> None:
        self._reuse = reuse
        self._key = key
        self._purges = purges
        self._parts: list[bytes] = []
        self._size = 0
        self._over = False

    def write(self, data: bytes) -> None:
        """Bytes of the answer's body, in order. Never raises."""
        if self._over:
            return
        size = len(data)
        if self._size + size > ANSWER_BYTES_MAX:
            self._reuse.not_kept("answer_too_large")
            self.drop()
        elif self._reuse.recording_bytes + size > RECORDING_BYTES_MAX:
            self._reuse.not_kept("recording_full")
            self.drop()
        else:
            self._parts.append(data)
            self._size += size
            self._reuse.recording_bytes += size

    def drop(self) -> None:
        """The answer is not to be kept. Any number of times, and after `keep`."""
        self._over = True
        self._parts.clear()
        self._reuse.recording_bytes -= self._size
        self._size = 0

    def keep(
        self, *, served: str, stop_reason: str, content_type: bytes, request_id: str, usage: Usage, cost_nanousd: int
    ) -> None:
        """The answer was whole, a 200, and every byte of it was written here: keep it, if it may be. Never raises.

        `served` is the model that the attempt went to, `cost_nanousd` what that attempt alone was billed.
        """
        if self._over:
            return
        reuse, key = self._reuse, self._key
        reason = unkeepable_end(stop_reason=stop_reason, asked=key.model, served=served, usage=usage)
        if reason:
            reuse.not_kept(reason)
            self.drop()
            return
        answer = KeptAnswer(
            streamed=key.streamed,
            content_type=content_type,
            body=b"".join(self._parts),
            model=served,
            stop_reason=stop_reason,
            request_id=request_id,
            usage=usage,
            cost_nanousd=cost_nanousd,
            at_ns=reuse.now_ns(),
        )
        # From here on the bytes are those of the task.
        size, self._size = self._size, 0
        self._over = True
        self._parts.clear()
        reuse.put_away(key, answer, self._purges, size)


class Delivery:
    """Gives an answer back to one client. It takes the exchange's `on_gone` and `on_paused` for its time."""

    __slots__ = ("_answer", "_exchange", "_lines", "_paused", "_stopped", "_wake")

    def __init__(self, exchange: Exchange, reusable: Reusable, *, call_id: str, more_lines: bytes = b"") -> None:
        """`more_lines`: header lines of the caller's, `name: value\\r\\n` each."""
        self._exchange = exchange
        self._answer = reusable.answer
        self._lines = head_lines(reusable.answer, age_s=reusable.age_s, call_id=call_id) + more_lines
        self._paused = False
        self._stopped = False
        self._wake: asyncio.Future[None] | None = None

    async def run(self) -> bool:
        """Write the answer as fast as the client reads it. False when it left, or `interrupt` came, before the end."""
        exchange, answer = self._exchange, self._answer
        if exchange.gone:
            return False
        if not answer.streamed:
            exchange.respond(200, self._lines, answer.body)
            return True
        exchange.on_gone, exchange.on_paused = self._gone, self._pause
        exchange.start_stream(200, self._lines)
        for piece in pieces(answer.body, PIECE_BYTES):
            while self._paused and not self._stopped:
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake
            if self._stopped or exchange.gone:
                return False
            exchange.write(piece)
        exchange.end()
        return True

    def interrupt(self, error_event: bytes) -> None:
        """The process ends now: a stream that is not whole ends with this event."""
        if self._exchange.streaming and not self._exchange.finished:
            self._exchange.end(error_event)
        self._gone()

    def _gone(self) -> None:
        self._stopped = True
        self._go_on()

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        if not paused:
            self._go_on()

    def _go_on(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


def _judged(key: ReuseKey, answer: KeptAnswer, catalog: Catalog) -> tuple[str, bytes]:
    """Why it is not kept, or its record."""
    reason = unkeepable_answer(answer, asked=key.model, catalog=catalog)
    return (reason, b"") if reason else ("", pack(key.digest, answer))
