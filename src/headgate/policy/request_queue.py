"""Decides who of those that wait for one model class is asked for next, and tells each how long it will wait.

What it is: order, bounds and deadlines, over numbers. What it is not: a limit (`limiter.py`), a clock, or the bodies of
requests. Whoever drives it takes `next`, asks the limiter for that entry, and reports `admitted`, `denied` or `hold`.
The answer may come later: until then the entry is asking, and others may be named.

Order is deficit round robin over people, with rounds that are counted instead of walked. Every round gives each person
who waits `weight` seconds of capacity, so the round in which a person's savings pay for the first request of the line
is known when that request becomes the first: `since + cost / weight`. A heap holds these rounds. The quantum is thus as
small as can be: nobody waits for a whole turn of the others, and a share is exact to one request. A person's own
requests are served in the order they came. A person without requests is forgotten, and savings with them.

Units: costs in seconds of the class's capacity, times in seconds of one monotonic clock. After anything but a question
(`join`, `leave`, a report, `freed`, `release`, `unblock`) somebody's turn may have come: ask `next` until it is None.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Final, Literal

from headgate.policy.limiter import Verdict
from headgate.policy.records import Record

ASKS_MAX = 32
"""Outstanding at once. A round trip to Redis is 0.3 to 100 ms: enough for 320 requests/s at the slow end."""
WAIT_S_MIN = 0.001
"""What a refusal blocks for at least: a wait of nothing would make the driver ask for ever."""
BACKGROUND_SHARE = 0.1
"""Of the capacity, while background work waits (failure-model §4.4)."""
BURST_S = 10.0
"""Seconds of capacity that a full bucket holds, for estimates; the limiter's default."""
STALE_MAX = 64
"""What a heap may hold of the past, beyond as much as it holds of the present."""
HELD = "breaker_open"
"""The reason of what is held."""
_SLACK = 1e-9
_CREDIT_SHARE = BACKGROUND_SHARE / (1 - BACKGROUND_SHARE)

RefusalReason = Literal["person_queue_full", "queue_full", "queue_bytes"]

_GONE: Final = 0
_READY: Final = 1
"""In its lane's heap."""
_ASKING: Final = 2
_PINNED: Final = 3
"""Was refused by the class in its turn: it keeps the turn until the class has enough for it."""
_BLOCKED: Final = 4
"""Was refused by a limit of its own person, or is held."""


Forecast = tuple["Entry", int, float]
_Place = tuple[float, float, int, float, deque["Entry"], int]


class QueueBounds(Record, frozen=True, gc=False):
    """What may wait in all classes together (failure-model §4.4)."""

    waiting_max: int = 500
    bytes_max: int = 64 * 32 * 1024 * 1024


class QueueSnapshot(Record, frozen=True, gc=False):
    """How the queue of a class stands, for people to read."""

    waiting: int
    bytes: int
    people: int
    background: int
    """Of those that wait."""
    oldest_wait_s: float
    blocked_s: float | None
    """Until the class has enough for the next; None when nobody waits for that, or nobody can say."""
    reason: str
    expected_wait_s: float
    """Of a free arrival as dear as the mean of those that wait."""


class Entry:
    """One request that waits. Drivers may derive from it, to hang on it what they wake. Compared by identity."""

    __slots__ = (
        "_line",
        "_queue",
        "_rounds",
        "background",
        "bytes",
        "cost_s",
        "deadline",
        "enqueued_at",
        "gap_s",
        "head",
        "user",
        "waiting_max",
        "weight",
    )

    def __init__(
        self,
        user: str,
        *,
        cost_s: float,
        deadline: float,
        enqueued_at: float,
        weight: float = 1.0,
        bytes: int = 0,
        background: bool = False,
        head: bool = False,
        waiting_max: int = 10,
        gap_s: float = 0.0,
    ) -> None:
        """`cost_s` > 0 and `weight` > 0. At `deadline` it is over. `head`: a retry, it goes before what its person has.

        `waiting_max`: how many its person may have waiting. `gap_s`: seconds between two requests of its person at the
        person's own limit (60 / rpm), 0 for none; only estimates read it.
        """
        assert cost_s > 0, cost_s
        assert weight > 0, weight
        self.user = user
        self.cost_s = cost_s
        self.deadline = deadline
        self.enqueued_at = enqueued_at
        self.weight = weight
        self.bytes = bytes
        self.background = background
        self.head = head
        self.waiting_max = waiting_max
        self.gap_s = gap_s
        self._rounds = 0.0 if head else cost_s / weight
        """A retry is due at once, and costs its person no savings: it has had its turn, and paid for it."""
        self._queue: RequestQueue | None = None
        """Where it waits."""
        self._line: _Line | None = None
        """None too when its deadline was met and `expired` did not tell yet."""

    def __repr__(self) -> str:
        lane = " background" if self.background else ""
        return f"<Entry {self.user}{lane} {self.cost_s:g} s until {self.deadline:g}>"


class _Line:
    """The requests of one person in one lane, and where the person stands."""

    __slots__ = (
        "alone",
        "asked",
        "block_round",
        "credit_s",
        "due",
        "entries",
        "epoch",
        "lane",
        "named",
        "reason",
        "seq",
        "since",
        "state",
        "unfit",
        "unfit_until",
        "until",
        "user",
    )

    def __init__(self, user: str, lane: _Lane, seq: int) -> None:
        self.user = user
        self.lane = lane
        self.entries: deque[Entry] = deque()
        self.since = lane.round
        """The round since which it saves for its first entry."""
        self.due = 0.0
        """The round in which it can pay."""
        self.seq = seq
        """Order among those that are due in one round: who came first. It does not change, so it can be foretold."""
        self.state: int = _READY
        self.asked: Entry | None = None
        self.named = 0
        """Order in which lines were named."""
        self.alone = False
        """Nobody else was asking when it was named: it was its turn."""
        self.unfit: Entry | None = None
        """What the class refused: it is known not to fit before `unfit_until`, unless something is given back."""
        self.unfit_until = -math.inf
        self.epoch = 0
        """Of the queue when it was asked for last."""
        self.until = -math.inf
        """When a line that is `_BLOCKED` may be asked for again, and why not before."""
        self.reason = ""
        self.block_round = 0.0
        self.credit_s = 0.0
        """What was taken from the background's guaranteed share for the one that is asked for or pinned."""

    def saving_since(self) -> float:
        """`since` as of the present round: who is blocked saves nothing."""
        if self.state == _BLOCKED and self.lane.round != self.block_round:
            return self.since + (self.lane.round - self.block_round)
        return self.since


class _Lane:
    """People, or background work: the lines of one kind and the order among them."""

    __slots__ = ("blocked", "heap", "lines", "round")

    def __init__(self) -> None:
        self.lines: dict[str, _Line] = {}
        self.heap: list[tuple[float, int, _Line]] = []
        """By round; what is no longer so is dropped when it comes up."""
        self.round = 0.0
        """Of the last that was admitted."""
        self.blocked = 0
        """Lines that are `_BLOCKED`."""

    def top(self) -> _Line | None:
        """Whose turn it is."""
        heap = self.heap
        while heap:
            due, seq, line = heap[0]
            if line.state == _READY and line.due == due and line.seq == seq:
                return line
            heappop(heap)
        return None

    def push(self, line: _Line) -> None:
        line.due = line.since + line.entries[0]._rounds
        line.state = _READY
        heap = self.heap
        heappush(heap, (line.due, line.seq, line))
        if len(heap) > 2 * len(self.lines) + STALE_MAX:
            ready = [one for one in self.lines.values() if one.state == _READY]
            self.heap = [(one.due, one.seq, one) for one in ready]
            heapify(self.heap)

    def clear(self) -> None:
        self.heap.clear()
        self.round = 0.0


class QueueTotals:
    """What waits in all queues together: they share its bounds."""

    __slots__ = ("bounds", "by_user", "bytes", "queues", "waiting")

    def __init__(self, bounds: QueueBounds) -> None:
        self.bounds = bounds
        self.waiting = 0
        self.bytes = 0
        self.by_user: tuple[dict[str, int], dict[str, int]] = ({}, {})
        """How many a person has waiting; in the background in the second."""
        self.queues: list[RequestQueue] = []

    def refusal(self, entry: Entry) -> RefusalReason | None:
        """What an arrival would exceed."""
        if self.by_user[entry.background].get(entry.user, 0) >= entry.waiting_max:
            return "person_queue_full"
        if self.waiting >= self.bounds.waiting_max:
            return "queue_full"
        if self.bytes + entry.bytes > self.bounds.bytes_max:
            return "queue_bytes"
        return None

    def make_room(self, entry: Entry) -> list[Entry] | None:
        """Shed what is of a lower class, if that makes room for this arrival; None, and nothing shed, if it does not.

        First the background, then the lightest; of these the newest of the longest line. Never a retry, nor what asks.
        """
        mine = _class_of(entry)
        lower = [
            one
            for queue in self.queues
            for line in queue.lines()
            for one in line.entries
            if _class_of(one) < mine and not one.head and one is not line.asked
        ]
        too_many = self.waiting + 1 - self.bounds.waiting_max
        too_much = self.bytes + entry.bytes - self.bounds.bytes_max
        if len(lower) < too_many or sum(one.bytes for one in lower) < too_much:
            return None
        shed: list[Entry] = []
        while len(shed) < too_many or sum(one.bytes for one in shed) < too_much:
            lengths = {id(one._line): len(one._line.entries) for one in lower if one._line is not None}
            # The last of the greatest: within a line entries stand in the order they came.
            victim = min(reversed(lower), key=lambda one: (_class_of(one), -lengths[id(one._line)]))
            lower.remove(victim)
            assert victim._queue is not None
            victim._queue.leave(victim)
            shed.append(victim)
        return shed


def _class_of(entry: Entry) -> tuple[bool, float]:
    return not entry.background, entry.weight


def _is_of_class(reason: str) -> bool:
    return reason.startswith("class_") or reason in ("frozen", "slow_start")


class RequestQueue:
    """The queue of one model class. Empty, it is false and holds nothing.

    Memory is bounded by what waits. One operation costs O(log people), an estimate O(waiting).
    """

    def __init__(self, totals: QueueTotals, *, burst_s: float = BURST_S) -> None:
        """`burst_s`: seconds of capacity that the class's full bucket holds; only estimates read it."""
        self._totals = totals
        totals.queues.append(self)
        self._burst_s = burst_s
        self._people = _Lane()
        self._background = _Lane()
        self._waiting = 0
        self._bytes = 0
        self._seq = 0
        self._asks = 0
        self._pinned: _Line | None = None
        self._again: _Line | None = None
        """What was pinned, while it asks again: then nobody else does, or small requests would take what it needs."""
        self._epoch = 0
        """Counts how often the class got something back: what did not fit before may fit now."""
        self._blocks: list[tuple[float, int, _Line]] = []
        self._deadlines: list[tuple[float, int, Entry]] = []
        self._credit = 0.0
        """What background work may take before people, in seconds of capacity."""
        self._pace = 1.0
        self._empty_at = -math.inf
        """When the class's bucket was or will be empty if nothing more is taken, as its last answers tell."""
        self._reason = "class_rpm"
        """What the class last refused for."""

    def __len__(self) -> int:
        """Entries that wait, those included that ask, and those whose deadline `expired` did not tell yet."""
        return self._waiting

    def __repr__(self) -> str:
        return f"<RequestQueue {self._waiting} waiting, {self._asks} asking, {len(self._people.lines)} people>"

    # what happens

    def join(
        self,
        entry: Entry,
        now: float,  # noqa: ARG002  every move of the queue has its time
    ) -> tuple[tuple[Entry, ...], RefusalReason | None]:
        """Let an entry wait: what was shed to make room for it (mostly nothing), and why it may not, None if it may.

        A retry (`entry.head`) is never refused.
        """
        assert entry._queue is None, entry
        totals = self._totals
        shed: list[Entry] | None = None
        if not entry.head:
            refusal = totals.refusal(entry)
            if refusal is not None:
                shed = totals.make_room(entry) if refusal != "person_queue_full" else None
                if shed is None:
                    return (), refusal
        lane = self._background if entry.background else self._people
        line = lane.lines.get(entry.user)
        if line is None:
            line = lane.lines[entry.user] = _Line(entry.user, lane, self._number())
            line.entries.append(entry)
            lane.push(line)
        elif entry.head:
            line.entries.appendleft(entry)
            if line.state == _READY:
                lane.push(line)
        else:
            line.entries.append(entry)
        entry._queue, entry._line = self, line
        self._waiting += 1
        self._bytes += entry.bytes
        totals.waiting += 1
        totals.bytes += entry.bytes
        by_user = totals.by_user[entry.background]
        by_user[entry.user] = by_user.get(entry.user, 0) + 1
        if entry.deadline < math.inf:
            self._note_deadline(entry)
        return tuple(shed) if shed else (), None

    def next(self, now: float) -> Entry | None:
        """Whom to ask the limiter for; None: nobody now. It asks until it is reported on, leaves or expires."""
        if self._blocks:
            self._end_blocks(now)
        if self._again is not None or self._asks >= ASKS_MAX:
            return None
        while True:
            line = self._turn()
            if line is None or self._fits_at(line) > now:
                return None
            entry = line.entries[0]
            if entry.deadline > now:
                break
            self._take_out(entry, line)
        if line.state == _PINNED:
            self._pinned, self._again = None, line
        else:
            heappop(line.lane.heap)
            line.named = self._number()
            line.alone = self._asks == 0
            if line.lane is self._background and self._has_credit(entry):
                line.credit_s = entry.cost_s
                self._credit -= entry.cost_s
        line.state = _ASKING
        line.asked = entry
        line.unfit, line.epoch = None, self._epoch
        self._asks += 1
        return entry

    def admitted(self, entry: Entry, now: float, pace: float = 1.0) -> bool:
        """The limiter let it pass, and so it leaves the queue. False: it may not go, so give back what was taken.

        That is so when it left while it asked, or its deadline is over. `pace` is the verdict's.
        """
        line = entry._line
        if line is None or line.asked is not entry:
            return False
        if entry.deadline <= now:
            self._take_out(entry, line)
            return False
        self._pace = pace
        # It passed, so there was enough for it, whatever was thought before.
        enough_since = now - min(entry.cost_s, self._burst_s) / pace
        self._empty_at = min(max(self._empty_at, now - self._burst_s), enough_since) + entry.cost_s / pace
        lane = line.lane
        if lane is self._people:
            background = self._background
            if len(background.lines) > background.blocked:
                self._credit += entry.cost_s * _CREDIT_SHARE
        line.credit_s = 0.0
        line.since = line.due
        lane.round = max(lane.round, line.due)
        self._take_out(entry, line)
        self._uncount(entry)
        return True

    def denied(self, entry: Entry, verdict: Verdict, now: float) -> None:
        """The limiter did not let it pass: it is first in its line again, as if it had never been named.

        For a reason of the class nobody is named until the wait is over, and then this entry; for one of its person
        only the person waits, and saves nothing. An infinite wait of a person ends with `freed`. Of an entry that left
        nothing is heard. What was asked before it joined, because nobody waited, may be reported right after `join`.
        """
        line = entry._line
        if line is None:
            return
        if line.asked is entry:
            self._end_ask(line)
        elif line.state == _READY and line.entries[0] is entry:
            line.named, line.epoch = self._number(), self._epoch
            line.alone = self._asks == 0 and self._pinned is None and line.lane.top() is line
        else:
            return
        until = now + max(verdict.wait_s, WAIT_S_MIN)
        self._pace = verdict.pace
        if not _is_of_class(verdict.reason):
            self._block(line, until, verdict.reason)
            return
        self._reason = verdict.reason
        if until < math.inf:
            self._empty_at = until - min(entry.cost_s, self._burst_s) / verdict.pace
        line.unfit, line.unfit_until = entry, until
        if line.alone and (line.lane is self._people or line.credit_s):
            line.state = _PINNED
            self._pinned = line
        else:
            # It was asked for beside others, or for what people leave: its turn comes by its savings alone.
            self._give_back_credit(line)
            line.lane.push(line)

    def hold(self, entry: Entry, until: float | None, now: float) -> None:
        """Its model takes nothing until then (None: until `release`). Its person waits, others go on.

        It may be the answer to `next`, in place of `admitted` or `denied`. It has no effect on an entry that is not the
        first of its line: its turn will come.
        """
        line = entry._line
        if line is None or line.state == _BLOCKED:
            return
        if line.asked is entry:
            self._end_ask(line)
        elif line.asked is not None or line.entries[0] is not entry:
            return
        self._block(line, math.inf if until is None else max(until, now + WAIT_S_MIN), HELD)

    def release(self) -> None:
        """A model takes requests again: all that is held is named in its turn."""
        for line in [line for line in self.lines() if line.state == _BLOCKED and line.reason == HELD]:
            self._end_block(line)

    def freed(self, user: str) -> None:
        """A slot of this person is free: ends a block of unknown length."""
        for lane in (self._people, self._background):
            line = lane.lines.get(user)
            if line is not None and line.state == _BLOCKED and line.until == math.inf and line.reason != HELD:
                self._end_block(line)

    def unblock(self) -> None:
        """The class has more than it said (a freeze ended early, something was given back): it may be asked at once."""
        self._epoch += 1

    def leave(self, entry: Entry) -> None:
        """It waits no more: the client is gone, or it was served elsewhere. Twice is once; also while it asks."""
        if entry._queue is not self:
            return
        if entry._line is not None:
            self._take_out(entry, entry._line)
        self._uncount(entry)

    def expired(self, now: float) -> list[Entry]:
        """Those whose deadline is over; they have left."""
        over: list[Entry] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heappop(self._deadlines)[2]
            if entry._queue is self:
                self.leave(entry)
                over.append(entry)
        return over

    # what is asked

    def __iter__(self) -> Iterator[Entry]:
        """All that wait, a person's in their order, but for those of which only `expired` is still to tell."""
        return iter([entry for line in self.lines() for entry in line.entries])

    def wake_at(self) -> float | None:
        """When `expired` and `next` say something new though nothing happens; None: never.

        It is what remains after `next` was asked until it was None.
        """
        at = self._first_deadline()
        if self._again is None and self._asks < ASKS_MAX:
            line = self._turn()
            if line is not None and line.unfit is not None:
                fits_at = self._fits_at(line)
                at = min(at, fits_at) if fits_at > -math.inf else at
            if self._pinned is None:
                while self._blocks and not self._is_current(self._blocks[0]):
                    heappop(self._blocks)
                if self._blocks:
                    at = min(at, self._blocks[0][0])
        return at if at < math.inf else None

    def position(self, entry: Entry, now: float | None = None) -> int:
        """How many are served until it is, itself included, if nobody comes; without `now`: and nobody gives up. ≥ 1.

        Of an entry that does not wait here: as if it came now.
        """
        lane, line, index = self._standing(entry)
        if now is not None and self._deadlines:
            return next(place for one, place, _ in self._walk(lane, line, entry, now) if one is entry)
        tag, seq = self._place(lane, line, index, entry._rounds)
        others, cost_s = self._before(lane, line, tag, seq)
        between = self._between(lane, cost_s + self._cost_s(line, index), entry.cost_s)[0]
        return index + others + between + 1

    def expected_wait_s(self, entry: Entry, now: float) -> float:
        """Seconds from now until it is admitted."""
        return self.expected(entry, now)[0]

    def expected(self, entry: Entry, now: float) -> tuple[float, str]:
        """Seconds from now until it is admitted, and what binds, as `predicted_wait_s` says it of an arrival.

        Of an entry that does not wait here: as if it came now.
        """
        lane, line, index = self._standing(entry)
        return self._estimate(lane, line, index, entry, now)

    def forecasts(self, now: float) -> list[Forecast]:
        """Everybody who waits, in the order of service, with their `position` at `now` and `expected_wait_s`.

        O(n log n), where one by one it is n². Where own limits are in play too the two differ as estimates do.
        """
        return list(self._walk(self._people, None, None, now))

    def predicted_wait_s(
        self, user: str, weight: float, cost_s: float, background: bool, now: float, *, gap_s: float = 0.0
    ) -> tuple[float, str]:
        """Seconds that an arrival would wait, and what binds it: a class's or a person's reason, "" for none.

        Right to the millisecond if nobody else comes and what passes costs what was said; where many people are at
        their own limits and the class is busy too, up to a fifth of the estimates are off by more than a quarter.
        Who will have met their deadline before their turn is not counted; the deadline of the one asked for is.
        Later arrivals lengthen it: each other person by no more than `their weight / weight` times the cost of this
        request and of its person's before it, background by a ninth of all that. A block of unknown length counts as
        none, and is named.
        """
        entry = Entry(user, cost_s=cost_s, deadline=math.inf, enqueued_at=now, weight=weight, gap_s=gap_s)
        entry.background = background
        return self.expected(entry, now)

    def snapshot(self, now: float) -> QueueSnapshot:
        """How it stands."""
        entries = [entry for line in self.lines() for entry in line.entries]
        line = self._turn()
        fits_at = self._fits_at(line) if line is not None else -math.inf
        wait_s = 0.0
        if entries:
            mean_s = sum(entry.cost_s for entry in entries) / len(entries)
            wait_s = self.predicted_wait_s("", 1.0, mean_s, False, now)[0]
        return QueueSnapshot(
            waiting=self._waiting,
            bytes=self._bytes,
            people=len({line.user for line in self.lines()}),
            background=sum(entry.background for entry in entries),
            oldest_wait_s=max((now - entry.enqueued_at for entry in entries), default=0.0),
            blocked_s=fits_at - now if now < fits_at < math.inf else None,
            reason=self._reason if fits_at > now else "",
            expected_wait_s=wait_s,
        )

    def lines(self) -> list[_Line]:
        """Of both lanes."""
        return [*self._people.lines.values(), *self._background.lines.values()]

    # order

    def _number(self) -> int:
        self._seq += 1
        return self._seq

    def _turn(self) -> _Line | None:
        """The line whose first entry is next, if not before the class has enough for it."""
        if self._pinned is not None:
            return self._pinned
        background = self._background.top() if self._background.lines else None
        if background is not None and self._has_credit(background.entries[0]):
            return background
        return self._people.top() or background

    def _has_credit(self, entry: Entry) -> bool:
        return self._credit >= entry.cost_s - _SLACK

    def _fits_at(self, line: _Line) -> float:
        """When the class may have enough for the first of a line, as it said when it was asked last."""
        if line.unfit is line.entries[0] and line.epoch == self._epoch:
            return line.unfit_until
        return -math.inf

    def _take_out(self, entry: Entry, line: _Line) -> None:
        """Out of the order. It is counted until `_uncount`."""
        entries = line.entries
        entry._line = None
        if line.unfit is entry:
            line.unfit = None
        was_first = entries[0] is entry
        if was_first:
            entries.popleft()
        else:
            entries.remove(entry)
        if line.asked is entry:
            self._end_ask(line)
        elif line.state == _ASKING or (not was_first and line.state != _GONE):
            return
        if line.state == _BLOCKED:
            if entries and line.reason != HELD:
                return
            self._end_block(line)
            return
        if line.state == _PINNED:
            self._pinned = None
        self._give_back_credit(line)
        self._place_again(line)

    def _place_again(self, line: _Line) -> None:
        """Where its first entry belongs; a line without entries is gone."""
        lane = line.lane
        if line.entries:
            lane.push(line)
            return
        line.state = _GONE
        del lane.lines[line.user]
        if not lane.lines:
            lane.clear()
            if lane is self._background:
                self._credit = 0.0

    def _end_ask(self, line: _Line) -> None:
        line.asked = None
        self._asks -= 1
        if self._again is line:
            self._again = None

    def _give_back_credit(self, line: _Line) -> None:
        self._credit += line.credit_s
        line.credit_s = 0.0

    def _block(self, line: _Line, until: float, reason: str) -> None:
        lane = line.lane
        self._give_back_credit(line)
        if line.state == _PINNED:
            self._pinned = None
        line.state = _BLOCKED
        line.until = until
        line.reason = reason
        line.block_round = lane.round
        lane.blocked += 1
        if until < math.inf:
            heappush(self._blocks, (until, self._number(), line))
            if len(self._blocks) > 2 * (self._people.blocked + self._background.blocked) + STALE_MAX:
                self._blocks = [block for block in self._blocks if self._is_current(block)]
                heapify(self._blocks)

    def _end_blocks(self, now: float) -> None:
        blocks = self._blocks
        while blocks and blocks[0][0] <= now:
            block = heappop(blocks)
            if self._is_current(block):
                self._end_block(block[2])

    def _end_block(self, line: _Line) -> None:
        line.since = line.saving_since()
        line.lane.blocked -= 1
        line.state = _READY
        self._place_again(line)

    @staticmethod
    def _is_current(block: tuple[float, int, _Line]) -> bool:
        return block[2].state == _BLOCKED and block[2].until == block[0]

    # counts

    def _note_deadline(self, entry: Entry) -> None:
        heappush(self._deadlines, (entry.deadline, self._number(), entry))
        if len(self._deadlines) > 2 * self._waiting + STALE_MAX:
            self._deadlines = [one for one in self._deadlines if one[2]._queue is self]
            heapify(self._deadlines)

    def _uncount(self, entry: Entry) -> None:
        entry._queue = None
        totals = self._totals
        self._waiting -= 1
        self._bytes -= entry.bytes
        totals.waiting -= 1
        totals.bytes -= entry.bytes
        by_user = totals.by_user[entry.background]
        left = by_user[entry.user] - 1
        if left:
            by_user[entry.user] = left
        else:
            del by_user[entry.user]
        if not self._waiting:
            self._blocks.clear()
            self._deadlines.clear()

    # estimates

    def _standing(self, entry: Entry) -> tuple[_Lane, _Line | None, int]:
        """Where it stands, or would."""
        line = entry._line
        if line is not None and entry._queue is self:
            return line.lane, line, line.entries.index(entry)
        lane = self._background if entry.background else self._people
        line = lane.lines.get(entry.user)
        return lane, line, len(line.entries) if line is not None else 0

    def _first_deadline(self) -> float:
        while self._deadlines and self._deadlines[0][2]._queue is not self:
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf

    def _estimate(self, lane: _Lane, line: _Line | None, index: int, entry: Entry, now: float) -> tuple[float, str]:
        """The wait of what stands, or would stand, at `index` of a line, and what binds it.

        Reckoned by sums, as if everybody stayed; somebody's deadline before that is rare, and then they are walked.
        """
        tag, seq = self._place(lane, line, index, entry._rounds)
        before_s = self._cost_s(line, index) + self._before(lane, line, tag, seq)[1]
        before_s += self._between(lane, before_s, entry.cost_s)[1]
        wait_s = self._served_in_s(before_s, entry.cost_s, now)
        before_s += self._unblocked_s(lane, line, tag, wait_s, now)
        wait_s = self._served_in_s(before_s, entry.cost_s, now)
        if self._pinned is not None and self._fits_at(self._pinned) < math.inf:
            wait_s = max(wait_s, self._fits_at(self._pinned) - now)
        reason = self._reason
        if line is not None and line.state == _BLOCKED:
            gaps_s = index * entry.gap_s if line.reason != HELD else 0.0
            block_s = max(line.until - now, 0.0) + gaps_s if line.until < math.inf else wait_s
            if block_s >= wait_s:
                wait_s, reason = block_s, line.reason
        if self._first_deadline() < now + wait_s:
            wait_s = next(wait_s for one, _, wait_s in self._walk(lane, line, entry, now) if one is entry)
        return wait_s, reason if wait_s > 0 or reason != self._reason else ""

    def _walk(self, lane: _Lane, mine: _Line | None, wanted: Entry | None, now: float) -> Iterator[Forecast]:
        """What will happen if nobody comes: each in turn, their position, and the wait if they alone never give up.

        Who has met their deadline by then takes nothing. Only `wanted` (None: everybody) is sure to be named: if it
        does not wait it goes to the end of the line `mine`, or of a new one of that lane. A block of unknown length
        never ends; who is told their wait behind one is told as if there were none, and takes nothing from others.
        """
        # A place: when it is due, the order of its line, its index in the line, since when it saves, line, lane.
        # Those of people, of background and of who was named; who is blocked by the end of that, alarms by deadline.
        people, background, named, asleep, alarms = places = tuple[list[_Place], ...]([] for _ in range(5))
        heads, unpaid, gapped = dict[float, int](), dict[float, float](), set[float]()
        burst_s, pace, credit_s, clock_s, count = self._burst_s, self._pace, self._credit, 0.0, 0
        empty_s = max(self._empty_at - now, -burst_s)
        rounds = [self._people.round, self._background.round]

        def put(order: float, index: int, since: float, entries: deque[Entry], kind: int) -> None:
            last = len(entries) - 1
            while wanted and index < last and entries[index].deadline - now <= clock_s and entries[index] != wanted:
                index += 1
            heads[order] = index
            if index < last:
                heappush(alarms, (entries[index].deadline - now, order, index, since, entries, kind))
            insort(places[kind], (since + entries[index]._rounds, order, index, since, entries, kind))

        for line in self.lines():
            kind, since, entries = int(line.lane is self._background), line.since, line.entries
            if line is mine and wanted is not None and wanted not in entries:
                entries = deque([*entries, wanted])
            if line.state == _BLOCKED:
                since = line.saving_since()
                if line.until < math.inf:
                    heappush(asleep, (line.until - now, line.seq, 0, since - rounds[kind], entries, kind))
                    if line.reason != HELD:
                        gapped.add(line.seq)
                elif wanted is None or line is mine:
                    unpaid[line.seq] = 0.0
                    put(line.seq, 0, since, entries, kind)
                continue
            is_named = line.state != _READY and (not kind or line.credit_s or not self._people.lines)
            key, turns = (line.named, named) if is_named else (line.due, places[kind])
            turns.append((key, line.seq, 0, since, entries, kind))
            if len(entries) > 1:
                heads[line.seq] = 0
                alarms.append((entries[0].deadline - now, line.seq, 0, since, entries, kind))
        for some in places:
            some.sort()
        if wanted is not None and mine is None:
            put(math.inf, 0, lane.round, deque([wanted]), int(lane is self._background))
        if (pinned := self._pinned) is not None and (fits_at := self._fits_at(pinned)) < math.inf:
            clock_s = max(min(fits_at, pinned.entries[0].deadline) - now, 0.0)
        while True:
            while asleep and asleep[0][0] <= clock_s:
                _, order, index, saved, entries, kind = heappop(asleep)
                put(order, index, rounds[kind] + saved, entries, kind)
            while alarms and alarms[0][0] <= clock_s:
                # The first of a line gives up: what was saved for it is there for the next.
                _, order, index, since, entries, kind = heappop(alarms)
                if heads[order] == index:
                    put(order, index + 1, since, entries, kind)
            turns, on_credit = named or people or background, False
            if background and not named:
                on_credit = background[0][4][background[0][2]].cost_s <= credit_s + _SLACK
                turns = background if on_credit else turns
            if not turns:
                if not asleep:
                    return
                # Meanwhile the bucket fills, and no further than it is deep.
                empty_s, clock_s = max(empty_s, asleep[0][0] - burst_s), asleep[0][0]
                continue
            _, order, index, since, entries, kind = turns.pop(0)
            entry, is_head = entries[index], heads.get(order, index) == index
            cost_s, own_s = entry.cost_s, unpaid.get(order, 0.0)
            at_s = empty_s + (own_s + (cost_s if cost_s < burst_s else burst_s)) / pace
            at_s = clock_s if at_s < clock_s else at_s
            if wanted is None or entry is wanted:
                yield entry, count + 1 + (index if order in unpaid else 0), at_s
            elif not is_head:
                continue
            left_s = entry.deadline - now
            if order in unpaid:
                unpaid[order] = own_s + cost_s
                since += entry._rounds
            elif left_s > at_s:
                count += 1
                clock_s = at_s
                empty_s += cost_s / pace
                since += entry._rounds
                rounds[kind] = max(rounds[kind], since)
                if on_credit:
                    credit_s -= cost_s
                elif kind == 0 and background:
                    credit_s += cost_s * _CREDIT_SHARE
            else:
                # If it was its turn nobody else had theirs until it gave up.
                clock_s = max(clock_s, left_s)
            goes_on = is_head and index + 1 < len(entries)
            if goes_on and left_s > at_s and entry.gap_s and order in gapped:
                heappush(asleep, (at_s + entry.gap_s, order, index + 1, since - rounds[kind], entries, kind))
            elif goes_on:
                put(order, index + 1, since, entries, kind)

    def _served_in_s(self, before_s: float, cost_s: float, now: float) -> float:
        """When the class's bucket has paid for all that is before it and then has enough for this one."""
        empty_in_s = max(self._empty_at - now, -self._burst_s)
        return max(empty_in_s + (before_s + min(cost_s, self._burst_s)) / self._pace, 0.0)

    @staticmethod
    def _cost_s(line: _Line | None, index: int) -> float:
        """Of what its own person has before it."""
        if line is None or index == 0:
            return 0.0
        return sum(entry.cost_s for position, entry in enumerate(line.entries) if position < index)

    @staticmethod
    def _place(lane: _Lane, line: _Line | None, index: int, rounds: float) -> tuple[float, float]:
        """The round in which it is due, and its order among those due then. What was named is due before all rounds."""
        if line is None:
            return lane.round + rounds, math.inf
        if index == 0 and line.state in (_ASKING, _PINNED):
            return -math.inf, line.named
        tag = line.saving_since()
        for position, entry in enumerate(line.entries):
            if position == index:
                break
            tag += entry._rounds
        return tag + rounds, line.seq if index < len(line.entries) else math.inf

    @staticmethod
    def _before(lane: _Lane, mine: _Line | None, tag: float, seq: float) -> tuple[int, float]:
        """How many of other people's entries of this lane are served before that place, and what they cost."""
        count, cost_s = 0, 0.0
        for line in lane.lines.values():
            state = line.state
            if line is mine or state == _BLOCKED:
                continue
            due, order = line.since, line.seq
            named = state != _READY
            for entry in line.entries:
                due += entry._rounds
                if named:
                    named = False
                    if tag == -math.inf and line.named > seq:
                        break
                elif due > tag or (due == tag and order > seq):
                    break
                count += 1
                cost_s += entry.cost_s
        return count, cost_s

    def _between(self, lane: _Lane, before_s: float, cost_s: float) -> tuple[int, float]:
        """How many of the other lane are served meanwhile, and what they cost.

        Background takes its share of what people before it cost; people go on until background can pay from its share.
        """
        background = self._background
        if lane is background and not self._people.lines:
            return 0, 0.0
        if lane is self._people and len(background.lines) == background.blocked:
            return 0, 0.0
        # What was named on the account of the share has been paid from it, and is part of what is counted here.
        credit_s = self._credit + sum(line.credit_s for line in background.lines.values())
        if lane is background:
            share_s = (before_s + cost_s - credit_s) / _CREDIT_SHARE - _SLACK
            return _first_of(_in_order(self._people), at_least_s=share_s)
        share_s = credit_s + before_s * _CREDIT_SHARE + _SLACK
        if share_s < min(line.entries[0].cost_s for line in background.lines.values()):
            return 0, 0.0
        return _first_of(_in_order(background), at_most_s=share_s)

    @staticmethod
    def _unblocked_s(lane: _Lane, mine: _Line | None, tag: float, wait_s: float, now: float) -> float:
        """What people who are blocked now will take before it, once they are not."""
        if not lane.blocked or wait_s <= 0 or tag == -math.inf:
            return 0.0
        cost_s = 0.0
        for line in lane.lines.values():
            if line is mine or line.state != _BLOCKED or line.until - now >= wait_s:
                continue
            at_s = max(line.until - now, 0.0)
            due = line.saving_since() + (tag - lane.round) * at_s / wait_s
            for entry in line.entries:
                due += entry._rounds
                if due > tag or at_s >= wait_s:
                    break
                cost_s += entry.cost_s
                at_s += entry.gap_s
        return cost_s


def _in_order(lane: _Lane) -> list[float]:
    """Costs of all in a lane whose people are not blocked, in the order in which they will be served."""
    places: list[tuple[float, int, float]] = []
    for line in lane.lines.values():
        if line.state == _BLOCKED:
            continue
        due = line.since
        for entry in line.entries:
            due += entry._rounds
            first = line.state != _READY and entry is line.entries[0]
            places.append((-math.inf, line.named, entry.cost_s) if first else (due, line.seq, entry.cost_s))
    places.sort()
    return [place[2] for place in places]


def _first_of(costs: list[float], *, at_most_s: float = math.inf, at_least_s: float = math.inf) -> tuple[int, float]:
    """How many of these, taken in order, cost no more than that together, or for the first time as much as that."""
    count, cost_s = 0, 0.0
    for one_s in costs:
        if cost_s >= at_least_s or cost_s + one_s > at_most_s:
            break
        count += 1
        cost_s += one_s
    return count, cost_s
