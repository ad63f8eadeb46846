"""Experiments between models: who is given which arm, and what can be said of the arms afterwards.

What it is: a deal that needs no memory (a hash decides), and intervals and comparisons of what the ledger counted. What
it is not: the choice of model (`routing.py`), nor the count itself (`storage/reports.py`).

What is dealt is a unit: a conversation, or a person where there is none. Requests of one unit share an arm and are
alike (a conversation that fails once fails again), so intervals are made over units and not over requests. Intervals
and comparisons are at 95 %, each by itself: of twenty comparisons of equal arms one will look like a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

from headgate.policy.records import Record

_Z = 1.959963984540054
"""Of the normal distribution, 95 % lie within so many deviations."""
_T_OF_FEW = (12.7062, 4.3027)
"""Student's t at 95 % for one and two degrees of freedom, where the series below does not hold."""
_HASH_BYTES = 8


class Arm(Record, frozen=True, gc=False):
    """One side of an experiment."""

    name: str
    model: str
    weight: float = 1.0
    """Share of the units beside the other arms' weights, ≥ 0."""


class Experiment(Record, frozen=True, gc=False):
    """An A/B test between models. At least one weight is above 0."""

    name: str
    model: str
    """Requests that would go to this model take part."""
    arms: tuple[Arm, ...]
    endpoint: str = ""
    """And that have this label; empty: any."""
    salt: str = ""
    """Another one deals anew."""


def arm_label(experiment: str, arm: str) -> str:
    """How the ledger names an arm. Neither name has a colon."""
    return f"{experiment}:{arm}"


class Deal:
    """Gives each unit of an experiment its arm, the same one whenever and wherever it is asked.

    Weighted rendezvous: each arm's hash with the unit is a draw from an exponential distribution of the arm's weight,
    and the smallest wins. The draws do not know of each other, so that when one arm's weight grows units only move to
    it, when it shrinks only away from it, and never between two others: fewer cannot move (Schindelhauer and
    Schomaker, "Weighted distributed hash tables", SPAA 2005).
    """

    __slots__ = ("_draws", "arms", "experiment")

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.arms: tuple[Arm, ...] = tuple(arm for arm in experiment.arms if arm.weight > 0)
        """Those that any unit is given."""
        assert self.arms, experiment
        self._draws = [
            (blake2b(f"{experiment.name}\0{experiment.salt}\0{arm.name}\0".encode(), digest_size=_HASH_BYTES), arm)
            for arm in self.arms
        ]

    def arm_of(self, unit: str) -> Arm:
        """The arm of a conversation or a person."""
        encoded = unit.encode()
        first, least = self.arms[0], math.inf
        for hashed, arm in self._draws:
            draw = hashed.copy()
            draw.update(encoded)
            # In (0, 1], never 0: of that there is no logarithm.
            share = (int.from_bytes(draw.digest()) + 1) / (1 << 8 * _HASH_BYTES)
            score = -math.log(share) / arm.weight
            if score < least:
                first, least = arm, score
        return first


class Estimate(Record, frozen=True, gc=False):
    """A value and its 95 % interval; no interval where there is too little to tell."""

    value: float
    low: float | None = None
    high: float | None = None


class Unit(Record, frozen=True, gc=False):
    """What one conversation or person did in an arm."""

    requests: int
    errors: int
    cost_nanousd: int


def error_rate(units: Sequence[Unit]) -> Estimate | None:
    """Errors a request, with Wilson's interval; None without a request.

    Where the requests of a unit fail together, they tell less than as many of strangers: the interval is then that of
    as many requests as they are worth (their number over the design effect).
    """
    requests, errors = sum(unit.requests for unit in units), sum(unit.errors for unit in units)
    if not requests:
        return None
    rate = errors / requests
    clustered = _variance([(unit.requests, unit.errors) for unit in units], rate)
    if not clustered:  # one unit, or units that are all the same
        return _wilson(rate, requests)
    # What it would be of strangers, estimated in the same way.
    binomial = rate * (1 - rate) / (requests - 1)
    return _wilson(rate, requests / max(1.0, clustered / binomial))


def cost_per_request(units: Sequence[Unit]) -> Estimate | None:
    """Nano-dollars a request, with the normal interval of a ratio over units (Student's t, where they are few); None
    without a request, and without an interval for a single unit."""
    requests = sum(unit.requests for unit in units)
    if not requests:
        return None
    mean = sum(unit.cost_nanousd for unit in units) / requests
    variance = _variance([(unit.requests, unit.cost_nanousd) for unit in units], mean)
    if variance is None:
        return Estimate(mean)
    half = _student_t(len(units) - 1) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half)


def differs(one: Estimate | None, other: Estimate | None) -> bool | None:
    """Whether the 95 % interval of the difference leaves out 0; None where that cannot be told.

    The interval is put together from the two (Newcombe's tenth method, "Interval estimation for the difference between
    independent proportions", 1998); for two symmetric ones it is the test that everybody knows.
    """
    if one is None or other is None or one.low is None or one.high is None or other.low is None or other.high is None:
        return None
    difference = one.value - other.value
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    return not difference - below <= 0 <= difference + above


def _wilson(rate: float, requests: float) -> Estimate:
    """Stays within 0 and 1 and has a width at 0 errors, too, which the normal interval has not."""
    spread = _Z * _Z / requests
    middle = (rate + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(rate * (1 - rate) / requests + spread / (4 * requests))
    # Rounding must not put the rate itself outside.
    return Estimate(rate, min(max(middle - half, 0.0), rate), max(min(middle + half, 1.0), rate))


def _variance(units: Sequence[tuple[int, int]], ratio: float) -> float | None:
    """Of the ratio of sums over units (requests, amount), by linearization; None for fewer than two."""
    count = len(units)
    if count < 2:
        return None
    squares = math.fsum((amount - ratio * requests) ** 2 for requests, amount in units)
    return count / (count - 1) * squares / sum(requests for requests, _ in units) ** 2


def _student_t(freedom: int) -> float:
    """At 95 %, two-sided; within 1 % for three degrees of freedom and ever closer (Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(_T_OF_FEW):
        return _T_OF_FEW[freedom - 1]
    return (
        _Z
        + (_Z**3 + _Z) / (4 * freedom)
        + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)
        + (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / (384 * freedom**3)
    )
