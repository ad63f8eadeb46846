"""Decides whether a call may leave now, by every limit it is under: those of people and those of Anthropic.

What it is: one state machine over token buckets (requests, input and output tokens a minute) and concurrency slots, for
subjects (a person, a key) and for Anthropic's model classes. It takes from all of them or from none. What it is not: an
order of who comes next (`request_queue.py`), money (`budgets`), or a clock.

Several processes make the same decisions in Redis: `storage/limiter.lua` repeats this file, and a test drives both
with one history and compares every answer. So state here is plain numbers, and an operation is a function of them and
of `now`.

Rules of Anthropic's limits are those of claude-api §6.1: continuous refill; uncached input is estimated first and
corrected when the answer begins; output counts as it is produced and never as `max_tokens`; cache reads are free.
Units: levels in requests or tokens, `now` in seconds of one monotonic clock, limits a minute.
"""

from __future__ import annotations

import math

from headgate.policy.records import Record
from headgate.policy.token_bucket import refilled, wait_s
from headgate.wire.headers import RateLimits

MINUTE_S = 60.0
FREEZE_S_MAX = 300.0
"""A `retry-after` beyond this is not believed: after it one probe looks again (failure-model §2.1)."""
PROBE_FROM_S = 20.0
"""After a freeze as long as this one call goes ahead, and the others wait for what it meets."""
PROBE_S = 30.0
"""How long they wait for it."""
REGROWTH = 1.1
REGROWTH_EVERY_S = 10.0
"""A halved rate or burst regains a tenth of itself in ten seconds: from a half to the whole takes 73 s."""
FACTOR_MIN = 1 / 64
USED_S = 10.0
"""Over which the rate in use is remembered."""
USED_MIN = 1 / 8
"""The least share of a rate that counts as in use: one call that meets a ramp limit does not stop a class."""
HALVED_EVERY_S = 1.0
"""Fifty calls that were under way together and hit one limit are one piece of news."""
SUBJECTS_KEPT_MIN = 1000

_DIMENSIONS = ("rpm", "itpm", "otpm")


class ClassLimits(Record, frozen=True, gc=False):
    """Anthropic's limits of one model class, a minute, > 0; None is without limit."""

    rpm: float | None = None
    itpm: float | None = None
    otpm: float | None = None
    burst_s: float = 10.0
    """Seconds of the rate that a full bucket holds."""
    learn: bool = False
    """Believe a limit that Anthropic's headers name even where it is higher; a lower one is always believed."""


class Subject(Record, frozen=True, gc=False):
    """Whom a limit holds for. `id` is `kind:name` (`user:alice`, `key:3x9…`); the kind begins a refusal's reason.

    Limits are > 0; None is without limit.
    """

    id: str
    rpm: float | None = None
    otpm: float | None = None
    """Output tokens a minute. Nothing is reserved: who is above zero may go, and what is produced is taken."""
    concurrency: int | None = None
    burst_s: float = 60.0


class Ask(Record, frozen=True, gc=False):
    """May this attempt leave? `id` is unique for each attempt; `lease_s` is how long a lost one holds its slot."""

    id: str
    class_id: str
    limits: ClassLimits
    subjects: tuple[Subject, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    lease_s: float = 600.0


class Verdict(Record, frozen=True, gc=False):
    """The answer. `wait_s`: until the same ask could pass if nobody else came; infinite for a concurrency slot.

    `reason`: `<kind>_rpm`, `<kind>_otpm`, `<kind>_concurrency`, `class_rpm`, `class_itpm`, `class_otpm` or `frozen`.
    `pace` is the share of its rate at which the class refills now, in (0, 1].
    """

    admitted: bool
    wait_s: float = 0.0
    reason: str = ""
    pace: float = 1.0


_ADMITTED = Verdict(True)


def cost_s(limits: ClassLimits, input_tokens: int, output_tokens: int) -> float:
    """Seconds of a class's capacity that a call takes, in the dimension that it needs most of. > 0."""
    cost = 1 / limits.rpm if limits.rpm else 0.0
    if limits.itpm:
        cost = max(cost, input_tokens / limits.itpm)
    if limits.otpm:
        cost = max(cost, output_tokens / limits.otpm)
    return max(cost * MINUTE_S, 1e-6)


class _Factor:
    """A multiplier that is halved by bad news and regrows."""

    __slots__ = ("at", "value")

    def __init__(self) -> None:
        self.value = 1.0
        self.at = 0.0

    def now(self, now: float) -> float:
        if self.value >= 1.0:
            return 1.0
        grown = max(now - self.at, 0.0) / REGROWTH_EVERY_S
        # Whole by then whatever it was; a power of it would overflow.
        return 1.0 if grown > 100.0 else min(1.0, self.value * REGROWTH**grown)

    def halve(self, now: float, used: float = 1.0) -> None:
        """`used`: the share that was in use. Half of a rate that nobody needs would change nothing."""
        value = self.now(now)
        if value >= 1.0:
            value = min(max(used, USED_MIN), 1.0)
        self.value = max(value / 2, FACTOR_MIN)
        self.at = now


class _Class:
    """State of one model class. Lists have one number for each of requests, input and output."""

    __slots__ = (
        "_for",
        "at",
        "burst",
        "capacities",
        "frozen_until",
        "halved_at",
        "learned",
        "levels",
        "pace",
        "probe",
        "rates_s",
        "sent",
        "synced",
        "taken",
        "used",
    )

    def __init__(self, now: float) -> None:
        self.levels = [math.inf, math.inf, math.inf]
        """Infinite until the first refill brings it down to the capacity; for ever where there is no limit."""
        self.at = now
        self.taken = [0.0, 0.0, 0.0]
        """All that was ever taken, to tell what was taken since a certain call left."""
        self.used = [0.0, 0.0, 0.0]
        """What was taken lately; it fades in USED_S."""
        self.sent = 0
        self.synced = 0
        """The youngest call whose headers were believed."""
        self.learned = [0.0, 0.0, 0.0]
        self.frozen_until = -math.inf
        self.probe = ""
        """`?`: the next call is the probe. Else the id of the one that is out."""
        self.pace = _Factor()
        self.burst = _Factor()
        self.halved_at = -math.inf
        self._for: ClassLimits | None = None
        self.rates_s = [0.0, 0.0, 0.0]
        self.capacities = [math.inf, math.inf, math.inf]

    def limit(self, limits: ClassLimits, dimension: int) -> float | None:
        """What holds now: what was configured, and what Anthropic said."""
        configured = (limits.rpm, limits.itpm, limits.otpm)[dimension]
        learned = self.learned[dimension]
        if not learned:
            return configured
        return learned if limits.learn or configured is None else min(configured, learned)

    def learn(self, dimension: int, limit: float) -> None:
        """Anthropic's headers name a limit."""
        if self.learned[dimension] != limit:
            self.learned[dimension] = limit
            self._for = None

    def refill(self, limits: ClassLimits, now: float) -> None:
        """Bring the levels to `now`. The pace is that of the interval's start: while it grows, rather too little."""
        if self._for is not limits or self.burst.value < 1.0:
            self._size(limits, now)
        levels, capacities = self.levels, self.capacities
        elapsed_s = now - self.at
        if elapsed_s > 0:
            pace = self.pace.now(self.at)
            self.at = now
            kept = max(1.0 - elapsed_s / USED_S, 0.0)
            for dimension in (0, 1, 2):
                levels[dimension] += elapsed_s * (self.rates_s[dimension] * pace)
                self.used[dimension] *= kept
        for dimension in (0, 1, 2):
            if levels[dimension] > capacities[dimension]:
                levels[dimension] = capacities[dimension]

    def take(self, dimension: int, amount: float) -> None:
        """Take, or give back what is below zero; what that brings above the capacity the next refill cuts."""
        self.levels[dimension] -= amount
        self.taken[dimension] += amount
        self.used[dimension] += amount

    def share_used(self) -> float:
        """How much of the rate was in use lately, in the dimension that is nearest to its limit. 1.0 without limits."""
        shares = [used / (rate_s * USED_S) for used, rate_s in zip(self.used, self.rates_s, strict=True) if rate_s]
        return max(shares, default=1.0)

    def _size(self, limits: ClassLimits, now: float) -> None:
        """Rates and capacities under these limits."""
        burst = self.burst.now(now)
        if burst >= 1.0:
            self.burst.value = 1.0
        for dimension in (0, 1, 2):
            limit = self.limit(limits, dimension)
            rate_s = 0.0 if limit is None else limit / MINUTE_S
            self.rates_s[dimension] = rate_s
            if limit is None:
                # Nothing is counted; a limit that comes later begins with a full bucket and not with a debt.
                self.levels[dimension] = self.capacities[dimension] = math.inf
            else:
                self.capacities[dimension] = max(rate_s * limits.burst_s * burst, 1.0)
        self._for = limits


class _SubjectState:
    """State of one subject; `busy` are the attempts that hold a slot, with the end of their lease."""

    __slots__ = ("at", "busy", "full_at", "output", "requests")

    def __init__(self, now: float) -> None:
        self.requests = math.inf
        self.output = math.inf
        self.at = now
        self.full_at = now
        """When it is as if it had never been seen."""
        self.busy: dict[str, float] = {}


class _Reservation:
    """What an attempt has taken so far."""

    __slots__ = (
        "at",
        "class_id",
        "expires_at",
        "input_tokens",
        "limits",
        "marks",
        "output_tokens",
        "sequence",
        "spent",
        "subjects",
    )

    def __init__(self, ask: Ask, sequence: int, marks: tuple[float, float, float], now: float) -> None:
        self.at = now
        self.class_id = ask.class_id
        self.limits = ask.limits
        self.subjects = ask.subjects
        self.input_tokens = ask.input_tokens
        self.output_tokens = ask.output_tokens
        self.spent = 0
        """Output that the subjects have paid for."""
        self.sequence = sequence
        self.marks = marks
        """`taken` of the class when this attempt left."""
        self.expires_at = now + ask.lease_s


class Limiter:
    """All limits of a process. Memory is bounded by who was seen in the last minutes and by what is under way."""

    def __init__(self) -> None:
        self._classes: dict[str, _Class] = {}
        self._subjects: dict[str, _SubjectState] = {}
        self._reservations: dict[str, _Reservation] = {}
        self._sweep_at_len = SUBJECTS_KEPT_MIN

    def __len__(self) -> int:
        """Attempts that hold a reservation."""
        return len(self._reservations)

    @property
    def subjects(self) -> int:
        """Subjects that are remembered."""
        return len(self._subjects)

    def holds(self, ask_id: str, now: float) -> bool:
        """Whether an attempt holds a reservation."""
        return self._held(ask_id, now) is not None

    def admit(self, ask: Ask, now: float) -> Verdict:
        """Take what the ask needs from every bucket, or nothing. A person's own limit is named before the class's."""
        state = self._class(ask.class_id, now)
        denied = self._denied_subject(ask.subjects, now) if ask.subjects else None
        if denied is None:
            denied = self._denied_class(state, ask, now)
        if denied is not None:
            return denied
        for subject in ask.subjects:
            self._take_subject(subject, ask, now)
        state.take(0, 1.0)
        state.take(1, float(ask.input_tokens))
        state.take(2, float(ask.output_tokens))
        state.sent += 1
        taken = state.taken
        self._reservations[ask.id] = _Reservation(ask, state.sent, (taken[0], taken[1], taken[2]), now)
        if state.probe:
            state.probe, state.frozen_until = ask.id, now + PROBE_S
        return _ADMITTED if state.pace.value >= 1.0 else Verdict(True, pace=state.pace.now(now))

    def correct(self, ask_id: str, *, input_tokens: int, output_tokens: int, now: float) -> None:
        """What Anthropic says by now: exact uncached input, and output so far. Absolute numbers, so twice is once."""
        reservation = self._held(ask_id, now)
        if reservation is not None:
            self._thaw(ask_id, reservation, now)
            self._charge(reservation, input_tokens, max(output_tokens, reservation.output_tokens), output_tokens, now)

    def settle(self, ask_id: str, *, input_tokens: int, output_tokens: int, now: float) -> None:
        """The attempt is over and took this much. Unknown, expired and settled ones are left alone."""
        reservation = self._held(ask_id, now)
        if reservation is None:
            return
        state = self._class(reservation.class_id, now)
        if state.probe == ask_id:
            # It met neither an answer nor a limit: the next one is the probe.
            state.probe, state.frozen_until = "?", now
        self._charge(reservation, input_tokens, output_tokens, output_tokens, now)
        self._forget(ask_id)

    def renew(self, ask_id: str, *, lease_s: float, now: float) -> None:
        """The attempt is still under way."""
        reservation = self._held(ask_id, now)
        if reservation is None:
            return
        reservation.expires_at = now + lease_s
        for subject in reservation.subjects:
            held = self._subjects.get(subject.id)
            if held is not None and ask_id in held.busy:
                held.busy[ask_id] = now + lease_s

    def expire(self, now: float) -> int:
        """Forget attempts whose lease is over (their owner is gone); what they took stays taken. Returns how many."""
        expired = [ask_id for ask_id, one in self._reservations.items() if one.expires_at <= now]
        for ask_id in expired:
            self._forget(ask_id)
        return len(expired)

    def observe(self, ask_id: str, limits: RateLimits, now: float) -> None:
        """Anthropic's rate-limit headers of an attempt. They only ever lower a level (failure-model §4.3).

        `remaining` is what was left when that attempt arrived: what was taken since comes off it, and what refilled
        since is added, or an answer that took long to come would take the refill of its whole time away. Headers of
        an older attempt than the last believed say nothing new about levels.
        """
        reservation = self._held(ask_id, now)
        if reservation is None:
            return
        state = self._class(reservation.class_id, now)
        self._thaw(ask_id, reservation, now)
        state.refill(reservation.limits, now)
        refilling_s = max(now - reservation.at, 0.0) * state.pace.now(reservation.at)
        newest = reservation.sequence >= state.synced
        state.synced = max(state.synced, reservation.sequence)
        for dimension, told in enumerate((limits.requests, limits.input_tokens, limits.output_tokens)):
            if told is None or told.limit <= 0:
                continue
            state.learn(dimension, float(told.limit))
            if newest:
                since = state.taken[dimension] - reservation.marks[dimension]
                refill = refilling_s * state.rates_s[dimension]
                state.levels[dimension] = min(state.levels[dimension], told.remaining + refill - since)

    def throttled(
        self, class_id: str, limits: ClassLimits, *, retry_after_s: float | None, ramp: bool, now: float
    ) -> None:
        """Anthropic answered 429: nothing leaves for the class until its `retry-after` is over.

        Our levels were too high, so they are emptied and the burst is halved; on a ramp limit the rate is.
        """
        state = self._class(class_id, now)
        state.refill(limits, now)
        if state.probe not in ("", "?"):
            # While a probe is out nothing else is, so this is its answer: what it was told replaces the wait for it.
            state.frozen_until = now
        if now >= state.frozen_until and now - state.halved_at >= HALVED_EVERY_S:
            state.halved_at = now
            if ramp:
                state.pace.halve(now, state.share_used())
            else:
                state.burst.halve(now)
        for dimension in (0, 1, 2):
            if state.capacities[dimension] < math.inf:
                state.levels[dimension] = min(state.levels[dimension], 0.0)
        if retry_after_s is not None:
            freeze_s = min(retry_after_s, FREEZE_S_MAX)
            state.frozen_until = max(state.frozen_until, now + freeze_s)
            if freeze_s >= PROBE_FROM_S or state.probe:
                state.probe = "?"

    def owe(self, class_id: str, limits: ClassLimits, amounts: tuple[float, float, float], now: float) -> None:
        """What was taken elsewhere: requests, input and output tokens that left while these limits were not asked."""
        state = self._class(class_id, now)
        state.refill(limits, now)
        for dimension in (0, 1, 2):
            state.take(dimension, amounts[dimension])

    def taken(self, class_id: str) -> tuple[float, float, float]:
        """All that was ever taken of a class: requests, input and output tokens, less what was given back."""
        state = self._classes.get(class_id)
        return (0.0, 0.0, 0.0) if state is None else (state.taken[0], state.taken[1], state.taken[2])

    def snapshot(self, class_id: str, limits: ClassLimits, now: float) -> ClassSnapshot:
        """How a class stands, for people to read."""
        state = self._class(class_id, now)
        state.refill(limits, now)
        return ClassSnapshot(
            limits=tuple(state.limit(limits, dimension) for dimension in range(3)),
            levels=tuple(None if math.isinf(level) else round(level) for level in state.levels),
            learned=tuple(limit or None for limit in state.learned),
            frozen_s=max(state.frozen_until - now, 0.0),
            pace=state.pace.now(now),
            burst=state.burst.now(now),
        )

    def subject_level(self, subject: Subject, now: float) -> float | None:
        """Requests the subject could make at once, None when it has no such limit."""
        if subject.rpm is None:
            return None
        state = self._subjects.get(subject.id)
        capacity = _capacity(subject.rpm, subject.burst_s)
        if state is None:
            return capacity
        return refilled(state.requests, at=state.at, now=now, rate_s=subject.rpm / MINUTE_S, capacity=capacity)

    def effective(self, class_id: str, limits: ClassLimits) -> ClassLimits:
        """The limits that hold, with what was learned."""
        state = self._classes.get(class_id)
        if state is None or not any(state.learned):
            return limits
        rpm, itpm, otpm = (state.limit(limits, dimension) for dimension in range(3))
        return ClassLimits(rpm=rpm, itpm=itpm, otpm=otpm, burst_s=limits.burst_s, learn=limits.learn)

    # inside

    def _class(self, class_id: str, now: float) -> _Class:
        state = self._classes.get(class_id)
        if state is None:
            state = self._classes[class_id] = _Class(now)
        return state

    def _held(self, ask_id: str, now: float) -> _Reservation | None:
        reservation = self._reservations.get(ask_id)
        return reservation if reservation is not None and reservation.expires_at > now else None

    def _forget(self, ask_id: str) -> None:
        for subject in self._reservations.pop(ask_id).subjects:
            held = self._subjects.get(subject.id)
            if held is not None:
                held.busy.pop(ask_id, None)

    def _denied_subject(self, subjects: tuple[Subject, ...], now: float) -> Verdict | None:
        worst: Verdict | None = None
        for subject in subjects:
            state = self._subjects.get(subject.id)
            if state is None:
                continue
            _refill_subject(state, subject, now)
            if subject.concurrency is None and state.requests >= 1.0 and state.output >= 1.0:
                continue  # the usual answer, and the cheap one
            for what, wait in _subject_waits(state, subject, now):
                if wait > 0 and (worst is None or wait > worst.wait_s):
                    worst = Verdict(False, wait, f"{subject.id.partition(':')[0]}_{what}")
        return worst

    def _denied_class(self, state: _Class, ask: Ask, now: float) -> Verdict | None:
        state.refill(ask.limits, now)
        if now < state.frozen_until:
            return Verdict(False, state.frozen_until - now, "frozen", state.pace.now(now))
        levels = state.levels
        if levels[0] >= 1.0 and levels[1] >= ask.input_tokens and levels[2] >= ask.output_tokens:
            return None
        pace = state.pace.now(now)
        worst, worst_wait = 0, 0.0
        for dimension, need in enumerate((1.0, float(ask.input_tokens), float(ask.output_tokens))):
            if state.capacities[dimension] < math.inf:
                wait = wait_s(
                    levels[dimension],
                    need,
                    rate_s=state.rates_s[dimension] * pace,
                    capacity=state.capacities[dimension],
                )
                if wait > worst_wait:
                    worst, worst_wait = dimension, wait
        return Verdict(False, worst_wait, f"class_{_DIMENSIONS[worst]}", pace) if worst_wait > 0 else None

    def _take_subject(self, subject: Subject, ask: Ask, now: float) -> None:
        state = self._subjects.get(subject.id)
        if state is None:
            if len(self._subjects) >= self._sweep_at_len:
                self._sweep(now)
            state = self._subjects[subject.id] = _SubjectState(now)
            _refill_subject(state, subject, now)
        if subject.rpm is not None:
            state.requests -= 1
        if subject.concurrency is not None:
            state.busy[ask.id] = now + ask.lease_s
        _note_full(state, subject)

    def _charge(
        self, reservation: _Reservation, input_tokens: int, output_tokens: int, produced: int, now: float
    ) -> None:
        state = self._class(reservation.class_id, now)
        state.refill(reservation.limits, now)
        state.take(1, float(input_tokens - reservation.input_tokens))
        state.take(2, float(output_tokens - reservation.output_tokens))
        reservation.input_tokens, reservation.output_tokens = input_tokens, output_tokens
        more = produced - reservation.spent
        if more > 0:
            reservation.spent = produced
            for subject in reservation.subjects:
                held = self._subjects.get(subject.id)
                if subject.otpm is not None and held is not None:
                    _refill_subject(held, subject, now)
                    held.output -= more
                    _note_full(held, subject)

    def _thaw(self, ask_id: str, reservation: _Reservation, now: float) -> None:
        """The probe was answered: the others may go."""
        state = self._class(reservation.class_id, now)
        if state.probe == ask_id:
            state.probe, state.frozen_until = "", now

    def _sweep(self, now: float) -> None:
        """Forget who is as if never seen."""
        for subject_id in [key for key, one in self._subjects.items() if one.full_at <= now and not one.busy]:
            del self._subjects[subject_id]
        self._sweep_at_len = max(SUBJECTS_KEPT_MIN, 2 * len(self._subjects))


class ClassSnapshot(Record, frozen=True, gc=False):
    """How a class stands: requests, input and output tokens, in this order; None is without limit or not known."""

    limits: tuple[float | None, ...]
    levels: tuple[int | None, ...]
    learned: tuple[float | None, ...]
    frozen_s: float
    pace: float
    burst: float


def _capacity(per_minute: float, burst_s: float) -> float:
    return max(per_minute / MINUTE_S * burst_s, 1.0)


def _refill_subject(state: _SubjectState, subject: Subject, now: float) -> None:
    if subject.rpm is not None:
        state.requests = refilled(
            state.requests,
            at=state.at,
            now=now,
            rate_s=subject.rpm / MINUTE_S,
            capacity=_capacity(subject.rpm, subject.burst_s),
        )
    if subject.otpm is not None:
        state.output = refilled(
            state.output,
            at=state.at,
            now=now,
            rate_s=subject.otpm / MINUTE_S,
            capacity=_capacity(subject.otpm, subject.burst_s),
        )
    state.at = max(state.at, now)


def _subject_waits(state: _SubjectState, subject: Subject, now: float) -> list[tuple[str, float]]:
    waits = []
    if subject.rpm is not None:
        capacity = _capacity(subject.rpm, subject.burst_s)
        waits.append(("rpm", wait_s(state.requests, 1.0, rate_s=subject.rpm / MINUTE_S, capacity=capacity)))
    if subject.otpm is not None:
        capacity = _capacity(subject.otpm, subject.burst_s)
        waits.append(("otpm", wait_s(state.output, 1.0, rate_s=subject.otpm / MINUTE_S, capacity=capacity)))
    if subject.concurrency is not None:
        for ask_id in [ask_id for ask_id, expires_at in state.busy.items() if expires_at <= now]:
            del state.busy[ask_id]
        if len(state.busy) >= subject.concurrency:
            waits.append(("concurrency", math.inf))
    return waits


def _note_full(state: _SubjectState, subject: Subject) -> None:
    """When both buckets are full again."""
    full_at = max(state.full_at, state.at)
    for level, limit in ((state.requests, subject.rpm), (state.output, subject.otpm)):
        if limit is not None:
            full_at = max(full_at, state.at + (_capacity(limit, subject.burst_s) - level) * MINUTE_S / limit)
    state.full_at = full_at
