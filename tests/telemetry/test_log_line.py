"""The line of a call as bytes."""

import json

import msgspec

from headgate.telemetry.log_line import LogLine, encode


def test_a_line_carries_every_field_also_the_empty_ones_in_their_order(line) -> None:
    assert list(json.loads(encode(line()))) == list(LogLine.__struct_fields__)


def test_one_call_is_one_line_whatever_a_client_named_itself(line) -> None:
    hostile = 'a\n{"event":"call"}\r\u2028\x00"'
    encoded = encode(line(user_id=hostile))
    assert encoded.count(b"\n") == 1
    assert encoded.endswith(b"\n")
    assert json.loads(encoded)["user_id"] == hostile


def test_what_is_asked_of_every_failed_call_is_there() -> None:
    asked = {"ts", "user_id", "model", "input_tokens_estimate", "error_code", "retry_count"}
    assert asked <= set(LogLine.__struct_fields__)


def test_no_field_has_room_for_a_prompt() -> None:
    kinds = {field.name: field.type for field in msgspec.structs.fields(LogLine)}
    assert not {"body", "messages", "system", "prompt", "content", "text", "key"} & set(kinds)
