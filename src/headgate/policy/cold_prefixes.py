"""Decides who of many with the same cold prefix writes it to the prompt cache, and who waits for that.

An entry of Anthropic's cache can be read once the answer that writes it has begun; of N requests that leave together
all N write, at 1.25 or 2 times the price (claude-api §7.1). Here the first goes ahead. The others wait until its answer
begins, or for `wait_s` after it was sent (a whole answer begins late), or until it failed: then the first of them is
the next writer. While the writer itself waits for a turn they wait with it, for most would be behind it anyway; but it
may be held by a limit of its own person. So whoever has waited for `wait_s` takes its place, one after another, each
with a quarter of that time to be sent. When three writers in a row have failed, it is the prompt that is wrong or
Anthropic that is down, and everybody goes on: one after another, two hundred would hear of it too late.

What it is: a state machine over keys and tickets. What it is not: knowledge of which prefix is cold
(`prompt_cache.py`), or a timer; the driver asks `until` and wakes whom it is told to.
"""

from __future__ import annotations

import msgspec

NOT_YET = float("inf")
_FAILED_MAX = 3
_TURN_SHARE = 0.25
"""Of `wait_s`, for who took the writer's place to be sent, before the next takes it."""


class _Flight(msgspec.Struct, gc=False):
    """One cold prefix on its way into the cache."""

    writer: str
    since: float
    """When it became the writer."""
    sent_at: float = NOT_YET
    failed: int = 0
    """Writers that were sent, and are out without an answer."""
    waiting: dict[str, float] = {}
    """Tickets with when they came, in that order."""


class ColdPrefixes:
    """All prefixes that somebody is writing. As large as the calls under way that have one."""

    __slots__ = ("_flights", "wait_s")

    def __init__(self, wait_s: float) -> None:
        """`wait_s`: how long the writer's answer is waited for, seconds."""
        self.wait_s = wait_s
        self._flights: dict[bytes, _Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def join(self, key: bytes, ticket: str, now: float) -> bool:
        """Whether this ticket goes ahead (it is the writer); else it waits, as `until` says."""
        flight = self._flights.get(key)
        if flight is None:
            self._flights[key] = _Flight(ticket, now)
            return True
        if flight.writer == ticket:
            return True
        flight.waiting.setdefault(ticket, now)
        return False

    def until(self, key: bytes, ticket: str, now: float) -> float | None:
        """When this ticket's wait ends at the latest, later than `now`. None: it is over, and the ticket goes on.

        It is over for who has become the writer, which is also who waited long enough for one that has no turn. Who was
        told a moment has to ask again then: by others it may have been put off.
        """
        flight = self._flights.get(key)
        if flight is None or ticket not in flight.waiting:
            return None
        came_at = flight.waiting[ticket]
        if flight.sent_at != NOT_YET:
            ends_at = max(flight.sent_at, came_at) + self.wait_s
            if now < ends_at:
                return ends_at
            del flight.waiting[ticket]
            return None
        ends_at = max(came_at + self.wait_s, flight.since + self.wait_s * _TURN_SHARE)
        if now < ends_at:
            return ends_at
        self._hand_over(flight, ticket, now)
        return None

    def on_its_way(self, key: bytes, ticket: str) -> bool:
        """Whether another ticket's request, which has been sent, writes this prefix."""
        flight = self._flights.get(key)
        return flight is not None and flight.writer != ticket and flight.sent_at != NOT_YET

    def sent(self, key: bytes, ticket: str, now: float) -> list[str]:
        """The writer's request leaves. Who must set a new alarm is returned."""
        flight = self._flights.get(key)
        if flight is None or flight.writer != ticket:
            return []
        flight.sent_at = now
        return list(flight.waiting)

    def began(self, key: bytes) -> list[str]:
        """An answer with this prefix has begun: it can be read. Everybody who waited for that goes on."""
        flight = self._flights.pop(key, None)
        return [] if flight is None else list(flight.waiting)

    def left(self, key: bytes, ticket: str, now: float) -> list[str]:
        """The ticket is out: it failed, left, or waits no longer. Whoever goes on in its place is returned."""
        flight = self._flights.get(key)
        if flight is None:
            return []
        if flight.writer != ticket:
            flight.waiting.pop(ticket, None)
            return []
        flight.failed += flight.sent_at != NOT_YET
        if not flight.waiting or flight.failed >= _FAILED_MAX:
            del self._flights[key]
            return list(flight.waiting)
        heir = next(iter(flight.waiting))
        self._hand_over(flight, heir, now)
        return [heir]

    def _hand_over(self, flight: _Flight, heir: str, now: float) -> None:
        del flight.waiting[heir]
        flight.writer, flight.since, flight.sent_at = heir, now, NOT_YET
