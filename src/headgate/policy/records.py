"""The records of one request, in the order they come to exist, and the events the ledger is told.

`StreamFold` lives in `wire/stream.py` and `LogLine` in `telemetry/log_line.py`; all others are here.
They are frozen `msgspec.Struct`s (docs/decisions/0002): a frozen dataclass of 24 fields takes 5.4 µs to make,
the same struct 0.5 µs, and a request makes ten of them.

Units: `*_at` and `deadline` are monotonic seconds; `*_at_ns` are UTC nanoseconds for the ledger. The two are never
subtracted from one another. Money is integer nano-dollars (1 USD = 1_000_000_000).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from headgate.wire.usage import NO_USAGE, Usage

Scope = Literal["messages", "app", "batch", "admin:read", "admin:write"]
FailureKind = Literal["status", "connect", "tls", "reset", "timeout", "stall", "truncated", "stream_error", "malformed"]
OutcomeKind = Literal["completed", "failed", "abandoned", "cut", "refused"]
AttemptState = Literal["open", "settled", "estimated", "void"]


class Record(msgspec.Struct, frozen=True, gc=False):
    """Base of all records."""


class ClientRequest(Record, frozen=True, gc=False):
    """1. What a client sent, once its head and body are complete."""

    call_id: str
    """`call_` and 24 characters; unique over processes."""
    body: bytes
    """Decoded of any content-encoding; otherwise the client's bytes."""
    forwarded: bytes
    """The header lines Anthropic will get from this client, `name: value\\r\\n` each: the open list of the design."""
    query: bytes
    """Raw query string, without `?`."""
    received_at: float
    received_at_ns: int


class Principal(Record, frozen=True, gc=False):
    """2. Who is asking. Made once per key and request attribution, never from the body of an untrusted key."""

    key_id: str
    user: str
    tier: str = "free"
    scopes: frozenset[str] = frozenset({"messages"})
    models: tuple[str, ...] = ()
    """Model ids this key may ask for; empty: all."""
    rpm: int | None = None
    otpm: int | None = None
    concurrency: int | None = None
    budget_day_nanousd: int | None = None
    budget_month_nanousd: int | None = None
    plan_cache: bool = True
    """Whether prompts of this key are marked for the cache."""


class Plan(Record, frozen=True, gc=False):
    """3. What we mean to do: the models in order, the bytes to send, how long it may wait."""

    models: tuple[str, ...]
    body: bytes
    streamed: bool
    input_tokens_estimate: int
    max_tokens: int
    deadline: float
    """Monotonic seconds; no wait (queue or backoff) may end after it."""
    arm: str = ""
    reasons: tuple[str, ...] = ()
    model_asked: str = ""


class Admitted(Record, frozen=True, gc=False):
    """4a. The request may be sent. Holds what was reserved for it."""

    reservation_id: str = ""
    queue_ms: int = 0


class Refused(Record, frozen=True, gc=False):
    """4b. The request may not be sent, and why. `retry_after_s` is None where trying again cannot help."""

    status: int
    error_type: str
    error_code: str
    message: str
    retry_after_s: float | None = None
    retryable: bool = True
    """False where the same request would be refused again after the wait too."""
    limit: float | None = None
    """The number that was reached, where one was."""
    window_s: float | None = None
    """The time it holds for."""


class Attempt(Record, frozen=True, gc=False):
    """5. One call to Anthropic. `number` starts at 1 and counts over all models."""

    number: int
    model: str


class Failure(Record, frozen=True, gc=False):
    """6. How an attempt failed. `status` is 0 where no HTTP status came.

    `sent` tells whether bytes of the request may have reached Anthropic: a connect failure costs nothing, a reset
    after sending may have been billed.
    """

    kind: FailureKind
    status: int = 0
    error_type: str = ""
    error_code: str = ""
    message: str = ""
    retry_after_s: float | None = None
    should_retry: bool | None = None
    """Upstream's `x-should-retry`, None when absent."""
    upstream_request_id: str = ""
    elapsed_s: float = 0.0
    sent: bool = True


class Outcome(Record, frozen=True, gc=False):
    """8. How the call ended. Exactly one for each `Admitted`."""

    kind: OutcomeKind
    status: int
    attempts: int
    model: str
    error_code: str = ""
    failure: Failure | None = None
    refused: Refused | None = None
    """Why no attempt was made, when the call was refused while it waited for its turn."""


class AttemptEntry(Record, frozen=True, gc=False, omit_defaults=True):
    """One row of the ledger's attempts, as `headgate calls` shows it."""

    number: int
    model: str
    state: AttemptState
    status: int = 0
    error_code: str = ""
    upstream_request_id: str = ""
    usage: Usage = NO_USAGE
    price_id: str = ""
    cost_nanousd: int = 0


class LedgerEntry(Record, frozen=True, gc=False, omit_defaults=True):
    """9. One call as the ledger knows it: who, model, tokens of the attempt that served, cost over all attempts."""

    call_id: str
    at_ns: int
    key_id: str
    user: str
    tier: str
    endpoint: str
    conversation: str
    model_asked: str
    model: str
    arm: str
    status: int
    error_code: str
    outcome: OutcomeKind | None
    state: AttemptState
    stop_reason: str
    streamed: bool
    usage: Usage
    cost_nanousd: int
    saved_nanousd: int
    queue_ms: int
    first_byte_ms: int | None
    total_ms: int
    attempts: tuple[AttemptEntry, ...]
    family: str = ""
    reused: bool = False


# What the journal is told, in the order it happens. A call is `CallOpened`, then for each attempt `AttemptIntent`
# (before any byte leaves), at most one `AttemptStarted`, any number of `AttemptProgress`, exactly one `AttemptEnded`,
# and at last one `CallClosed`.


class CallOpened(Record, frozen=True, gc=False, tag="opened", tag_field="event", omit_defaults=True):
    """A client's request was accepted for a decision. Comes first, in one write with the first intent."""

    call_id: str
    at_ns: int
    key_id: str
    user: str
    tier: str
    endpoint: str
    model_asked: str
    streamed: bool
    conversation: str = ""
    arm: str = ""
    family: str = ""
    """Of prompts (`policy/prompt_families.py`); empty where none was told."""
    prefix: str = ""
    """Digest of the longest prefix that the prompt cache can hold, as it was sent; hex."""
    prefix_tokens: int = 0
    """An estimate."""
    digest: str = ""
    """Of the whole request: equal requests of one key have equal ones; hex."""


class AttemptIntent(Record, frozen=True, gc=False, tag="intent", tag_field="event", omit_defaults=True):
    """An attempt is about to leave. Should the process die now, this row is what a bill is estimated from."""

    call_id: str
    number: int
    model: str
    at_ns: int
    input_tokens_estimate: int
    max_tokens: int


class AttemptStarted(Record, frozen=True, gc=False, tag="started", tag_field="event", omit_defaults=True):
    """Anthropic began to answer: the input side of `usage` is exact from here on."""

    call_id: str
    number: int
    upstream_request_id: str
    usage: Usage


class AttemptProgress(Record, frozen=True, gc=False, tag="progress", tag_field="event", omit_defaults=True):
    """Output so far (tokens, an estimate unless a `message_delta` said so). Every 2 s of a stream at most."""

    call_id: str
    number: int
    output_tokens: int


class AttemptEnded(Record, frozen=True, gc=False, tag="ended", tag_field="event", omit_defaults=True):
    """The attempt's one terminal row. `void`: nothing is billed; `estimated`: the bill is our estimate."""

    call_id: str
    number: int
    state: Literal["settled", "estimated", "void"]
    status: int
    usage: Usage
    price_id: str
    cost_nanousd: int
    saved_nanousd: int = 0
    error_code: str = ""
    upstream_request_id: str = ""


class CallClosed(Record, frozen=True, gc=False, tag="closed", tag_field="event", omit_defaults=True):
    """The call's one outcome. `model` is the one that served (or failed last)."""

    call_id: str
    outcome: OutcomeKind
    status: int
    model: str
    total_ms: int
    queue_ms: int = 0
    first_byte_ms: int | None = None
    error_code: str = ""
    stop_reason: str = ""
    reused: bool = False
    """It was answered by the answer of an earlier call."""
    saved_nanousd: int = 0
    """What that one had cost. What caching saved is told by the attempts."""


LedgerEvent = CallOpened | AttemptIntent | AttemptStarted | AttemptProgress | AttemptEnded | CallClosed
