"""Lets the requests that waited for a model go at a growing pace once it is back, and not all at once.

    admissions a second ÷ steady demand

    1.4          ╭───────────────────╮ caught up: no pace any more
    1.0         ╱
               ╱
    0.2 ──────╯
        outage ended

What it is: the pace of one model class, which knows the demand of the time before the outage.
What it is not: the queue, a limit (`policy/limiter.py` still holds), or what notices an outage (`policy/breaker.py`).

A crowd that is let go at once finds caches cold and a ramp limit (failure-model §2.7), and makes the next outage.
"""

from __future__ import annotations

import enum
import math

from headgate.policy.records import Record

SMOOTHED_OVER_S = 60.0
"""Memory of the demand: long enough that chance is 1.3 % of 50/s, short enough that the noon rush is not the night."""
KNOWN_AFTER_S = 10.0
"""Seconds of watching before the demand is believed."""
FLOOR_PER_S = 2.0
"""The demand of a process that knows none, and the least of one that does: a pace below it protects nobody."""
START_RATIO = 0.2
HOLD_RATIO = 1.4
"""Of the demand. The bar is 1.5 in any second; the rest is for the error of what was learned and for `CREDIT_S`."""
RAMP_DOUBLES_S = 0.7
"""2.0 s from the first pace to the last: two or three answers' time. What is lost in it lengthens the backlog."""
BACKLOG_S = 5.0
"""Seconds of the demand that may wait for the end of an outage: at 1.4 times the demand it is gone in 13 s."""
HOLD_S = 45.0
"""Since the release began. A full queue of 10 s of demand is drained in 28 s: who still waits now shows more demand
than there was before the outage, and the pace grows with it."""
GROWTH_DOUBLES_S = 5.0
"""As failure-model §2.7 has it for a release of unknown demand."""
RELEASE_S_MAX = 120.0
"""Then it ends by itself; by then the pace is beyond every demand."""
CREDIT_S = 0.02
"""A timer that wakes this late loses no admission."""

_RAMP = math.log(2) / RAMP_DOUBLES_S
_RAMP_S = RAMP_DOUBLES_S * math.log2(HOLD_RATIO / START_RATIO)
_GROWTH = math.log(2) / GROWTH_DOUBLES_S
_SLACK = 1e-6


class Phase(enum.Enum):
    """What a class is going through."""

    STEADY = "steady"
    """All pass, and the demand is learned."""
    OUTAGE = "outage"
    """Nothing is learned, and nothing is held: what passes are probes."""
    RELEASE = "release"
    """Who waits is let go at the pace."""


class SlowStartView(Record, frozen=True, gc=False):
    """A class's pace for people."""

    phase: Phase
    demand_per_s: float | None
    pace_per_s: float | None
    """None: no pace."""


class SlowStart:
    """The pace of one class. `now` is monotonic seconds; a clock that goes back does no harm."""

    __slots__ = (
        "_allowance", "_allowed_at", "_counted", "_counted_at", "_demand_per_s", "_hold_s", "_phase", "_released_at",
        "_watched_s",
    )  # fmt: skip

    def __init__(self, now: float) -> None:
        self._phase = Phase.STEADY
        self._counted = 0.0
        """Admissions, each fading away over `SMOOTHED_OVER_S`."""
        self._counted_at = now
        self._watched_s = 0.0
        """Without the outages, up to `_counted_at`."""
        self._released_at = now
        self._demand_per_s = FLOOR_PER_S
        """The demand that this release goes by."""
        self._hold_s = 0.0
        self._allowance = 0.0
        """Admissions that may be made at `_allowed_at`; below zero when more were made than were allowed."""
        self._allowed_at = now

    def __repr__(self) -> str:
        return f"<SlowStart {self._phase.value} demand {self.demand_per_s}>"

    @property
    def demand_per_s(self) -> float | None:
        """Steady admissions a second; None while too little was seen."""
        if self._watched_s < KNOWN_AFTER_S:
            return None
        return self._counted / (SMOOTHED_OVER_S * -math.expm1(-self._watched_s / SMOOTHED_OVER_S))

    def drained_in_s(self, waiting: int) -> float:
        """How long the last of so many will wait once the outage is over; 0.0 while the demand is not known."""
        demand = self.demand_per_s
        return 0.0 if demand is None else waiting / (HOLD_RATIO * max(demand, FLOOR_PER_S))

    def backlog_max(self) -> float:
        """How many may wait for the end of an outage, so that all is as before within 20 s of it.

        While they drain new requests keep coming: only what the pace is above the demand takes from the backlog.
        """
        demand = self.demand_per_s
        return math.inf if demand is None else BACKLOG_S * max(demand, FLOOR_PER_S)

    def admitted(self, now: float) -> None:
        """A request goes to the upstream. Tell of every one, a retry too."""
        if self._phase is Phase.STEADY:
            self._watch(now)
            self._counted += 1.0
        elif self.active(now):
            self._refill(now)
            # More than a second's debt is forgiven, or a crowd that passed unasked would stop the class.
            self._allowance = max(self._allowance - 1.0, -HOLD_RATIO * self._demand_per_s)

    def outage_began(self, now: float) -> None:
        """The class's breaker opened."""
        if self._phase is Phase.STEADY:
            self._watch(now)
        self._phase = Phase.OUTAGE

    def outage_ended(self, now: float) -> None:
        """The class's breaker closed: the release begins."""
        if self._phase is not Phase.OUTAGE:
            return
        known = self.demand_per_s
        self._demand_per_s = max(known or 0.0, FLOOR_PER_S)
        self._hold_s = HOLD_S if known is not None else _RAMP_S
        self._phase = Phase.RELEASE
        self._released_at = self._allowed_at = now
        self._allowance = 1.0

    def caught_up(self, now: float) -> None:
        """The queue is empty. Ends the release, but not before the pace is above the demand.

        An empty queue in its first moments says only that the crowd is still on its way.
        """
        if self.active(now) and now - self._released_at >= _RAMP_S:
            self._end(now)

    def active(self, now: float) -> bool:
        """Whether a pace holds."""
        if self._phase is not Phase.RELEASE:
            return False
        if now - self._released_at >= RELEASE_S_MAX:
            self._end(now)
            return False
        return True

    def wait_s(self, now: float, count: int = 1) -> float:
        """Seconds until so many may go, 0.0 when they may now: the next one, or the last of a line."""
        if not self.active(now):
            return 0.0
        self._refill(now)
        short = count - self._allowance
        if short <= _SLACK:
            return 0.0
        since_s = now - self._released_at
        return max(self._when_allowed_s(self._allowed_by(since_s) + short) - since_s, _SLACK)

    def snapshot(self, now: float) -> SlowStartView:
        """For `/admin`."""
        pace_per_s = self._pace_per_s(now - self._released_at) if self.active(now) else None
        return SlowStartView(self._phase, self.demand_per_s, pace_per_s)

    def _end(self, now: float) -> None:
        # What was learned before the outage is taken up as if no time had passed.
        self._phase = Phase.STEADY
        self._counted_at = now

    def _watch(self, now: float) -> None:
        passed_s = now - self._counted_at
        self._counted_at = now
        if passed_s > 0:
            self._watched_s += passed_s
            self._counted *= math.exp(-passed_s / SMOOTHED_OVER_S)

    def _refill(self, now: float) -> None:
        if now < self._allowed_at:
            self._allowed_at = now
            self._released_at = min(self._released_at, now)
            return
        since_s = now - self._released_at
        allowed = self._allowed_by(since_s) - self._allowed_by(self._allowed_at - self._released_at)
        self._allowance = min(self._allowance + allowed, 1.0 + CREDIT_S * self._pace_per_s(since_s))
        self._allowed_at = now

    # The pace is 0.2 of the demand and grows to 1.4 of it, holds, and grows again. Its integral, how many may have
    # gone, has a closed form in each of the three parts, and so has the inverse: no step that a slow clock could skip.

    def _pace_per_s(self, since_s: float) -> float:
        if since_s < _RAMP_S:
            return START_RATIO * self._demand_per_s * math.exp(_RAMP * since_s)
        return HOLD_RATIO * self._demand_per_s * math.exp(_GROWTH * max(since_s - self._hold_s, 0.0))

    def _allowed_by(self, since_s: float) -> float:
        ramp_s = min(since_s, _RAMP_S)
        allowed = START_RATIO / _RAMP * math.expm1(_RAMP * ramp_s)
        if since_s > _RAMP_S:
            allowed += HOLD_RATIO * (min(since_s, self._hold_s) - _RAMP_S)
        if since_s > self._hold_s:
            allowed += HOLD_RATIO / _GROWTH * math.expm1(_GROWTH * (since_s - self._hold_s))
        return self._demand_per_s * allowed

    def _when_allowed_s(self, count: float) -> float:
        """The inverse of `_allowed_by`."""
        in_ramp, in_hold = self._allowed_by(_RAMP_S), self._allowed_by(self._hold_s)
        if count <= in_ramp:
            return math.log1p(_RAMP * count / (START_RATIO * self._demand_per_s)) / _RAMP
        hold_per_s = HOLD_RATIO * self._demand_per_s
        if count <= in_hold:
            return _RAMP_S + (count - in_ramp) / hold_per_s
        return self._hold_s + math.log1p(_GROWTH * (count - in_hold) / hold_per_s) / _GROWTH
