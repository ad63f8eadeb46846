"""Laws of the check of prompt files: what varies is an error at its place, what an author wrote is none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.prompt_files import FINDINGS_MAX, UnreadablePrompt, compare_files, lint, read


def text_file(text: str):
    return read(text.encode(), is_json=False)


def body(value, **dump):
    return read(json.dumps(value, **dump).encode(), is_json=True)


@pytest.mark.parametrize(
    ("text", "value", "cause"),
    [
        ("It is 2026-11-24T10:15:00Z.", "2026-11-24T10:15:00Z", "timestamp"),
        ("The current time is 2026-11-24 10:15.", "2026-11-24 10:15", "timestamp"),
        ("Bây giờ là 22:06:10.", "22:06:10", "timestamp"),
        ("timestamp: 1785000000", "1785000000", "timestamp"),
        ("Today is 2026-11-24.", "2026-11-24", "date"),
        ("Hôm nay: 24/11/2026", "24/11/2026", "date"),
        ("Trace 550e8400-e29b-41d4-a716-446655440000.", "550e8400-e29b-41d4-a716-446655440000", "uuid"),
        ("user_id: 48213", "48213", "user_id"),
        ("The user is user_id: u-48213 (Lan).", "u-48213", "user_id"),
        ("Mã khách hàng KH-20931 của lan", "KH-20931", "user_id"),
        ("Phiên: a81f9c2b77d04e1e", "a81f9c2b77d04e1e", "random_token"),
        ("Chào ${ten_khach}", "${ten_khach}", "placeholder"),
        ("You talk to user: lan@example.vn", "lan@example.vn", "user_id"),
        ("This is request 1234.", "1234", "counter"),
        ("Session #4711 of many", "4711", "counter"),
        ("session_id=ab12cd34ef56", "ab12cd34ef56", "random_token"),
        ("Dear {{ user.name }},", "{{ user.name }}", "placeholder"),
        ("Now: ${NOW}", "${NOW}", "placeholder"),
        ("Today: {current_date}", "{current_date}", "placeholder"),
        ("Ask <%= session %>", "<%= session %>", "placeholder"),
    ],
)
def test_what_varies_is_an_error_at_its_line_and_column(text, value, cause):
    (found,) = [one for one in lint(text_file(f"Xin chào.\nBạn là ai? {text}\n")) if one.severity == "error"]
    assert (found.cause, found.line) == (cause, 2)
    assert found.column == len("Bạn là ai? ") + text.index(value) + 1
    assert found.snippet == value[:40]


@pytest.mark.parametrize(
    "text",
    [
        "The price list is valid from 2026-01-01 until 31/12/2026.",
        "It costs $1,234.50, or 1.200.000 đ, and 8 % VAT.",
        "Call 1900 1234, 0909 123 456 or +84 28 3822 1234.",
        "We are open from 8:00 to 17:30, on Sunday from 10:00.",
        "Answer in JSON like {answer} with {foo} and {bar_baz}.",
        "Mã khách hàng gồm 8 chữ số; người dùng là khách: xem trang 4",
        "Version 2.12.0 of 24 November 2026 has 1234 pages.",
        "Keep a message below 500 characters and a session under 120 minutes.",
        "A request of 2026 is old. HTTP 429 means that you wait.",
        "User: hi\nAssistant: hello\nuser id is required, customer name: unknown",
        "ISO 27001, RFC 9110, COVID-19, iPhone15, claude-sonnet-4-6",
    ],
)
def test_what_an_author_wrote_is_no_error_nor_note(text):
    assert lint(text_file(text)) == []


@pytest.mark.parametrize("text", ["Write to help@example.vn.", "{{company}} sells tea.", "Closed on 2026-12-24 16:00."])
def test_what_may_be_the_same_for_all_is_a_note(text):
    assert [one.severity for one in lint(text_file(text))] == ["note"]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_scanned_where_the_prompt_stands_and_not_in_messages(ascii_only, indent):
    value = {
        "messages": [{"role": "user", "content": "at 2026-11-24T10:15:00Z"}],
        "system": [{"type": "text", "text": 'Xin chào "bạn"\nLúc 2026-11-24T10:15:00Z'}],
        "tools": [{"name": "a", "description": "asked by user_id: 48213"}],
    }
    file = body(value, ensure_ascii=ascii_only, indent=indent)
    found = lint(file)
    assert {one.cause for one in found} == {"timestamp", "user_id"}
    lines = file.data.decode().split("\n")
    for one in found:
        assert lines[one.line - 1][one.column - 1 :].startswith(one.snippet)


def test_marks_are_checked_against_the_minimum():
    marked = {"system": [{"type": "text", "text": "short", "cache_control": {"type": "ephemeral"}}]}
    (found,) = lint(body(marked), min_tokens=1_024)
    assert (found.cause, found.severity, found.column) == ("below_minimum", "error", len('{"system": [') + 1)
    assert lint(body(marked)) == []


def test_versions_are_compared_and_an_edit_is_a_note():
    one, other = ({"tools": [{"name": name} for name in names]} for names in ("ab", "ba"))
    found = compare_files(body(one), body(other))
    assert (found.cause, found.severity, found.column) == ("tool_order", "error", len('{"tools": [') + 1)
    edited = compare_files(text_file("One.\nBe kind."), text_file("One.\nBe brief."))
    assert (edited.cause, edited.severity, edited.line, edited.column) == ("text_changed", "note", 2, 4)
    spaced = compare_files(text_file("Be  kind."), text_file("Be kind."))
    assert (spaced.cause, spaced.severity) == ("whitespace", "error")
    assert compare_files(text_file("a"), text_file("a")) is None


@pytest.mark.parametrize(
    ("data", "is_json", "says"),
    [
        (b"\xff", False, "UTF-8"),
        (b"{", True, "JSON"),
        (b"[]", True, "object"),
        (b'{"model": 7, "system": "x"}', True, "model"),
        (b'{"prompt": "x"}', True, "none of system"),
        (b"{}", True, "none of system"),
    ],
)
def test_a_file_that_holds_no_prompt_is_refused_with_the_mend(data, is_json, says):
    with pytest.raises(UnreadablePrompt, match=says):
        read(data, is_json=is_json)


@given(st.text(max_size=200) | st.text(alphabet='{}$<%=>user_id: 0123456789-T"@.\n', max_size=200))
def test_no_text_makes_it_raise(text):
    if not any("\ud800" <= sign <= "\udfff" for sign in text):
        for found in (lint(text_file(text)), lint(body({"system": text}))):
            assert all(one.line >= 1 and one.column >= 1 for one in found)


def test_a_file_full_of_findings_has_so_many_and_no_more():
    assert len(lint(text_file("request 1234\n" * 1_000))) == FINDINGS_MAX


def test_an_address_is_a_note_in_words_of_its_own_and_a_broken_file_is_told_what_it_is():
    (found,) = lint(text_file("Write to help@huong.example, please."))
    assert (found.severity, found.message.split(".")[0]) == ("note", "An e-mail address")
    with pytest.raises(UnreadablePrompt, match=r"^it is not valid JSON: .*[^.]\. It should be a Messages body"):
        read(b"not json", is_json=True)
