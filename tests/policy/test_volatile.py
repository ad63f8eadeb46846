"""Laws of what varies in a text: each kind is told from the others, what an author wrote from both, and masks hide."""

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.volatile import classify, first_difference, looks_random, snippet


def cause(before: str, after: str, **users: str) -> tuple[str, int]:
    value = classify(before, after, first_difference(before, after), **users)
    return value.cause, value.start


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("2026-11-24T10:15:01Z", "2026-11-24T10:15:02Z", "timestamp"),
        ("2026-11-24 10:15:01.123456", "2026-11-24 10:15:01.223456", "timestamp"),
        ("Tue, 24 Nov 2026 22:06:56 GMT", "Tue, 24 Nov 2026 22:06:57 GMT", "timestamp"),
        ("November 24, 2026 at 10:06 PM", "November 24, 2026 at 10:07 PM", "timestamp"),
        ("22:06 24/11/2026", "22:07 24/11/2026", "timestamp"),
        ("1785000000", "1785000060", "timestamp"),
        ("1785000000.25", "1785000000.75", "timestamp"),
        ("10:15:01", "10:15:09", "timestamp"),
        ("2026-11-24", "2026-11-25", "date"),
        ("ngày 24 tháng 11 năm 2026", "ngày 25 tháng 11 năm 2026", "date"),
        ("Tuesday", "Thursday", "date"),
        ("550e8400-e29b-41d4-a716-446655440000", "550e8400-e29b-41d4-a716-446655440001", "uuid"),
        ("lan@example.vn", "lien@example.vn", "user_id"),
        ("user_id: 48213", "user_id: 48214", "user_id"),
        ("khách hàng: lan", "khách hàng: minh", "user_id"),
        ("usr_ab12", "usr_ab13", "user_id"),
        ("1234", "1235", "counter"),
        ("req-1234", "req-1299", "counter"),
        ("9", "10", "counter"),
        ("sess_ab12cd34ef", "sess_ab12cd99ef", "random_token"),
        ("kXvbQzRtGhWpLmNs", "kXvbQzRtGhWpLmNq", "random_token"),
        ("a  b", "a b", "whitespace"),
        ("a\r\nb", "a\nb", "whitespace"),
        ("caf\u00e9", "cafe\u0301", "unicode_form"),
        ("cafe\u0301 b", "caf\u00e9 b", "unicode_form"),
        ("$1,234", "$1,299", "text_changed"),
        ("20 %", "30 %", "text_changed"),
        ("iPhone15", "iPhone16", "text_changed"),
        ("Be kind", "Be brief", "text_changed"),
    ],
)
def test_each_kind_is_named(before, after, expected):
    assert cause(f"You help. {before} is all of it.", f"You help. {after} is all of it.")[0] == expected


def test_a_value_starts_where_it_starts_and_not_where_it_differs():
    assert cause("At 2026-11-24T10:15:01Z.", "At 2026-11-24T10:15:02Z.") == ("timestamp", 3)
    assert cause("Ask 1234 now", "Ask 1235 now") == ("counter", 4)


def test_a_value_that_merely_ends_before_the_difference_is_not_its_cause():
    assert cause("On 2026-11-24 say yes", "On 2026-11-24 say no")[0] == "text_changed"
    assert cause("2026-11-24, yes", "2026-11-24; yes")[0] == "text_changed"


def test_a_user_is_recognised_by_who_sent_the_request():
    assert cause("For Lan Anh only", "For Lan Binh only", user_before="Lan Anh", user_after="Lan Binh") == (
        "user_id",
        4,
    )
    assert cause("For Lan Anh only", "For Lan Binh only", user_before="x1", user_after="x2")[0] == "text_changed"


@pytest.mark.parametrize("word", ["headgate-2026", "COVID-19", "international", "JavaScript", "claude-sonnet-4-6"])
def test_words_are_not_random(word):
    assert not looks_random(word)


@given(st.randoms(use_true_random=False))
def test_tokens_of_programs_are_random(dice: random.Random):
    token = dice.choice("ghij") + "".join(dice.choice(string.hexdigits[:16]) for _ in range(15)) + "7k"
    assert looks_random(token)


def test_a_snippet_shows_the_shape_and_hides_the_words():
    text = "Our margin on Acme is 12%. Current time: 2026-11-24T10:15:01Z, user id: lan42"
    at = text.index("2026")
    shown = snippet(text, at, cause="timestamp")
    assert len(shown) <= 40
    assert "0000-00-00x00:00" in shown
    assert "time" in shown
    for secret in ("Acme", "margin", "12", "2026", "lan"):
        assert secret not in shown


@given(st.text(max_size=120), st.integers(0, 119), st.sampled_from(["timestamp", "whitespace", "text_changed"]))
def test_a_snippet_never_shows_a_digit_but_zero_and_is_short(text, at, cause):
    shown = snippet(text, min(at, len(text)), cause=cause)
    assert len(shown) <= 40
    assert not any(sign.isdigit() and sign != "0" for sign in shown)


@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=60))
def test_the_first_difference_is_that_of_a_walk(common, one, other):
    one, other = common + one, common + other
    walked = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert first_difference(one, other) == walked
    if one != other:
        classify(one, other, walked, user_before="ab", user_after="cd")
