"""Entries, queues and a bucket of a class's capacity, for the tests of the request queue."""

import math

from headgate.policy.limiter import Verdict
from headgate.policy.request_queue import Entry, QueueBounds, QueueTotals, RequestQueue

FREE, PAID = 1.0, 5.0
BOUNDS = QueueBounds()


class Named(Entry):
    """An entry that a test can read."""

    __slots__ = ("name",)

    def __init__(self, name: str, user: str | None = None, *, cost_s=1.0, deadline=math.inf, **fields):
        fields = {"enqueued_at": 0.0, "waiting_max": 1000} | fields
        super().__init__(user or name.rstrip("0123456789"), cost_s=cost_s, deadline=deadline, **fields)
        self.name = name

    def __repr__(self) -> str:
        return self.name


def queue_of(*entries: Entry, bounds: QueueBounds = BOUNDS) -> RequestQueue:
    """A queue in which these wait, in this order."""
    queue = RequestQueue(QueueTotals(bounds))
    for entry in entries:
        assert queue.join(entry, 0.0) == ((), None)
    return queue


def named(*names: str, **fields) -> list[Named]:
    return [Named(name, **fields) for name in names]


def by_class(wait_s: float, reason: str = "class_itpm") -> Verdict:
    return Verdict(False, wait_s, reason)


def by_person(wait_s: float, reason: str = "user_rpm") -> Verdict:
    return Verdict(False, wait_s, reason)


def all_admitted(queue: RequestQueue, now: float = 0.0) -> str:
    """The order in which they are named, if each is admitted before the next is named."""
    names = []
    while (entry := queue.next(now)) is not None:
        names.append(entry.name)
        assert queue.admitted(entry, now)
    return " ".join(names)


def background(*names: str, **fields) -> list[Named]:
    return named(*names, background=True, **fields)


class Bucket:
    """What stands in for the limiter: a bucket of seconds of the class's capacity, and one of requests a person."""

    def __init__(self, *, burst_s: float = 10.0, level_s: float | None = None, person_burst: float = 1.0):
        self.burst_s, self.person_burst = burst_s, person_burst
        self.level_s = burst_s if level_s is None else level_s
        self.at = 0.0
        self.people: dict[str, tuple[float, float]] = {}

    def level(self, now: float) -> float:
        return min(self.level_s + now - self.at, self.burst_s)

    def fits(self, entry: Entry, now: float) -> bool:
        return self.level(now) >= min(entry.cost_s, self.burst_s) - 1e-6

    def person_wait_s(self, entry: Entry, now: float) -> float:
        if not entry.gap_s:
            return 0.0
        level, at = self.people.get(entry.user, (self.person_burst, now))
        level = min(level + (now - at) / entry.gap_s, self.person_burst)
        return max(1.0 - level, 0.0) * entry.gap_s if level < 1.0 - 1e-9 else 0.0

    def ask(self, entry: Entry, now: float) -> Verdict:
        wait_s = self.person_wait_s(entry, now)
        if wait_s > 0:
            return by_person(wait_s)
        if not self.fits(entry, now):
            return by_class(min(entry.cost_s, self.burst_s) - self.level(now))
        self.level_s, self.at = self.level(now) - entry.cost_s, now
        if entry.gap_s:
            level, at = self.people.get(entry.user, (self.person_burst, now))
            self.people[entry.user] = min(level + (now - at) / entry.gap_s, self.person_burst) - 1.0, now
        return Verdict(True)


class Gate:
    """A driver in virtual time. Answers come after `latency_s`; the bucket decides when it is asked."""

    def __init__(self, bucket: Bucket, *, latency_s: float = 0.0, bounds: QueueBounds = BOUNDS):
        self.queue = RequestQueue(QueueTotals(bounds), burst_s=bucket.burst_s)
        self.bucket, self.latency_s = bucket, latency_s
        self.now = 0.0
        self.answers: list[tuple[float, Entry, Verdict]] = []
        self.admitted: list[tuple[float, Entry]] = []
        self.lost: list[Entry] = []
        self.asked = 0

    def pump(self) -> None:
        self.lost += self.queue.expired(self.now)
        while (entry := self.queue.next(self.now)) is not None:
            self.asked += 1
            verdict = self.bucket.ask(entry, self.now)
            if self.latency_s:
                self.answers.append((self.now + self.latency_s, entry, verdict))
            else:
                self.answered(entry, verdict)

    def answered(self, entry: Entry, verdict: Verdict) -> None:
        if not verdict.admitted:
            self.queue.denied(entry, verdict, self.now)
        elif self.queue.admitted(entry, self.now):
            self.admitted.append((self.now, entry))

    def join(self, entry: Entry) -> str | None:
        reason = self.queue.join(entry, self.now)[1]
        self.pump()
        return reason

    def run(self, until: float) -> None:
        """Let time pass; it stops early when nothing can happen any more."""
        while True:
            wake = self.queue.wake_at()
            at = min(math.inf if wake is None else wake, self.answers[0][0] if self.answers else math.inf)
            if at > until or at == math.inf:
                break
            self.now = max(self.now, at)
            while self.answers and self.answers[0][0] <= self.now:
                self.answered(*self.answers.pop(0)[1:])
            self.pump()
        if until < math.inf:
            self.now = until


def waits(gate: Gate, *, since: float = 0.0) -> dict[Entry, float]:
    return {entry: at - since for at, entry in gate.admitted}
