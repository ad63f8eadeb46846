"""Folds ledger events into rows of `calls` and `attempts`. Pure: opens no file and no database, reads no clock.

A call is in memory from its first event until it is closed and its attempts are; what was touched since the last
`committed` is written as whole rows. So any batching of the same events makes the same rows, and a call that opens
and ends within a batch is written once. The first ending of an attempt or a call holds: here a second is counted and
ignored, and in the tables a row that is not open is never written again. So a replay is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

import msgspec

from headgate.policy.records import (
    AttemptEnded,
    AttemptIntent,
    AttemptProgress,
    AttemptStarted,
    AttemptState,
    CallClosed,
    CallOpened,
    LedgerEvent,
    OutcomeKind,
)
from headgate.wire.usage import NO_USAGE, Usage

Price = Callable[[Usage, str, int], tuple[int, int, str]]
"""(usage, model, at_ns) → (cost_nanousd, saved_nanousd, price_id)."""

PROCESS_LOST = "process_lost"
"""The error code of what a process left open when it died."""

_number = attrgetter("number")
_encode_usage = msgspec.json.Encoder().encode
_decode_usage = msgspec.json.Decoder(Usage).decode


class AttemptRow(msgspec.Struct, gc=False):
    """A row of `attempts`, still changing."""

    number: int
    model: str = ""
    state: AttemptState = "open"
    at_ns: int = 0
    input_tokens_estimate: int = 0
    max_tokens: int = 0
    status: int = 0
    error_code: str = ""
    upstream_request_id: str = ""
    usage: Usage = NO_USAGE
    price_id: str = ""
    cost_nanousd: int = 0
    saved_nanousd: int = 0
    changed: bool = False
    """It is not written as it is now."""

    def values(self, call_id: str) -> tuple[Any, ...]:  # Any: what a database driver takes
        """The row, in the order of the table's columns."""
        return (
            call_id,
            self.number,
            self.model,
            self.state,
            self.at_ns,
            self.input_tokens_estimate,
            self.max_tokens,
            self.status,
            self.error_code,
            self.upstream_request_id,
            _encode_usage(self.usage).decode(),
            self.price_id,
            self.cost_nanousd,
            self.saved_nanousd,
            None,
        )


class CallRow(msgspec.Struct, gc=False):
    """A row of `calls`, still changing, with its attempts. What the attempts tell is added up in `values`."""

    call_id: str
    at_ns: int
    writer: str
    key_id: str = ""
    user_id: str = ""
    tier: str = ""
    endpoint: str = ""
    conversation: str = ""
    model_asked: str = ""
    model: str = ""
    arm: str = ""
    status: int = 0
    error_code: str = ""
    outcome: OutcomeKind | None = None
    stop_reason: str = ""
    streamed: bool = False
    queue_ms: int = 0
    first_byte_ms: int | None = None
    total_ms: int = 0
    family: str = ""
    prefix: str = ""
    prefix_tokens: int = 0
    digest: str = ""
    reused: bool = False
    reused_nanousd: int = 0
    """What a reused answer saved. Not a column: it is in `saved_nanousd`."""
    attempts: list[AttemptRow] = []
    """By number."""

    def attempt(self, number: int) -> AttemptRow:
        """The attempt of this number, made if it is new, marked as changed."""
        for row in self.attempts:
            if row.number == number:
                row.changed = True
                return row
        row = AttemptRow(number, changed=True)
        self.attempts.append(row)
        self.attempts.sort(key=_number)
        return row

    @property
    def state(self) -> AttemptState:
        """`open` until the call is closed and all its attempts are; `estimated` when any part of the bill is."""
        if self.outcome is None:
            return "open"
        state: AttemptState = "void"
        for attempt in self.attempts:
            if attempt.state == "open":
                return "open"
            if state == "void" or attempt.state == "estimated":
                state = attempt.state
        return state

    def values(self) -> tuple[Any, ...]:  # Any: what a database driver takes
        """The row, in the order of the table's columns. Tokens are those of the last attempt, money that of all."""
        usage = self.attempts[-1].usage if self.attempts else NO_USAGE
        cost_nanousd, saved_nanousd = 0, self.reused_nanousd
        for attempt in self.attempts:
            cost_nanousd += attempt.cost_nanousd
            saved_nanousd += attempt.saved_nanousd
        return (
            self.call_id,
            self.at_ns,
            self.writer,
            self.key_id,
            self.user_id,
            self.tier,
            self.endpoint,
            self.conversation,
            self.model_asked,
            self.model,
            self.arm,
            self.status,
            self.error_code,
            self.outcome,
            self.state,
            self.stop_reason,
            self.streamed,
            usage.input_tokens,
            usage.cache_read_tokens,
            usage.cache_write_5m_tokens,
            usage.cache_write_1h_tokens,
            usage.output_tokens,
            cost_nanousd,
            saved_nanousd,
            self.queue_ms,
            self.first_byte_ms,
            self.total_ms,
            self.family,
            self.prefix,
            self.prefix_tokens,
            self.digest,
            self.reused,
        )


def call_from_columns(call: Mapping[str, Any], tried: Iterable[Mapping[str, Any]]) -> CallRow:
    """The opposite of `values`: a call and its attempts from their rows, by the names of their columns."""
    row = CallRow(**{name: call[name] for name in CallRow.__struct_fields__ if name in call})
    row.streamed, row.reused = bool(row.streamed), bool(row.reused)
    for attempt in tried:
        fields = {name: attempt[name] for name in AttemptRow.__struct_fields__ if name in attempt}
        row.attempts.append(AttemptRow(**{**fields, "usage": decode_usage(fields["usage"])}))
    row.attempts.sort(key=_number)
    row.reused_nanousd = call["saved_nanousd"] - sum(attempt.saved_nanousd for attempt in row.attempts)
    return row


def decode_usage(column: str) -> Usage:
    """The usage that an attempt's row holds."""
    return _decode_usage(column)


def ending_of_orphan(call: CallRow, price: Price) -> tuple[LedgerEvent, ...]:
    """The events that close a call whose process is gone: one ending for each open attempt, and one for the call.

    Billed is what was seen: the exact input once Anthropic began to answer and the estimate before, and the output
    up to the last progress. It is an estimate either way, and never nothing.
    """
    events: list[LedgerEvent] = []
    for attempt in call.attempts:
        if attempt.state != "open":
            continue
        usage = attempt.usage
        if not usage.prompt_tokens:
            usage = msgspec.structs.replace(usage, input_tokens=attempt.input_tokens_estimate)
        cost_nanousd, saved_nanousd, price_id = price(usage, attempt.model, attempt.at_ns)
        events.append(
            AttemptEnded(
                call_id=call.call_id,
                number=attempt.number,
                state="estimated",
                status=attempt.status,
                usage=usage,
                price_id=price_id,
                cost_nanousd=cost_nanousd,
                saved_nanousd=saved_nanousd,
                error_code=PROCESS_LOST,
            )
        )
    if call.outcome is None:
        last = call.attempts[-1] if call.attempts else AttemptRow(0, call.model_asked, "void")
        answered = last.state == "settled"
        outcome: OutcomeKind = "completed" if answered else "cut" if last.usage.prompt_tokens else "failed"
        events.append(
            CallClosed(
                call_id=call.call_id,
                outcome=outcome,
                status=last.status,
                model=last.model,
                total_ms=0,
                error_code="" if answered else PROCESS_LOST,
            )
        )
    return tuple(events)


class Fold:
    """Calls that are open, and what changed since the last commit."""

    def __init__(self, find: Callable[[str], CallRow | None]) -> None:
        """`find` looks up a call that is not in memory, by its id: one that was closed before an event for it came."""
        self.open: dict[str, CallRow] = {}
        self.contradictions = 0
        """Events that told another ending of what had ended. Stays 0 as long as nobody ends what was swept."""
        self._find = find
        self._touched: dict[str, CallRow] = {}

    def load(self, call: CallRow) -> None:
        """Take up a call that the database has as open."""
        self.open[call.call_id] = call

    def apply(self, events: Iterable[LedgerEvent], writer: str) -> None:
        """Fold the events of this writer's journal, in their order."""
        for event in events:
            call_id = event.call_id
            call = self._touched.get(call_id)
            if call is None:
                call = self.open.get(call_id)
                if call is None:
                    call = self.open[call_id] = self._unknown(event, writer)
                self._touched[call_id] = call
            self._tell(call, event)
            if call.outcome is not None and call.state != "open":
                self.open.pop(call_id, None)

    def changed(self) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        """Rows of `calls` and of `attempts` that differ from what was last committed."""
        calls = [call.values() for call in self._touched.values()]
        attempts = [
            attempt.values(call.call_id)
            for call in self._touched.values()
            for attempt in call.attempts
            if attempt.changed
        ]
        return calls, attempts

    def committed(self) -> None:
        """What `changed` gave is in the database."""
        for call in self._touched.values():
            for attempt in call.attempts:
                attempt.changed = False
        self._touched.clear()

    def _unknown(self, event: LedgerEvent, writer: str) -> CallRow:
        if isinstance(event, CallOpened):
            return CallRow(event.call_id, event.at_ns, writer)
        # The line that opened it may be damaged: what it cost is told all the same, at the time its writer began.
        at_ns = event.at_ns if isinstance(event, AttemptIntent) else int(writer.partition("-")[0])
        return self._find(event.call_id) or CallRow(event.call_id, at_ns, writer)

    def _tell(self, call: CallRow, event: LedgerEvent) -> None:
        match event:
            case CallOpened():
                call.at_ns = event.at_ns
                call.key_id = event.key_id
                call.user_id = event.user
                call.tier = event.tier
                call.endpoint = event.endpoint
                call.conversation = event.conversation
                call.model_asked = event.model_asked
                call.model = call.model or event.model_asked
                call.arm = event.arm
                call.streamed = event.streamed
                call.family = event.family
                call.prefix = event.prefix
                call.prefix_tokens = event.prefix_tokens
                call.digest = event.digest
            case AttemptIntent():
                attempt = call.attempt(event.number)
                attempt.model = event.model
                attempt.at_ns = event.at_ns
                attempt.input_tokens_estimate = event.input_tokens_estimate
                attempt.max_tokens = event.max_tokens
            case AttemptStarted():
                attempt = call.attempt(event.number)
                if attempt.state == "open":
                    attempt.upstream_request_id = event.upstream_request_id
                    attempt.usage = event.usage
            case AttemptProgress():
                attempt = call.attempt(event.number)
                if attempt.state == "open" and event.output_tokens > attempt.usage.output_tokens:
                    attempt.usage = msgspec.structs.replace(attempt.usage, output_tokens=event.output_tokens)
            case AttemptEnded():
                attempt = call.attempt(event.number)
                if attempt.state != "open":
                    self.contradictions += (attempt.state, attempt.cost_nanousd) != (event.state, event.cost_nanousd)
                    return
                attempt.state = event.state
                attempt.status = event.status
                attempt.usage = event.usage
                attempt.price_id = event.price_id
                attempt.cost_nanousd = event.cost_nanousd
                attempt.saved_nanousd = event.saved_nanousd
                attempt.error_code = event.error_code
                attempt.upstream_request_id = event.upstream_request_id or attempt.upstream_request_id
            case CallClosed():
                if call.outcome is not None:
                    self.contradictions += call.outcome != event.outcome
                    return
                call.outcome = event.outcome
                call.status = event.status
                call.model = event.model
                call.total_ms = event.total_ms
                call.queue_ms = event.queue_ms
                call.first_byte_ms = event.first_byte_ms
                call.error_code = event.error_code
                call.stop_reason = event.stop_reason
                call.reused = event.reused
                call.reused_nanousd = event.saved_nanousd
