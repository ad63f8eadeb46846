"""Errors that the gateway makes: Anthropic's envelope, and advice that a client's SDK can act upon."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.gateway import refusals
from headgate.policy.records import Refused
from headgate.wire import errors

READY_MADE = {name: value for name, value in vars(refusals).items() if isinstance(value, Refused)}


def headers(lines: bytes) -> dict[bytes, bytes]:
    return dict(line.split(b": ", 1) for line in lines.split(b"\r\n")[:-1])


@pytest.mark.parametrize("refused", READY_MADE.values(), ids=READY_MADE)
def test_every_refusal_is_an_envelope_that_names_its_call_and_its_code(refused):
    answer = refusals.answer(refused, call_id="call_1")
    body = json.loads(answer.body)
    wait = {} if refused.retry_after_s is None else {"retry_after_s": refused.retry_after_s}
    assert body == {
        "type": "error",
        "error": {
            "type": refused.error_type,
            "message": refused.message,
            "details": {"error_code": refused.error_code} | wait,
        },
        "request_id": "call_1",
    }
    assert answer.status == refused.status
    sent = headers(answer.header_lines)
    assert sent[b"content-type"] == b"application/json"
    assert sent[b"request-id"] == sent[b"x-headgate-call"] == b"call_1"
    assert sent[b"x-should-retry"] in (b"true", b"false")


@pytest.mark.parametrize("refused", READY_MADE.values(), ids=READY_MADE)
def test_every_refusal_has_a_type_of_anthropics_and_a_text_for_people(refused):
    assert refused.error_type in errors.STATUS_BY_TYPE
    assert refused.message.endswith(".")
    assert refused.error_code.islower()


def test_codes_of_refusals_are_distinct():
    codes = [refused.error_code for refused in READY_MADE.values()]
    assert len(set(codes)) == len(codes) >= 8


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
def test_what_cannot_get_better_tells_the_client_not_to_retry(status):
    refused = refusals.bad_request("No.", status=status, code="x")
    sent = headers(refusals.answer(refused, call_id="call_1").header_lines)
    assert sent[b"x-should-retry"] == b"false"
    assert b"retry-after" not in sent
    assert refused.error_type == errors.TYPE_BY_STATUS[status]


@given(st.none() | st.floats(0, 1e12), st.booleans())
def test_advice_is_one_clear_word_and_never_more_than_a_minute(retry_after_s, should_retry):
    sent = headers(refusals.advice(retry_after_s, should_retry=should_retry))
    assert sent[b"x-should-retry"] == (b"true" if should_retry else b"false")
    if retry_after_s is None:
        assert b"retry-after" not in sent
    else:
        assert 1 <= int(sent[b"retry-after"]) <= 60
        assert int(sent[b"retry-after"]) >= min(retry_after_s, 60)
        assert (b"retry-after-ms" in sent) == should_retry
        if should_retry:
            assert min(retry_after_s, 60) * 1000 <= int(sent[b"retry-after-ms"]) <= 60_000


def test_a_refusal_with_a_limit_names_it_in_the_body_and_in_the_two_fields_of_the_draft():
    refused = Refused(429, "rate_limit_error", "user_rpm_exceeded", "No.", retry_after_s=6.2, limit=20, window_s=60.0)
    answer = refusals.answer(refused, call_id="c")
    details = json.loads(answer.body)["error"]["details"]
    assert details == {"error_code": "user_rpm_exceeded", "limit": 20, "window_s": 60.0, "retry_after_s": 6.2}
    sent = headers(answer.header_lines)
    assert sent[b"RateLimit-Policy"] == b'"user_rpm";q=20;w=60'
    assert sent[b"RateLimit"] == b'"user_rpm";r=0;t=7'
    assert (sent[b"retry-after"], sent[b"retry-after-ms"]) == (b"7", b"6200")


def test_only_a_refusal_that_names_a_wait_and_may_end_differently_invites_the_client_back():
    for refused in READY_MADE.values():
        sent = headers(refusals.answer(refused, call_id="c").header_lines)
        assert (b"retry-after" in sent) == (refused.retry_after_s is not None)
        assert (sent[b"x-should-retry"] == b"true") == (refused.retryable and refused.retry_after_s is not None)
    invited = {refused.error_code for refused in READY_MADE.values() if refused.retryable and refused.retry_after_s}
    assert invited >= {"keys_unavailable", "ledger_unavailable", "restarting"}
