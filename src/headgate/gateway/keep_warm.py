"""Prefixes that are kept in Anthropic's cache between two uses, where reads on the way cost less than a write.

What it is: who is warmed and when (`WarmTimes`, `DayCap`: time is an argument), one warming request to its end
(`WarmCall`), and the rounds that join them (`WarmKeeper`). What it is not: the arithmetic (`policy/cache_ttl.py`).

A warming request is a call like others: it has an intent before it leaves, one terminal row, its price, and it is paid
from the budgets of the key whose prefix it is; in the ledger it is of the user `headgate` and the endpoint `keep_warm`.
It takes nobody's turn, is never tried again, and nobody is told when it fails. An answer with `max_tokens: 0` is not
streamed, and its input is a read (claude-api §7.6).

Of several processes on one machine the first alone has one, so that a prefix is not warmed twice and the cap holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Literal

import msgspec
import sqlalchemy as sa
import structlog

from headgate.gateway.budgets import nanousd
from headgate.gateway.failures import failure_of_status
from headgate.gateway.prompt_caching import KeptPrompt
from headgate.gateway.purse import Purse
from headgate.gateway.settings import CacheSection
from headgate.gateway.settlement import Attribution, Settlement
from headgate.gateway.shared import Shared
from headgate.gateway.traffic import Turn, Waiting, Want
from headgate.gateway.upstream import Answer, UpstreamConnection
from headgate.policy.breaker import State
from headgate.policy.cache_ttl import TTL_S, KeepWarm, warm_body
from headgate.policy.call import failure_code
from headgate.policy.forecast import uncached
from headgate.policy.pricing import upper_bound
from headgate.policy.prompt_cache import CachePlan
from headgate.policy.records import Attempt, ClientRequest, Failure, Plan, Principal, Record, Refused
from headgate.policy.retry import Cause, cause
from headgate.storage.interfaces import LedgerUnavailable
from headgate.storage.tables import calls
from headgate.wire.catalog import DAY_NS
from headgate.wire.errors import RAMP_CODE
from headgate.wire.message import InvalidBody, scan
from headgate.wire.prompt import Ttl, read_system, read_tools
from headgate.wire.usage import NO_USAGE, Usage, UsageError, decode_usage

log = structlog.get_logger()

ENDPOINT = "keep_warm"
USER = "headgate"
ROUND_S = 5.0
AT_ONCE_MAX = 4
REST_S = 3600.0
"""How long a family is left alone whose warming was refused, or wrote what it was to read."""
TURN_S = 2.0
"""A warming request waits so long for a turn: it can come again with the next round."""
ANSWER_S = 20.0
"""For the answer; with the wait for a turn within the lease of its money, 30 s."""
RESTING_MAX = 4_096
_EARLY_SHARE = 0.8
"""Of the TTL: before that nothing is asked nor prepared. The arithmetic says 0.9."""
_ARRIVES_S = 5.0
"""Before the TTL's end: what leaves later may find the prefix gone, and would write it."""
_PLACEHOLDER_TOKENS = 16
_HEADER_PREFIX = b"anthropic-"
"""Of the client's header lines those that belong to the prompt: version and betas."""

Skip = Literal["cap", "budget", "busy", "breaker", "stopped", "ledger"]


class Warm(Record, frozen=True, gc=False):
    """A prefix that can be warmed."""

    body: bytes
    plan: CachePlan
    """Of the request whose prefix it is, but with the marks alone that the warming request has."""
    principal: Principal
    endpoint: str
    model: str
    header_lines: bytes
    speed: str

    @property
    def key(self) -> bytes:
        """Model and longest prefix: the same prefix of two families is one."""
        return self.plan.marked[-1].key

    @property
    def ttl(self) -> Ttl:
        """Of the longest prefix."""
        return self.plan.marked[-1].ttl

    @property
    def tokens(self) -> int:
        """What it sends, at most: an estimate, or what Anthropic counted."""
        return self.plan.prefix_tokens + _PLACEHOLDER_TOKENS


def warm_of(kept: KeptPrompt) -> Warm | None:
    """What warms this prompt's tools and system; None where nothing does."""
    body = warm_body(kept.plan.body)
    if body is None:
        return None
    try:
        request = scan(body)
        speed = request.speed
    except InvalidBody:
        return None
    parts = (read_tools(request.raw("tools") or b"[]"), read_system(request.raw("system") or b"[]"))
    # Marks in tools and system come first, in the order of the prompt; what follows stood in the messages.
    count = sum(bool(block.mark) for part in parts for block in part.blocks)
    marked = kept.plan.marked[:count]
    if not marked:
        return None
    lines = [line for line in kept.header_lines.split(b"\r\n") if line.lower().startswith(_HEADER_PREFIX)]
    return Warm(
        body=body,
        # Nothing is asked about the conversation: neither its last turn nor who waits is touched. The body is let go.
        plan=msgspec.structs.replace(kept.plan, body=b"", marked=marked, tail=False, cold=b"", digest=""),
        principal=kept.principal,
        endpoint=kept.endpoint,
        model=kept.model,
        header_lines=b"".join(line + b"\r\n" for line in [*lines, b"content-type: application/json"]),
        speed=speed,
    )


class _Warmth(msgspec.Struct, gc=False):
    """One prefix since its last use by a person."""

    used_at: float
    live_from: float
    """The start of the last request that read or wrote it, a person's or ours."""
    pings: int = 0


class WarmTimes:
    """Whose prefix is to be warmed now. Pure; seconds are monotonic. As much is remembered as there are prompts kept
    (no more bytes than theirs), and RESTING_MAX families that are left alone."""

    def __init__(self) -> None:
        self._warmth: dict[bytes, _Warmth] = {}
        self._prepared: dict[str, tuple[KeptPrompt, Warm | None]] = {}
        self._resting: dict[str, float] = {}

    def due(
        self, kept: Sequence[KeptPrompt], now: float, worth: Callable[[KeptPrompt], KeepWarm | None]
    ) -> tuple[list[Warm], list[str]]:
        """What to warm now, each prefix once and what ends first first; and families whose prefix is gone.

        `worth` is asked about those alone whose prefix is near its end.
        """
        used: dict[bytes, float] = {}
        for prompt in kept:
            for one in prompt.plan.marked:
                used[one.key] = max(used.get(one.key, prompt.used_at), prompt.used_at)
        self._forget(kept, used)
        found: dict[bytes, tuple[float, Warm]] = {}
        gone: list[str] = []
        for prompt in kept:
            family = prompt.plan.family
            shortest_s = min(TTL_S[one.ttl] for one in prompt.plan.marked)
            if now < prompt.used_at + shortest_s * _EARLY_SHARE or self._resting.get(family, now) > now:
                continue
            warm = self._warm_of(prompt)
            if warm is None:
                gone.append(family)
                continue
            warmth = self._since(warm.key, used[warm.key])
            ends_at = warmth.live_from + TTL_S[warm.ttl] - _ARRIVES_S
            if now >= ends_at:
                gone.append(family)
            elif warm.key not in found and self._is_due(prompt, warm, warmth, now, worth):
                found[warm.key] = (ends_at, warm)
        return [warm for _, warm in sorted(found.values(), key=_end)], gone

    def sent(self, warm: Warm) -> None:
        """A warming request has left; it counts whatever came of it, for it may be billed."""
        warmth = self._warmth.get(warm.key)
        if warmth is not None:
            warmth.pings += 1

    def warmed(self, warm: Warm, sent_at: float) -> None:
        """It was answered: the prefix lives from when it was sent."""
        warmth = self._warmth.get(warm.key)
        if warmth is not None:
            warmth.live_from = max(warmth.live_from, sent_at)

    def rest(self, family: str, until: float) -> None:
        """Leave this family alone for a while."""
        self._resting.pop(family, None)
        self._resting[family] = until
        if len(self._resting) > RESTING_MAX:
            del self._resting[next(iter(self._resting))]

    def clear(self) -> None:
        """Keeping warm was switched off."""
        self._warmth.clear()
        self._prepared.clear()
        self._resting.clear()

    def _is_due(
        self,
        prompt: KeptPrompt,
        warm: Warm,
        warmth: _Warmth,
        now: float,
        worth: Callable[[KeptPrompt], KeepWarm | None],
    ) -> bool:
        ttl_s = TTL_S[warm.ttl]
        if now < warmth.live_from + ttl_s * _EARLY_SHARE:
            return False
        said = worth(prompt)
        if said is None or not said.worth or warmth.pings >= said.pings_max:
            return False
        # The arithmetic is of the TTL that is chosen now; a mark with another one was made before, or by the caller.
        return ttl_s / 2 < said.every_s < ttl_s and now >= warmth.live_from + said.every_s

    def _since(self, key: bytes, used_at: float) -> _Warmth:
        warmth = self._warmth.get(key)
        if warmth is None or warmth.used_at < used_at:
            live_from = used_at if warmth is None else max(used_at, warmth.live_from)
            warmth = self._warmth[key] = _Warmth(used_at, live_from)
        return warmth

    def _warm_of(self, prompt: KeptPrompt) -> Warm | None:
        prepared = self._prepared.get(prompt.plan.family)
        if prepared is None or prepared[0] is not prompt:
            prepared = self._prepared[prompt.plan.family] = (prompt, warm_of(prompt))
        return prepared[1]

    def _forget(self, kept: Sequence[KeptPrompt], used: Iterable[bytes]) -> None:
        families, keys = {prompt.plan.family for prompt in kept}, set(used)
        for family in [family for family in self._prepared if family not in families]:
            del self._prepared[family]
        for key in [key for key in self._warmth if key not in keys]:
            del self._warmth[key]


def _end(found: tuple[float, Warm]) -> float:
    return found[0]


class DayCap:
    """Nano-dollars that warming cost on this UTC day, and what is under way may cost."""

    def __init__(self) -> None:
        self.day = -1
        self.spent_nanousd = 0
        self.held_nanousd = 0

    def seed(self, at_ns: int, spent_nanousd: int) -> None:
        """What the ledger has of the day of `at_ns`."""
        self.day, self.spent_nanousd = at_ns // DAY_NS, spent_nanousd

    def take(self, at_ns: int, upper_nanousd: int, cap_nanousd: int) -> bool:
        """Whether one more that may cost so much stays within the cap; then it is held until `settle`."""
        self._turn(at_ns)
        if self.spent_nanousd + self.held_nanousd + upper_nanousd > cap_nanousd:
            return False
        self.held_nanousd += upper_nanousd
        return True

    def settle(self, at_ns: int, upper_nanousd: int, cost_nanousd: int) -> None:
        """What was held is over. `at_ns` is that of its `take`: that day pays for it."""
        self.held_nanousd -= upper_nanousd
        if at_ns // DAY_NS == self.day:
            self.spent_nanousd += cost_nanousd

    def _turn(self, at_ns: int) -> None:
        day = at_ns // DAY_NS
        if day > self.day:
            self.day, self.spent_nanousd = day, 0


def spent_on_warming(connection: sa.Connection, at_ns: int) -> int:
    """What the ledger has of warming on the UTC day of `at_ns`, in nano-dollars. Blocks."""
    statement = sa.select(sa.func.coalesce(sa.func.sum(calls.c.cost_nanousd), 0)).where(
        calls.c.at_ns >= at_ns // DAY_NS * DAY_NS, calls.c.endpoint == ENDPOINT, calls.c.user_id == USER
    )
    return int(connection.execute(statement).scalar_one())


class _WarmAnswer(msgspec.Struct, frozen=True):
    usage: msgspec.Raw
    model: str = ""
    stop_reason: str | None = None
    content: list[msgspec.Raw] = []


_warm_answer = msgspec.json.Decoder(_WarmAnswer)


class Warmed(Record, frozen=True, gc=False):
    """What came of one warming request."""

    usage: Usage = NO_USAGE
    cost_nanousd: int = 0
    sent_at: float = 0.0
    skipped: Skip | None = None
    """It never left."""
    failure: Failure | None = None


class WarmCall:
    """One warming request to its end. One of `Shared.live`: its rows are not swept, and a drain waits for it."""

    def __init__(self, shared: Shared, warm: Warm, call_id: str) -> None:
        now = shared.clock()
        self._shared = shared
        self._warm = warm
        self._request = ClientRequest(call_id, warm.body, warm.header_lines, b"", now, shared.now_ns())
        self._whose = Attribution(user=USER, tier=warm.principal.tier, endpoint=ENDPOINT)
        self._plan = Plan(
            models=(warm.model,),
            body=warm.body,
            streamed=False,
            input_tokens_estimate=warm.tokens,
            max_tokens=0,
            deadline=now + TURN_S,
            model_asked=warm.model,
        )
        self._attempt = Attempt(1, warm.model)
        self._settlement = Settlement(shared.accounts, self._request)
        self._purse = Purse(
            shared.purses,
            shared.policies.budgets,
            warm.principal,
            user=USER,
            tier=warm.principal.tier,
            call_id=call_id,
            at_ns=self._request.received_at_ns,
        )
        self._turn: Turn | None = None
        self._waiting: Waiting | None = None
        self._connection: UpstreamConnection | None = None
        self._until: float | None = None
        self._open = False
        """Its intent is written, and its end is not."""
        self._stopped = False

    async def run(self) -> Warmed:
        """From the money to the row that ends it. Raises LedgerUnavailable when no intent could be written."""
        shared, call_id = self._shared, self._request.call_id
        shared.live[call_id] = self
        try:
            return await self._run()
        finally:
            if self._open:
                # Cancelled at the end of the process: it may have been worked on.
                if self._connection is not None:
                    self._connection.abort()
                self._failed(Failure(kind="reset", message="The gateway is restarting."), None)
            if self._turn is not None:
                self._give_back(0)
            self._purse.settle(self._settlement.attempt_nanousd)
            del shared.live[call_id]

    def stop(self) -> None:
        """Do not leave any more. What has left comes to its end."""
        self._stopped = True
        if self._waiting is not None:
            self._shared.traffic.leave(self._waiting)

    # as `Shared.live` asks

    def tick(self, now: float) -> None:
        """Called a few times a second."""
        self._purse.tick(now)
        if self._until is not None and now > self._until and self._connection is not None:
            self._connection.abort()

    def interrupt(self) -> None:
        """The process ends."""
        self.stop()
        if self._connection is not None:
            self._connection.abort()

    # inside

    async def _run(self) -> Warmed:
        shared, settlement = self._shared, self._settlement
        paid = await self._purse.reserve(1, self._plan, self._warm.body, shared.clock(), speed=self._warm.speed)
        if isinstance(paid, Refused):
            return Warmed(skipped="budget")
        if self._stopped:
            return Warmed(skipped="stopped")
        refused = await self._take_turn()
        if refused is not None:
            return Warmed(skipped=refused)
        opened = settlement.opened(self._plan, self._warm.principal, self._whose, self._warm.plan)
        settlement.intend(self._attempt, self._plan, shared.now_ns(), opened)
        self._open = True
        if shared.settings.ledger.durability == "power":
            await shared.ledger.durable()
        sent_at = shared.clock()
        self._until = sent_at + ANSWER_S
        head = b"POST %b/v1/messages HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % (
            shared.upstream.base_path,
            shared.upstream_head,
            self._warm.header_lines,
            len(self._warm.body),
        )
        reply = await shared.upstream.send(head, self._warm.body, self._track, first_byte_timeout_s=ANSWER_S)
        self._connection = None
        if isinstance(reply, Failure):
            return self._failed(reply, None)
        assert self._turn is not None
        shared.traffic.told(self._turn, reply.header_map)
        if reply.status != 200:
            return self._failed(failure_of_status(reply, shared.now_ns()), reply)
        if reply.streamed:
            reply.abort()
            return self._failed(Failure(kind="malformed", status=200, message="A stream was not asked for."), reply)
        try:
            message = _warm_answer.decode(reply.body())
            usage = decode_usage(message.usage)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, UsageError) as error:
            return self._failed(Failure(kind="malformed", status=200, message=str(error)), reply)
        return self._answered(reply, message, usage, sent_at)

    async def _take_turn(self) -> Skip | None:
        """A turn that nobody else waits for; else why there is none."""
        shared, warm = self._shared, self._warm
        traffic, class_id = shared.traffic, shared.class_id(warm.model)
        if traffic.breakers.state(warm.model) is not State.CLOSED:
            return "breaker"
        if any(len(queue) for lane, _, queue in traffic.lanes() if lane == class_id):
            return "busy"
        waiting = self._waiting = traffic.join(
            Want(
                ask_id=f"{self._request.call_id}:1",
                model=warm.model,
                class_id=class_id,
                limits=shared.policies.class_limits(class_id),
                subjects=(),
                input_tokens=_PLACEHOLDER_TOKENS,
                output_tokens=0,
                deadline=self._plan.deadline,
                user=USER,
                background=True,
                since=self._request.received_at,
                bytes=len(warm.body),
                call_id=self._request.call_id,
                key_id=warm.principal.key_id,
            )
        )
        result = await waiting.wait()
        self._waiting = None
        if not isinstance(result, Turn):
            return "stopped" if self._stopped else "busy"
        self._turn = result
        if result.probe:
            # Whether a model is back is for a person's request to find out.
            return "breaker"
        return "stopped" if self._stopped else None

    def _track(self, connection: UpstreamConnection) -> bool:
        if self._stopped:
            return False
        self._connection = connection
        return True

    def _answered(self, answer: Answer, message: _WarmAnswer, usage: Usage, sent_at: float) -> Warmed:
        shared = self._shared
        cost_nanousd = self._settlement.completed_whole(
            self._attempt,
            answer,
            usage,
            model=message.model,
            stop_reason=message.stop_reason or "",
            has_content=bool(message.content),
        )
        self._close("completed", 200, "")
        assert self._turn is not None
        shared.traffic.succeeded(self._turn)
        self._end_turn(uncached(usage))
        shared.caching.planner.began(self._warm.plan, model=self._warm.model, usage=usage, now=shared.clock())
        return Warmed(usage=usage, cost_nanousd=cost_nanousd, sent_at=sent_at)

    def _failed(self, failure: Failure, answer: Answer | None) -> Warmed:
        self._settlement.failed(self._attempt, self._plan, failure, answer, None)
        self._close("failed", failure.status, failure_code(failure))
        assert self._turn is not None
        if cause(failure) is Cause.RATE_LIMIT:
            ramp = failure.error_code == RAMP_CODE
            self._shared.traffic.throttled(self._turn, retry_after_s=failure.retry_after_s, ramp=ramp)
        # Neither an outage nor a spend cap is made of it: the next person's request finds those out.
        self._give_back(_PLACEHOLDER_TOKENS if failure.sent and failure.kind != "status" else 0)
        return Warmed(cost_nanousd=self._settlement.cost_nanousd, failure=failure)

    def _close(self, kind: Literal["completed", "failed"], status: int, error_code: str) -> None:
        self._open = False
        total_ms = round((self._shared.clock() - self._request.received_at) * 1000)
        self._settlement.close(
            kind, status=status, model=self._warm.model, error_code=error_code, total_ms=total_ms, first_byte_ms=None
        )

    def _give_back(self, input_tokens: int) -> None:
        assert self._turn is not None
        self._shared.traffic.neutral(self._turn)
        self._end_turn(input_tokens)

    def _end_turn(self, input_tokens: int) -> None:
        turn, self._turn = self._turn, None
        assert turn is not None
        self._shared.traffic.ended(turn, input_tokens=input_tokens, output_tokens=0)


class KeepWarmView(Record, frozen=True):
    """How keeping warm stands, for `/admin`. Counts are since the start, money is of this UTC day."""

    on: bool
    cap_nanousd: int
    spent_nanousd: int
    held_nanousd: int
    """What is under way may cost."""
    prompts: int
    bytes: int
    warmed: int
    failed: int
    read_tokens: int
    written_tokens: int
    """By warming requests that came too late."""
    skipped: dict[str, int]
    """Warming requests that did not leave, by why: `cap`, `budget`, `busy`, `breaker`, `stopped`, `ledger`."""


class WarmKeeper:
    """The rounds. Off until the settings say otherwise; for the loop's thread."""

    def __init__(
        self,
        shared: Shared,
        section: CacheSection,
        *,
        new_call_id: Callable[[], str],
        read_spent: Callable[[int], int],
        shares: Callable[[], int],
        every_s: float = ROUND_S,
    ) -> None:
        """`read_spent` is what the ledger has of the day of these UTC nanoseconds, and may block; `shares` is how many
        like this one there are, which have the day's cap together."""
        self._shared = shared
        self._section = section
        self._new_call_id = new_call_id
        self._read_spent = read_spent
        self._shares = shares
        self._every_s = every_s
        self._times = WarmTimes()
        self._cap = DayCap()
        self._seeded = False
        self._stopping = asyncio.Event()
        self._calls: set[WarmCall] = set()
        self._warmed = self._failed = self._read_tokens = self._written_tokens = 0
        self._skipped: dict[str, int] = {}

    async def run(self) -> None:
        """Look every few seconds, until `stop`."""
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(self._every_s):
                    await self._stopping.wait()
            except TimeoutError:
                await self.look()

    def apply(self, section: CacheSection) -> None:
        """Settings were read again. Switched off, nothing leaves any more, and nothing is remembered."""
        self._section = section
        if not section.keep_warm:
            self._times.clear()
            self._stop_calls()

    def stop(self) -> None:
        """The process stops: nothing leaves any more."""
        self._stopping.set()
        self._stop_calls()

    async def look(self) -> None:
        """One round: warm what is due, and return when all of it is over."""
        if not self._is_on or not await self._seed():
            return
        shared = self._shared
        kept = shared.caching.kept
        due, gone = self._times.due(kept.prompts(), shared.clock(), self._worth)
        for family in gone:
            kept.drop(family)
        left = iter(due)
        while some := list(islice(left, AT_ONCE_MAX)):
            await asyncio.gather(*(self._warm(one) for one in some))

    def snapshot(self) -> KeepWarmView:
        """How it stands."""
        kept = self._shared.caching.kept
        today = self._shared.now_ns() // DAY_NS == self._cap.day
        return KeepWarmView(
            on=self._section.keep_warm,
            cap_nanousd=self._cap_nanousd(),
            spent_nanousd=self._cap.spent_nanousd if today else 0,
            held_nanousd=self._cap.held_nanousd,
            prompts=len(kept.prompts()),
            bytes=kept.bytes,
            warmed=self._warmed,
            failed=self._failed,
            read_tokens=self._read_tokens,
            written_tokens=self._written_tokens,
            skipped=dict(self._skipped),
        )

    @property
    def _is_on(self) -> bool:
        return self._section.keep_warm and not self._stopping.is_set()

    def _stop_calls(self) -> None:
        for call in list(self._calls):
            call.stop()

    def _cap_nanousd(self) -> int:
        return (nanousd(self._section.keep_warm_usd_day) or 0) // max(self._shares(), 1)

    def _worth(self, prompt: KeptPrompt) -> KeepWarm | None:
        return self._shared.caching.planner.keep_warm(
            prompt.principal.key_id,
            prompt.endpoint,
            prompt.plan.family,
            at_ns=self._shared.now_ns(),
            budget_nanousd_day=self._cap_nanousd(),
        )

    async def _seed(self) -> bool:
        """Begin with what this day has cost already. Nothing is spent before that is known."""
        if not self._seeded:
            at_ns = self._shared.now_ns()
            try:
                spent_nanousd = await asyncio.to_thread(self._read_spent, at_ns)
            except (sa.exc.SQLAlchemyError, TimeoutError) as error:
                log.warning("keep_warm_unread", reason=str(error))
                return False
            self._cap.seed(at_ns, spent_nanousd)
            self._seeded = True
        return self._is_on

    async def _warm(self, warm: Warm) -> None:
        shared = self._shared
        if not self._is_on:
            self._skip("stopped")
            return
        at_ns = shared.now_ns()
        upper_nanousd = upper_bound(warm.tokens, 0, warm.model, at_ns, shared.catalog, speed=warm.speed)
        if not self._cap.take(at_ns, upper_nanousd, self._cap_nanousd()):
            self._skip("cap")
            return
        call = WarmCall(shared, warm, self._new_call_id())
        self._calls.add(call)
        cost_nanousd = upper_nanousd
        try:
            done = await call.run()
            cost_nanousd = done.cost_nanousd
        except LedgerUnavailable:
            cost_nanousd = 0
            done = Warmed(skipped="ledger")
        finally:
            self._calls.discard(call)
            self._cap.settle(at_ns, upper_nanousd, cost_nanousd)
        if done.skipped is not None:
            self._skip(done.skipped)
        else:
            self._came(warm, done)

    def _came(self, warm: Warm, done: Warmed) -> None:
        """What follows from a warming request that left."""
        family, failure, usage = warm.plan.family, done.failure, done.usage
        if failure is None or failure.sent:
            self._times.sent(warm)
        if failure is not None:
            self._failed += 1
            rests = failure.kind == "status" and 400 <= failure.status < 500 and cause(failure) is not Cause.RATE_LIMIT
            if rests:
                self._times.rest(family, self._shared.clock() + REST_S)
            log.info(
                "keep_warm_failed",
                family=family,
                failure=failure.kind,
                status=failure.status,
                error_code=failure_code(failure),
                cost_nanousd=done.cost_nanousd,
                rests_s=REST_S if rests else 0.0,
            )
            return
        written = usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
        self._times.warmed(warm, done.sent_at)
        self._warmed += 1
        self._read_tokens += usage.cache_read_tokens
        self._written_tokens += written
        if written >= usage.cache_read_tokens:
            # The prefix was not there, or this is another one: going on would write it again and again.
            self._times.rest(family, self._shared.clock() + REST_S)
        log.info(
            "keep_warm",
            family=family,
            key_id=warm.principal.key_id,
            model=warm.model,
            read_tokens=usage.cache_read_tokens,
            written_tokens=written,
            cost_nanousd=done.cost_nanousd,
        )

    def _skip(self, why: Skip) -> None:
        self._skipped[why] = self._skipped.get(why, 0) + 1
