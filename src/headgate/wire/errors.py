"""Anthropic's error envelope: reading it, and writing it where the gateway is the author.

What it is: the shape `{"type":"error","error":{…},"request_id":…}`, its types and statuses (claude-api §5).
What it is not: a decision (see `policy/retry.py`).
"""

from __future__ import annotations

import msgspec

from headgate.wire import sse

TYPE_BY_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
STATUS_BY_TYPE = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}

SPEND_CAP_CODES = frozenset({"enforced_spend_limit_reached", "contract_spend_limit_reached"})
"""429s that last until a limit is raised or a month ends: never retried (claude-api §5)."""


SPEND_CAP_MESSAGE = "You have reached your specified"
"""A limit that the organization set for itself: a 400 without a code, so only its text tells (claude-api §5)."""

RAMP_CODE = "ramp_limit_exceeded"
"""A 429 for growing too fast, whatever the limits (claude-api §6.1)."""


class ErrorDetails(msgspec.Struct, frozen=True):
    """`error.details`; `error_code` is the stable name to branch on."""

    error_code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """`error` of the envelope."""

    type: str = ""
    message: str = ""
    details: ErrorDetails | None = None


class Envelope(msgspec.Struct, frozen=True):
    """What Anthropic answers instead of a message."""

    error: ErrorBody = ErrorBody()
    request_id: str | None = None


_envelope = msgspec.json.Decoder(Envelope)


def parse(body: bytes) -> Envelope:
    """The envelope in an error's body; an empty one when the body is something else (an edge answers in HTML)."""
    try:
        return _envelope.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return Envelope()


def error_code(envelope: Envelope) -> str:
    """`error.details.error_code`, empty when absent."""
    details = envelope.error.details
    return (details and details.error_code) or ""


def envelope(error_type: str, message: str, *, code: str, request_id: str, **details: float) -> bytes:
    """The body of an error that the gateway made. `details` stand beside `error_code`: a limit, a wait."""
    return msgspec.json.encode(_document(error_type, message, code, request_id, details))


def event(error_type: str, message: str, *, code: str, request_id: str, **details: float) -> bytes:
    """The same as the last event of a stream."""
    return sse.frame(b"error", msgspec.json.encode(_document(error_type, message, code, request_id, details)))


def _document(
    error_type: str, message: str, code: str, request_id: str, details: dict[str, float]
) -> dict[str, object]:
    return {
        "type": "error",
        "error": {"type": error_type, "message": message, "details": {"error_code": code, **details}},
        "request_id": request_id,
    }
