"""What went wrong upstream, from Anthropic's words into ours and back: answers into failures, failures into answers.

Pure. What follows from a failure is `policy/retry.py`; who is told is `pipeline.py` and `passthrough.py`.
"""

from __future__ import annotations

from headgate.gateway import forwarding, refusals
from headgate.gateway.upstream import Answer
from headgate.policy.call import failure_code
from headgate.policy.records import Failure, Refused
from headgate.wire import errors
from headgate.wire.headers import retry_after_s, should_retry
from headgate.wire.stream import NAME_CHARS_MAX


def request_id(answer: Answer | None) -> str:
    """Anthropic's id of an answer, empty when it gave none."""
    return answer.header_map.get(b"request-id", b"").decode("latin-1") if answer is not None else ""


def failure_of_status(answer: Answer, now_ns: int) -> Failure:
    """What an error answer of Anthropic's says."""
    envelope = errors.parse(answer.body())
    headers = answer.header_map
    return Failure(
        kind="status",
        status=answer.status,
        error_type=envelope.error.type[:NAME_CHARS_MAX],
        error_code=errors.error_code(envelope)[:NAME_CHARS_MAX],
        message=envelope.error.message,
        retry_after_s=retry_after_s(headers, now_s=now_ns / 1e9),
        should_retry=should_retry(headers),
        upstream_request_id=request_id(answer),
    )


def passed_on_lines(answer: Answer, failure: Failure) -> bytes | None:
    """The header lines of an error of Anthropic's that the client sees as it is, with our advice on trying again.

    None for what is not the client's to see: 401 and 403 are about our own key, a redirect is about us, and
    beyond 599 there is no status.
    """
    if not 400 <= answer.status <= 599 or answer.status in (401, 403):
        return None
    return forwarding.response_lines(answer.headers) + refusals.advice(failure.retry_after_s, should_retry=False)


def cut_error(failure: Failure, *, interrupted: bool) -> tuple[str, str, str]:
    """`(type, code, message)` of the last event of a stream that did not reach its end."""
    if interrupted:
        return "overloaded_error", "restarting", "The gateway is restarting. Try again."
    if failure.kind == "stall":
        return "api_error", "upstream_stalled", failure.message
    if failure.kind == "stream_error":
        return failure.error_type, failure.error_code or failure.error_type, failure.message
    return "api_error", "upstream_cut", failure.message or "Anthropic's stream ended early."


def refusal_of(failure: Failure) -> Refused:
    """What a client is told when there is no answer of Anthropic's to pass on."""
    code = failure_code(failure)
    match failure.kind:
        case "timeout" | "stall":
            return Refused(504, "timeout_error", code, failure.message)
        case "status" if failure.status in (401, 403):
            return Refused(502, "api_error", "upstream_credential", "Anthropic refused this gateway's own key.")
        case "status":
            return Refused(502, "api_error", code, f"Anthropic answered with status {failure.status}.")
        case _:
            return Refused(502, "api_error", code, failure.message)
