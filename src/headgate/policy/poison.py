"""Refuses a request that breaks the upstream each time it is sent, so that nobody else pays for it.

What it is: a table of the few bodies that failed ambiguously of late (failure-model §2.1, last row).
What it is not: what computes a fingerprint (an HMAC of the body, at the caller's), or judges what is ambiguous
(`policy/retry.py`).

One body that fails again and again says little about the model: only its first failure counts in the breaker. Once a
breaker opens all the same it was an outage, and the table is cleared: no body is to blame.
"""

from __future__ import annotations

from collections import OrderedDict

FAILURES = 3
WINDOW_S = 600.0
REFUSED_S = 600.0
"""As long as the window, so that one moment ends both."""
BODIES_MAX = 1_000
"""Some 0.5 MB at most. Beyond it the body that failed longest ago is forgotten."""


class _Body:
    """One body's failures in the window, oldest first, at most `FAILURES`; with so many it is refused."""

    __slots__ = ("counted_at", "failed_at")

    def __init__(self, now: float) -> None:
        self.counted_at = now
        """When a failure last counted in the breaker."""
        self.failed_at = [now]


class PoisonTable:
    """Bodies by fingerprint. `now` is monotonic seconds; a clock that goes back does no harm.

    It is empty but for the minutes after a failure: ask `len` before computing a fingerprint.
    """

    __slots__ = ("_bodies", "_bodies_max", "failures")

    def __init__(self, *, failures: int = FAILURES, bodies_max: int = BODIES_MAX) -> None:
        """`failures` ≥ 1: of one body, from which on it is refused."""
        self.failures = failures
        self._bodies: OrderedDict[bytes, _Body] = OrderedDict()
        """The one that failed longest ago first."""
        self._bodies_max = bodies_max

    def __len__(self) -> int:
        return len(self._bodies)

    def refused_for_s(self, fingerprint: bytes, now: float) -> float | None:
        """Seconds until this body may be sent again; None when it may now."""
        self._forget(now)
        body = self._bodies.get(fingerprint)
        if body is None or len(body.failed_at) < self.failures:
            return None
        return body.failed_at[-1] + REFUSED_S - now

    def failed(self, fingerprint: bytes, now: float) -> bool:
        """An attempt with this body failed ambiguously. True when that should count in the breaker.

        What ends while the body is refused was sent before: it neither counts nor prolongs.
        """
        self._forget(now)
        body = self._bodies.get(fingerprint)
        if body is None:
            self._bodies[fingerprint] = _Body(now)
            if len(self._bodies) > self._bodies_max:
                self._bodies.popitem(last=False)
            return True
        if len(body.failed_at) >= self.failures:
            return False
        body.failed_at = [at for at in body.failed_at if now - at < WINDOW_S] + [now]
        self._bodies.move_to_end(fingerprint)
        if now - body.counted_at < WINDOW_S:
            return False
        body.counted_at = now
        return True

    def succeeded(self, fingerprint: bytes) -> None:
        """The body was answered: it is sound."""
        self._bodies.pop(fingerprint, None)

    def clear(self) -> None:
        """A breaker opened."""
        self._bodies.clear()

    def _forget(self, now: float) -> None:
        """Drop what last failed before the window; what is refused is free by then."""
        if self._bodies and now < next(reversed(self._bodies.values())).failed_at[-1]:
            self._mend_clock(now)
        while self._bodies:
            if now - next(iter(self._bodies.values())).failed_at[-1] < WINDOW_S:
                return
            self._bodies.popitem(last=False)

    def _mend_clock(self, now: float) -> None:
        """After a clock went back nothing failed later than now, or it would be refused for longer than was meant."""
        for body in self._bodies.values():
            body.failed_at = [min(at, now) for at in body.failed_at]
            body.counted_at = min(body.counted_at, now)
