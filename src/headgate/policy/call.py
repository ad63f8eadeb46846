"""One admitted request to its one outcome: a state machine that is told what happened and says what to do next.

    SENDING ──started──▶ RELAYING ──completed──▶ DONE
       ▲ │ failed           │ failed before the commit point
       │ ▼                  ▼
     woke ◀── BACKOFF ◀─────┘          (failed after it, abandoned, or nothing left to try: DONE)

What it is: which attempt is made, when, and how the call ends. What it is not: sockets, clocks or dice; those are
in the driver (`gateway/pipeline.py`), which does what `step` says until it says `Finish`.

The commit point is the first byte of the answer given to the client. Before it a second attempt is invisible; after
it there is none (design §5.2). Illegal moves are assertions: they guard money.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from headgate.policy.records import Attempt, Failure, Outcome, OutcomeKind, Plan
from headgate.policy.retry import GiveUp, RetryBudget, RetryPolicy, decide


class Send(msgspec.Struct, frozen=True):
    """Make this attempt."""

    attempt: Attempt


class Sleep(msgspec.Struct, frozen=True):
    """Wait until this monotonic second; it is never after the deadline."""

    until: float


class Relay(msgspec.Struct, frozen=True):
    """Pass the answer on until it ends."""


class Finish(msgspec.Struct, frozen=True):
    """The call is over."""

    outcome: Outcome


Step = Send | Sleep | Relay | Finish
State = Literal["SENDING", "BACKOFF", "RELAYING", "DONE"]

_RELAY = Relay()


class Call:
    """State of one call. `step` is what to do now; tell it what came of it by exactly one of the methods."""

    __slots__ = ("_attempts", "_budget", "_committed", "_jitter", "_plan", "_policy", "_state", "reasons", "step")

    def __init__(self, plan: Plan, *, policy: RetryPolicy, budget: RetryBudget, jitter: Callable[[], float]) -> None:
        self._plan = plan
        self._policy = policy
        self._budget = budget
        self._jitter = jitter
        self._attempts = 0
        self._committed = False
        self._state: State = "SENDING"
        self.reasons: tuple[str, ...] = plan.reasons
        """Why each decision fell as it did, in order; for the log."""
        self.step: Step = self._next_attempt()
        budget.deposit()

    def __repr__(self) -> str:
        return f"<Call {self._state} attempt {self._attempts}{' committed' if self._committed else ''} {self.step}>"

    @property
    def attempts(self) -> int:
        """Attempts made or being made, over all models."""
        return self._attempts

    @property
    def committed(self) -> bool:
        """Whether the client has seen a byte of the answer."""
        return self._committed

    def started(self) -> None:
        """Anthropic began to answer with a status that is relayed."""
        assert self._state == "SENDING", self
        self._state = "RELAYING"
        self.step = _RELAY

    def commit(self) -> None:
        """The first byte of the answer goes to the client now."""
        assert self._state == "RELAYING", self
        self._committed = True

    def completed(self, status: int) -> None:
        """The answer has gone to the client whole."""
        assert self._state == "RELAYING", self
        self._finish("completed", status)

    def failed(self, failure: Failure, now: float) -> None:
        """The attempt broke: at sending, or while its answer was relayed."""
        assert self._state in ("SENDING", "RELAYING"), self
        if self._committed:
            self._finish("cut", 200, failure)
            return
        decision = decide(
            failure,
            attempts_made=self._attempts,
            now=now,
            deadline=self._plan.deadline,
            policy=self._policy,
            jitter=self._jitter(),
        )
        if isinstance(decision, GiveUp):
            self.reasons += (f"give_up:{decision.reason}",)
            self._finish("failed", failure.status, failure)
            return
        if not self._budget.withdraw():
            self.reasons += ("give_up:retry_budget",)
            self._finish("failed", failure.status, failure)
            return
        self.reasons += (f"retry:{decision.reason}",)
        assert decision.at <= self._plan.deadline, (decision, self._plan.deadline)
        self._state = "BACKOFF"
        self.step = Sleep(decision.at)

    def woke(self) -> None:
        """The wait is over."""
        assert self._state == "BACKOFF", self
        self._state = "SENDING"
        self.step = self._next_attempt()

    def abandoned(self) -> None:
        """The client left, and nobody waits for the answer any more."""
        assert self._state != "DONE", self
        self._finish("abandoned", 499)

    def stopped(self) -> None:
        """The process ends while nothing is under way: nothing is sent any more."""
        assert self._state == "BACKOFF", self
        failure = Failure(kind="connect", message="The gateway is restarting.", should_retry=False, sent=False)
        self._finish("failed", 529, failure)

    def _next_attempt(self) -> Send:
        assert not self._committed, "no second attempt after the commit point"
        self._attempts += 1
        assert self._attempts <= self._policy.attempts_max
        return Send(Attempt(self._attempts, self._plan.models[0]))

    def _finish(self, kind: OutcomeKind, status: int, failure: Failure | None = None) -> None:
        assert self._state != "DONE", self
        self._state = "DONE"
        self.step = Finish(
            Outcome(
                kind=kind,
                status=status,
                attempts=self._attempts,
                model=self._plan.models[0],
                error_code=failure_code(failure) if failure else "",
                failure=failure,
            )
        )


def failure_code(failure: Failure) -> str:
    """A stable name for a failure, for the ledger, the log and `error.details.error_code`."""
    if failure.error_code:
        return failure.error_code
    match failure.kind:
        case "status":
            return failure.error_type or f"upstream_{failure.status}"
        case "stream_error":
            return failure.error_type
        case "connect":
            return "upstream_unreachable"
        case "tls":
            return "upstream_certificate"
        case "timeout":
            return "upstream_timeout"
        case "stall":
            return "upstream_stalled"
        case "malformed":
            return "upstream_malformed"
        case _:
            return "upstream_cut"
