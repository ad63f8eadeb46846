"""Errors that the gateway itself makes, in Anthropic's envelope, with the advice that clients act upon.

A client's SDK retries a 429 or 5xx blindly unless `x-should-retry` says no, and sleeps for whatever `retry-after`
says (claude-api §5.1), so every error here carries the first and never more than 60 s of the second.
"""

from __future__ import annotations

import math

import msgspec

from headgate.policy.records import Refused
from headgate.wire import errors

RETRY_AFTER_S_MAX = 60


class ErrorAnswer(msgspec.Struct, frozen=True):
    """A whole error response: status, header lines without framing, body."""

    status: int
    header_lines: bytes
    body: bytes


def advice(retry_after_s: float | None, *, should_retry: bool) -> bytes:
    """The header lines that tell a client whether and when to come back.

    `retry-after` is whole seconds; SDKs read `retry-after-ms` first, which says a short wait as it is.
    """
    lines = b"x-should-retry: true\r\n" if should_retry else b"x-should-retry: false\r\n"
    if retry_after_s is not None:
        wait_s = min(max(retry_after_s, 0.001), RETRY_AFTER_S_MAX)
        lines += b"retry-after: %d\r\n" % math.ceil(wait_s)
        if should_retry:
            lines += b"retry-after-ms: %d\r\n" % math.ceil(wait_s * 1000)
    return lines


def answer(refused: Refused, *, call_id: str) -> ErrorAnswer:
    """What a client is told about a refusal. Only one that names a wait invites it to come back."""
    details: dict[str, float] = {}
    limit_lines = b""
    if refused.limit is not None:
        details["limit"] = refused.limit
        if refused.window_s is not None:
            details["window_s"] = refused.window_s
            limit_lines = _limit_lines(refused)
    if refused.retry_after_s is not None:
        details["retry_after_s"] = round(min(refused.retry_after_s, RETRY_AFTER_S_MAX), 3)
    body = errors.envelope(refused.error_type, refused.message, code=refused.error_code, request_id=call_id, **details)
    return ErrorAnswer(
        refused.status,
        b"content-type: application/json\r\nrequest-id: %b\r\nx-headgate-call: %b\r\n%b%b"
        % (
            call_id.encode(),
            call_id.encode(),
            limit_lines,
            advice(refused.retry_after_s, should_retry=refused.retryable and refused.retry_after_s is not None),
        ),
        body,
    )


def _limit_lines(refused: Refused) -> bytes:
    """The two fields of draft-ietf-httpapi-ratelimit-headers-11, for clients that know nothing of Anthropic's."""
    name = refused.error_code.removesuffix("_exceeded").encode()
    return b'RateLimit-Policy: "%b";q=%d;w=%d\r\nRateLimit: "%b";r=0;t=%d\r\n' % (
        name,
        round(refused.limit or 0),
        round(refused.window_s or 0),
        name,
        math.ceil(min(refused.retry_after_s or 0.0, RETRY_AFTER_S_MAX)),
    )


def bad_request(message: str, *, status: int = 400, code: str = "invalid_request") -> Refused:
    """The request cannot be what the API takes."""
    return Refused(status=status, error_type=errors.TYPE_BY_STATUS[status], error_code=code, message=message)


INVALID_KEY = Refused(
    status=401,
    error_type="authentication_error",
    error_code="invalid_key",
    message="Invalid key. Send a Headgate key (hg_…) as x-api-key or as Authorization: Bearer.",
)
TOO_MANY_BAD_KEYS = Refused(
    status=429,
    error_type="rate_limit_error",
    error_code="bad_keys_exceeded",
    message="Too many invalid keys came from this address. Try again in a minute.",
    retry_after_s=60.0,
    retryable=False,
)
KEYS_UNAVAILABLE = Refused(
    status=503,
    error_type="api_error",
    error_code="keys_unavailable",
    message="The gateway cannot read its keys at the moment.",
    retry_after_s=5.0,
)
LEDGER_UNAVAILABLE = Refused(
    status=503,
    error_type="api_error",
    error_code="ledger_unavailable",
    message="The gateway cannot write its ledger at the moment, and sends nothing that it could not account for.",
    retry_after_s=5.0,
)
BODIES_EXHAUSTED = Refused(
    status=529,
    error_type="overloaded_error",
    error_code="bodies_exhausted",
    message="This gateway holds too many large requests; try again shortly.",
    retry_after_s=1.0,
)
NO_SUCH_PATH = Refused(
    status=404, error_type="not_found_error", error_code="no_such_path", message="There is nothing at this path."
)
LOOP = Refused(
    status=508,
    error_type="api_error",
    error_code="loop_detected",
    message="This request has been through this gateway before: its upstream URL leads back to itself.",
)
INTERNAL = Refused(
    status=500, error_type="api_error", error_code="internal_error", message="The gateway failed. It has been logged."
)
BATCH_WITH_BUDGET = Refused(
    status=403,
    error_type="permission_error",
    error_code="batch_with_budget",
    message="A budget holds for this key, its person, its tier or everybody, and batches are not counted against "
    "budgets yet. Send the requests one by one, or through a gateway without budgets.",
    retryable=False,
)
RESTARTING = Refused(
    status=529,
    error_type="overloaded_error",
    error_code="restarting",
    message="The gateway is restarting. Try again.",
    retry_after_s=1.0,
)


def spend_cap(code: str, probe_in_s: float) -> Refused:
    """Anthropic has said that its account may spend no more: nothing is sent until a probe is answered."""
    return Refused(
        429,
        "billing_error",
        "upstream_spend_cap",
        f"The gateway's account has reached its spend limit at Anthropic ({code}).",
        retry_after_s=probe_in_s,
        retryable=False,
    )


def poison_prompt(refused_for_s: float) -> Refused:
    """This very request has broken its model again and again."""
    return Refused(
        502,
        "api_error",
        "poison_prompt",
        "This request has failed again and again without an answer; it is not sent again for some minutes.",
        retry_after_s=refused_for_s,
        retryable=False,
    )
