"""Sees who spends much faster than they ever do, before the day's budget is gone (failure-model §2.6, "$80 in 2 h").

What it is: for each person and each key (`user:alice`, `key:3x9…`) the dollars of the last ten minutes, what ten
minutes of theirs used to cost in the last seven days, and who is therefore held to one call at a time. Beside it a
counter of equal calls. What it is not: a budget (`budgets.py`), an alert (`alerts.py`), or a clock.

The limit of ten minutes
- for who has less than a day of history: the absolute line ($2);
- for who has more: five times the 99th percentile of their own ten minutes, and never under a floor ($0.50). So who
  pays $30 an hour all week may go on, and who pays a cent is held at fifty and not at two hundred;
- for who has a cap a day as well: at most an eighth of it, or twice their own percentile where that is more. Five times
  a busy hour may be a quarter of the cap, and then $20 would be gone in forty minutes;
- a key without a day of history has none beside those of the people who use it: two hundred people on the first day of
  an app are no loop, nor is a new key of who pays $30 an hour. One with a history, which is how a small script is
  caught, has at least the line once for each of several people.

What was spent trips, and the trip holds until an hour after it has calmed down. What is under way is counted at what it
is expected to cost, holds back at once, and is forgotten as soon as it is known better: a hundred calls that start
together are held before the first is paid, and an estimate that was too high costs nobody an hour. Who is held back for
half a minute is told of like a trip.

What is spent in a trip teaches nothing, or a loop of two hours would be its own excuse for a week; an operator who
releases it says that it was right.

Money is integer nano-dollars, `now_s` seconds of one monotonic clock; one that goes back stands still here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Mapping
from heapq import nlargest
from math import ceil
from typing import Literal

from headgate.policy.alerts import CallCost
from headgate.policy.records import Record

NANOUSD_PER_USD = 1_000_000_000
BUCKET_S = 10
WINDOW_S = 600
BUCKETS = WINDOW_S // BUCKET_S + 1
"""Sixty whole ones and the one that runs: never less than ten minutes, and at most ten seconds more."""
HISTORY_WINDOWS = 7 * 24 * 6
HISTORY_S_MIN = 24 * 3600.0
HISTORY_WINDOWS_MIN = 12
"""In which something was spent; two hours in all. Fewer say nothing about what is usual."""
CAP_SHARE = 8
CAP_FACTOR = 2
GRACE_S = 3600.0
GRACE_FACTOR_MAX = 16
HELD_BACK_TOLD_S = 30.0
HELD_BACK_GAP_S = 20.0
"""Who is refused and comes again within it has been held back all the time."""
CALLS_SHOWN = 10
IN_FLIGHT_S_MAX = 3600.0
"""A call whose end was never told is forgotten after it."""
IN_FLIGHT_MAX = 1_000
"""Of one subject, and the people of one key. Beyond it the oldest is no longer counted."""
SUBJECTS_MAX = 5_000
"""5 KB each at most (measured), 25 MB. Beyond it who spent longest ago is forgotten, and who is held last of all."""
LOOP_CALLS = 30
LOOP_DIGESTS_MAX = 4_096
"""Some 1 KB each at most, 4 MB. Beyond it the digest that was seen longest ago is forgotten."""

_NO_LIMIT = 1 << 63
_LEVEL_BASE_NANOUSD = 1_000
_WORTH = (0, *(ceil(_LEVEL_BASE_NANOUSD * 2 ** (step / 8)) for step in range(255)))
"""Levels of one byte, each 9 % above the one before: from $0.000001 to $3,600 in ten minutes."""


class VelocityPolicy(Record, frozen=True, gc=False):
    """The lines, as settings have them."""

    line_nanousd: int = 2 * NANOUSD_PER_USD
    """Of ten minutes, > 0."""
    history_factor: float = 5.0
    """≥ 1."""
    hold_s: float = 3600.0
    """How long a trip goes on after the window has fallen to its limit again, ≥ 0."""
    floor_nanousd: int = NANOUSD_PER_USD // 2
    """Of ten minutes: nobody is held for less, unless the line is lower."""


DEFAULT_POLICY = VelocityPolicy()


class Trip(Record, frozen=True, gc=False):
    """A subject went over its limit, or will with what is under way. `calls` are the last that led to it, in order."""

    subject: str
    window_nanousd: int
    """Spent in ten minutes, without what is under way."""
    in_flight_nanousd: int
    """What is under way is expected to cost."""
    limit_nanousd: int
    p99_nanousd: int | None
    """Of its own history, at most 9 % too high; None where there was too little of it."""
    calls: tuple[CallCost, ...]


class Loop(Record, frozen=True, gc=False):
    """A subject sends one request again and again."""

    subject: str
    digest: str
    calls_in_window: int
    """At least so many."""
    calls: tuple[CallCost, ...]


class SubjectSpend(Record, frozen=True, gc=False):
    """How one subject stands."""

    subject: str
    window_nanousd: int
    in_flight_nanousd: int
    limit_nanousd: int | None
    limit_from: Literal["line", "history", "people"]
    """`people`: a new key, which those of its people hold; it has none of its own."""
    p99_nanousd: int | None
    history_windows: int
    """Of ten minutes each, in which it spent something."""
    people: int
    """That used a key in the window; 0 for a person."""
    grace: int
    """The limit is so many times what it would be: an operator released it."""
    tripped: bool
    held_back: bool
    """By what is under way."""
    held_s: float
    """Until it is let go by itself if it stays calm; 0 when it is not held."""


class _Subject:
    """One subject's state."""

    __slots__ = (
        "bucket",
        "buckets",
        "calls",
        "calls_nanousd",
        "cap_nanousd",
        "first_at",
        "grace",
        "grace_until",
        "held_until",
        "history",
        "in_flight",
        "in_flight_nanousd",
        "in_flight_unknown",
        "p99_nanousd",
        "people",
        "teaches",
        "total_nanousd",
        "tripped",
        "window",
        "window_nanousd",
    )

    def __init__(self, now_s: float) -> None:
        self.bucket = int(now_s // BUCKET_S)
        """Up to which it was brought."""
        self.buckets: deque[tuple[int, int]] = deque()
        """Number of the bucket and what was spent in it, oldest first; those of the window."""
        self.total_nanousd = 0
        self.calls: deque[CallCost] = deque()
        """The last of them, CALLS_SHOWN at most."""
        self.calls_nanousd = 0
        """What they cost together."""
        self.in_flight: OrderedDict[str, tuple[float, int]] = OrderedDict()
        """When it began and what it is expected to cost, by call."""
        self.in_flight_nanousd = 0
        self.in_flight_unknown = 0
        """Calls of which nothing is expected yet."""
        self.people: OrderedDict[str, int] = OrderedDict()
        """The bucket in which each was last seen, oldest first."""
        self.cap_nanousd: int | None = None
        self.history = b""
        """A level for each of the last ten-minute windows, by its number modulo; empty until there is one."""
        self.window = int(now_s // WINDOW_S)
        self.window_nanousd = 0
        self.teaches = True
        """Whether this window will be history."""
        self.first_at = now_s
        self.p99_nanousd: int | None = None
        self.tripped = False
        self.held_until = 0.0
        self.grace = 1
        self.grace_until = 0.0


class SpendVelocity:
    """Ten minutes of each subject against its own past. Ids are `kind:name`."""

    def __init__(self, policy: VelocityPolicy = DEFAULT_POLICY, *, subjects_max: int = SUBJECTS_MAX) -> None:
        self.policy = policy
        self._subjects: OrderedDict[str, _Subject] = OrderedDict()
        """The one that was told of longest ago first."""
        self._subjects_max = subjects_max
        self._tripped: dict[str, None] = {}
        self._held_back: dict[str, tuple[float, float]] = {}
        """Since when by what is under way, and when that was last seen."""
        self._told_back: dict[str, None] = {}
        self._now_s = float("-inf")

    def __len__(self) -> int:
        return len(self._subjects)

    def seed(self, history: Mapping[str, Mapping[int, int]], now_s: float) -> None:
        """What the ledger knows, told once at the start: nano-dollars by how many windows ago.

        0 are the ten minutes up to the start, 1 those before them, up to 1,007. Before the first `spent`, or with
        what was spent since left out.
        """
        now_s = self._forward(now_s)
        for subject_id, windows in history.items():
            subject = self._subject(subject_id, now_s)
            levels = bytearray(subject.history or bytes(HISTORY_WINDOWS))
            for ago, nanousd in windows.items():
                if 0 < ago < HISTORY_WINDOWS and nanousd > 0:
                    at = (subject.window - ago) % HISTORY_WINDOWS
                    levels[at] = max(levels[at], _level(nanousd))
                    subject.first_at = min(subject.first_at, now_s - ago * WINDOW_S)
            subject.history = bytes(levels)
            recent = windows.get(0, 0)
            if recent > 0:
                # When in these ten minutes it was is not known: it leaves the window as if it were the middle.
                bucket = int(now_s // BUCKET_S) - BUCKETS // 2
                subject.buckets.appendleft((bucket, recent))
                subject.total_nanousd += recent
                subject.window_nanousd += recent
            self._learn(subject, now_s)

    def began(
        self,
        subject_id: str,
        call_id: str,
        expected_nanousd: int,
        now_s: float,
        *,
        person: str = "",
        cap_day_nanousd: int | None = None,
    ) -> None:
        """A call is about to start. Told again for the same call, the last word counts.

        `expected_nanousd` is what it will probably cost, not the most it could; 0: as much as the last ten calls of
        this subject did. `person` is who used a key; `cap_day_nanousd` what the subject may spend a day.
        """
        now_s = self._forward(now_s)
        subject = self._subject(subject_id, now_s)
        _note(subject, person, cap_day_nanousd)
        at = now_s
        if call_id in subject.in_flight:
            at = subject.in_flight[call_id][0]
            _landed(subject, call_id)
        subject.in_flight[call_id] = (at, expected_nanousd)
        subject.in_flight_nanousd += expected_nanousd
        subject.in_flight_unknown += not expected_nanousd
        if len(subject.in_flight) > IN_FLIGHT_MAX:
            _landed(subject, next(iter(subject.in_flight)))

    def spent(
        self,
        subject_id: str,
        nanousd: int,
        call_id: str,
        now_s: float,
        *,
        person: str = "",
        cap_day_nanousd: int | None = None,
    ) -> Trip | None:
        """A call has ended, or a part of it that is paid: what is known takes the place of what was expected.

        A Trip when this is what went over; None while it goes on.
        """
        now_s = self._forward(now_s)
        subject = self._subject(subject_id, now_s)
        _note(subject, person, cap_day_nanousd)
        _landed(subject, call_id)
        if nanousd <= 0:
            return None
        bucket = subject.bucket
        if subject.buckets and subject.buckets[-1][0] == bucket:
            subject.buckets[-1] = (bucket, subject.buckets[-1][1] + nanousd)
        else:
            subject.buckets.append((bucket, nanousd))
        subject.total_nanousd += nanousd
        subject.window_nanousd += nanousd
        subject.calls.append(CallCost(call_id, nanousd))
        subject.calls_nanousd += nanousd
        if len(subject.calls) > CALLS_SHOWN:
            subject.calls_nanousd -= subject.calls.popleft().cost_nanousd
        limit = self._limit(subject, now_s)
        if subject.total_nanousd <= limit:
            return None
        subject.held_until = _falls_at(subject, limit) + self.policy.hold_s
        if subject.tripped:
            return None
        subject.tripped = True
        subject.teaches = False
        self._tripped[subject_id] = None
        self._held_back.pop(subject_id, None)
        self._told_back.pop(subject_id, None)
        return _trip(subject_id, subject, limit)

    def forget_call(self, subject_id: str, call_id: str) -> None:
        """What was expected of a call is not this subject's any more."""
        subject = self._subjects.get(subject_id)
        if subject is not None:
            _landed(subject, call_id)

    def throttled(self, subject_id: str, now_s: float) -> bool:
        """Whether it is held to one call at a time: tripped, or about to with what is under way."""
        now_s = self._forward(now_s)
        subject = self._subjects.get(subject_id)
        if subject is None:
            return False
        if subject.tripped and now_s < subject.held_until:
            return True
        if not self._is_over(subject, now_s):
            return False
        if not subject.tripped:
            self._see_held_back(subject_id, now_s)
        return True

    def held_back(self, now_s: float) -> tuple[Trip, ...]:
        """Who has been held back for half a minute by what is under way, once each; to be called every few seconds.

        It is no trip: it ends with what is under way, and `tick` says so.
        """
        now_s = self._forward(now_s)
        told = []
        for subject_id in list(self._held_back):
            subject = self._subjects.get(subject_id)
            if subject is None:
                continue  # `tick` forgets it
            if self._is_over(subject, now_s):
                self._see_held_back(subject_id, now_s)
            since, seen = self._held_back[subject_id]
            if seen - since >= HELD_BACK_TOLD_S and subject_id not in self._told_back:
                self._told_back[subject_id] = None
                told.append(_trip(subject_id, subject, self._limit(subject, now_s)))
        return tuple(told)

    def _see_held_back(self, subject_id: str, now_s: float) -> None:
        since, seen = self._held_back.get(subject_id, (now_s, now_s))
        self._held_back[subject_id] = (since if now_s - seen <= HELD_BACK_GAP_S else now_s, now_s)

    def tripped(self, subject_id: str) -> bool:
        """Whether it went over with what was spent, and nothing has ended that."""
        return subject_id in self._tripped

    def graced(self, subject_id: str, now_s: float) -> bool:
        """Whether an operator released it within the hour."""
        subject = self._subjects.get(subject_id)
        return subject is not None and self._forward(now_s) < subject.grace_until

    def release(self, subject_id: str, now_s: float) -> bool:
        """An operator lets it go. False when it was neither tripped nor held back.

        What it spent so far is forgiven, and its limit is double for an hour; released again within the hour it
        doubles again, up to sixteen times.
        """
        now_s = self._forward(now_s)
        subject = self._subjects.get(subject_id)
        if subject is None or not (subject.tripped or subject_id in self._held_back):
            return False
        self._advance(subject, now_s)
        self._held_back.pop(subject_id, None)
        self._told_back.pop(subject_id, None)
        subject.grace = min(subject.grace * 2, GRACE_FACTOR_MAX) if now_s < subject.grace_until else 2
        subject.grace_until = now_s + GRACE_S
        subject.buckets.clear()
        subject.total_nanousd = 0
        subject.teaches = True
        self._end_trip(subject_id, subject)
        return True

    def tick(self, now_s: float) -> tuple[str, ...]:
        """Let go whose time is over. Returns them, and who was told of and is not held back any more.

        To be called every few seconds.
        """
        now_s = self._forward(now_s)
        over = [each for each in self._tripped if now_s >= self._subjects[each].held_until]
        for subject_id in over:
            subject = self._subjects[subject_id]
            self._advance(subject, now_s)
            self._end_trip(subject_id, subject)
        free = []
        for subject_id, (_, seen) in list(self._held_back.items()):
            if now_s - seen > HELD_BACK_GAP_S and not self._is_over(self._subjects.get(subject_id), now_s):
                del self._held_back[subject_id]
                if subject_id in self._told_back:
                    del self._told_back[subject_id]
                    free.append(subject_id)
        return (*over, *free)

    def snapshot(self, now_s: float, *, most: int = 200) -> tuple[SubjectSpend, ...]:
        """Who is held first, then who spends most; at most `most`."""
        now_s = self._forward(now_s)
        # By what was spent when each was last looked at, which is never less: to bring 5,000 to now would take 70 ms.
        likely = nlargest(2 * most, self._subjects.items(), key=self._rank)
        for _, subject in likely:
            self._advance(subject, now_s)
        likely.sort(key=self._rank, reverse=True)
        return tuple(self._view(subject_id, subject, now_s) for subject_id, subject in likely[:most])

    def _rank(self, one: tuple[str, _Subject]) -> tuple[bool, bool, int]:
        return one[1].tripped, one[0] in self._held_back, one[1].total_nanousd

    def _view(self, subject_id: str, subject: _Subject, now_s: float) -> SubjectSpend:
        limit = self._limit(subject, now_s)
        return SubjectSpend(
            subject=subject_id,
            window_nanousd=subject.total_nanousd,
            in_flight_nanousd=_in_flight(subject),
            limit_nanousd=None if limit == _NO_LIMIT else limit,
            limit_from="history" if subject.p99_nanousd is not None else "people" if subject.people else "line",
            p99_nanousd=subject.p99_nanousd,
            history_windows=len(subject.history) - subject.history.count(0),
            people=len(subject.people),
            grace=subject.grace if now_s < subject.grace_until else 1,
            tripped=subject.tripped,
            held_back=subject_id in self._held_back,
            held_s=max(subject.held_until - now_s, 0.0) if subject.tripped else 0.0,
        )

    def _is_over(self, subject: _Subject | None, now_s: float) -> bool:
        if subject is None:
            return False
        self._advance(subject, now_s)
        limit = self._limit(subject, now_s)
        return limit != _NO_LIMIT and subject.total_nanousd + _in_flight(subject) > limit

    def _limit(self, subject: _Subject, now_s: float) -> int:
        """Nano-dollars that ten minutes may cost."""
        line = self.policy.line_nanousd
        p99 = subject.p99_nanousd
        people = len(subject.people)
        if p99 is None:
            if people:
                return _NO_LIMIT
            limit = line
        else:
            limit = int(p99 * self.policy.history_factor)
            if subject.cap_nanousd is not None:
                limit = min(limit, max(subject.cap_nanousd // CAP_SHARE, p99 * CAP_FACTOR))
            limit = max(limit, min(self.policy.floor_nanousd, line))
            if people > 1:
                limit = max(limit, line * people)
        return limit * subject.grace if now_s < subject.grace_until else limit

    def _subject(self, subject_id: str, now_s: float) -> _Subject:
        subject = self._subjects.get(subject_id)
        if subject is None:
            if len(self._subjects) >= self._subjects_max:
                self._forget_one()
            subject = self._subjects[subject_id] = _Subject(now_s)
        else:
            self._subjects.move_to_end(subject_id)
            self._advance(subject, now_s)
        return subject

    def _forget_one(self) -> None:
        """Who is held goes last: or it would free itself by inventing names."""
        gone = next((each for each in self._subjects if each not in self._tripped), next(iter(self._subjects)))
        del self._subjects[gone]
        self._tripped.pop(gone, None)

    def _advance(self, subject: _Subject, now_s: float) -> None:
        """Bring a subject to now: what left the window, and what became history."""
        bucket = int(now_s // BUCKET_S)
        if bucket == subject.bucket:
            return
        subject.bucket = bucket
        oldest = bucket - BUCKETS
        while subject.buckets and subject.buckets[0][0] <= oldest:
            subject.total_nanousd -= subject.buckets.popleft()[1]
        while subject.people and next(iter(subject.people.values())) <= oldest:
            subject.people.popitem(last=False)
        while subject.in_flight:
            call_id, (at, _) = next(iter(subject.in_flight.items()))
            if now_s - at < IN_FLIGHT_S_MAX:
                break
            _landed(subject, call_id)
        window = int(now_s // WINDOW_S)
        if window == subject.window:
            return
        levels = bytearray(subject.history or bytes(HISTORY_WINDOWS))
        levels[subject.window % HISTORY_WINDOWS] = _level(subject.window_nanousd) if subject.teaches else 0
        for empty in range(subject.window + 1, min(window, subject.window + HISTORY_WINDOWS)):
            levels[empty % HISTORY_WINDOWS] = 0
        subject.history = bytes(levels)
        subject.window = window
        subject.window_nanousd = 0
        subject.teaches = not subject.tripped
        self._learn(subject, now_s)

    def _learn(self, subject: _Subject, now_s: float) -> None:
        """The 99th percentile (nearest rank) of the windows in which something was spent.

        Those without are left out, or who works an hour a week would have a percentile of nothing. The dearest never
        decides alone: one bad quarter of an hour in a short history is no measure.
        """
        levels = sorted(filter(None, subject.history))
        if len(levels) < HISTORY_WINDOWS_MIN or now_s - subject.first_at < HISTORY_S_MIN:
            subject.p99_nanousd = None
        else:
            rank = min(ceil(len(levels) * 0.99), len(levels) - 1)
            subject.p99_nanousd = _WORTH[levels[rank - 1]]

    def _end_trip(self, subject_id: str, subject: _Subject) -> None:
        subject.tripped = False
        subject.held_until = 0.0
        self._tripped.pop(subject_id, None)

    def _forward(self, now_s: float) -> float:
        if now_s > self._now_s:
            self._now_s = now_s
        return self._now_s


class LoopDetector:
    """Counts equal calls of a subject. A digest says which are equal: that of the whole request, or of most of it.

    It holds nobody: a question that many people of an app ask is no fault, and somebody looks.
    """

    def __init__(self, *, calls: int = LOOP_CALLS, digests_max: int = LOOP_DIGESTS_MAX) -> None:
        """More than `calls` ≥ 1 in ten minutes are a loop."""
        self._calls = calls
        self._digests_max = digests_max
        self._seen: OrderedDict[tuple[str, str], list[tuple[float, CallCost]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def called(self, subject_id: str, digest: str, call: CallCost, now_s: float) -> Loop | None:
        """A Loop for each call beyond those that are allowed: tell it once (`AlertBook`). No digest counts nothing."""
        if not digest:
            return None
        key = (subject_id, digest)
        seen = self._seen.get(key)
        if seen is None:
            # Most digests come once: a list of one is made and forgotten in a third of the time of a deque.
            seen = self._seen[key] = []
            if len(self._seen) > self._digests_max:
                self._seen.popitem(last=False)
        else:
            self._seen.move_to_end(key)
        seen.append((now_s, call))
        if len(seen) > self._calls + 1:
            del seen[0]
        if len(seen) <= self._calls or now_s - seen[0][0] >= WINDOW_S:
            return None
        return Loop(subject_id, digest, len(seen), tuple(call for _, call in seen[-CALLS_SHOWN:]))


def _note(subject: _Subject, person: str, cap_day_nanousd: int | None) -> None:
    """Of a subject that was brought to now."""
    if cap_day_nanousd is not None:
        subject.cap_nanousd = cap_day_nanousd
    if person:
        subject.people[person] = subject.bucket
        subject.people.move_to_end(person)
        if len(subject.people) > IN_FLIGHT_MAX:
            subject.people.popitem(last=False)


def _landed(subject: _Subject, call_id: str) -> None:
    landed = subject.in_flight.pop(call_id, None)
    if landed is not None:
        subject.in_flight_nanousd -= landed[1]
        subject.in_flight_unknown -= not landed[1]


def _in_flight(subject: _Subject) -> int:
    """What is under way is expected to cost."""
    if not subject.in_flight_unknown or not subject.calls:
        return subject.in_flight_nanousd
    usual = subject.calls_nanousd // len(subject.calls)
    return subject.in_flight_nanousd + subject.in_flight_unknown * usual


def _trip(subject_id: str, subject: _Subject, limit_nanousd: int) -> Trip:
    return Trip(
        subject=subject_id,
        window_nanousd=subject.total_nanousd,
        in_flight_nanousd=_in_flight(subject),
        limit_nanousd=limit_nanousd,
        p99_nanousd=subject.p99_nanousd,
        calls=tuple(subject.calls),
    )


def _level(nanousd: int) -> int:
    """The lowest level that is worth as much; 0 for nothing."""
    return min(bisect_left(_WORTH, nanousd), len(_WORTH) - 1)


def _falls_at(subject: _Subject, limit_nanousd: int) -> float:
    """When the window will be at its limit again if nothing more is spent."""
    left = subject.total_nanousd
    for bucket, nanousd in subject.buckets:
        left -= nanousd
        if left <= limit_nanousd:
            return float((bucket + BUCKETS) * BUCKET_S)
    raise AssertionError("an empty window costs nothing, and every limit is at least that")
