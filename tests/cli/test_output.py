"""How numbers look in tables."""

import pytest

from headgate.cli.output import milliseconds, timestamp, usd


@pytest.mark.parametrize(
    ("nanousd", "text"),
    [
        (0, "$0.00"),
        (1_234_567_890_000, "$1,234.57"),
        (10_000_000, "$0.01"),
        (7_500_000, "$0.007500"),
        (1_000, "$0.000001"),
    ],
)
def test_a_sum_shows_cents_and_below_a_cent_as_much_as_there_is(nanousd: int, text: str) -> None:
    assert usd(nanousd) == text


def test_what_was_not_measured_is_a_dash() -> None:
    assert [milliseconds(value) for value in (None, 0, 840, 12_345)] == ["–", "0 ms", "840 ms", "12.3 s"]


def test_a_time_is_rfc_3339_in_utc() -> None:
    assert timestamp(1_764_000_000_125_000_000) == "2025-11-24T16:00:00.125Z"
