"""How numbers look in tables."""

import re

import pytest

from headgate.cli.output import count, milliseconds, print_table, timestamp, usd


@pytest.mark.parametrize(
    ("nanousd", "text"),
    [
        (0, "$0.00"),
        (1_234_567_890_000, "$1,234.57"),
        (10_000_000, "$0.01"),
        (7_500_000, "$0.007500"),
        (1_000, "$0.000001"),
        (-4_130_000, "-$0.004130"),
        (-12_340_000_000, "-$12.34"),
    ],
)
def test_a_sum_shows_cents_and_below_a_cent_as_much_as_there_is(nanousd: int, text: str) -> None:
    assert usd(nanousd) == text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_narrow_terminal_gets_parts_with_whole_words_and_the_first_column_in_each(monkeypatch, capsys, width) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    names = [f"number {at}>" for at in range(8)]
    row = [f"{at:,}" for at in range(1_234_567, 1_234_575)]
    print_table(("model", *names, "why"), [("claude-sonnet-4-6", *row, "a sentence that goes on and on. " * 3)])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert all(len(line) <= width for line in lines)
    said = "\n".join(lines)
    assert all(said.count(number) == 1 for number in row)
    assert said.count("claude-sonnet-4-6") == said.count("model") == {40: 5, 80: 3, 200: 1}[width]


def test_one_is_no_plural() -> None:
    assert [count(number, "file") for number in (0, 1, 1_200)] == ["0 files", "1 file", "1,200 files"]


def test_what_was_not_measured_is_a_dash() -> None:
    assert [milliseconds(value) for value in (None, 0, 840, 12_345)] == ["–", "0 ms", "840 ms", "12.3 s"]


def test_a_time_is_rfc_3339_in_utc() -> None:
    assert timestamp(1_764_000_000_125_000_000) == "2025-11-24T16:00:00.125Z"
