"""What we mean to do with a request: the plan says what the body says, and changes no byte of it."""

import pytest

from headgate.policy.routing import plan
from headgate.policy.token_estimate import input_tokens
from headgate.wire.message import InvalidBody, scan

BODY = b'{"model": "claude-sonnet-4-6", "max_tokens":1024,"stream":true, "x":1.0, "messages":[{"content":"hi"}]}'


def test_a_plan_is_what_the_body_asks_for():
    made = plan(scan(BODY), received_at=100.0, deadline_s=20.0)
    assert made.models == ("claude-sonnet-4-6",)
    assert made.body is BODY
    assert made.streamed
    assert made.max_tokens == 1024
    assert made.deadline == 120.0
    assert made.input_tokens_estimate == input_tokens(scan(BODY)) > 0


def test_a_request_without_stream_and_max_tokens_is_planned_all_the_same():
    made = plan(scan(b'{"model":"m"}'), received_at=0.0, deadline_s=1.0)
    assert (made.streamed, made.max_tokens) == (False, 0)


@pytest.mark.parametrize("body", [b"{}", b'{"model":7}', b'{"model":"m","stream":"yes"}'])
def test_what_cannot_be_planned_is_the_callers_fault(body):
    with pytest.raises(InvalidBody):
        plan(scan(body), received_at=0.0, deadline_s=1.0)
