"""Decides whether and when a failed attempt is tried again. Does not sleep, does not roll dice.

What each failure means is failure-model §2.1; what the official SDK does with the same answers is claude-api §5.1.
"""

from __future__ import annotations

import enum

import msgspec

from headgate.policy.records import Failure
from headgate.wire.errors import SPEND_CAP_CODES, SPEND_CAP_MESSAGE, STATUS_BY_TYPE


class Cause(enum.Enum):
    """Whose fault a failure is, and so what may follow."""

    RATE_LIMIT = "rate_limit"
    """429 that passes: wait. Never a sign of an outage."""
    SPEND_CAP = "spend_cap"
    """Money has run out at Anthropic: nothing helps but an operator or the calendar."""
    OVERLOADED = "overloaded"
    SERVER = "server"
    """500, 502, 503: Anthropic's side, nothing produced."""
    AMBIGUOUS = "ambiguous"
    """The request was sent and no whole answer came: it may have been billed, so at most one more."""
    CONNECT = "connect"
    """Nothing was sent: free to try again."""
    CREDENTIAL = "credential"
    """Our own key or certificate is the trouble: retrying cannot help, an operator must."""
    CALLER = "caller"
    """The request itself is at fault: it fails everywhere."""


OUTAGE = frozenset({Cause.OVERLOADED, Cause.SERVER, Cause.AMBIGUOUS, Cause.CONNECT})
"""Causes that tell of a model that is down (an F in column B of failure-model §2.1); all others are neutral."""


AMBIGUOUS_MAX = 2
"""Attempts of a request that may have been billed for nothing: one retry, and no more (failure-model §2.1)."""


class RetryPolicy(msgspec.Struct, frozen=True):
    """Limits of trying again (design §5.5)."""

    attempts_max: int = 3
    base_delay_s: float = 1.0
    delay_s_max: float = 8.0


class RetryAt(msgspec.Struct, frozen=True):
    """Try again at `at` (monotonic seconds)."""

    at: float
    reason: str


class GiveUp(msgspec.Struct, frozen=True):
    """Do not try again. `reason` says why, for the log."""

    reason: str


def cause(failure: Failure) -> Cause:
    """Whose fault this failure is."""
    match failure.kind:
        case "connect":
            return Cause.CONNECT
        case "tls":
            return Cause.CREDENTIAL
        case "reset" | "timeout" | "stall" | "truncated" | "malformed":
            return Cause.AMBIGUOUS if failure.sent else Cause.CONNECT
        case "status" | "stream_error":
            status = failure.status if failure.kind == "status" else STATUS_BY_TYPE.get(failure.error_type, 500)
    if failure.error_code in SPEND_CAP_CODES or status == 402:
        return Cause.SPEND_CAP
    if status == 400 and failure.message.startswith(SPEND_CAP_MESSAGE):
        return Cause.SPEND_CAP
    match status:
        case 429:
            return Cause.RATE_LIMIT
        case 529:
            return Cause.OVERLOADED
        case 401 | 403:
            return Cause.CREDENTIAL
        case 408 | 409 | 504:
            return Cause.AMBIGUOUS
        case _ if status >= 500 or 300 <= status < 400:
            return Cause.SERVER
        case _:
            return Cause.CALLER


def decide(
    failure: Failure,
    *,
    attempts_made: int,
    ambiguous_made: int,
    now: float,
    deadline: float,
    policy: RetryPolicy,
    jitter: float,
) -> RetryAt | GiveUp:
    """Whether to send once more after `attempts_made` (≥ 1) attempts, `ambiguous_made` of which may have been billed.

    `jitter` is one roll in [0, 1). A wait that could not end by `deadline` is refused now, not later.
    """
    why = cause(failure)
    if failure.should_retry is False:
        return GiveUp("x_should_retry_false")
    if why in (Cause.SPEND_CAP, Cause.CREDENTIAL, Cause.CALLER):
        return GiveUp(why.value)
    if attempts_made >= policy.attempts_max or ambiguous_made >= AMBIGUOUS_MAX:
        return GiveUp("attempts_exhausted")
    wait_s = _wait_s(why, failure, attempts_made, policy, jitter)
    if now + wait_s > deadline:
        return GiveUp("past_deadline")
    return RetryAt(now + wait_s, why.value)


def _wait_s(why: Cause, failure: Failure, attempts_made: int, policy: RetryPolicy, jitter: float) -> float:
    if failure.retry_after_s is not None:
        # A floor, with the jitter after it: fifty waiters that hold the same number must not come back as one.
        return failure.retry_after_s * (1 + 0.2 * jitter)
    backoff_s = min(policy.base_delay_s * (1 << (attempts_made - 1)), policy.delay_s_max)
    match why:
        case Cause.CONNECT:
            return 0.1 * backoff_s * (0.5 + 0.5 * jitter)
        case Cause.SERVER | Cause.AMBIGUOUS if attempts_made == 1:
            return policy.base_delay_s * (0.25 + 0.25 * jitter)
        case _:
            # Full jitter, but never at once: a roll of 0 would make the retry part of the burst it answers to.
            return backoff_s * (0.1 + 0.9 * jitter)


class RetryBudget:
    """Keeps attempts at `1 + ratio` times the requests, plus a starting capital.

    Every client request deposits `ratio`, every retry withdraws 1 when it is decided (not when it is sent: retries in
    backoff count, or a thousand of them pass at once; failure-model §1, Envoy).
    """

    __slots__ = ("_capacity", "_level", "_ratio")

    def __init__(self, *, ratio: float = 0.2, capacity: float = 10.0) -> None:
        self._ratio = ratio
        self._capacity = capacity
        self._level = capacity

    def deposit(self) -> None:
        """A client's request came in."""
        self._level = min(self._level + self._ratio, self._capacity)

    def withdraw(self, *, owing: bool = False) -> bool:
        """Whether a retry may be made; takes it from the budget if so. `owing`: made in any case, paid for later."""
        if self._level < 1 and not owing:
            return False
        self._level -= 1
        return True

    def snapshot(self) -> float:
        """Retries that could be made now."""
        return self._level
