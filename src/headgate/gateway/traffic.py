"""Turns: every attempt waits here until its person's limits, its model's breaker and Anthropic's limits let it leave.

What it is: the driver of the pure parts: the order (`policy/request_queue.py`), the rates (the limiter behind
`storage/limits.py`), outages (`policy/breaker.py`, `policy/slow_start.py`). It has the timers, the futures, and who is
told. What it is not: a decision of its own. With nothing in the way a turn is given at once, without a future, a timer
or a queue.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable, Iterable, Mapping

import msgspec
import structlog

from headgate.gateway import refusals
from headgate.gateway.policies import Policies
from headgate.policy.admission import no_turn
from headgate.policy.breaker import STRAY, AccountBreaker, Breakers, State, Transition
from headgate.policy.limiter import MINUTE_S, Ask, ClassLimits, Subject, Verdict, cost_s
from headgate.policy.poison import PoisonTable
from headgate.policy.records import Record, Refused
from headgate.policy.request_queue import HELD, Entry, QueueTotals, RequestQueue
from headgate.policy.slow_start import SlowStart
from headgate.storage.interfaces import Limits
from headgate.wire.headers import rate_limits

log = structlog.get_logger()

TOLD_EVERY_S = 0.1
ASKING_S = 0.005
SLOT_ASKED_EVERY_S = 0.5
LEASE_S = 60.0
RENEW_EVERY_S = 15.0


class Want(Record, frozen=True, gc=False):
    """What a turn is wanted for."""

    ask_id: str
    model: str
    class_id: str
    limits: ClassLimits
    subjects: tuple[Subject, ...]
    input_tokens: int
    output_tokens: int
    deadline: float
    user: str
    weight: float = 1.0
    waiting_max: int = 10
    background: bool = False
    again: bool = False
    """A retry goes to the head of its person's line."""
    since: float = 0.0
    """When the request came, monotonic seconds: it keeps its place where it goes elsewhere."""
    divertible: bool = False
    """There is another model to go to, should this one's breaker open."""
    better: tuple[str, ...] = ()
    """Models that would be asked rather, should a breaker of theirs close."""
    bytes: int = 0
    call_id: str = ""
    key_id: str = ""
    conversation: str = ""


class Turn(Record, frozen=True, gc=False):
    """A turn was given. Exactly one `Traffic.ended` must follow."""

    ask_id: str
    model: str
    class_id: str
    limits: ClassLimits
    breaker_token: int
    account_token: int
    probe: bool
    """It finds out whether its model is back."""
    slots: bool
    """It holds a slot of a subject that may make so many calls at once."""


class Diverted(Record, frozen=True, gc=False):
    """The model's breaker opened meanwhile: choose again."""


class Left(Record, frozen=True, gc=False):
    """The wait was given up: the client left, or the process stops."""


_DIVERTED = Diverted()
_LEFT = Left()
Result = Turn | Refused | Diverted | Left


class Waiting(Entry):
    """One want in the queue. `result` is None until there is one; then await is not needed."""

    __slots__ = ("_future", "ask", "denied", "result", "want")

    def __init__(self, want: Want, now: float) -> None:
        # The tightest of them tells when the next of this line can follow.
        rpm = min((one.rpm for one in want.subjects if one.rpm), default=None)
        super().__init__(
            want.user,
            cost_s=cost_s(want.limits, want.input_tokens, want.output_tokens),
            deadline=want.deadline,
            enqueued_at=now,
            weight=want.weight,
            bytes=want.bytes,
            background=want.background,
            head=want.again,
            waiting_max=want.waiting_max,
            gap_s=MINUTE_S / rpm if rpm else 0.0,
        )
        self.want = want
        self.ask = Ask(
            id=want.ask_id,
            class_id=want.class_id,
            limits=want.limits,
            subjects=want.subjects,
            input_tokens=want.input_tokens,
            output_tokens=want.output_tokens,
            lease_s=LEASE_S,
        )
        self.denied = (now, "")
        """Until when, and why, it was last told to wait; at its deadline that is why it had no turn."""
        self.result: Result | None = None
        self._future: asyncio.Future[Result] | None = None

    def finish(self, result: Result) -> None:
        """Tell who waits; the first word holds."""
        if self.result is None:
            self.result = result
            if self._future is not None:
                self._future.set_result(result)

    async def wait(self) -> Result:
        """The result, when there is one."""
        if self.result is None:
            self._future = asyncio.get_running_loop().create_future()
            return await self._future
        return self.result


class _Lane:
    """One model class: its queue, its timer, and its pace after an outage."""

    __slots__ = ("asking", "class_id", "limits", "queue", "slow_start", "timer", "timer_at", "told_at")

    def __init__(self, class_id: str, queue: RequestQueue, limits: ClassLimits, now: float) -> None:
        self.class_id = class_id
        self.asking = 0
        """Asks out of the queue that have no answer yet."""
        self.limits = limits
        self.queue = queue
        self.slow_start = SlowStart(now)
        self.timer: asyncio.TimerHandle | None = None
        self.timer_at = 0.0
        self.told_at = -TOLD_EVERY_S


class Traffic:
    """All turns of a process."""

    def __init__(
        self,
        limits: Limits,
        policies: Policies,
        *,
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self.limits = limits
        self.breakers = Breakers(policies.breaker, jitter=jitter)
        self.account = AccountBreaker(probe_s=policies.spend_cap_probe_s)
        self.poison = PoisonTable(failures=policies.poison_failures)
        self._totals = QueueTotals(policies.queue)
        self._clock = clock
        self._lanes: dict[str, _Lane] = {}
        self._live: set[str] = set()
        """Turns that are out."""
        self._renewed_at = clock()

    # the path

    def join(self, want: Want) -> Waiting:
        """Ask for a turn. The result may be there already; else `await waiting.wait()`."""
        now = self._clock()
        waiting = Waiting(want, now)
        retry_at = self.account.retry_at(now)
        if retry_at is not None:
            # It began before the money ran out, and comes back from a pause or from another model.
            waiting.finish(refusals.spend_cap(self.account.code, retry_at - now))
            return waiting
        lane = self._lane(want.class_id, want.limits)
        queue = lane.queue
        if not len(queue) and not lane.slow_start.active(now) and self.breakers.admits(want.model, now):
            # Nobody waits and nothing is known to be in the way: ask at once.
            self.limits.admit(waiting.ask, functools.partial(self._answered_directly, lane, waiting))
        else:
            self._line_up(lane, waiting, now, None)
        return waiting

    def leave(self, waiting: Waiting) -> None:
        """The client is gone, or the process stops."""
        if waiting.result is None:
            lane = self._lanes[waiting.want.class_id]
            lane.queue.leave(waiting)
            waiting.finish(_LEFT)
            self._pump(lane)

    def began(self, turn: Turn, *, input_tokens: int) -> None:
        """Anthropic answers: the uncached input is exact from here on."""
        self.limits.correct(turn.ask_id, input_tokens=input_tokens, output_tokens=0)
        self._changed(self.breakers.answering(turn.model, turn.breaker_token, self._clock()), turn.class_id)
        self._room(turn.class_id)

    def progressed(self, turn: Turn, *, input_tokens: int, output_tokens: int) -> None:
        """Output so far."""
        self.limits.correct(turn.ask_id, input_tokens=input_tokens, output_tokens=output_tokens)

    def told(self, turn: Turn, headers: Mapping[bytes, bytes]) -> None:
        """The head of an answer, for the limits that it names. A class is told about ten times a second at most."""
        lane, now = self._lanes[turn.class_id], self._clock()
        if now - lane.told_at >= TOLD_EVERY_S and b"anthropic-ratelimit-requests-limit" in headers:
            lane.told_at = now
            self.limits.observe(turn.ask_id, rate_limits(headers))

    def throttled(self, turn: Turn, *, retry_after_s: float | None, ramp: bool) -> None:
        """Anthropic answered 429."""
        self.limits.throttled(turn.class_id, turn.limits, retry_after_s=retry_after_s, ramp=ramp)

    def ended(self, turn: Turn, *, input_tokens: int, output_tokens: int) -> None:
        """The attempt is over and took this much."""
        self._live.discard(turn.ask_id)
        self.limits.settle(turn.ask_id, input_tokens=input_tokens, output_tokens=output_tokens)
        if turn.slots:
            # The slot is of no class: whoever waited for it may wait anywhere.
            for lane in self._lanes.values():
                for user in {entry.user for entry in lane.queue}:
                    lane.queue.freed(user)
                if lane.class_id != turn.class_id and len(lane.queue):
                    self._pump(lane)
        self._room(turn.class_id)

    def succeeded(self, turn: Turn) -> None:
        """The model answered."""
        if self.account.succeeded(turn.account_token):
            log.warning("spend_cap_over")
        self._changed(self.breakers.succeeded(turn.model, turn.breaker_token, self._clock()), turn.class_id)

    def failed(self, turn: Turn) -> None:
        """The model failed, as in an outage."""
        self._changed(self.breakers.failed(turn.model, turn.breaker_token, self._clock()), turn.class_id)

    def neutral(self, turn: Turn) -> None:
        """The attempt says nothing about the model: a 429, a 4xx, a client that left."""
        self.breakers.neutral(turn.model, turn.breaker_token, self._clock())

    def spend_cap(self, code: str) -> None:
        """Anthropic says that the account may spend no more: nothing leaves, and nobody waits in vain."""
        now = self._clock()
        if not self.account.tripped(now, code):
            return
        log.error("spend_cap", code=code, mend="raise the limit in the Claude console")
        for lane in self._lanes.values():
            for entry in list(lane.queue):
                assert isinstance(entry, Waiting)
                lane.queue.leave(entry)
                entry.finish(refusals.spend_cap(code, (self.account.retry_at(now) or now) - now))

    def apply(self, policies: Policies) -> None:
        """The settings were read again."""
        self.breakers.apply(policies.breaker)
        self.account.probe_s = policies.spend_cap_probe_s
        self.poison.failures = policies.poison_failures
        self._totals.bounds = policies.queue
        for lane in self._lanes.values():
            lane.limits = policies.class_limits(lane.class_id)
            lane.queue.unblock()
            self._pump(lane)

    def tick(self, now: float) -> None:
        """Heartbeats of the store, leases of what is under way, outages that end by time."""
        self.limits.tick(now)
        if now - self._renewed_at >= RENEW_EVERY_S:
            self._renewed_at = now
            for ask_id in self._live:
                self.limits.renew(ask_id, lease_s=LEASE_S)

    def waiting(self) -> Iterable[tuple[Waiting, int, float]]:
        """Everybody who waits, with their position and expected wait in seconds."""
        now = self._clock()
        for lane in self._lanes.values():
            for entry, position, expected_s in lane.queue.forecasts(now):
                assert isinstance(entry, Waiting)
                yield entry, position, expected_s

    def lanes(self) -> Iterable[tuple[str, ClassLimits, RequestQueue]]:
        """Every model class that was ever asked for."""
        return [(lane.class_id, lane.limits, lane.queue) for lane in self._lanes.values()]

    # inside

    def _lane(self, class_id: str, limits: ClassLimits) -> _Lane:
        lane = self._lanes.get(class_id)
        if lane is None:
            queue = RequestQueue(self._totals, burst_s=limits.burst_s)
            lane = self._lanes[class_id] = _Lane(class_id, queue, limits, self._clock())
        lane.limits = limits
        return lane

    def _answered_directly(self, lane: _Lane, waiting: Waiting, verdict: Verdict) -> None:
        now = self._clock()
        if waiting.result is not None:
            self._give_back(waiting, verdict)
        elif verdict.admitted:
            self._give(lane, waiting, now)
        else:
            self._line_up(lane, waiting, now, verdict)

    def _line_up(self, lane: _Lane, waiting: Waiting, now: float, verdict: Verdict | None) -> None:
        """Into the queue; or told at once that it would be in vain."""
        want = waiting.want
        shed, refusal = lane.queue.join(waiting, now)
        for entry in shed:
            assert isinstance(entry, Waiting)
            expected_s = self._lanes[entry.want.class_id].queue.expected_wait_s(entry, now)
            entry.finish(no_turn("queue_full", expected_s, entry.want.subjects))
        if refusal is not None:
            waiting.finish(no_turn(refusal, lane.queue.expected_wait_s(waiting, now), want.subjects))
            return
        if verdict is not None:
            self._denied(lane, waiting, verdict, now)
        self._pump(lane)
        if waiting.result is None:
            expected_s, why = lane.queue.expected(waiting, now)
            if lane.slow_start.active(now):
                release_s = lane.slow_start.wait_s(now, lane.queue.position(waiting))
                if release_s > expected_s:
                    expected_s, why = release_s, "slow_start"
            if waiting.denied[1] == HELD:
                # Behind everybody else who waits for the outage to end; and beyond a bound they would be its echo.
                ahead = len(lane.queue) - 1
                expected_s = max(expected_s, waiting.denied[0] - now) + lane.slow_start.drained_in_s(ahead)
                why = HELD
                if ahead >= lane.slow_start.backlog_max() and not want.again:
                    expected_s = max(expected_s, want.deadline - now)
                    lane.queue.leave(waiting)
                    waiting.finish(no_turn(why, expected_s, want.subjects))
                    return
            if now + expected_s > want.deadline:
                lane.queue.leave(waiting)
                waiting.finish(no_turn(why, expected_s, want.subjects))

    def _pump(self, lane: _Lane) -> None:
        """Let everybody ask whose turn it is, and set the alarm for the next change."""
        now = self._clock()
        queue = lane.queue
        for expired in queue.expired(now):
            assert isinstance(expired, Waiting)
            expected_s, why = queue.expected(expired, now)
            until, last = expired.denied
            # Also where its own limit would let it go just now, a moment too late: that limit is why it waited.
            if last and max(until - now, 0.0) >= expected_s:
                expected_s, why = max(until - now, 0.0), last
            expired.finish(no_turn(why, expected_s, expired.want.subjects))
        while (entry := queue.next(now)) is not None:
            assert isinstance(entry, Waiting)
            model = entry.want.model
            if not self.breakers.admits(model, now):
                self._hold(lane, entry, now)
                continue
            slow_s = lane.slow_start.wait_s(now)
            if slow_s <= 0 and self.limits.shared and lane.slow_start.active(now) and lane.asking:
                # Its pace counts who was admitted: over Redis that is known an answer later.
                slow_s = ASKING_S
            if slow_s > 0:
                queue.denied(entry, Verdict(False, slow_s, "slow_start"), now)
                continue
            if entry.ask.limits is not lane.limits:
                entry.ask = msgspec.structs.replace(entry.ask, limits=lane.limits)
            lane.asking += 1
            self.limits.admit(entry.ask, functools.partial(self._answered, lane, entry))
        if not len(queue):
            lane.slow_start.caught_up(now)
        self._arm(lane, queue.wake_at())

    def _answered(self, lane: _Lane, entry: Waiting, verdict: Verdict) -> None:
        now = self._clock()
        lane.asking -= 1
        if entry.result is not None:
            self._give_back(entry, verdict)
        elif not verdict.admitted:
            self._denied(lane, entry, verdict, now)
        elif not self.breakers.admits(entry.want.model, now):
            # It opened, or another one became its probe, while the answer was on its way.
            self._give_back(entry, verdict)
            self._hold(lane, entry, now)
        elif lane.queue.admitted(entry, now, verdict.pace):
            self._give(lane, entry, now)
        else:
            self._give_back(entry, verdict)
        if self.limits.shared:
            self._pump(lane)

    def _denied(self, lane: _Lane, entry: Waiting, verdict: Verdict, now: float) -> None:
        if self.limits.shared and math.isinf(verdict.wait_s):
            # A slot that another process frees is not heard of here.
            verdict = Verdict(False, SLOT_ASKED_EVERY_S, verdict.reason, verdict.pace)
        entry.denied = (now + verdict.wait_s, verdict.reason)
        lane.queue.denied(entry, verdict, now)

    def _hold(self, lane: _Lane, entry: Waiting, now: float) -> None:
        until = self.breakers.retry_at(entry.want.model, now)
        entry.denied = (now if until is None else until, HELD)
        lane.queue.hold(entry, until, now)

    def _give(self, lane: _Lane, waiting: Waiting, now: float) -> None:
        want = waiting.want
        account_token = self.account.started(now)
        if account_token == STRAY:
            # Somebody before it in the queue became the probe of an account without money.
            self.limits.settle(want.ask_id, input_tokens=0, output_tokens=0)
            waiting.finish(refusals.spend_cap(self.account.code, (self.account.retry_at(now) or now) - now))
            return
        lane.slow_start.admitted(now)
        self._live.add(want.ask_id)
        waiting.finish(
            Turn(
                want.ask_id,
                want.model,
                want.class_id,
                want.limits,
                self.breakers.started(want.model, now),
                account_token,
                probe=self.breakers.state(want.model) is not State.CLOSED,
                slots=any(subject.concurrency is not None for subject in want.subjects),
            )
        )

    def _give_back(self, waiting: Waiting, verdict: Verdict) -> None:
        """The turn came too late."""
        if verdict.admitted:
            self.limits.settle(waiting.want.ask_id, input_tokens=0, output_tokens=0)

    def _room(self, class_id: str) -> None:
        """Something was given back: whoever waits may ask again before the time they were told."""
        lane = self._lanes.get(class_id)
        if lane is not None and len(lane.queue):
            lane.queue.unblock()
            self._pump(lane)

    def _changed(self, transition: Transition | None, class_id: str) -> None:
        """A breaker turned: some go elsewhere, some may go on."""
        if transition is None:
            return
        model, after, now = transition.model, transition.after, self._clock()
        log.warning("breaker", model=model, before=transition.before.value, after=after.value, reason=transition.reason)
        lane = self._lanes[class_id]
        if after is State.OPEN:
            lane.slow_start.outage_began(now)
            # What failed together failed for a reason of its own.
            self.poison.clear()
            for entry in _by_arrival(lane.queue):
                if entry.want.model == model and entry.want.divertible:
                    lane.queue.leave(entry)
                    entry.finish(_DIVERTED)
        elif after is State.CLOSED:
            lane.slow_start.outage_ended(now)
            self._call_home(model)
        lane.queue.release()
        self._pump(lane)

    def _call_home(self, model: str) -> None:
        """Who waits for a fallback would now be served sooner, and better, by the model that they asked for."""
        for lane in self._lanes.values():
            for entry in _by_arrival(lane.queue):
                if model in entry.want.better:
                    lane.queue.leave(entry)
                    entry.finish(_DIVERTED)
            self._pump(lane)

    def _arm(self, lane: _Lane, at: float | None) -> None:
        if lane.timer is not None:
            if at is not None and lane.timer_at <= at:
                return
            lane.timer.cancel()
            lane.timer = None
        if at is not None:
            lane.timer_at = at
            delay_s = max(at - self._clock(), 0.0)
            lane.timer = asyncio.get_running_loop().call_later(delay_s, self._alarm, lane)

    def _alarm(self, lane: _Lane) -> None:
        lane.timer = None
        self._pump(lane)


def _by_arrival(queue: RequestQueue) -> list[Waiting]:
    """Whoever goes elsewhere goes in the order in which they came."""
    return sorted((one for one in queue if isinstance(one, Waiting)), key=lambda one: one.want.since)
