"""The line of a call as bytes."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.telemetry.log_line import LogLine, encode

REQUIRED = [field.name for field in msgspec.structs.fields(LogLine) if field.required]


def test_a_line_carries_every_field_also_the_empty_ones_in_their_order(line) -> None:
    assert list(json.loads(encode(line()))) == list(LogLine.__struct_fields__)


def test_one_call_is_one_line_whatever_a_client_named_itself(line) -> None:
    hostile = 'a\n{"event":"call"}\r\u2028\x00"'
    encoded = encode(line(user_id=hostile))
    assert encoded.count(b"\n") == 1
    assert encoded.endswith(b"\n")
    assert json.loads(encoded)["user_id"] == hostile


@pytest.mark.parametrize(
    "text", ["\n", "\r\n", "\0", "\x1b[2J", "\x7f", "\x85", "\x9b31m", "\u2028", "\u2029", '"}\n{', "\\", "Bảo 漢字 😀"]
)
def test_no_text_makes_a_second_line_or_speaks_to_a_terminal(line, text) -> None:
    shown = encode(line(user_id=f"a{text}b", reasons=(text,))).decode()
    assert len(shown.splitlines()) == 1
    assert not any(character < " " or "\x7f" <= character <= "\x9f" for character in shown[:-1])
    assert json.loads(shown)["user_id"] == f"a{text}b"
    assert json.loads(shown)["reasons"] == [text]


@given(st.sampled_from(["user_id", "conversation", "endpoint", "model_asked", "error_code"]), st.text())
def test_any_text_is_read_back_from_one_line(field, text) -> None:
    shown = encode(LogLine(**dict.fromkeys(REQUIRED, "") | {field: text})).decode()
    assert len(shown.splitlines()) == 1
    assert json.loads(shown)[field] == text


def test_text_of_other_scripts_stays_readable(line) -> None:
    assert "Bảo 漢字 😀".encode() in encode(line(user_id="Bảo 漢字 😀"))


def test_what_is_asked_of_every_failed_call_is_there() -> None:
    asked = {"ts", "user_id", "model", "input_tokens_estimate", "error_code", "retry_count"}
    assert asked <= set(LogLine.__struct_fields__)


def test_no_field_has_room_for_a_prompt() -> None:
    kinds = {field.name: field.type for field in msgspec.structs.fields(LogLine)}
    assert not {"body", "messages", "system", "prompt", "content", "text", "key"} & set(kinds)
