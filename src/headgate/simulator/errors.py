"""Errors of the Messages API: status, type, text, and the envelope they travel in."""

from dataclasses import dataclass, field
from http import HTTPStatus

import msgspec

from headgate.simulator.jsonvalue import JsonObject

ERROR_TYPES: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    502: "api_error",
    503: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""docs: api/errors; 405, 408 and 422 carry the nearest type, their bodies are not documented."""

MESSAGES: dict[int, str] = {
    401: "invalid x-api-key",
    402: "Your account has an unpaid balance.",
    403: "Your API key does not have permission to use the specified resource.",
    404: "Not found",
    413: "Request exceeds the maximum size",
    429: "This request would exceed your organization's rate limit. Please wait and try again later.",
    500: "Internal server error",
    503: "Service unavailable",
    504: "Request timed out",
    529: "Overloaded",
}


@dataclass(frozen=True, slots=True)
class ApiError:
    """An answer that is not a message."""

    status: int
    message: str
    error_code: str | None = None
    """Stable code in `error.details.error_code`; None leaves `details` out."""
    type: str | None = None
    """None: the type that belongs to the status."""
    headers: tuple[tuple[str, str], ...] = field(default=())

    @property
    def error_type(self) -> str:
        """`error.type` of the envelope."""
        return self.type or ERROR_TYPES.get(self.status, "api_error")

    def envelope(self, request_id: str | None) -> JsonObject:
        """The envelope. An event in a stream has no request id: pass None."""
        error: JsonObject = {"type": self.error_type, "message": self.message}
        if self.error_code is not None:
            error["details"] = {"error_code": self.error_code}
        envelope: JsonObject = {"type": "error", "error": error}
        if request_id is not None:
            envelope["request_id"] = request_id
        return envelope

    def body(self, request_id: str | None) -> bytes:
        """The envelope as JSON."""
        return msgspec.json.encode(self.envelope(request_id))


def invalid(message: str, error_code: str | None = None) -> ApiError:
    """A 400 `invalid_request_error`."""
    return ApiError(400, message, error_code)


def default_error(status: int) -> ApiError:
    """The ordinary error of a status, as the API words it where the words are known."""
    return ApiError(status, MESSAGES.get(status) or reason_phrase(status))


def reason_phrase(status: int) -> str:
    """The phrase of the status line; 529 is Anthropic's own."""
    if status == 529:
        return "Overloaded"
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


class Rejected(Exception):
    """A request the API refuses to run; carries its answer. Raised while a request is read, caught where it is
    answered.
    """

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error
