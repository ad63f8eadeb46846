"""Sums, spans and moments as people type them on the command line."""

import pytest
import typer

from headgate.cli.inputs import moment_ns, nanousd, span_ns


def test_a_span_or_moment_that_is_none_is_a_wrong_option() -> None:
    assert span_ns("30m") == 1800 * 10**9
    with pytest.raises(typer.BadParameter, match="30d"):
        span_ns("soon")
    with pytest.raises(typer.BadParameter, match="2026-11-24"):
        moment_ns("soon", now_ns=0)


@pytest.mark.parametrize(
    ("text", "nanodollars"), [("20", 20 * 10**9), ("$0.5", 5 * 10**8), ("0.1", 10**8), ("0.000000001", 1)]
)
def test_dollars_become_nanodollars_exactly(text: str, nanodollars: int) -> None:
    assert nanousd(text) == nanodollars


@pytest.mark.parametrize("text", ["", "much", "0", "-1", "nan", "inf", "0.0000000001", "1e5", "1_0", "1000000000"])
def test_anything_else_is_no_sum(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"0\.50"):
        nanousd(text)
