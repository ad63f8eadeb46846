"""Laws of the error envelope: Anthropic's is read whatever stands in it, and ours reads back as what was written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.wire import errors, sse
from headgate.wire.errors import Envelope, ErrorBody


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>502 Bad Gateway</html>",
        b"[]",
        b"null",
        b'"x"',
        b'{"error":"x"}',
        b'{"error":null}',
        b'{"error":{"type":7}}',
        b'{"error":{"details":"x"}}',
        b'{"error":{"message":"\xff"}}',
        b'{"error":{"message":"\\ud800"}}',
        b'{"error":' + b"[" * 100_000,
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\x1f\x8b\x08",
    ],
)
def test_what_is_no_envelope_reads_as_an_empty_one(body):
    assert errors.parse(body) == Envelope()
    assert errors.error_code(errors.parse(body)) == ""


def test_an_envelope_is_read_with_its_code_and_request_id():
    body = (
        b'{"type":"error","error":{"type":"rate_limit_error","message":"Slow.",'
        b'"details":{"error_code":"ramp_limit_exceeded","x":[1]}},"request_id":"req_1","new":1}'
    )
    envelope = errors.parse(body)
    assert (envelope.error.type, envelope.error.message, envelope.request_id) == ("rate_limit_error", "Slow.", "req_1")
    assert errors.error_code(envelope) == "ramp_limit_exceeded"


@pytest.mark.parametrize("details", [b"", b',"details":null', b',"details":{}', b',"details":{"error_code":null}'])
def test_a_code_that_is_absent_is_empty(details):
    envelope = errors.parse(b'{"error":{"type":"api_error","message":"m"' + details + b"}}")
    assert envelope.error.type == "api_error"
    assert errors.error_code(envelope) == ""


@given(st.binary(max_size=60))
def test_reading_an_envelope_never_raises(body):
    assert isinstance(errors.error_code(errors.parse(body)), str)


@given(st.text(), st.text(), st.text())
def test_an_envelope_that_was_written_is_read_back(message, code, request_id):
    body = errors.envelope("api_error", message, code=code, request_id=request_id)
    envelope = errors.parse(body)
    assert envelope.error == ErrorBody("api_error", message, errors.ErrorDetails(code))
    assert (envelope.request_id, errors.error_code(envelope)) == (request_id, code)
    assert json.loads(body)["type"] == "error"


@given(st.text(), st.text())
def test_the_event_is_one_frame_that_carries_the_envelope(message, code):
    event = errors.event("overloaded_error", message, code=code, request_id="call_1")
    assert sse.SseReader().feed(event) == [event]
    assert sse.parse(event) == (
        b"error",
        errors.envelope("overloaded_error", message, code=code, request_id="call_1"),
    )


def test_every_type_has_a_status_and_every_such_status_leads_back():
    for error_type, status in errors.STATUS_BY_TYPE.items():
        assert errors.TYPE_BY_STATUS[status] == error_type
    assert set(errors.TYPE_BY_STATUS.values()) == set(errors.STATUS_BY_TYPE)
