"""Decides who of many with the same cold prefix writes it to the prompt cache, and who waits for that.

An entry of Anthropic's cache can be read once the answer that writes it has begun; of N requests that leave together
all N write, at 1.25 or 2 times the price (claude-api §7.1). Here the first goes ahead. The others wait until its answer
begins, or for `wait_s` after it was sent (a whole answer begins late), or until it failed: then the first of them is
the next writer. While the writer itself waits for a turn, they wait with it: they would be behind it anyway.

What it is: a state machine over keys and tickets. What it is not: knowledge of which prefix is cold
(`prompt_cache.py`), or a timer; the driver asks `until` and wakes whom it is told to.
"""

from __future__ import annotations

import msgspec

FOREVER = float("inf")


class _Flight(msgspec.Struct, gc=False):
    """One cold prefix on its way into the cache."""

    writer: str
    sent_at: float = FOREVER
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
            self._flights[key] = _Flight(ticket)
            return True
        if flight.writer == ticket:
            return True
        flight.waiting.setdefault(ticket, now)
        return False

    def until(self, key: bytes, ticket: str) -> float | None:
        """When this ticket's wait ends at the latest; `FOREVER` while the writer has not been sent. None: it is over.

        A ticket that has become the writer waits no longer.
        """
        flight = self._flights.get(key)
        if flight is None or ticket not in flight.waiting:
            return None
        return max(flight.sent_at, flight.waiting[ticket]) + self.wait_s

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

    def left(self, key: bytes, ticket: str) -> list[str]:
        """The ticket is out: it failed, left, or waits no longer. Whoever goes on in its place is returned."""
        flight = self._flights.get(key)
        if flight is None:
            return []
        if flight.writer != ticket:
            flight.waiting.pop(ticket, None)
            return []
        if not flight.waiting:
            del self._flights[key]
            return []
        heir = next(iter(flight.waiting))
        del flight.waiting[heir]
        flight.writer, flight.sent_at = heir, FOREVER
        return [heir]
