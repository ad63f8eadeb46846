"""Laws of the headers that steer a client: whatever a server sends, a wait is finite and never an exception."""

import math
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headgate.wire.headers import RateLimit, RateLimits, rate_limits, retry_after_s, should_retry

NOW_S = datetime(2026, 11, 24, 15, 0, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        (b"0", 0.0),
        (b"7", 7.0),
        (b" 7 ", 7.0),
        (b"1.5", 1.5),
        (b"1e2", 100.0),
        (b"4294967295", 4294967295.0),
        (b"Tue, 24 Nov 2026 15:00:30 GMT", 30.0),
        (b"Tuesday, 24-Nov-26 15:00:30 GMT", 30.0),
        (b"Tue Nov 24 15:00:30 2026", 30.0),
        (b"Tue, 24 Nov 2026 15:00:30", 30.0),
        (b"Tue, 24 Nov 2026 15:00:30 -0000", 30.0),
        (b"Tue, 24 Nov 2026 22:00:30 +0700", 30.0),
        (b"-1", None),
        (b"-0", None),
        (b"-1e-9", None),
        (b"Tue, 24 Nov 2026 14:59:59 GMT", None),
        (b"Thu, 01 Jan 1970 00:00:00 GMT", None),
        (b"NaN", None),
        (b"nan", None),
        (b"inf", None),
        (b"-Infinity", None),
        (b"1e309", None),
        (b"", None),
        (b" ", None),
        (b"soon", None),
        (b"7 seconds", None),
        (b"7, 8", None),
        (b"0x10", None),
        (b"\xff\x00", None),
        (b"9" * 10_000, None),
        (b" " * 10_000 + b"7", None),
        (b"Tue, 99 Nov 2026 15:00:30 GMT", None),
        (b"Tue, 24 Nov 0000 15:00:30 GMT", None),
        (b"Tue, 24 Nov 2026 15:00:30 +9999999999", None),
    ],
)
def test_retry_after_in_every_form(value, wait_s):
    assert retry_after_s({b"retry-after": value}, now_s=NOW_S) == wait_s


def test_an_absent_header_is_no_wait():
    assert retry_after_s({}, now_s=NOW_S) is None


@pytest.mark.parametrize(
    ("milliseconds", "seconds", "wait_s"),
    [
        (b"250", b"9", 0.25),
        (b"0", b"9", 0.0),
        (b"250.5", None, 0.2505),
        (b"junk", b"9", 9.0),
        (b"-1", b"9", 9.0),
        (b"NaN", b"9", 9.0),
        (b"1e309", b"-9", None),
        (b"", None, None),
    ],
)
def test_milliseconds_win_over_seconds_where_they_can_be_read(milliseconds, seconds, wait_s):
    headers = {b"retry-after-ms": milliseconds} | ({b"retry-after": seconds} if seconds is not None else {})
    assert retry_after_s(headers, now_s=NOW_S) == wait_s


@pytest.mark.parametrize("zone", ["Asia/Ho_Chi_Minh", "America/New_York"])
def test_a_date_without_a_zone_means_utc_wherever_the_process_runs(monkeypatch, zone):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert retry_after_s({b"retry-after": b"Tue, 24 Nov 2026 15:00:30"}, now_s=NOW_S) == 30.0
    finally:
        monkeypatch.undo()
        time.tzset()


@given(st.integers(1, 10**8))
def test_a_date_is_as_far_away_as_it_says(wait_s):
    date = datetime.fromtimestamp(NOW_S, UTC) + timedelta(seconds=wait_s)
    assert retry_after_s({b"retry-after": format_datetime(date, usegmt=True).encode()}, now_s=NOW_S) == wait_s


DATE_PARTS = st.sampled_from(
    ["Tue,", "Mon", "24", "Nov", "2026", "9999", "15:00:30", "99:99:99", "GMT", "+0700", "-2359", "-1", ",", "(", ")"]
)
VALUES = st.one_of(
    st.binary(max_size=80),
    st.text("0123456789.eE+-_ infaNT", max_size=12).map(str.encode),
    st.lists(DATE_PARTS, max_size=8).map(lambda parts: " ".join(parts).encode()),
    st.sampled_from([b"1_000", b"(", b'"', b"Tue, 24 Nov 2026 15:00:30 (GMT"]),
)


@given(VALUES, VALUES, st.sampled_from([0.0, NOW_S, 1e12]))
@example(b"", b"1_0", NOW_S)
def test_no_value_makes_anything_but_a_finite_wait_or_none(milliseconds, seconds, now_s):
    for headers in (
        {b"retry-after": seconds},
        {b"retry-after-ms": milliseconds},
        {b"retry-after": seconds, b"retry-after-ms": milliseconds},
    ):
        wait_s = retry_after_s(headers, now_s=now_s)
        assert wait_s is None or (math.isfinite(wait_s) and wait_s >= 0)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (b"true", True),
        (b"false", False),
        (b" TRUE ", True),
        (b"False", False),
        (b"", None),
        (b"1", None),
        (b"no", None),
    ],
)
def test_advice_on_retrying_is_yes_no_or_absent(value, advice):
    assert should_retry({b"x-should-retry": value}) is advice
    assert should_retry({}) is None


def limit_headers(name: bytes, limit: bytes, remaining: bytes) -> dict[bytes, bytes]:
    return {
        b"anthropic-ratelimit-%b-limit" % name: limit,
        b"anthropic-ratelimit-%b-remaining" % name: remaining,
    }


def test_each_limit_is_read_by_its_name():
    headers = (
        limit_headers(b"requests", b"50", b"49")
        | limit_headers(b"input-tokens", b"30000", b"29000")
        | limit_headers(b"output-tokens", b"8000", b"0")
        | limit_headers(b"tokens", b"1", b"1")
    )
    assert rate_limits(headers) == RateLimits(RateLimit(50, 49), RateLimit(30_000, 29_000), RateLimit(8_000, 0))


@pytest.mark.parametrize("odd", [b"", b"-1", b"1.5", b"many", b"1" * 16, "٣".encode(), b" 1"])
def test_a_limit_that_cannot_be_read_is_absent(odd):
    assert rate_limits(limit_headers(b"requests", odd, b"1")) == RateLimits()
    assert rate_limits(limit_headers(b"requests", b"1", odd)) == RateLimits()
    assert rate_limits({}) == RateLimits()


@given(st.binary(max_size=30), st.binary(max_size=30))
def test_no_limit_header_raises(limit, remaining):
    found = rate_limits(limit_headers(b"requests", limit, remaining)).requests
    assert found is None or (found.limit >= 0 and found.remaining >= 0)
