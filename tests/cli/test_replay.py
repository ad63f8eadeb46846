"""How shares are written on the command line; what `headgate replay` tells is in test_prices.py, over one ledger."""

from fractions import Fraction

import pytest
import typer

from headgate.cli.replay import share


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("30%", Fraction(3, 10)), ("0.3", Fraction(3, 10)), ("1", 1)])
def test_a_share_is_exact(text, value) -> None:
    assert share("--batch", text) == value


@pytest.mark.parametrize("text", ["", "x", "-1", "1.01", "101%", "1/0"])
def test_what_is_no_share_is_refused(text) -> None:
    with pytest.raises(typer.BadParameter, match="no share"):
        share("--batch", text)
