"""What one call costs, told to the ledger as it happens: the only place where a call's events are written.

What it is: intent, start, progress and end of each attempt, and the call's one closing, with their prices. What it is
not: a decision. An ending waits in memory for the next write, so that the last one and the closing are one write.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import structlog

from headgate.gateway.failures import request_id
from headgate.gateway.upstream import Answer
from headgate.policy.call import failure_code
from headgate.policy.pricing import Cost, is_billable, price
from headgate.policy.prompt_cache import CachePlan
from headgate.policy.records import (
    Attempt,
    AttemptEnded,
    AttemptIntent,
    AttemptProgress,
    AttemptStarted,
    CallClosed,
    CallOpened,
    ClientRequest,
    Failure,
    LedgerEvent,
    OutcomeKind,
    Plan,
    Principal,
    Record,
)
from headgate.policy.token_estimate import OutputCalibration
from headgate.storage.interfaces import Ledger
from headgate.wire.catalog import Catalog
from headgate.wire.stream import StreamFold
from headgate.wire.usage import NO_USAGE, Usage

log = structlog.get_logger()

_ASSUMED_MODELS_MAX = 1000


class Attribution(Record, frozen=True, gc=False):
    """On whose behalf a request is made: from the headers for apps, or the key alone."""

    user: str
    """Empty: `metadata.user_id` of the body, else the key's owner (only for keys with scope `app`)."""
    tier: str
    endpoint: str = "messages"
    conversation: str = ""
    deadline_s: float | None = None


class Ending(Record, frozen=True, gc=False):
    """How a call ended."""

    outcome: OutcomeKind
    status: int
    """What the client saw."""
    total_ms: int
    model: str = ""
    error_code: str = ""
    failure: str = ""
    reasons: tuple[str, ...] = ()
    attempts: int = 0
    first_byte_ms: int | None = None
    reused: bool = False


class Accounts:
    """What the settlements of a process share."""

    def __init__(self, ledger: Ledger, catalog: Catalog) -> None:
        self.ledger = ledger
        self.calibration = OutputCalibration()
        self._catalog = catalog
        self._assumed_models: set[str] = set()

    def cost(self, usage: Usage, model: str, at_ns: int, *, billable: bool) -> Cost:
        """The price of an attempt; a model without a price is reported once."""
        cost = price(usage, model, at_ns, self._catalog, billable=billable)
        if cost.assumed and model not in self._assumed_models and len(self._assumed_models) < _ASSUMED_MODELS_MAX:
            self._assumed_models.add(model)
            log.error("unknown_price", model=model, priced_as=cost.price_id, mend="add the model to wire/catalog.toml")
        return cost


class Settlement:
    """One call's account. `usage` and `estimated` are those of the attempt that served, or failed last."""

    __slots__ = (
        "_accounts",
        "_ended",
        "_request",
        "attempt_nanousd",
        "cost_nanousd",
        "estimated",
        "saved_nanousd",
        "stop_reason",
        "usage",
    )

    def __init__(self, accounts: Accounts, request: ClientRequest) -> None:
        self._accounts = accounts
        self._request = request
        self._ended: list[LedgerEvent] = []
        self.usage = NO_USAGE
        self.estimated = False
        self.attempt_nanousd = 0
        """Of the attempt that ended last."""
        self.cost_nanousd = 0
        """Over all attempts."""
        self.saved_nanousd = 0
        self.stop_reason = ""

    def opened(
        self, plan: Plan, principal: Principal, whose: Attribution, prompt: CachePlan | None = None
    ) -> CallOpened:
        """The event a call begins with. `prompt` is what is known of it, None when it was not looked at."""
        return CallOpened(
            call_id=self._request.call_id,
            at_ns=self._request.received_at_ns,
            key_id=principal.key_id,
            user=whose.user,
            tier=whose.tier,
            endpoint=whose.endpoint,
            model_asked=plan.model_asked,
            streamed=plan.streamed,
            conversation=whose.conversation,
            arm=plan.arm,
            family="" if prompt is None else prompt.family,
            prefix="" if prompt is None else prompt.prefix,
            prefix_tokens=0 if prompt is None else prompt.prefix_tokens,
            digest="" if prompt is None else prompt.digest,
        )

    def intend(self, attempt: Attempt, plan: Plan, at_ns: int, opened: CallOpened | None) -> None:
        """Before any byte leaves; `opened` comes with the first attempt. LedgerUnavailable: nothing may leave."""
        intent = AttemptIntent(
            call_id=self._request.call_id,
            number=attempt.number,
            model=attempt.model,
            at_ns=at_ns,
            input_tokens_estimate=plan.input_tokens_estimate,
            max_tokens=plan.max_tokens,
        )
        if opened is not None:
            self._accounts.ledger.write(opened, intent)
        else:
            self._accounts.ledger.write(*self._take_ended(), intent)

    def started(self, attempt: Attempt, answer: Answer, fold: StreamFold) -> None:
        """`message_start`: the input side is exact from here on."""
        self._accounts.ledger.write(
            AttemptStarted(
                call_id=self._request.call_id,
                number=attempt.number,
                upstream_request_id=request_id(answer),
                usage=fold.usage,
            )
        )

    def progressed(self, attempt: Attempt, plan: Plan, fold: StreamFold) -> Usage:
        """Output so far; returns what has been used."""
        seen = self._seen(attempt, plan, fold)
        tokens = seen.output_tokens
        self._accounts.ledger.write(
            AttemptProgress(call_id=self._request.call_id, number=attempt.number, output_tokens=tokens)
        )
        return seen

    def completed_stream(self, attempt: Attempt, answer: Answer, fold: StreamFold) -> None:
        """The stream came to its end: exact."""
        self.stop_reason = fold.stop_reason
        if not fold.usage.thinking_tokens:
            # Thinking is billed in full and shown in part or not at all: such an answer says nothing about text.
            self._accounts.calibration.observe(
                attempt.model, output_bytes=fold.output_bytes, output_tokens=fold.usage.output_tokens
            )
        billable = is_billable(stop_reason=fold.stop_reason, has_content=fold.saw_content or fold.saw_block)
        self._end(attempt, "settled", 200, fold.usage, answer, model=fold.model, billable=billable)

    def completed_whole(
        self, attempt: Attempt, answer: Answer, usage: Usage, *, model: str, stop_reason: str, has_content: bool
    ) -> int:
        """An answer that was not streamed: exact. Returns what this attempt cost, in nano-dollars."""
        self.stop_reason = stop_reason
        billable = is_billable(stop_reason=stop_reason, has_content=has_content)
        return self._end(attempt, "settled", 200, usage, answer, model=model, billable=billable)

    def left(self, attempt: Attempt, plan: Plan, answer: Answer, fold: StreamFold, *, status: int) -> None:
        """The client left a stream: what was produced so far is billed, and estimated."""
        self._end(attempt, "estimated", status, self._seen(attempt, plan, fold), answer, "client_left")

    def failed(
        self, attempt: Attempt, plan: Plan, failure: Failure, answer: Answer | None, fold: StreamFold | None
    ) -> None:
        """The attempt broke. `fold` is what its stream told, None when there was none."""
        code = failure_code(failure)
        if fold is not None and fold.started:
            self._end(attempt, "estimated", failure.status, self._seen(attempt, plan, fold), answer, code)
        elif failure.sent and failure.kind not in ("status", "stream_error"):
            # It may have been worked on and billed: never free, until a reconciliation says otherwise.
            usage = Usage(input_tokens=plan.input_tokens_estimate)
            self._end(attempt, "estimated", failure.status, usage, None, code)
        else:
            self._end(attempt, "void", failure.status, NO_USAGE, answer if failure.status else None, code)

    def pause(self) -> None:
        """A wait begins: what has ended is written before it."""
        if self._ended:
            self._accounts.ledger.write(*self._take_ended())

    def close(
        self,
        kind: OutcomeKind,
        *,
        status: int,
        model: str,
        error_code: str,
        total_ms: int,
        queue_ms: int = 0,
        first_byte_ms: int | None = None,
        opened: CallOpened | None = None,
    ) -> None:
        """The call's one outcome. `opened` comes with a call of which no attempt was made."""
        closed = CallClosed(
            call_id=self._request.call_id,
            outcome=kind,
            status=status,
            model=model,
            total_ms=total_ms,
            queue_ms=queue_ms,
            first_byte_ms=first_byte_ms,
            error_code=error_code,
            stop_reason=self.stop_reason,
        )
        if opened is not None:
            self._accounts.ledger.write(opened, closed)
        else:
            self._accounts.ledger.write(*self._take_ended(), closed)

    def reused(self, ending: Ending, opened: CallOpened, stop_reason: str, saved_nanousd: int) -> None:
        """The call was answered by the answer of an earlier one, which had cost this much: it costs nothing."""
        self.stop_reason, self.saved_nanousd = stop_reason, saved_nanousd
        self._accounts.ledger.write(
            opened,
            CallClosed(
                call_id=self._request.call_id,
                outcome=ending.outcome,
                status=ending.status,
                model=ending.model,
                total_ms=ending.total_ms,
                first_byte_ms=ending.first_byte_ms,
                error_code=ending.error_code,
                stop_reason=stop_reason,
                reused=True,
                saved_nanousd=saved_nanousd,
            ),
        )

    def _seen(self, attempt: Attempt, plan: Plan, fold: StreamFold) -> Usage:
        """Usage of an answer that did not end: exact input, and output by the bytes that went by."""
        if not fold.started:
            return Usage(input_tokens=plan.input_tokens_estimate)
        if fold.usage_final:
            return fold.usage
        tokens = self._accounts.calibration.tokens(attempt.model, fold.output_bytes)
        return msgspec.structs.replace(fold.usage, output_tokens=max(tokens, fold.usage.output_tokens))

    def _end(
        self,
        attempt: Attempt,
        state: Literal["settled", "estimated", "void"],
        status: int,
        usage: Usage,
        answer: Answer | None,
        error_code: str = "",
        *,
        model: str = "",
        billable: bool = True,
    ) -> int:
        """The attempt's terminal row, priced at the model the answer names."""
        cost = self._accounts.cost(
            usage, model or attempt.model, self._request.received_at_ns, billable=billable and state != "void"
        )
        self._ended.append(
            AttemptEnded(
                call_id=self._request.call_id,
                number=attempt.number,
                state=state,
                status=status,
                usage=usage,
                price_id=cost.price_id,
                cost_nanousd=cost.cost_nanousd,
                saved_nanousd=cost.saved_nanousd,
                error_code=error_code,
                upstream_request_id=request_id(answer),
            )
        )
        self.usage = usage
        self.estimated = state == "estimated"
        self.saved_nanousd = cost.saved_nanousd
        self.attempt_nanousd = cost.cost_nanousd
        self.cost_nanousd += cost.cost_nanousd
        return cost.cost_nanousd

    def _take_ended(self) -> list[LedgerEvent]:
        ended, self._ended = self._ended, []
        return ended
