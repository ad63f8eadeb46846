"""One request to its one outcome: a state machine that is told what happened and says what to do next.

    QUEUED ──admitted──▶ SENDING ──started──▶ RELAYING ──completed──▶ DONE
     ▲  │ diverted,        │ failed              │ failed before the commit point
     │  ▼ unfit            ▼                     ▼
     └─────── woke ── BACKOFF ◀──────────────────┘        (failed after it, refused, abandoned, nothing left: DONE)

What it is: which attempt is made on which model, when, and how the call ends. What it is not: sockets, clocks or dice;
those are in the driver (`gateway/pipeline.py`), which does what `step` says until it says `Finish`.

Models are tried in the plan's order: the next one when the breaker of the one before is open, or when it failed twice
(with three attempts for a request over all models, the third is the fallback's; docs/decisions/0006).

The commit point is the first byte of the answer given to the client. Before it a second attempt is invisible; after
it there is none (design §5.2). Illegal moves are assertions: they guard money.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from headgate.policy.records import Attempt, Failure, Outcome, OutcomeKind, Plan, Refused
from headgate.policy.retry import AMBIGUOUS_MAX, Cause, GiveUp, RetryAt, RetryBudget, RetryPolicy, cause, decide

_FAILURES_BEFORE_FALLBACK = 2


class Admit(msgspec.Struct, frozen=True):
    """Get a turn for an attempt on this model: its body, its limits, its place in the queue."""

    model: str
    again: bool
    """An attempt of this call was sent before: it goes to the head of its person's line."""


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


Step = Admit | Send | Sleep | Relay | Finish
State = Literal["QUEUED", "SENDING", "BACKOFF", "RELAYING", "DONE"]

_RELAY = Relay()


def _always(model: str, now: float) -> bool:  # noqa: ARG001  the shape of `Breakers.admits`
    return True


class Call:
    """State of one call. `step` is what to do now; tell it what came of it by exactly one of the methods."""

    __slots__ = (
        "_admits",
        "_ambiguous",
        "_attempts",
        "_budget",
        "_committed",
        "_failed_here",
        "_failure",
        "_jitter",
        "_models",
        "_plan",
        "_policy",
        "_probing",
        "_state",
        "model",
        "reasons",
        "step",
    )

    def __init__(
        self,
        plan: Plan,
        *,
        policy: RetryPolicy,
        budget: RetryBudget,
        jitter: Callable[[], float],
        admits: Callable[[str, float], bool] = _always,
        now: float = 0.0,
        sticky: str = "",
    ) -> None:
        """`admits(model, now)` tells whether the breaker of a model lets an attempt start.

        `sticky` is the fallback that the conversation went on with, empty for none.
        """
        self._plan = plan
        self._policy = policy
        self._budget = budget
        self._jitter = jitter
        self._admits = admits
        self._models = plan.models
        """Those that may still be tried, in order."""
        self._attempts = 0
        self._ambiguous = 0
        """Attempts that may have been billed though no answer came of them."""
        self._probing = False
        """Whether the attempt of now is its model's probe."""
        self._failed_here = 0
        """Failures in a row of the model of now."""
        self._failure: Failure | None = None
        self._committed = False
        self._state: State = "QUEUED"
        self.model = plan.models[0]
        """The model of the attempt that is made, waited for, or was made last."""
        self.reasons: tuple[str, ...] = plan.reasons
        """Why each decision fell as it did, in order; for the log."""
        if sticky in self._models[1:]:
            self.reasons += ("fallback:sticky",)
            self._models = (sticky, *(model for model in self._models if model != sticky))
            self.model = sticky
        if len(self._models) > 1 and not admits(self.model, now):
            self._move_on("breaker_open", now)
        self.step: Step = Admit(self.model, again=False)

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

    @property
    def fallback_reason(self) -> str:
        """Why a model other than the first is asked; empty when none is."""
        if self.model == self._plan.models[0]:
            return ""
        return next((reason[9:] for reason in reversed(self.reasons) if reason.startswith("fallback:")), "")

    def admitted(self, *, probe: bool = False) -> None:
        """The turn has come: the attempt is made. `probe`: it is the one that finds out whether its model is back."""
        assert self._state == "QUEUED", self
        assert not self._committed, "no second attempt after the commit point"
        if not self._attempts:
            # Not when it came: of a crowd that waits, the deposits would be lost before the retries are due.
            self._budget.deposit()
        self._probing = probe
        self._attempts += 1
        assert self._attempts <= self._policy.attempts_max
        self._state = "SENDING"
        self.step = Send(Attempt(self._attempts, self.model))

    def unfit(self, reason: str, now: float) -> None:
        """The body cannot be made to fit this model, which is not the first."""
        assert self._state == "QUEUED", self
        assert self.model != self._plan.models[0], "the plan's own model takes the plan's own body"
        self._drop(f"unfit:{reason}", now)

    def diverted(self, now: float) -> None:
        """While it waited for its turn, its model's breaker opened, or that of a better model closed."""
        assert self._state == "QUEUED", self
        if self._attempts:
            self._move_on("breaker_open", now)
        else:
            model = next((one for one in self._plan.models if one in self._models and self._admits(one, now)), None)
            if model is not None and model != self.model:
                self.reasons += ("home",) if model == self._plan.models[0] else ("fallback:breaker_open",)
                self.model = model
        self.step = Admit(self.model, again=self._attempts > 0)

    def refused(self, refused: Refused, now: float) -> None:
        """There is no turn for this model in time. A fallback that is full is no fallback; else the call ends."""
        assert self._state == "QUEUED", self
        if self.model != self._plan.models[0] and len(self._models) > 1:
            self._drop(f"fallback_refused:{refused.error_code}", now)
        elif self._failure is not None:
            self.reasons += (f"give_up:{refused.error_code}",)
            self._finish("failed", self._failure.status, self._failure)
        else:
            self._state = "DONE"
            self.step = Finish(
                Outcome("refused", refused.status, 0, self.model, error_code=refused.error_code, refused=refused)
            )

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
        self._failure = failure
        self._failed_here += 1
        self._ambiguous += cause(failure) is Cause.AMBIGUOUS
        if self._committed:
            self._finish("cut", 200, failure)
        else:
            self._after_failure(failure, now)

    def woke(self) -> None:
        """The wait is over."""
        assert self._state == "BACKOFF", self
        self._state = "QUEUED"
        self.step = Admit(self.model, again=True)

    def abandoned(self) -> None:
        """The client left, and nobody waits for the answer any more."""
        assert self._state != "DONE", self
        self._finish("abandoned", 499)

    def stopped(self) -> None:
        """The process ends while nothing is under way: nothing is sent any more."""
        assert self._state in ("BACKOFF", "QUEUED"), self
        failure = Failure(kind="connect", message="The gateway is restarting.", should_retry=False, sent=False)
        self._finish("failed", 529, failure)

    # inside

    def _after_failure(self, failure: Failure, now: float) -> None:
        """Again here, or on the next model, or no more."""
        decision = self._decision(failure, now)
        why = cause(failure)
        elsewhere = (
            len(self._models) > 1
            and self._attempts < self._policy.attempts_max
            and now <= self._plan.deadline
            and failure.should_retry is not False
            and self._better_elsewhere(why, failure, now)
        )
        if isinstance(decision, GiveUp) and not elsewhere:
            self.reasons += (f"give_up:{decision.reason}",)
            self._finish("failed", failure.status, failure)
        elif not self._budget.withdraw(owing=elsewhere and self._probing):
            # Who was the probe did all others a favour, and goes on whatever is left; probes are few.
            self.reasons += ("give_up:retry_budget",)
            self._finish("failed", failure.status, failure)
        elif elsewhere and self._move_on(why.value, now):
            self._state = "QUEUED"
            self.step = Admit(self.model, again=True)
        elif isinstance(decision, GiveUp):
            self.reasons += (f"give_up:{decision.reason}",)
            self._finish("failed", failure.status, failure)
        else:
            self.reasons += (f"retry:{decision.reason}",)
            assert decision.at <= self._plan.deadline, (decision, self._plan.deadline)
            self._state = "BACKOFF"
            self.step = Sleep(decision.at)

    def _decision(self, failure: Failure, now: float) -> RetryAt | GiveUp:
        return decide(
            failure,
            attempts_made=self._attempts,
            ambiguous_made=self._ambiguous,
            now=now,
            deadline=self._plan.deadline,
            policy=self._policy,
            jitter=self._jitter(),
        )

    def _better_elsewhere(self, why: Cause, failure: Failure, now: float) -> bool:
        """Whether the trouble is this model's, and waiting for it has been tried or is in vain (failure-model §2.1)."""
        match why:
            case Cause.OVERLOADED | Cause.SERVER:
                return self._failed_here >= _FAILURES_BEFORE_FALLBACK or not self._admits(self.model, now)
            case Cause.AMBIGUOUS:
                # One more attempt at most, since each may be billed; a model that is slow will be slow again.
                slow = failure.kind in ("timeout", "stall") or failure.status == 504
                return self._ambiguous < AMBIGUOUS_MAX and (slow or not self._admits(self.model, now))
            case Cause.RATE_LIMIT:
                return failure.retry_after_s is None and self._failed_here >= _FAILURES_BEFORE_FALLBACK
            case _:
                return False

    def _move_on(self, why: str, now: float) -> bool:
        """Go on to the next model whose breaker lets it; stay where there is none."""
        for at, model in enumerate(self._models):
            if model != self.model and self._admits(model, now):
                self.reasons += (f"fallback:{why}",)
                # What stands before it stays a last resort behind it.
                self._models = (*self._models[at:], *self._models[:at])
                self.model = model
                self._failed_here = 0
                return True
        return False

    def _drop(self, reason: str, now: float) -> None:
        """This model is out of the question: the others, or how the call last failed."""
        self.reasons += (reason,)
        self._models = tuple(model for model in self._models if model != self.model)
        self.model = next((model for model in self._models if self._admits(model, now)), self._models[0])
        self._failed_here = 0
        failure = self._failure
        if failure is None:
            self.step = Admit(self.model, again=False)
            return
        # The retry is paid for already. It was to be elsewhere; now it is here, after the pause that belongs to it.
        decision = self._decision(failure, now)
        if isinstance(decision, GiveUp):
            self.reasons += (f"give_up:{decision.reason}",)
            self._finish("failed", failure.status, failure)
        else:
            self._state = "BACKOFF"
            self.step = Sleep(decision.at)

    def _finish(self, kind: OutcomeKind, status: int, failure: Failure | None = None) -> None:
        assert self._state != "DONE", self
        self._state = "DONE"
        self.step = Finish(
            Outcome(
                kind=kind,
                status=status,
                attempts=self._attempts,
                model=self.model,
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
