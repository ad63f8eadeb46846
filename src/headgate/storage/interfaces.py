"""What the services ask of storage, as protocols. Adapters live beside this file, one topic each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from headgate.policy.budgets import AccountUse, MoneyAsk, MoneyVerdict
from headgate.policy.limiter import Ask, ClassLimits, ClassSnapshot, Subject, Verdict
from headgate.policy.records import LedgerEvent, Principal
from headgate.wire.headers import RateLimits


class LedgerUnavailable(Exception):
    """The data directory cannot be written: no new call may leave. Says which path and why."""


class KeyRefused(Exception):
    """A presented key does not open the door. `reason` is for the log, never for the client: it sees one text."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class KeysUnavailable(Exception):
    """The key store could not be read for longer than a minute: nobody can be let in (answer 503)."""


class Ledger(Protocol):
    """Two ledgers of one truth: an append-only journal, folded into a database by a writer thread."""

    def write(self, *events: LedgerEvent) -> None:
        """Append the events in one `write(2)`, in this order; they survive a `kill -9` when it returns.

        Raises LedgerUnavailable when an event that opens a call or an attempt cannot be written. Events that end one
        are kept in memory and written as soon as the disk takes them: what was paid is never forgotten.
        """

    async def durable(self) -> None:
        """Return once all that was written also survives a power loss; at once unless `ledger.durability = "power"`."""


class KeyRing(Protocol):
    """Virtual keys in memory, refreshed from the store."""

    def authenticate(self, presented: bytes) -> Principal:
        """Who owns this key. Constant time in the secret, the same path for an unknown id.

        Raises KeyRefused (unknown, wrong, revoked, expired) and KeysUnavailable.
        """


class Limits(Protocol):
    """All limits of people and of Anthropic, in this process or shared over several by Redis.

    Every method is for the loop's thread, returns at once and never raises. What each of them means is said in
    `policy/limiter.py`; a model-based test holds both adapters to it.
    """

    @property
    def shared(self) -> bool:
        """Whether other processes are counted now. False in one process, and while Redis is away (local share)."""

    @property
    def replicas(self) -> int:
        """Living processes that share these limits, this one with them. ≥ 1."""

    def admit(self, ask: Ask, answered: Callable[[Verdict], None]) -> None:
        """May this attempt leave? `answered` is called exactly once, on the loop.

        In one process before this returns; over Redis within 150 ms, whatever Redis does. In what is sent together,
        nobody passes an ask of the same class that was denied for the class. A denied ask may be asked again, with
        the same id; an id that holds a reservation may not.
        """

    def correct(self, ask_id: str, *, input_tokens: int, output_tokens: int) -> None:
        """What Anthropic says by now, absolute: uncached input and output so far."""

    def settle(self, ask_id: str, *, input_tokens: int, output_tokens: int) -> None:
        """The attempt is over and took this much. Twice is once; unknown ids are left alone."""

    def renew(self, ask_id: str, *, lease_s: float) -> None:
        """The attempt is still under way; its lease ends `lease_s` from now."""

    def observe(self, ask_id: str, rate_limits: RateLimits) -> None:
        """Rate-limit headers of the attempt's answer."""

    def throttled(self, class_id: str, limits: ClassLimits, *, retry_after_s: float | None, ramp: bool) -> None:
        """Anthropic answered 429 to a call of this class."""

    def snapshot(self, class_id: str, limits: ClassLimits) -> ClassSnapshot:
        """How the class stands, as last known (over Redis up to some seconds old)."""

    def subject_level(self, subject: Subject) -> float | None:
        """Requests the subject could make at once, as last known; None without such a limit."""

    def effective(self, class_id: str, limits: ClassLimits) -> ClassLimits:
        """The limits that hold here and now: with what Anthropic's headers said, and only a share in local mode."""

    def tick(self, now: float) -> None:
        """To be called four times a second with monotonic seconds: leases, heartbeats."""


class Money(Protocol):
    """All budgets, in this process or shared over several by Redis. Said in full in `policy/budgets.py`.

    Every method is for the loop's thread, returns at once (`seed` aside) and raises only ValueError, for an amount
    that none can be.
    """

    @property
    def shared(self) -> bool:
        """Whether other processes are counted now. False in one process, and while Redis is away (a share)."""

    @property
    def uncertain(self) -> bool:
        """Whether something is counted that only the ledger can tell: `seed` soon, within a minute."""

    def reserve(self, ask: MoneyAsk, answered: Callable[[MoneyVerdict], None]) -> None:
        """May this attempt be paid for? `answered` is called exactly once, on the loop.

        In one process before this returns; over Redis within 150 ms, whatever Redis does. Every admitted ask is to be
        settled. A denied ask may be asked again with the same id, as with a lower bound.
        """

    def spend(self, ask_id: str, nanousd: int, over: Callable[[], None]) -> None:
        """What the attempt has cost so far, absolute. `over` is called, at most once for a call of this, when that is
        beyond the reservation and there is no room for more: cut the attempt."""

    def settle(self, ask_id: str, nanousd: int) -> None:
        """The attempt is over and cost this much. Twice is once, and the first holds; unknown ids are left alone."""

    def renew(self, ask_id: str, *, lease_s: float) -> None:
        """The attempt is still under way; its lease ends `lease_s` from now."""

    async def seed(self) -> bool:
        """Read the ledger and bring the count to it. False when it could not be read, or somebody else was first.

        At the start, after a correction of the ledger, when a cap is new, when `uncertain`, and every ten minutes.
        """

    def snapshot(self, account_ids: Collection[str]) -> tuple[AccountUse, ...]:
        """How these accounts stand today and this month, as last known (over Redis up to some seconds old)."""

    def tick(self, now: float) -> None:
        """To be called four times a second with monotonic seconds: leases, looks at Redis."""
