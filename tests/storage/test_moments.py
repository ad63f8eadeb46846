"""Spans and moments as people write them."""

from datetime import UTC, datetime

import pytest

from headgate.storage.moments import moment_ns, span_s

NOW_NS = int(datetime(2026, 11, 24, 12, tzinfo=UTC).timestamp()) * 10**9


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("24h", 86_400), ("30d", 2_592_000), ("2w", 1_209_600), ("0s", 0)]
)
def test_a_span_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert span_s(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1.5h", "1 h", "1y", "1000000000d", "5300w", "٣d"])
def test_anything_else_is_no_span(text: str) -> None:
    with pytest.raises(ValueError, match="30d"):
        span_s(text)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("24h", datetime(2026, 11, 23, 12, tzinfo=UTC)),
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T08:30:00Z", datetime(2026, 11, 1, 8, 30, tzinfo=UTC)),
        ("2026-11-01T08:30:00+07:00", datetime(2026, 11, 1, 1, 30, tzinfo=UTC)),
        ("2026-11-01T08:30", datetime(2026, 11, 1, 8, 30, tzinfo=UTC)),
    ],
)
def test_a_moment_is_a_span_back_from_now_or_a_time_in_utc_unless_it_says_otherwise(
    text: str, moment: datetime
) -> None:
    assert moment_ns(text, now_ns=NOW_NS) == int(moment.timestamp()) * 10**9


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2026-13-01", "12:00", "9999-01-01", "1677-01-01", "0001-01-01T00:00:00+14:00"]
)
def test_anything_else_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match="2026-11-24"):
        moment_ns(text, now_ns=NOW_NS)
