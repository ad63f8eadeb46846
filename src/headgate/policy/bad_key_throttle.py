"""Counts bad keys by address, and says when an address has shown too many.

What it is: a state machine on a clock that is passed in, of bounded memory.
What it is not: what keeps a key from being guessed (256 bits do); it keeps a broken client from filling the log.
So ask for the key first: behind one address of an office a good key is let in whatever its neighbours try.
"""

from __future__ import annotations

from collections import OrderedDict, deque

FAILURES_PER_MIN = 20
WINDOW_S = 60.0
ADDRESSES_MAX = 10_000
"""Some 6 MB at most. Beyond it the address that failed longest ago is forgotten."""


class AddressThrottle:
    """At most `failures_per_min` answers of 401 to an address in any minute; then 429.

    An address is whatever text the caller counts by: for IPv6 its /64, which one client has to itself.
    """

    def __init__(self, *, failures_per_min: int = FAILURES_PER_MIN) -> None:
        self._failures_per_min = failures_per_min
        self._failed_at: OrderedDict[str, deque[float]] = OrderedDict()

    def refused_for_s(self, address: str, *, now: float) -> float | None:
        """Seconds until the address may fail again; None when it may now. `now` is monotonic seconds."""
        failed_at = self._failed_at.get(address)
        if failed_at is None or len(failed_at) < self._failures_per_min:
            return None
        wait_s = failed_at[0] + WINDOW_S - now
        return wait_s if wait_s > 0 else None

    def failed(self, address: str, *, now: float) -> float | None:
        """Count a bad key. None: answer 401; else answer 429 with these seconds to wait.

        What is answered 429 is not counted: the address waits for its oldest failure, however hard it knocks.
        """
        wait_s = self.refused_for_s(address, now=now)
        if wait_s is not None:
            return wait_s
        failed_at = self._failed_at.setdefault(address, deque(maxlen=self._failures_per_min))
        failed_at.append(now)
        self._failed_at.move_to_end(address)
        if len(self._failed_at) > ADDRESSES_MAX:
            self._failed_at.popitem(last=False)
        return None
